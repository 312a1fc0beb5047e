"""One linear map per expert over ragged groups of rows, with the gather before it and the weighted sum after it.

Letters: N tokens, E experts, K experts per token, S = N * K pairs. A *sorted* row belongs to the expert whose
offsets it lies between; rows past the last offset belong to nobody and are zero in every result.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import grouped_linear_cpp, grouped_linear_cuda, grouped_linear_sm90, grouped_linear_torch, reference
from .backend import DTYPES, autocast_dtype, choose_backend, library, no_second_derivative, requested_backend
from .routing import DispatchPlan

LAYOUTS = ("token", "pair", "sorted")
BACKENDS = ("cpp", "torch", "cuda", "cuda_sm90", "reference")


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    plan: DispatchPlan,
    *,
    top_k: int,
    source: str = "token",
    target: str = "token",
    gates: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiply every row by the weight of its expert: `y[rows of e] = x[rows of e] @ weight[e].T`.

    Deterministic; sums over slots are taken in float32 (float64 for float64). Under autocast, `x` and `weight` are
    cast to its dtype.

    Args:
        x: rows to read, by `source`: "token" (N, in), the same row for all K slots of a token; "pair" (S, in), pair
            p = token * K + slot; "sorted" (S, in), already in the plan's order.
        weight: (E, out, in), dtype of `x`.
        plan: from `dispatch_plan`.
        top_k: K.
        source: layout of `x`.
        target: layout of the result: "sorted" (S, out); "pair" (S, out); "token" (N, out), the sum over the slots of
            gate * row.
        gates: (N, K) floating point; needed for target "token", elsewhere optional; multiplies the rows.
        backend: see `modmoe.ops.backend`.

    Returns:
        The rows in layout `target`, dtype of `x`. Pairs without an expert give zeros.

    Raises:
        ValueError: an unknown layout, shapes that do not fit, gates missing for target "token", a plan that is not
            one of `dispatch_plan`.
        TypeError: dtypes of `x` and `weight` that differ or are not of `modmoe.ops.backend.DTYPES`, integer gates.
        RuntimeError: tensors on several devices, or a backend that cannot be had; on the CPU, where a look costs
            nothing, offsets that do not rise to at most S.
    """
    x, weight = (t.to(autocast_dtype(t)) for t in (x, weight))
    _check(x, weight, plan, top_k, source, target, gates)
    arguments = (x, weight, plan.order, plan.inverse, plan.offsets, gates, top_k, source, target)
    name = requested_backend("grouped_linear", backend, BACKENDS)
    if name == "reference":
        return reference.grouped_linear(*arguments)
    out: Tensor = torch.ops.modmoe.grouped_linear(*arguments, name)
    return out


