"""Seconds and memory of one call. Results live until the clock has stopped, so that freeing them is not timed."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

_MIB = 2**20


class Stopwatch(Protocol):
    """For the calls of one device."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """Time of `call`."""

    def peak_growth(self, call: Callable[[], Any]) -> float | None:
        """MiB by which the peak of memory during `call` exceeds what is in use before it; None where unknown."""


class CPUStopwatch:
    """Wall time, and resident memory as Linux counts it."""

    def seconds(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        result = call()
        end = time.perf_counter()
        del result
        return end - start

    def peak_growth(self, call: Callable[[], Any]) -> float | None:
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            before = _resident_kib("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
            call()
            return (_resident_kib("VmHWM") - before) / 1024
        except OSError:  # not Linux with glibc, or a container that hides /proc
            return None


def resident_mib() -> float:
    """Resident memory of this process, without what glibc keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _resident_kib("VmRSS") / 1024


def _resident_kib(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1])


class CUDAStopwatch:
    """Time between two events on the current stream, from a cold L2 cache, and memory of PyTorch's allocator.

    Where a call launches work more slowly than the device does it, the launching is what is timed.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def seconds(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1000

    def peak_growth(self, call: Callable[[], Any]) -> float | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / _MIB


def stopwatch_for(device: torch.device) -> Stopwatch:
    return CUDAStopwatch() if device.type == "cuda" else CPUStopwatch()
