"""The grouped linear map on the CPU with the kernels of csrc/cpu.

float32, float64 and, on some processors (csrc/cpu/numbers.h), bfloat16 run in one kernel, gather and sums included,
where widths fill vectors (grouped_linear.cpp). All else takes torch's own products, one expert per thread
(grouped_products.cpp); there, PyTorch gathers and sums.
"""

import functools

import torch
from torch import Tensor

from . import grouped_linear_torch
from .backend import without_autocast
from .build import cpu_problem
from .grouped_linear_torch import Products

problem = cpu_problem

_VECTOR = 64  # bytes; the widest that any processor has


@without_autocast
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
    """See `ops.grouped_linear`."""
    if not _is_fused(weight):
        layout = (order, inverse, offsets, gates, top_k, source, target)
        return grouped_linear_torch.forward(x, weight, *layout, products=_PRODUCTS)
    gates = None if gates is None else gates.to(_sum_dtype(x)).contiguous()
    plan = (order.contiguous(), offsets.contiguous())
    out: Tensor = torch.ops.modmoe_cpu.grouped_linear(x.contiguous(), weight, *plan, gates, top_k, source, target)
    return out


@without_autocast
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
    needs = (needs_x, needs_weight, needs_gates)
    if not _is_fused(weight):
        layout = (order, inverse, offsets, gates, top_k, source, target)
        return grouped_linear_torch.backward(dy, x, weight, *layout, *needs, products=_PRODUCTS)
    work_gates = None if gates is None else gates.to(_sum_dtype(x)).contiguous()
    plan = (order.contiguous(), offsets.contiguous())
    rows = (dy.contiguous(), x.contiguous())
    dx, dweight, dgates = torch.ops.modmoe_cpu.grouped_linear_backward(
        *rows, weight, *plan, work_gates, top_k, source, target, *needs
    )
    dgates = x.new_empty(0) if gates is None or not needs_gates else dgates.view_as(gates).to(gates.dtype)
    return dx, dweight, dgates


def _is_fused(weight: Tensor) -> bool:
    _, out, width = weight.shape
    fills = all(size > 0 and size * weight.itemsize % _VECTOR == 0 for size in (out, width))
    taken = weight.dtype in (torch.float32, torch.float64) or (weight.dtype == torch.bfloat16 and _takes_bf16())
    return taken and fills and weight.stride()[1:] == (width, 1)


@functools.cache
def _takes_bf16() -> bool:
    takes: bool = torch.ops.modmoe_cpu.takes_bf16()
    return takes


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# Detached, because the products run on threads that do not know that autograd has been told already.


def _multiply(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out: Tensor = torch.ops.modmoe_cpu.grouped_multiply(rows.detach(), weight.detach(), offsets)
    return out


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    out: Tensor = torch.ops.modmoe_cpu.grouped_outer(left.detach(), right.detach(), offsets)
    return out


_PRODUCTS = Products(_multiply, _outer)