def _check(
    x: Tensor, weight: Tensor, plan: DispatchPlan, top_k: int, source: str, target: str, gates: Tensor | None
) -> None:
    if source not in LAYOUTS or target not in LAYOUTS:
        raise ValueError(f"source and target must be one of {LAYOUTS}, got source={source!r}, target={target!r}")
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x must be (rows, in) and weight (experts, out, in), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or x.dtype not in DTYPES:
        raise TypeError(f"x and weight must share one dtype of {DTYPES}, got {x.dtype} and {weight.dtype}")
    num_pairs = plan.order.shape[0]
    if top_k < 1 or num_pairs % top_k:
        raise ValueError(f"top_k must divide the {num_pairs} pairs of the plan, got {top_k}")
    num_tokens = num_pairs // top_k
    num_rows = num_tokens if source == "token" else num_pairs
    if x.shape[0] != num_rows:
        raise ValueError(f"source {source!r} needs {num_rows} rows for this plan and top_k={top_k}, got {x.shape[0]}")
    if plan.offsets.shape[0] != weight.shape[0]:
        raise ValueError(f"the plan is for {plan.offsets.shape[0]} experts but weight has {weight.shape[0]}")
    if plan.offsets.dtype != torch.int32 or plan.inverse.shape != plan.order.shape:
        raise ValueError(
            "the plan must have int32 offsets, and an inverse as long as its order, "
            f"got {plan.offsets.dtype}, {tuple(plan.inverse.shape)} and {tuple(plan.order.shape)}"
        )
    if gates is None:
        if target == "token":
            raise ValueError("target 'token' sums over slots and needs gates (tokens, top_k)")
    elif gates.shape != (num_tokens, top_k):
        raise ValueError(f"gates must have shape ({num_tokens}, {top_k}), got {tuple(gates.shape)}")
    elif not gates.is_floating_point():
        raise TypeError(f"gates must be floating point, got {gates.dtype}")
    devices = {t.device for t in (x, weight, *plan, gates) if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


# The op and its gradient.


def _implementation(backend: str, x: Tensor, weight: Tensor) -> ModuleType:
    problems: dict[str, Callable[[], str | None]] = {
        "cpp": lambda: grouped_linear_cpp.problem(x),
        "torch": lambda: None,
        "cuda": lambda: grouped_linear_cuda.problem(x),
        "cuda_sm90": lambda: grouped_linear_sm90.problem(x, weight),
    }
    modules = {
        "cpp": grouped_linear_cpp,
        "torch": grouped_linear_torch,
        "cuda": grouped_linear_cuda,
        "cuda_sm90": grouped_linear_sm90,
    }
    return modules[choose_backend("grouped_linear", backend, problems)]


def _forward(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    gates: Tensor | None,
    top_k: int,
    source: str,
    target: str,
    backend: str,
) -> Tensor:
    implementation = _implementation(backend, x, weight)
    out: Tensor = implementation.forward(x, weight, order, inverse, offsets, gates, top_k, source, target)
    return out


def _backward(
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
    backend: str,
    needs_x: bool,
    needs_weight: bool,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gates; an empty tensor where one is not needed."""
    layout = (order, inverse, offsets, gates, top_k, source, target)
    needs = (needs_x, needs_weight, needs_gates)
    dx, dweight, dgates = _implementation(backend, x, weight).backward(dy, x, weight, *layout, *needs)
    return dx, dweight, dgates


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    gates: Tensor | None,
    top_k: int,
    source: str,
    target: str,
    backend: str,
) -> Tensor:
    return x.new_empty(order.shape[0] // top_k if target == "token" else order.shape[0], weight.shape[1])


def _backward_fake(
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
    backend: str,
    needs_x: bool,
    needs_weight: bool,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        x.new_empty(0) if gates is None or not needs_gates else gates.new_empty(gates.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.top_k, ctx.source, ctx.target, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 5)]
    settings = (ctx.top_k, ctx.source, ctx.target, ctx.backend)
    grads = torch.ops.modmoe.grouped_linear_backward(dy, *ctx.saved_tensors, *settings, *needs)
    dx, dweight, dgates = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, dweight, None, None, None, dgates, *(None,) * len(settings)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor order, Tensor inverse, Tensor offsets, Tensor? gates, "
    "SymInt top_k, str source, str target, str backend"
)
# Compiled graphs leave them out of CUDA graphs: on most devices grouped_mm waits for the host.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
library.define(f"grouped_linear({_ARGUMENTS}) -> Tensor", tags=_TAGS)
library.define(
    f"grouped_linear_backward(Tensor dy, {_ARGUMENTS}, bool needs_x, bool needs_weight, bool needs_gates)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
library.impl("grouped_linear", _forward, "CompositeExplicitAutograd")
library.impl("grouped_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("modmoe::grouped_linear", _forward_fake, lib=library)
torch.library.register_fake("modmoe::grouped_linear_backward", _backward_fake, lib=library)
torch.library.register_autograd("modmoe::grouped_linear", _autograd, setup_context=_setup_context, lib=library)
no_second_derivative("grouped_linear")
