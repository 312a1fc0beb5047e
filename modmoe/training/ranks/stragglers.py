"""Which rank the others wait for."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Stragglers:
    """
    Times what each rank does before it meets the others: reading data, and the forward pass of the blocks.

    On a CUDA device the forward pass is timed by the device, without waiting for it. Where the forward pass itself
    holds collectives (expert parallelism, ZeRO-3) waiting evens the ranks out, and the ratio says less than is true.

    Args:
        blocks: the base model: what comes after it, the router losses, may wait for other ranks.
        ranks: how many there are; a single one times nothing, for nobody would ask.
    """

    def __init__(self, blocks: nn.Module, ranks: int) -> None:
        self._data_seconds = 0.0
        self._forward_seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._begun: Any = None
        if ranks > 1:
            blocks.register_forward_pre_hook(self._begin)
            blocks.register_forward_hook(self._end)

    def add_data_time(self, seconds: float) -> None:
        """Count time that this rank took to read a batch."""
        self._data_seconds += seconds

    def metrics(self, steps: int, device: torch.device) -> dict[str, float]:
        """
        The slowest rank since the last call, and how many times the median rank's time it took.

        Args:
            steps: in that time.
            device: where collectives run.
        """
        waited = sum(first.elapsed_time(last) / 1e3 for first, last in self._synchronized())
        own = torch.tensor([self._data_seconds + self._forward_seconds + waited], device=device, dtype=torch.float64)
        self._data_seconds, self._forward_seconds, self._events = 0.0, 0.0, []
        everyone = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        seconds = torch.cat(everyone).cpu() / steps
        slowest, median = int(seconds.argmax()), float(seconds.median())
        return {
            "rank/slowest": slowest,
            "rank/slowest_over_median": round(float(seconds[slowest]) / max(median, 1e-9), 3),
            "rank/own_seconds_per_step": round(median, 6),
        }

    def _begin(self, module: nn.Module, _: Any) -> None:
        if not module.training:
            return
        self._begun = self._now()

    def _end(self, module: nn.Module, _: Any, __: Any) -> None:
        if self._begun is None:
            return
        now, begun, self._begun = self._now(), self._begun, None
        if isinstance(now, float):
            self._forward_seconds += now - begun
        else:
            self._events.append((begun, now))

    def _synchronized(self) -> list[tuple[Any, Any]]:
        if self._events:
            self._events[-1][1].synchronize()
        return self._events

    @staticmethod
    def _now() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
