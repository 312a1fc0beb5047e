"""From the state that many processes saved in pieces to the weight files of a plain Hugging Face directory."""

from collections.abc import Mapping
from pathlib import Path

import torch

from modmoe.models.safetensors_stream import TensorSpec, WeightsWriter
from modmoe.training.engine_state import WEIGHT
from modmoe.training.sharded_state import ShardedState


def saved_weights(state: ShardedState) -> dict[str, TensorSpec]:
    """Name -> dtype and shape of the weights and buffers, as they were saved in full precision."""
    prefix = f"{WEIGHT}/"
    return {name.removeprefix(prefix): spec for name, spec in state.specs.items() if name.startswith(prefix)}


def write_weights(state: ShardedState, directory: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """
    Write model.safetensors, or several files and their index; memory holds one piece at a time.

    Args:
        state: with the weights of a whole model.
        directory: an existing one.
        dtypes: name -> what to cast it to.

    Raises:
        FileNotFoundError, ValueError: if a file of the state is missing, damaged or truncated.
        OSError: where the disk cannot take it.
    """
    specs = {name: spec._replace(dtype=dtypes[name]) for name, spec in saved_weights(state).items()}
    with WeightsWriter(directory, specs) as writer:
        for name, spec in specs.items():
            for piece in state.pieces(f"{WEIGHT}/{name}"):
                writer.write(name, piece.to(spec.dtype))
