"""Routing on the CUDA kernels of csrc/cuda/routing.cuh."""

import functools

import torch
from torch import Tensor

from .build import library_problem

MAX_EXPERTS = 1024


def gating_problem(logits: Tensor) -> str | None:
    """Say why `gating` cannot run on these (N, E) logits here; None if it can."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no {logits.dtype}"
    return plan_problem(logits, logits.shape[1])


def plan_problem(x: Tensor, num_experts: int) -> str | None:
    """Say why `dispatch_plan` cannot run for a tensor like `x` here; None if it can."""
    if num_experts > MAX_EXPERTS:
        return f"it is for at most {MAX_EXPERTS} experts, got {num_experts}"
    return device_problem(x.device)


def device_problem(device: torch.device) -> str | None:
    """Say why the kernels of csrc/cuda cannot run on `device`; None if they can."""
    if device.type != "cuda":
        return f"it is for CUDA, the tensors are on {device.type!r}"
    return library_problem("cuda") or _card_problem(
        torch.cuda.current_device() if device.index is None else device.index
    )


@functools.cache
def _card_problem(index: int) -> str | None:
    problem: str = torch.ops.modmoe_cuda.device_problem(index)
    return problem or None


def gating(
    logits: Tensor, top_k: int, token_mask: Tensor | None, selection_bias: Tensor | None, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Return gates and expert ids, as `ops.route` has them; ties go to the lower id."""
    bias = None if selection_bias is None else selection_bias.float().contiguous()
    mask = None if token_mask is None else token_mask.contiguous()
    gates, index = torch.ops.modmoe_cuda.gating(logits.contiguous(), top_k, mask, bias, renormalize)
    return gates, index


def dispatch_plan(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `ops.DispatchPlan`. Ids that are no expert's count as "none"."""
    tokens_per_expert, offsets, order, inverse = torch.ops.modmoe_cuda.dispatch_plan(
        top_k_index.contiguous(), num_experts
    )
    return tokens_per_expert, offsets, order, inverse
