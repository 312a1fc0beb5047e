"""From state that many processes saved in pieces to a plain Hugging Face directory."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from modmoe.models.safetensors_stream import TensorSpec, WeightsWriter
from modmoe.surgery.model_directory import copy_tokenizer, new_directory, read_config
from modmoe.training.checkpoints.checkpoint import RETIRED, STATE, defect
from modmoe.training.checkpoints.engine_state import WEIGHT
from modmoe.training.checkpoints.sharded_state import ShardedState

# What a saved config says beyond the architecture.
_NOT_ARCHITECTURE = {"architectures", "dtype", "transformers_version", "use_cache", "_name_or_path"}
# A factor on a loss, which a schedule may move.
_NOT_ARCHITECTURE |= {"router_aux_loss_coef"}


def write_model(
    state: ShardedState, directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """
    Write what `from_pretrained` reads, in the dtypes that the model computes with.

    Args:
        state: with the weights.
        directory: an existing one.
        model: of which this process may hold a part.
        tokenizer: to go with it.

    Raises:
        OSError: where the disk cannot take it.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    _write_weights(state, directory, {name: tensor.dtype for name, tensor in tensors})
    write_all_but_weights(directory, model, tokenizer)


def write_all_but_weights(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the configs and the tokenizer of a model to an existing directory."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def consolidate(checkpoint: Path, target: Path, dtype: torch.dtype) -> str:
    """
    Make a plain Hugging Face directory of a checkpoint.

    Args:
        checkpoint: of a training run, complete.
        target: a new directory; it appears once it is complete.
        dtype: of its floating-point weights; they are kept in float32 while training.

    Returns:
        one sentence that says what was written.

    Raises:
        FileExistsError: if `target` exists.
        FileNotFoundError, ValueError: if the checkpoint is incomplete or damaged; names the file. Or if it holds
            adapters, or experts that are being pruned.
    """
    problem = defect(checkpoint)
    if problem is not None:
        raise ValueError(f"{checkpoint} is not a complete checkpoint: {problem}")
    state = ShardedState(checkpoint / STATE)
    specs = _saved_weights(state)
    if any(".lora_A." in name for name in specs):
        raise ValueError(f"{checkpoint} holds adapters: merge {checkpoint / 'adapter'} into their model with PEFT")
    if any(state.values.get(RETIRED, {}).values()):
        raise ValueError(f"{checkpoint} holds experts that are on their way out: let the run end, and take its final/")
    with new_directory(target, checkpoint) as written:
        floats = {name: dtype if spec.dtype.is_floating_point else spec.dtype for name, spec in specs.items()}
        _write_weights(state, written, floats)
        copy_tokenizer(checkpoint, written)
        _write_config(checkpoint, written, dtype)
    elements = sum(spec.numel for spec in specs.values())
    return f"{target}: {len(specs)} tensors, {elements / 1e6:.1f} M numbers, {str(dtype).removeprefix('torch.')}"


def check_same_architecture(checkpoint: Path, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: if a checkpoint's config is of another model; names the first field that differs.
    """
    there, here = type(config).from_pretrained(checkpoint).to_dict(), config.to_dict()
    for name in sorted((there.keys() | here.keys()) - _NOT_ARCHITECTURE):
        if there.get(name) != here.get(name):
            raise ValueError(f"its model has {name}={there.get(name)!r}, this run's {here.get(name)!r}")


def _write_weights(state: ShardedState, directory: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Memory holds one piece at a time."""
    specs = {name: spec._replace(dtype=dtypes[name]) for name, spec in _saved_weights(state).items()}
    with WeightsWriter(directory, specs) as writer:
        for name, spec in specs.items():
            for piece in state.pieces(f"{WEIGHT}/{name}"):
                writer.write(name, piece.to(spec.dtype))


def _saved_weights(state: ShardedState) -> dict[str, TensorSpec]:
    prefix = f"{WEIGHT}/"
    return {name.removeprefix(prefix): spec for name, spec in state.specs.items() if name.startswith(prefix)}


def _write_config(checkpoint: Path, directory: Path, dtype: torch.dtype) -> None:
    content = read_config(checkpoint) | {"dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
