"""Safetensors that are larger than memory: written piece by piece, read tensor by tensor.

A safetensors file begins with a header that says where each tensor lies, so that names, dtypes and shapes must be
known before the first byte of data; after that, pieces may come in any order of tensors. Format:
https://github.com/huggingface/safetensors#format
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
# Weights are used where the file is mapped, and a matrix times a vector can differ in the last bit with the address.
_ALIGNMENT = 64

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class TensorSpec(NamedTuple):
    """What is known of a tensor before its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """The spec of an existing tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class SafetensorsWriter:
    """
    One safetensors file whose tensors arrive in pieces; memory holds one piece at a time.

    A context manager. The file has its name only once it is complete and on the disk; when the block fails, nothing
    is left of it.

    Args:
        path: of the file; one that exists is replaced.
        specs: name -> dtype and shape of every tensor that will come.
        metadata: strings for the header; transformers wants the format "pt" that is there by default.

    Raises:
        OSError: where the disk cannot take it.
        ValueError: for a dtype that the format does not know.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._specs = dict(specs)
        self._temporary = path.with_name(f".{path.name}.tmp")
        header, offsets = _header(self._specs, {"format": "pt"} if metadata is None else dict(metadata))
        self._next = {name: len(header) + start for name, start in offsets.items()}
        self._end = {name: self._next[name] + spec.nbytes for name, spec in self._specs.items()}
        self._file = self._temporary.open("wb")
        self._file.write(header)

    def write(self, name: str, piece: torch.Tensor) -> None:
        """
        Append elements to a tensor.

        Args:
            name: of the tensor; the pieces of different tensors may alternate.
            piece: (...) the next elements in memory order, of the tensor's dtype, on any device.

        Raises:
            KeyError: if the file was not to have such a tensor.
            ValueError: for another dtype, or more elements than the tensor has.
        """
        spec = self._specs[name]
        if piece.dtype != spec.dtype:
            raise ValueError(f"{name} was announced as {spec.dtype}, got a piece in {piece.dtype}")
        size = piece.numel() * piece.element_size()
        if self._next[name] + size > self._end[name]:
            raise ValueError(f"{name} has {spec.numel} elements of shape {spec.shape}, got more")
        self._file.seek(self._next[name])
        self._file.write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._next[name] += size

    def close(self) -> None:
        """
        Put the file in its place.

        Raises:
            ValueError: if a tensor lacks elements.
        """
        for name, position in self._next.items():
            if position != self._end[name]:
                missing = (self._end[name] - position) // self._specs[name].dtype.itemsize
                raise ValueError(f"{name} lacks {missing} of its {self._specs[name].numel} elements")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Give up: remove what has been written."""
        self._temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk, told a second time
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()


class WeightsWriter:
    """
    The weight files of a plain Hugging Face directory, written in pieces: one file, or several and their index.

    A context manager, as `SafetensorsWriter` is. Use a new directory: files that are there already are not removed.

    Args:
        directory: an existing directory.
        specs: name -> dtype and shape of every tensor that will come; files take them in the order of their names.
        max_shard_bytes: of tensors in one file; a larger tensor has a file to itself.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._directory = directory
        self._specs = dict(sorted(specs.items()))
        shards = _shards(self._specs, max_shard_bytes)
        self._shard_of = {name: number for number, shard in enumerate(shards) for name in shard}
        self._writers: list[SafetensorsWriter] = []
        try:
            for number, shard in enumerate(shards, 1):
                path = directory / (WEIGHTS if len(shards) == 1 else _shard_name(number, len(shards)))
                self._writers.append(SafetensorsWriter(path, shard))
        except BaseException:
            self._discard()
            raise

    def write(self, name: str, piece: torch.Tensor) -> None:
        """Append elements to a tensor, as `SafetensorsWriter.write` does."""
        self._writers[self._shard_of[name]].write(name, piece)

    def close(self) -> None:
        """Complete all files, the index last."""
        for writer in self._writers:
            writer.close()
        if len(self._writers) > 1:
            total = {"total_size": sum(spec.nbytes for spec in self._specs.values())}
            weight_map = {name: self._writers[number].path.name for name, number in self._shard_of.items()}
            _write_json(self._directory / WEIGHTS_INDEX, {"metadata": total, "weight_map": weight_map})

    def _discard(self) -> None:
        for writer in self._writers:
            writer.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._discard()


class SavedWeights(Mapping[str, torch.Tensor]):
    """
    The tensors of a plain Hugging Face directory; each is read when it is asked for, and not kept.

    Args:
        directory: with model.safetensors, or several files and their index.

    Raises:
        FileNotFoundError: if there are no weights, or one of the files is missing.
        ValueError: if a file is damaged or truncated.
    """

    def __init__(self, directory: Path) -> None:
        self._files = {path: open_safetensors(path) for path in weight_files(directory)}
        self._file_of = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """(stop - start, ...): rows of a tensor, read alone."""
        return self._file_of[name].get_slice(name)[start:stop]

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, without reading it."""
        return spec_of(self._file_of[name], name)


def weight_files(directory: Path) -> list[Path]:
    """
    The weight files of a plain Hugging Face directory.

    Raises:
        FileNotFoundError: if there are none, or the index names one that is missing.
        ValueError: if the index is damaged.
    """
    index = directory / WEIGHTS_INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{index} is damaged: it names no weight files") from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{directory / missing[0]} is missing ({len(missing)} of {len(names)} files that the index names): "
                "copy or save the checkpoint again"
            )
        return [directory / name for name in names]
    if not (directory / WEIGHTS).is_file():
        pickles = pickled_files(directory)
        found = f", only pickled weights ({pickles[0]}), which can run code when read" if pickles else ""
        raise FileNotFoundError(
            f"{directory} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{found}: save the model as safetensors"
        )
    return [directory / WEIGHTS]


def pickled_files(directory: Path) -> list[str]:
    """Names of files that torch.save may have written."""
    return sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))


def open_safetensors(path: Path) -> Any:
    """
    Open a file for reading tensors, and slices of them, one at a time.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged or truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy or save the checkpoint again")
    try:
        # The handle maps the file and closes with its last reference.
        return safe_open(path, framework="pt").__enter__()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): copy or save the checkpoint again") from None


def spec_of(file: Any, name: str) -> TensorSpec:
    """Dtype and shape of a tensor in a file of `open_safetensors`."""
    found = file.get_slice(name)
    return TensorSpec(_DTYPES[found.get_dtype()], tuple(found.get_shape()))


def _header(specs: dict[str, TensorSpec], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the data each tensor begins."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    offsets, end = {}, 0
    # Tensors that fill whole units first, which keeps them aligned; then wide elements before narrow ones, so that all
    # lie at multiples of their size. The rest goes by name, so that the same tensors are the same file.
    for name in sorted(specs, key=lambda n: (specs[n].nbytes % _ALIGNMENT != 0, -specs[n].dtype.itemsize, n)):
        spec = specs[name]
        if spec.dtype not in _CODES:
            raise ValueError(f"{name}: safetensors cannot hold {spec.dtype}, only {', '.join(map(str, _CODES))}")
        offsets[name], end = end, end + spec.nbytes
        entries[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets


def _shards(specs: dict[str, TensorSpec], max_bytes: int) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
