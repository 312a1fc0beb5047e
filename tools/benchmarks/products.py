"""One grouped matrix product of rows that are already sorted by expert, forward and backward: nothing is moved.

Letters: S rows, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Contender, Run, Workload
from modmoe.ops import DispatchPlan, dispatch_plan, grouped_linear


class Inputs(NamedTuple):
    """rows (S, in), weight (E, out, in), dy (S, out)."""

    rows: Tensor
    weight: Tensor
    dy: Tensor
    plan: DispatchPlan


class Shape(NamedTuple):
    rows: int
    in_features: int
    out_features: int
    experts: int


def grouped_product(shape: Shape, backends: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Workload:
    """`backends` of ours, beside "torch" and `torch.nn.functional.grouped_mm` itself."""
    sizes = shape.rows * shape.in_features, shape.rows * shape.out_features, shape.in_features * shape.out_features

    def draw() -> Inputs:
        index = torch.randint(shape.experts, (shape.rows, 1), device=device)
        return Inputs(
            torch.randn(shape.rows, shape.in_features, device=device, dtype=dtype).requires_grad_(),
            draw_weight(shape.experts, shape.out_features, shape.in_features, device, dtype),
            torch.randn(shape.rows, shape.out_features, device=device, dtype=dtype),
            dispatch_plan(index, shape.experts),
        )

    return Workload(
        name="grouped product, {} rows, {} -> {}, {} experts".format(*shape),
        draw=draw,
        contenders=(
            *(Contender(name, forward_backward(_ours(name)), _EXACT, "ours") for name in backends),
            Contender("torch", forward_backward(_ours("torch")), _EXACT, "baseline"),
            Contender("grouped_mm", forward_backward(_grouped_mm), _EXACT),
        ),
        tokens=shape.rows,
        flops=3 * 2 * shape.rows * sizes[2],
        bytes=3 * (sizes[0] + sizes[1] + shape.experts * sizes[2]) * dtype.itemsize,
    )


def draw_weight(experts: int, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(E, out, in), such that results are about as large as inputs."""
    weight = torch.randn(experts, out_features, in_features, device=device, dtype=dtype)
    return weight.mul_(in_features**-0.5).requires_grad_()


def forward_backward(multiply: Callable[[Inputs], Tensor]) -> Run:
    def run(x: Inputs) -> dict[str, Tensor]:
        y = multiply(x)
        drows, dweight = torch.autograd.grad(y, (x.rows, x.weight), x.dy)
        return {"y": y.detach(), "drows": drows, "dweight": dweight}

    return run


def _ours(backend: str) -> Callable[[Inputs], Tensor]:
    def multiply(x: Inputs) -> Tensor:
        return grouped_linear(x.rows, x.weight, x.plan, top_k=1, source="sorted", target="sorted", backend=backend)

    return multiply


def _grouped_mm(x: Inputs) -> Tensor:
    return F.grouped_mm(x.rows, x.weight.mT, offs=x.plan.offsets)


def _one_by_one(x: Inputs) -> Tensor:
    parts = x.rows.split(x.plan.tokens_per_expert.tolist())
    return torch.cat([part @ weight.T for part, weight in zip(parts, x.weight.unbind(), strict=True)])


_EXACT = forward_backward(_one_by_one)
