"""Whether a directory is the same for all ranks, keeps what is written, and replaces files atomically."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .report import Directory, Fault

PROBE_BYTES = 2**20
WRITE_BYTES = 2**24
# Network file systems may show a change late.
PATIENCE = 10.0


def check_directory(path: Path, token: str) -> Directory | None:
    """
    Test a directory. Called by all ranks; what is written there is removed.

    Args:
        path: the directory; it is made if it is missing.
        token: the same on all ranks, new for each check.

    Returns:
        the findings on rank 0, None elsewhere.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folder = path / f".launch_check-{token}"
    probe = _Probe(folder, rank, world_size)
    for step in (probe.create, probe.see, probe.replace_or_watch, probe.write, probe.read_neighbour):
        try:
            step()
        except OSError as error:
            probe.faults.append(Fault(rank, "write", f"{error.strerror or error}"))
        dist.barrier()
        # All go on or none: a rank without the directory could only repeat what is known.
        if any(gathered(bool(probe.faults))):
            break
    speeds, faults = gathered(probe.speed), gathered(probe.faults)
    if rank != 0:
        return None
    free = shutil.disk_usage(next(p for p in [folder, *folder.absolute().parents] if p.exists())).free
    shutil.rmtree(folder, ignore_errors=True)
    return Directory(str(path), free, min(speeds), tuple(fault for each in faults for fault in each))


class _Probe:
    """One rank's part in the test; each method is a step that all ranks take together."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.folder, self.file = folder, folder / "probe"
        self.faults: list[Fault] = []
        self.speed = 0.0

    def create(self) -> None:
        if self.rank == 0:
            self.folder.mkdir(parents=True)
            _write(self.file, _content(0, PROBE_BYTES))

    def see(self) -> None:
        if not any(content == _content(0, PROBE_BYTES) for content in _reading(self.file)):
            self.faults.append(Fault(self.rank, "unseen"))

    def replace_or_watch(self) -> None:
        new = _content(1, PROBE_BYTES)
        if self.rank == 0:
            time.sleep(0.1)  # so that the others are watching
            temporary = self.folder / "probe.tmp"
            _write(temporary, new)
            os.replace(temporary, self.file)
        for content in _reading(self.file):
            if content == new:
                return
            if content != _content(0, PROBE_BYTES):
                detail = "missing" if content is None else f"{len(content)} of {PROBE_BYTES} bytes"
                self.faults.append(Fault(self.rank, "torn", detail))
                return
        self.faults.append(Fault(self.rank, "stale"))

    def write(self) -> None:
        begun = time.perf_counter()
        _write(self._file_of(self.rank), _content(self.rank, WRITE_BYTES))
        self.speed = WRITE_BYTES / (time.perf_counter() - begun)

    def read_neighbour(self) -> None:
        neighbour = (self.rank + 1) % self.world_size
        if not any(content == _content(neighbour, WRITE_BYTES) for content in _reading(self._file_of(neighbour))):
            self.faults.append(Fault(self.rank, "lost", f"the file of rank {neighbour}"))

    def _file_of(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}"


def _content(seed: int, count: int) -> bytes:
    return bytes([seed % 251 + 1]) * count


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _reading(path: Path) -> Iterator[bytes | None]:
    """What the file holds, None if it is missing, again and again for as long as one may wait."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            content = path.read_bytes()
        except OSError:
            content = None
        yield content
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def gathered(value: Any) -> list[Any]:
    """The value of each rank, on all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
