"""Teacher signals on disk: computed once, read by example in any order.

Per token of a top-k cache: 8 k + 4 bytes of logits (fp32 and int32), and the width times its element size for each
boundary. One file per batch as it was written; `cache.json` names the complete ones, so that writing goes on after an
interruption with the examples that are not in one.
"""

import bisect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modmoe.distill.frame import Batch
from modmoe.distill.signals import TeacherSignals
from modmoe.models.safetensors_stream import open_safetensors

MANIFEST = "cache.json"


class SignalCache:
    """
    A directory of teacher signals, opened for reading and for writing on.

    Args:
        directory: made if need be.
        identity: what the signals depend on, as JSON knows it: fingerprints of the teacher and of the data, top k,
            temperature, boundaries. A cache that was written for another one is refused.
        max_bytes: size that it may grow to.

    Raises:
        ValueError: for a cache of another identity, or a damaged one.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        directory.mkdir(parents=True, exist_ok=True)
        self._identity = json.loads(json.dumps(dict(identity)))
        # Where each batch ends, counted in examples.
        self._ends = self._read_manifest()
        self._bytes = sum(self._path(number).stat().st_size for number in range(len(self._ends)))
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        """Examples that are complete."""
        return self._ends[-1] if self._ends else 0

    def append(self, signals: TeacherSignals) -> None:
        """
        Write the signals of the next batch.

        Raises:
            ValueError: if the cache would become larger than it may.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in signals.tensors().items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        rows = len(next(iter(tensors.values())))
        if self._bytes + size > self.max_bytes:
            raise ValueError(
                f"the cache in {self.directory} holds {len(self)} examples in {self._bytes:,} bytes; {rows} more need "
                f"{size:,}, and max_bytes={self.max_bytes:,}: raise it, lower top_k, keep fewer boundaries, or take "
                "the teacher's signals online"
            )
        path = self._path(len(self._ends))
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        os.replace(temporary, path)
        self._ends.append(len(self) + rows)
        self._bytes += path.stat().st_size
        self._write_manifest()

    def fill(self, batches: Iterable[Batch], signals_of: Callable[[Batch], TeacherSignals]) -> None:
        """
        Write the signals of all examples that are not there yet.

        Args:
            batches: those that follow the first `len(self)` examples, which may have been written in other batches.
            signals_of: asks the teacher.
        """
        for batch in batches:
            with torch.no_grad():
                self.append(signals_of(batch))

    def read(self, examples: Sequence[int]) -> TeacherSignals:
        """
        The signals of some examples, numbered as they were written.

        Raises:
            IndexError: for an example that is not there.
            ValueError: if their lengths differ, or a file is damaged.
        """
        rows = [self._row(example) for example in examples]
        lengths = sorted({len(next(iter(row.values()))) for row in rows})
        if len(lengths) != 1:
            raise ValueError(f"examples of one batch must have one length, got {lengths}: cache packed blocks")
        return TeacherSignals.of({name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def _row(self, example: int) -> dict[str, torch.Tensor]:
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} is not in the cache of {len(self)} examples: write on with `fill`")
        number = bisect.bisect_right(self._ends, example)
        row = example - (self._ends[number - 1] if number else 0)
        if number not in self._open:
            self._open[number] = open_safetensors(self._path(number))
        file = self._open[number]
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118

    def _path(self, number: int) -> Path:
        return self.directory / f"signals_{number:06d}.safetensors"

    def _read_manifest(self) -> list[int]:
        path = self.directory / MANIFEST
        if not path.is_file():
            return []
        try:
            content = json.loads(path.read_text())
            identity, ends = content["identity"], [int(n) for n in content["ends"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): remove the cache and write it again") from None
        names = sorted(set(identity) | set(self._identity))
        differing = [name for name in names if identity.get(name) != self._identity.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"the cache in {self.directory} was written for {name}={identity.get(name)!r}, not "
                f"{self._identity.get(name)!r}: use another directory, or remove it"
            )
        missing = [number for number in range(len(ends)) if not self._path(number).is_file()]
        if missing:
            raise ValueError(f"{self._path(missing[0])} is missing: remove the cache and write it again")
        return ends

    def _write_manifest(self) -> None:
        path = self.directory / MANIFEST
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"identity": self._identity, "ends": self._ends}))
        os.replace(temporary, path)
