"""Which experts of a pool a process holds.

A stacked expert weight (E, out, in) that is cut along E is one interval of the whole tensor in memory order.
Everything that saves or loads weights can therefore treat a shard, of experts or of ZeRO, as an interval of a flat
tensor.
"""

from typing import NamedTuple

import torch


class ExpertSlice(NamedTuple):
    """The experts from `start` up to `stop` of a pool of `num_experts`."""

    start: int
    stop: int
    num_experts: int


def set_expert_slice(parameter: torch.nn.Parameter, part: ExpertSlice) -> None:
    """Note on a stacked expert weight (stop - start, out, in) which experts it holds."""
    parameter.expert_slice = part  # type: ignore[attr-defined]


def expert_slice(parameter: torch.Tensor) -> ExpertSlice | None:
    """What `set_expert_slice` noted; None for a parameter that every process holds in full."""
    return getattr(parameter, "expert_slice", None)
