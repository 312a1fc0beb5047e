"""The grouped linear map with the Hopper products of csrc/cuda/grouped_linear_sm90.cu; PyTorch gathers and sums."""

import functools

import torch
from torch import Tensor

from . import grouped_linear_torch
from .grouped_linear_torch import Products, aligned, zero_empty, zero_past
from .routing_cuda import device_problem


def problem(x: Tensor, weight: Tensor) -> str | None:
    """Say why this implementation cannot run on such tensors here; None if it can."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {x.dtype}"
    if any(width % 8 for width in weight.shape[1:]):
        return f"widths must be multiples of 8, weight is {tuple(weight.shape)}"
    if reason := device_problem(x.device):
        return reason
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return f"it is for compute capability 9.0, this is {torch.cuda.get_device_name(x.device)}"
    if not hasattr(torch.ops.modmoe_cuda, "multiply_sm90"):
        return "it was not built: that needs the CUTLASS headers (pip install --no-deps nvidia-cutlass)"
    return None


def _multiply(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    transposed = not weight.mT.is_contiguous()
    matrices = weight.contiguous() if transposed else weight.mT
    out = torch.ops.modmoe_cuda.multiply_sm90(aligned(rows.contiguous()), aligned(matrices), offsets, transposed)
    return zero_past(out, offsets)


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    out = torch.ops.modmoe_cuda.outer_sm90(aligned(left.contiguous()), aligned(right.contiguous()), offsets)
    return zero_empty(out, offsets)


_PRODUCTS = Products(_multiply, _outer)
forward = functools.partial(grouped_linear_torch.forward, products=_PRODUCTS)
backward = functools.partial(grouped_linear_torch.backward, products=_PRODUCTS)
