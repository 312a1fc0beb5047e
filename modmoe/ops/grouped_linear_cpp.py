"""The grouped linear map on the CPU with the products of csrc/cpu/grouped_linear.cpp; PyTorch gathers and sums."""

import functools

import torch
from torch import Tensor

from . import grouped_linear_torch
from .build import library_problem
from .grouped_linear_torch import Products


def problem(x: Tensor) -> str | None:
    """Say why this implementation cannot run on such rows here; None if it can."""
    if x.device.type != "cpu":
        return f"it is for the CPU, the tensors are on {x.device.type!r}"
    return library_problem("cpu")


# Detached, because the products run on threads that do not know that autograd has been told already.


def _multiply(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out: Tensor = torch.ops.modmoe_cpu.grouped_multiply(rows.detach(), weight.detach(), offsets)
    return out


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    out: Tensor = torch.ops.modmoe_cpu.grouped_outer(left.detach(), right.detach(), offsets)
    return out


_PRODUCTS = Products(_multiply, _outer)
forward = functools.partial(grouped_linear_torch.forward, products=_PRODUCTS)
backward = functools.partial(grouped_linear_torch.backward, products=_PRODUCTS)
