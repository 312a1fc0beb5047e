"""Packs: one extension of a model as a small directory, which applies to the model it was made for and lifts off it.

A pack holds the tensors of the extension under the names that they have in the model, what the extension is, and which
model is its *base*: the model without any extension.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from transformers import PreTrainedConfig

from modmoe.models import ModMoEConfig
from modmoe.models.extension import Extension
from modmoe.models.safetensors_stream import SafetensorsWriter, TensorSpec, open_safetensors, spec_of
from modmoe.surgery.extend import extension_specs, on_meta, with_extension
from modmoe.surgery.model_directory import (
    ModelDirectory,
    check_new,
    native_config,
    new_directory,
    read_json,
    write_model,
)

PACK_FILE = "pack.json"
WEIGHTS_FILE = "extension.safetensors"
_FORMAT = 1

# Fields of a config that do not change what a model computes from its inputs.
_OF_TRAINING = {
    "extensions",
    "attention_dropout",
    "sample_topk",
    "selection_bias_update_rate",
    "router_aux_loss_type",
    "router_aux_loss_coef",
    "router_aux_loss_reduction",
    "router_z_loss_weight",
    "aux_scope",
    "initializer_range",
    "use_cache",
    "output_router_logits",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}


class Base(NamedTuple):
    """Which model a pack belongs to."""

    config: dict[str, Any]
    """The fields that say what the model computes."""
    weights: str
    """SHA-256 over names, dtypes, shapes and all elements of the weights."""

    @classmethod
    def of(cls, model: ModelDirectory) -> Self:
        """Of a model without its extensions. Reads all of its weights, one at a time."""
        digest = hashlib.sha256()
        for name in sorted(model.base_names()):
            spec = model.specs[name]
            digest.update(json.dumps([name, str(spec.dtype), list(spec.shape)]).encode())
            if spec.numel:
                elements = model.weights[name].contiguous().reshape(-1).view(torch.uint8)
                digest.update(elements.numpy().data)
        return cls(_architecture(model.config), digest.hexdigest())

    @property
    def fingerprint(self) -> str:
        """Short form: of the config and of the weights."""
        config = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        return f"{config[:8]}-{self.weights[:12]}"

    def difference(self, other: Self) -> str | None:
        """How `other` differs, in words; None if it does not."""
        fields = [name for name in {**self.config, **other.config} if self.config.get(name) != other.config.get(name)]
        if fields:
            name = fields[0]
            rest = f" and {len(fields) - 1} more" if len(fields) > 1 else ""
            return f"{name} is {self.config.get(name)!r} there and {other.config.get(name)!r} here{rest}"
        if self.weights != other.weights:
            return "the configs agree, the weights differ, as after more training or in another dtype"
        return None


def _architecture(config: ModMoEConfig) -> dict[str, Any]:
    declared = {field.name for field in dataclasses.fields(ModMoEConfig)}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {name: getattr(config, name) for name in sorted(declared - inherited - _OF_TRAINING)}


@dataclasses.dataclass(frozen=True)
class Pack:
    """
    A pack on the disk.

    Attributes:
        path: where it is.
        extension: what it adds.
        base: which model it belongs to.
        beside: extensions that the model had when the pack was made, and that may have been there in training.
    """

    path: Path
    extension: Extension
    base: Base
    beside: list[str]

    @classmethod
    def load(cls, path: Path) -> Self:
        """
        Raises:
            FileNotFoundError: if there is no pack.
            ValueError: if it is damaged, or of a format that this version does not know.
        """
        fields = read_json(path / PACK_FILE, "give the directory of a pack")
        if fields.get("format") != _FORMAT:
            raise ValueError(f"{path} has format {fields.get('format')!r}, known is {_FORMAT}: use a newer ModMoE")
        try:
            # Through a config, so that fields which are younger than the pack have their defaults.
            base = Base(_architecture(native_config(fields["base"]["config"])), fields["base"]["weights"])
            return cls(path, Extension.of(fields["extension"]), base, list(fields["beside"]))
        except (LookupError, TypeError) as error:
            raise ValueError(f"{path / PACK_FILE} is damaged ({error!r}): copy the pack again") from None

    def check_base(self, model: ModelDirectory, base: Base) -> None:
        """
        Raises:
            ValueError: if the pack is for another base than `base`, that of `model`.
        """
        difference = self.base.difference(base)
        if difference is not None:
            raise ValueError(
                f"pack {self.extension.name!r} is for base {self.base.fingerprint}, and {model.path} is base "
                f"{base.fingerprint} ({difference}): apply it to the model it was made for"
            )

    def open(self, expected: dict[str, TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Names and values of the tensors.

        Args:
            expected: what the model wants.

        Raises:
            FileNotFoundError: if the weights are missing.
            ValueError: if they are damaged or not those of the extension.
        """
        file = open_safetensors(self.path / WEIGHTS_FILE)
        found = {name: spec_of(file, name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if wrong:
            raise ValueError(
                f"the weights in {self.path} are not those of extension {self.extension.name!r}: {wrong[0]} is "
                f"{found.get(wrong[0])}, wanted is {expected.get(wrong[0])}; copy the pack again"
            )
        return ((name, file.get_tensor(name)) for name in found)


def create_pack(directory: Path, name: str, out: Path) -> Pack:
    """
    Write one extension of a model as a pack.

    Args:
        directory: a native model with the extension; not modified.
        name: of the extension.
        out: a new directory, which appears once it is complete.

    Raises:
        FileNotFoundError: no native model in `directory`.
        FileExistsError: if `out` exists.
        ValueError: if the model has no such extension.
    """
    model = ModelDirectory(directory)
    extension = model.extension(name)
    specs = {tensor: spec for tensor, spec in model.specs.items() if extension.owns(tensor)}
    with new_directory(out, directory) as written:  # refuses before the base is read
        beside = [other.name for other in model.config.extension_list() if other.name != name]
        pack = Pack(out, extension, Base.of(model), beside)
        with SafetensorsWriter(written / WEIGHTS_FILE, specs) as writer:
            for tensor in specs:
                writer.write(tensor, model.weights[tensor])
        content = {
            "format": _FORMAT,
            "extension": dataclasses.asdict(extension),
            "base": pack.base._asdict(),
            "fingerprint": pack.base.fingerprint,
            "beside": beside,
        }
        (written / PACK_FILE).write_text(json.dumps(content, indent=2) + "\n")
        (written / "README.md").write_text(_card(pack, specs))
    return pack


def apply_packs(directory: Path, packs: Sequence[Path], out: Path) -> list[Pack]:
    """
    Write a model with the extensions of some packs, in their order, after those it has.

    Args:
        directory: the base of the packs, perhaps with other extensions; not modified.
        packs: directories of packs.
        out: a new directory, which appears once it is complete.

    Raises:
        FileNotFoundError: no native model in `directory`, or no pack.
        FileExistsError: if `out` exists.
        ValueError: a pack for another base or under a name that is taken.
    """
    model = ModelDirectory(directory)
    loaded = [Pack.load(path) for path in packs]
    fields = model.fields
    for pack in loaded:
        fields = with_extension(model, pack.extension, fields)
    check_new(out, directory, *packs)
    base = Base.of(model)
    for pack in loaded:
        pack.check_base(model, base)
    skeleton = on_meta(native_config(fields))
    specs, sources = dict(model.specs), [iter(model.weights.items())]
    for pack in loaded:
        added = extension_specs(model, skeleton, pack.extension)
        specs |= added
        sources.append(pack.open(added))
    write_model(model, out, fields, specs, itertools.chain(*sources))
    return loaded


def remove_extension(directory: Path, name: str, out: Path) -> None:
    """
    Write a model without one of its extensions.

    Args:
        directory: a native model; not modified.
        name: of the extension.
        out: a new directory, which appears once it is complete.

    Raises:
        FileNotFoundError: no native model in `directory`.
        FileExistsError: if `out` exists.
        ValueError: if the model has no such extension.
    """
    model = ModelDirectory(directory)
    extension = model.extension(name)
    specs = {tensor: spec for tensor, spec in model.specs.items() if not extension.owns(tensor)}
    pieces = ((tensor, model.weights[tensor]) for tensor in specs)
    write_model(model, out, _fields_without(model, name), specs, pieces)


def merge_common(directory: Path, name: str, out: Path) -> None:
    """
    Write a model in which the experts of a "common" extension are ordinary ones, after the old ones.

    The function stays the same up to rounding. The extension cannot be told apart afterwards: it has no pack and is
    not removed.

    Args:
        directory: a native model; not modified.
        name: of the extension; the first of the common ones.
        out: a new directory, which appears once it is complete.

    Raises:
        FileNotFoundError: no native model in `directory`.
        FileExistsError: if `out` exists.
        ValueError: if the model has no such extension, or it is none that can be merged.
    """
    model = ModelDirectory(directory)
    extension = model.extension(name)
    if extension.mode != "common":
        raise ValueError(
            f"extension {name!r} has a router of its own (mode='group'), which cannot be merged: leave it what it is"
        )
    first = next(other.name for other in model.config.extension_list() if other.mode == "common")
    if first != name:
        raise ValueError(f"extension {name!r} comes after {first!r}: merge {first!r} first")
    fields = _fields_without(model, name)
    for field, added in (("num_experts", extension.num_experts), ("num_attn_experts", extension.num_attn_experts)):
        counts = getattr(model.config, field)
        fields[field] = [count + added for count in counts] if isinstance(counts, list) else counts + added
    fields.pop("num_local_experts", None)  # another name of num_experts, which is set
    joined = {tensor.replace(f".extensions.{name}.", "."): tensor for tensor in model.specs if extension.owns(tensor)}
    specs = {tensor: spec for tensor, spec in model.specs.items() if not extension.owns(tensor)}
    numbered = {}
    for old, new in joined.items():
        rows, added = specs[old].shape[0], model.specs[new].shape[0]
        specs[old] = TensorSpec(specs[old].dtype, (rows + added, *specs[old].shape[1:]))
        own_rows = old.removesuffix("weight") + "expert_rows"
        if own_rows in specs:  # some experts were pruned, and the new ones come after the rows that they left
            numbered[own_rows] = torch.arange(rows, rows + added)
            specs[own_rows] = TensorSpec(specs[own_rows].dtype, (specs[own_rows].shape[0] + added,))

    def pieces() -> Iterable[tuple[str, torch.Tensor]]:
        for tensor in specs:
            yield tensor, model.weights[tensor]
            if tensor in joined:
                yield tensor, model.weights[joined[tensor]]
            elif tensor in numbered:
                yield tensor, numbered[tensor]

    write_model(model, out, fields, specs, pieces())


def _fields_without(model: ModelDirectory, name: str) -> dict[str, Any]:
    return model.fields | {"extensions": [fields for fields in model.config.extensions if fields["name"] != name]}


def _card(pack: Pack, specs: dict[str, TensorSpec]) -> str:
    """README.md of a pack: a model card as the hub reads it."""
    extension = pack.extension
    size = sum(spec.nbytes for spec in specs.values())
    count = sum(spec.numel for spec in specs.values())
    beside = ", ".join(pack.beside)
    trained = f" The model had these extensions too when the pack was made: {beside}." if beside else ""
    router = (
        "a router of their own with a null choice: a token may use none of them"
        if extension.mode == "group"
        else "rows in the routers of the base, whose old gates they make smaller"
    )
    return f"""---
library_name: modmoe
tags:
- mixture-of-experts
- modmoe-pack
---

# Extension pack `{extension.name}`

{extension.num_experts} FFN experts and {extension.num_attn_experts} attention experts for each layer of a ModMoE
model, with {router}. {count:,} parameters, {size:,} bytes.

Base: `{pack.base.fingerprint}`, a model with hidden size {pack.base.config["hidden_size"]} and
{pack.base.config["num_hidden_layers"]} layers; the pack is refused for any other.{trained}

```bash
python tools/pack.py apply --model BASE --pack PACK --out DIR
```

## Data, evaluation, license

To be filled in by who trained it.
"""
