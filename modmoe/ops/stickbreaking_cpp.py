"""Stick-breaking attention on the CPU, in C++ (csrc/cpu/stickbreaking.h)."""

import torch
from torch import Tensor

from .build import cpu_problem

problem = cpu_problem


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
    early_stop: bool,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out and remainder."""
    work = torch.promote_types(q.dtype, torch.float32)
    # The kernel reads keys in bfloat16 where they are: a cache of them is long.
    stored = k.dtype if k.dtype == torch.bfloat16 else work
    out, remainder = torch.ops.modmoe_cpu.stickbreaking_forward(
        _rows(q, work),
        _rows(k, stored),
        _rows(v, stored),
        *_limits(key_mask, document_start),
        None if lengths is None else lengths.to(torch.int64).contiguous(),
        scale,
        attend_current,
        _stop_below(q.dtype, early_stop),
    )
    return out.to(q.dtype), remainder


def backward(
    dout: Tensor,
    drem: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
    early_stop: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    work = torch.promote_types(q.dtype, torch.float32)
    grads = torch.ops.modmoe_cpu.stickbreaking_backward(
        _rows(dout, work),
        drem.contiguous(),
        *(_rows(x, work) for x in (q, k, v)),
        *_limits(key_mask, document_start),
        scale,
        attend_current,
        _stop_below(q.dtype, early_stop),
    )
    dq, dk, dv = (grad.to(q.dtype) for grad in grads)
    return dq, dk, dv


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, with a contiguous last dimension; the others may have any strides."""
    return x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous()


def _stop_below(dtype: torch.dtype, early_stop: bool) -> float:
    """A stick bounds the sum of the weights that it can still give; a shorter one than this cannot show in `dtype`."""
    return torch.finfo(dtype).eps / 64 if early_stop else 0.0


def _limits(key_mask: Tensor | None, document_start: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if document_start is not None:
        document_start = document_start.to(torch.int64).contiguous()
    return None if key_mask is None else key_mask.contiguous(), document_start
