"""The dispatch plan on the CPU with the kernel of csrc/cpu/routing.cpp."""

import torch
from torch import Tensor

from .build import cpu_problem

problem = cpu_problem


def dispatch_plan(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `ops.DispatchPlan`. Ids that are no expert's count as "none"."""
    tokens_per_expert, offsets, order, inverse = torch.ops.modmoe_cpu.dispatch_plan(
        top_k_index.contiguous(), num_experts
    )
    return tokens_per_expert, offsets, order, inverse
