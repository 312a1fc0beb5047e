"""What the machine can do, measured in the same run: a large matrix product and a large copy."""

import statistics
from typing import NamedTuple

import torch

from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import Workload


class Ceiling(NamedTuple):
    """Speeds of `torch.mm` of square matrices and of a copy (read and written bytes both counted)."""

    flops_per_second: float
    bytes_per_second: float

    def bound(self, workload: Workload) -> tuple[str, float]:
        """The slower of the two ways to count the work, and the seconds that it takes at least."""
        times = {
            "torch.mm": workload.flops / self.flops_per_second,
            "copy": workload.bytes / self.bytes_per_second,
        }
        return max(times.items(), key=lambda item: item[1])


def measure_ceiling(device: torch.device, dtype: torch.dtype, stopwatch: Stopwatch, rounds: int) -> Ceiling:
    """
    Args:
        device: where; on the CPU smaller matrices and copies do.
        dtype: of the matrices.
        stopwatch: for `device`.
        rounds: whose median is taken.
    """
    size, num_bytes = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    product, copy = [], []
    for turn in range(rounds + 1):  # the first does not count
        seconds = stopwatch.seconds(lambda: a @ b), stopwatch.seconds(lambda: target.copy_(source))
        if turn:
            product.append(seconds[0])
            copy.append(seconds[1])
    return Ceiling(2 * size**3 / statistics.median(product), 2 * num_bytes / statistics.median(copy))
