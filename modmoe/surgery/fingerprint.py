"""Knowing a checkpoint again without reading all of it.

A report on a model must not be used on another one. The same architecture trained once more has the same config and
the same shapes, so contents count as well: of every tensor its name, type and shape, all of it where it is small
(routers, norms, biases), and pieces from its beginning, middle and end where it is large. Reads 12 kB of a large one.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from modmoe.models.safetensors_stream import weight_files
from modmoe.surgery.model_directory import read_config

# Fields of config.json that say who wrote it and where it lay.
_INCIDENTAL = {"transformers_version", "_name_or_path"}
_WHOLE_BYTES = 1 << 20
_PIECE_BYTES = 4096

_MEANINGS = {
    "config": "the fields of config.json differ",
    "tensors": "names, types or shapes of the weights differ",
    "weights": "the weights have the same shapes but other values, as after more training",
}


def checkpoint_fingerprint(directory: Path) -> dict[str, str]:
    """
    Digests of a checkpoint directory; independent of its place and of how the weights are cut into files.

    Returns:
        "config", "tensors" and "weights" -> SHA-256 in hexadecimal.

    Raises:
        FileNotFoundError: no such directory, no config.json, no safetensors, or a shard is missing.
        ValueError: a damaged file.
    """
    fields = {name: value for name, value in read_config(directory).items() if name not in _INCIDENTAL}
    tensors, weights = hashlib.sha256(), hashlib.sha256()
    places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in weight_files(directory):
        start, header = _read_header(file)
        places |= {name: (file, start, entry) for name, entry in header.items()}
    for name, (file, start, entry) in sorted(places.items()):
        tensors.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        begin, end = entry["data_offsets"]
        with file.open("rb") as opened:
            for piece in _pieces(opened, start + begin, end - begin):
                weights.update(piece)
    return {
        "config": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest(),
        "tensors": tensors.hexdigest(),
        "weights": weights.hexdigest(),
    }


def checkpoint_identity(directory: Path) -> dict[str, Any]:
    """What a report keeps of the checkpoint it was made on: "path" and "fingerprint"."""
    return {"path": str(directory), "fingerprint": checkpoint_fingerprint(directory)}


def difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """What differs between two fingerprints, in words; None if nothing does."""
    return next((meaning for part, meaning in _MEANINGS.items() if expected.get(part) != found.get(part)), None)


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the entry of each tensor (the safetensors format)."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
        try:
            if 8 + length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            if any(8 + length + entry["data_offsets"][1] > size for entry in header.values()):
                raise ValueError("it is shorter than its header says")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged or truncated ({error}): copy or save the checkpoint again") from error
    return 8 + length, header


def _pieces(opened: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    if size <= _WHOLE_BYTES:
        spans = [(0, size)]
    else:
        spans = [(at, _PIECE_BYTES) for at in (0, (size - _PIECE_BYTES) // 2, size - _PIECE_BYTES)]
    for offset, length in spans:
        opened.seek(start + offset)
        yield opened.read(length)
