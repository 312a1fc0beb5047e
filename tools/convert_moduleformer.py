#!/usr/bin/env python
"""Convert an IBM ModuleFormer (MoLM) checkpoint into a native ModMoE directory, offline.

    python tools/convert_moduleformer.py IN OUT

IN holds config.json and safetensors, or old pickled .bin weights (read with `weights_only=True`, which runs no code).
Every tensor of IN must find its place, every tensor of the model must be filled, and the written directory must give
the same logits; OUT appears only when all of that held.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import command
import torch
from safetensors.torch import save_file

import modmoe  # noqa: F401  (registers the model types)
from modmoe import ModMoEForCausalLM
from modmoe.models.moduleformer import ModuleFormerConfig, ModuleFormerForCausalLM
from modmoe.surgery.model_directory import copy_tokenizer, new_directory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    return command.run(lambda: convert(arguments.source, arguments.target))


def convert(source: Path, target: Path) -> str:
    """
    Write the native form of `source` to `target`.

    Returns:
        one sentence that says what was converted.

    Raises:
        ValueError: not a ModuleFormer checkpoint, damaged, incomplete, or with tensors that have no place.
        FileExistsError: `target` is in use.
    """
    check_source(source)
    with new_directory(target, source) as written, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = with_safetensors(source, Path(scratch) / "source")
        model = ModuleFormerForCausalLM.from_pretrained(folder, dtype="auto")
        copy_tokenizer(source, written)
        model.save_pretrained(written)
        check_same(model, ModMoEForCausalLM.from_pretrained(written, dtype="auto"))
    parameters = sum(p.numel() for p in model.parameters())
    return f"{target}: {len(model.state_dict())} tensors, {parameters / 1e6:.1f} M parameters, {model.dtype}"


def check_source(source: Path) -> None:
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json: give the directory of a ModuleFormer checkpoint")
    model_type = json.loads((source / "config.json").read_text()).get("model_type")
    if model_type != ModuleFormerConfig.model_type:
        raise ValueError(f"{source} has model_type {model_type!r}; this tool converts 'moduleformer'")


def with_safetensors(source: Path, scratch: Path) -> Path:
    """`source` itself, or a copy of it whose pickled weights are safetensors."""
    if any(source.glob("model*.safetensors")):
        return source
    pickles = sorted(source.glob("pytorch_model*.bin"))
    if not pickles:
        raise FileNotFoundError(f"{source} holds neither model*.safetensors nor pytorch_model*.bin")
    scratch.mkdir()
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy2(file, scratch / file.name)
    shard_of: dict[str, str] = {}
    for i, pickle in enumerate(pickles, 1):
        name = f"model-{i:05d}-of-{len(pickles):05d}.safetensors" if len(pickles) > 1 else "model.safetensors"
        try:
            state = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types for a bad file
            raise ValueError(f"{pickle} cannot be read as plain tensors: {str(error).splitlines()[0]}") from error
        save_file({k: v.contiguous().clone() for k, v in state.items()}, scratch / name)
        shard_of |= dict.fromkeys(state, name)
    if len(pickles) > 1:
        index = {"metadata": {}, "weight_map": shard_of}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index))
    return scratch


@torch.no_grad()
def check_same(model: ModMoEForCausalLM, reloaded: ModMoEForCausalLM) -> None:
    ids = torch.arange(16)[None] % model.config.vocab_size
    if not torch.equal(model(ids).logits, reloaded(ids).logits):
        raise ValueError("the written checkpoint gives other logits than the one read: the disk may be failing")


if __name__ == "__main__":
    sys.exit(main())
