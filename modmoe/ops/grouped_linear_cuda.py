"""The grouped linear map on the CUDA kernels of csrc/cuda/grouped_linear.cuh: gather and scatter fused in."""

import torch
from torch import Tensor

from .routing_cuda import device_problem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(x: Tensor) -> str | None:
    """Say why this implementation cannot run on such rows here; None if it can."""
    if x.dtype not in _DTYPES:
        return f"it has no {x.dtype}"
    return device_problem(x.device)


def forward(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    gates: Tensor | None,
    top_k: int,
    source: str,
    target: str,
) -> Tensor:
    """See `ops.grouped_linear`. Gates are taken in float32."""
    out: Tensor = torch.ops.modmoe_cuda.grouped_linear(
        x.contiguous(), weight.contiguous(), order, offsets, _gates(gates), top_k, source, target
    )
    return out


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    gates: Tensor | None,
    top_k: int,
    source: str,
    target: str,
    needs_x: bool,
    needs_weight: bool,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and gates; an empty tensor where one is not needed."""
    dx, dweight, dgates = torch.ops.modmoe_cuda.grouped_linear_backward(
        *(t.contiguous() for t in (dy, x, weight)),
        order,
        offsets,
        _gates(gates),
        top_k,
        source,
        target,
        needs_x,
        needs_weight,
        needs_gates,
    )
    return dx, dweight, dgates if gates is None else dgates.to(gates.dtype)


def _gates(gates: Tensor | None) -> Tensor | None:
    return None if gates is None else gates.float().contiguous()
