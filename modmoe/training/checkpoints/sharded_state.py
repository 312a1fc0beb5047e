"""Tensors that many processes save in pieces and that any number of processes reads back.

A tensor is a flat vector in memory order; a piece is an interval of it. Each process writes the pieces that it owns
into one safetensors file, an index says which file holds which interval, and a reader asks for intervals of its own:
how the tensors were cut when they were written no longer matters. Nothing here knows of models or training.
"""

import bisect
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modmoe.models.safetensors_stream import SafetensorsWriter, TensorSpec, open_safetensors, spec_of

INDEX = "index.json"
_FORMAT = 1
_PIECES, _VALUES = "pieces", "values"


class Piece(NamedTuple):
    """Elements of a tensor, from `start` on, in memory order."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    data: torch.Tensor
    """(n,), any dtype and device."""


class _Stored(NamedTuple):
    """Where an interval lies."""

    start: int
    stop: int
    file: str


def rank_file(rank: int) -> str:
    """Name of the file of one process."""
    return f"rank-{rank:05d}.safetensors"


def write_pieces(directory: Path, rank: int, pieces: Iterable[Piece], values: dict[str, Any]) -> None:
    """
    Write what one process owns. Each process calls this, and after all of them one calls `write_index`.

    Args:
        directory: an existing directory that all processes share.
        rank: of this process, from 0.
        pieces: at most one per tensor; empty ones are left out.
        values: what else belongs to the state, for JSON; processes that give the same key must agree on the value.

    Raises:
        OSError: where the disk cannot take it.
    """
    held = {piece.name: piece for piece in pieces if piece.data.numel()}
    intervals = {name: [piece.start, list(piece.shape)] for name, piece in held.items()}
    metadata = {_PIECES: json.dumps(intervals), _VALUES: json.dumps(values)}
    specs = {name: TensorSpec(piece.data.dtype, (piece.data.numel(),)) for name, piece in held.items()}
    with SafetensorsWriter(directory / rank_file(rank), specs, metadata) as writer:
        for name, piece in held.items():
            writer.write(name, piece.data)


def write_index(directory: Path, world_size: int) -> None:
    """
    Say which file holds what, once all processes have written theirs.

    Raises:
        FileNotFoundError: if the file of a process is not there.
        ValueError: if a file is damaged, or the pieces do not make up whole tensors.
        OSError: where the disk cannot take it.
    """
    tensors: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for rank in range(world_size):
        if not (directory / rank_file(rank)).is_file():
            raise FileNotFoundError(f"{rank_file(rank)} is missing: all processes must share {directory}")
        file = open_safetensors(directory / rank_file(rank))
        metadata = file.metadata()
        for key, value in json.loads(metadata[_VALUES]).items():
            if values.setdefault(key, value) != value:
                raise ValueError(f"{rank_file(rank)} says {value!r} of {key}, and another file {values[key]!r}")
        for name, (start, shape) in json.loads(metadata[_PIECES]).items():
            dtype, (size,) = spec_of(file, name)
            found = {"dtype": str(dtype).removeprefix("torch."), "shape": shape}
            entry = tensors.setdefault(name, {**found, "pieces": []})
            if entry | found != entry:
                raise ValueError(f"{rank_file(rank)} and another file differ in dtype or shape of {name}")
            entry["pieces"].append([start, start + size, rank_file(rank)])
    for name, entry in tensors.items():
        entry["pieces"].sort()
        _check_whole(name, math.prod(entry["shape"]), entry["pieces"])
    content = {"format": _FORMAT, "tensors": tensors, "values": values}
    temporary = directory / f".{INDEX}.tmp"
    with temporary.open("w") as out:
        json.dump(content, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, directory / INDEX)


def _check_whole(name: str, numel: int, pieces: list[list[Any]]) -> None:
    end = 0
    for start, stop, file in [*pieces, [numel, numel, "nothing"]]:
        if start != end:
            what = "held by no process" if start > end else "held by two processes"
            raise ValueError(f"elements {min(start, end)} to {max(start, end)} of {name} are {what} (before {file})")
        end = stop


class ShardedState:
    """
    Reads what `write_pieces` and `write_index` wrote; files are opened when something of theirs is asked for.

    Args:
        directory: with the index.

    Raises:
        FileNotFoundError: if there is no index.
        ValueError: if it is damaged or of another format.

    Attributes:
        specs: name -> dtype and whole shape of every tensor.
        values: what else was saved.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        path = directory / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        try:
            content = json.loads(path.read_text())
            tensors = content["tensors"]
            self.values: dict[str, Any] = content["values"]
            self.specs = {
                name: TensorSpec(getattr(torch, entry["dtype"]), tuple(entry["shape"]))
                for name, entry in tensors.items()
            }
            self._pieces = {name: [_Stored(*piece) for piece in entry["pieces"]] for name, entry in tensors.items()}
            version = content["format"]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged") from None
        if version != _FORMAT:
            raise ValueError(f"{path} has format {version}, this version reads {_FORMAT}")

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """
        Copy elements from `start` on into a tensor, casting them to its dtype.

        Args:
            name: of the tensor.
            start: of the first element.
            out: (n,) receives n elements; on any device.

        Raises:
            KeyError: if there is no such tensor.
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged or truncated.
        """
        stop = start + out.numel()
        assert 0 <= start <= stop <= self.specs[name].numel, (name, start, stop)
        for begin, data in self._overlapping(name, start, stop):
            out[begin - start : begin - start + data.numel()].copy_(data)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The whole tensor in parts, (n,) each, in memory order; raises as `read` does."""
        for _, data in self._overlapping(name, 0, self.specs[name].numel):
            yield data

    def _overlapping(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Where each part begins in the tensor, and its elements."""
        pieces = self._pieces[name]
        for piece in pieces[bisect.bisect_right(pieces, start, key=lambda piece: piece.stop) :]:
            if piece.start >= stop:
                break
            begin, end = max(start, piece.start), min(stop, piece.stop)
            stored = self._file(piece.file).get_slice(name)
            if stored.get_shape() != [piece.stop - piece.start]:
                raise ValueError(f"{self._directory / piece.file} is not the file that {INDEX} speaks of")
            yield begin, stored[begin - piece.start : end - piece.start]

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = open_safetensors(self._directory / name)
        return self._files[name]
