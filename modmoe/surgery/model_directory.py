"""Native models on the disk: read tensor by tensor, and written beside the one they were made from."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from modmoe.models import ModMoEConfig
from modmoe.models.extension import Extension
from modmoe.models.safetensors_stream import SavedWeights, TensorSpec, WeightsWriter

_CONFIG = "config.json"
# Weights in any form, and the state of a training run.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


class ModelDirectory:
    """
    A saved native model. Nothing large is read.

    Attributes:
        path: where it is.
        fields: of config.json.
        config: what they say.
        weights: the tensors, each read when it is asked for.
        specs: what is known of them without reading.

    Raises:
        FileNotFoundError: no such directory, no config.json, no safetensors, or one of several missing.
        ValueError: a damaged file, or a model of another type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields = read_config(path)
        kind = self.fields.get("model_type")
        if kind != ModMoEConfig.model_type:
            remedy = "convert it with tools/convert_moduleformer.py" if kind == "moduleformer" else "upcycle it"
            raise ValueError(f"{path} has model_type {kind!r}, not {ModMoEConfig.model_type!r}: {remedy} first")
        self.config = native_config(self.fields)
        self.weights = SavedWeights(path)
        self.specs = {name: self.weights.spec(name) for name in self.weights}

    @property
    def prefix(self) -> str:
        """What stands before "layers" in the names of tensors; depends on the class that saved them."""
        return "model." if any(name.startswith("model.") for name in self.weights) else ""

    def extension(self, name: str) -> Extension:
        """
        Raises:
            ValueError: if the model has no such extension.
        """
        extensions = {extension.name: extension for extension in self.config.extension_list()}
        if name not in extensions:
            raise ValueError(f"{self.path} has no extension {name!r}: it has {', '.join(extensions) or 'none'}")
        return extensions[name]

    def base_names(self) -> list[str]:
        """Names of the tensors that belong to no extension."""
        extensions = self.config.extension_list()
        return [name for name in self.weights if not any(extension.owns(name) for extension in extensions)]


def native_config(fields: Mapping[str, Any]) -> ModMoEConfig:
    """
    Raises:
        ValueError: fields that are unknown or contradict each other, in one sentence.
    """
    with plain_errors():
        return ModMoEConfig.from_dict(dict(fields))


@contextmanager
def plain_errors() -> Iterator[None]:
    """Strict configs wrap what is wrong with a field into errors of their own; here it is a ValueError."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def read_config(directory: Path) -> dict[str, Any]:
    """
    The fields of config.json.

    Raises:
        FileNotFoundError: no such directory, or no config.json.
        ValueError: if it holds no object.
    """
    return read_json(directory / _CONFIG, "give the directory of a saved model")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError: if there is no such file; `remedy` says what to give.
        ValueError: if it holds no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: {remedy}")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or save it again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no object of fields: copy or save it again")
    return fields


def check_new(out: Path, *sources: Path) -> None:
    """
    Args:
        out: a directory that is to be made.
        sources: directories that are read, and stay as they are.

    Raises:
        FileExistsError: if `out` exists and is no empty directory.
        ValueError: as `check_place`.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists: name a new directory")
    check_place(out, *sources)


def check_place(out: Path, *sources: Path) -> None:
    """
    Raises:
        ValueError: if `out` lies below a file, or in one of `sources`, which stay as they are.
    """
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"the output directory {out} lies in {source}, which is not modified: name one elsewhere")
    file = next((parent for parent in out.parents if parent.is_file()), None)
    if file is not None:
        raise ValueError(f"the output directory {out} cannot be made, since {file} is a file: name one elsewhere")


@contextmanager
def new_directory(out: Path, *sources: Path) -> Iterator[Path]:
    """
    A directory to write to, which becomes `out` once the block has ended well; else nothing is left.

    Raises:
        FileExistsError, ValueError: as `check_new`.
    """
    check_new(out, *sources)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        written = Path(scratch) / "written"
        written.mkdir()
        yield written
        os.replace(written, out)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and the generation config from one directory to another."""
    for pattern in (*_TOKENIZER, "generation_config.json"):
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def copy_all_but_weights(source: Path, target: Path) -> None:
    """Copy the files that may stay what they are in another version of a model: tokenizer, configs, README."""
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, target / file.name)


def write_model(
    source: ModelDirectory,
    out: Path,
    fields: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    pieces: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """
    Write a model with the tokenizer and the other small files of `source`.

    Args:
        source: not modified.
        out: a new directory, which appears once it is complete.
        fields: of config.json.
        specs: name -> dtype and shape of every tensor.
        pieces: names and elements, those of a tensor in memory order.

    Raises:
        FileExistsError, ValueError: see `check_new`.
        OSError: where the disk cannot take it.
    """
    with new_directory(out, source.path) as written:
        copy_all_but_weights(source.path, written)
        # As transformers writes it, so that an unchanged config is the same file.
        (written / _CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        with WeightsWriter(written, specs) as writer:
            for name, piece in pieces:
                writer.write(name, piece)
