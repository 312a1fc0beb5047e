"""One linear map per expert over ragged groups of rows, with the gather before it and the weighted sum after it.

Letters: N tokens, E experts, K experts per token, S = N * K pairs. A *sorted* row belongs to the expert whose
offsets it lies between; rows past the last offset belong to nobody and are zero in every result.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .backend import autocast_dtype, library, requested_backend, without_autocast
from .routing import DispatchPlan

LAYOUTS = ("token", "pair", "sorted")
_GRANULE = 32  # rows


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
        ValueError: an unknown layout, shapes that do not fit, gates missing for target "token".
        TypeError: dtypes of `x` and `weight` that differ, or are not floating point.
        RuntimeError: tensors on several devices, or a backend that cannot be had.
    """
    x, weight = (t.to(autocast_dtype(t)) for t in (x, weight))
    _check(x, weight, plan, top_k, source, target, gates)
    arguments = (x, weight, plan.order, plan.inverse, plan.offsets, gates, top_k, source, target)
    if requested_backend("grouped_linear", backend, ("torch", "reference")) == "reference":
        return reference.grouped_linear(*arguments)
    out: Tensor = torch.ops.modmoe.grouped_linear(*arguments)
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
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise TypeError(f"x and weight must share a floating dtype, got {x.dtype} and {weight.dtype}")
    num_pairs = plan.order.shape[0]
    if top_k < 1 or num_pairs % top_k:
        raise ValueError(f"top_k must divide the {num_pairs} pairs of the plan, got {top_k}")
    num_tokens = num_pairs // top_k
    num_rows = num_tokens if source == "token" else num_pairs
    if x.shape[0] != num_rows:
        raise ValueError(f"source {source!r} needs {num_rows} rows for this plan and top_k={top_k}, got {x.shape[0]}")
    if plan.offsets.shape[0] != weight.shape[0]:
        raise ValueError(f"the plan is for {plan.offsets.shape[0]} experts but weight has {weight.shape[0]}")
    if gates is None:
        if target == "token":
            raise ValueError("target 'token' sums over slots and needs gates (tokens, top_k)")
    elif gates.shape != (num_tokens, top_k):
        raise ValueError(f"gates must have shape ({num_tokens}, {top_k}), got {tuple(gates.shape)}")
    devices = {t.device for t in (x, weight, plan.order, gates) if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


# Ragged products. On CPU a loop over the experts that have rows: the offsets are host memory anyway, and matrix
# products are nine tenths of the time. Elsewhere grouped_mm, which reads the offsets on the device.


def _multiply(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """(S, in) rows times (E, in, out) weight of their expert -> (S, out)."""
    if not _loops(rows):
        return _multiply_on_device(rows, weight, offsets)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    end = 0
    for expert, start, end in _spans(offsets, rows.dtype):
        torch.mm(rows[start:end], weight[expert], out=out[start:end])
    out[end:] = 0
    return out


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """(S, out) and (S, in) rows -> (E, out, in), the sum over each expert's rows of left x right."""
    if not _loops(left):
        return _outer_on_device(left, right, offsets)
    out = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for expert, start, end in _spans(offsets, left.dtype):
        out[expert].addmm_(left[start:end].T, right[start:end])
    return out


def _spans(offsets: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first row, past the last row), in order; experts without rows are left out.

    oneDNN, which multiplies in bfloat16 and float16, compiles a kernel for each new shape (three times the work of a
    small product) and keeps the last thousand. Cutting at a multiple of 32 rows makes shapes come back.
    """
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if dtype.itemsize == 2 and end - start > _GRANULE:
            cut = end - (end - start) % _GRANULE
            yield expert, start, cut
            start = cut
        if end > start:
            yield expert, start, end
        start = end


def _loops(rows: Tensor) -> bool:
    # grouped_mm has no float64; there the loop costs a host sync, and float64 is for checking only.
    return rows.device.type == "cpu" or rows.dtype == torch.float64


def _multiply_on_device(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    width = weight.shape[2]
    # grouped_mm reads weights best in (E, out, in) memory; padding keeps whichever dim is contiguous.
    out = F.grouped_mm(_pad_width(rows), _pad_matrix(weight), offs=offsets)[:, :width]
    past = torch.arange(out.shape[0], device=out.device) >= offsets[-1]
    return out.masked_fill(past[:, None], 0)  # grouped_mm leaves rows past the last offset uninitialised


def _outer_on_device(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    out = F.grouped_mm(_pad_width(left).T, _pad_width(right), offs=offsets)[:, : left.shape[1], : right.shape[1]]
    empty = offsets == F.pad(offsets, (1, 0))[:-1]
    return out.masked_fill(empty[:, None, None], 0)


def _missing(width: int, dtype: torch.dtype) -> int:
    return -width % (16 // dtype.itemsize)  # grouped_mm wants strides that are multiples of 16 bytes


def _pad_width(rows: Tensor) -> Tensor:
    missing = _missing(rows.shape[1], rows.dtype)
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def _pad_matrix(weight: Tensor) -> Tensor:
    """Pad both matrix dims of (E, in, out), and keep the memory order."""
    if weight.stride(-1) != 1:
        return _pad_matrix(weight.mT).mT
    rows, columns = (_missing(size, weight.dtype) for size in weight.shape[1:])
    return F.pad(weight, (0, columns, 0, rows)) if rows or columns else weight.contiguous()


# Layouts.


def _to_sorted(x: Tensor, order: Tensor, top_k: int, layout: str) -> Tensor:
    if layout == "sorted":
        return x.contiguous()
    return x.index_select(0, order // top_k if layout == "token" and top_k > 1 else order)


def _from_sorted(
    rows: Tensor, order: Tensor, inverse: Tensor, gates: Tensor | None, top_k: int, layout: str
) -> Tensor:
    """Bring sorted rows to `layout`, times their gates; "token" sums the slots, in slot order."""
    if layout == "sorted":
        return rows if gates is None else _scale(rows, _sorted_gates(gates, order))
    rows = rows.index_select(0, inverse)
    if layout == "pair":
        return rows if gates is None else _scale(rows, gates.reshape(-1, 1))
    slots = rows.to(_work_dtype(rows.dtype)).unflatten(0, (-1, top_k))
    total = slots.sum(1) if gates is None else torch.bmm(gates[:, None, :].to(slots.dtype), slots).squeeze(1)
    return total.to(rows.dtype)


def _sorted_gates(gates: Tensor, order: Tensor) -> Tensor:
    return gates.reshape(-1).index_select(0, order)[:, None]


def _scale(rows: Tensor, gates: Tensor) -> Tensor:
    return (rows * gates).to(rows.dtype)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# The op and its gradient.


@without_autocast
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
) -> Tensor:
    y = _multiply(_to_sorted(x, order, top_k, source), weight.mT, offsets)
    return _from_sorted(y, order, inverse, gates, top_k, target)


@without_autocast
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
    needs_x: bool,
    needs_weight: bool,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gates; an empty tensor where one is not needed."""
    dx, dweight, dgates = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    dy_rows = _to_sorted(dy, order, top_k, target)
    x_rows = _to_sorted(x, order, top_k, source) if needs_weight or needs_gates else None
    if needs_x or needs_gates:
        # Before the gates: the gate's gradient is <dy_r W_e, x_r>, so the ungated output need not be kept.
        u = _multiply(dy_rows, weight, offsets)
        if needs_gates:
            assert gates is not None
            assert x_rows is not None
            dots = (u.to(_work_dtype(u.dtype)) * x_rows).sum(-1)
            past = torch.arange(len(dots), device=dots.device) >= offsets[-1]
            dgates = dots.masked_fill(past, 0).index_select(0, inverse).view_as(gates).to(gates.dtype)
        if needs_x:
            dx = _from_sorted(u, order, inverse, gates, top_k, source)
    if needs_weight:
        assert x_rows is not None
        if gates is not None:
            scale = _sorted_gates(gates, order)
            if x_rows.shape[1] < dy_rows.shape[1]:
                x_rows = _scale(x_rows, scale)
            else:
                dy_rows = _scale(dy_rows, scale)
        dweight = _outer(dy_rows, x_rows, offsets)
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
    *tensors, ctx.top_k, ctx.source, ctx.target = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 5)]
    grads = torch.ops.modmoe.grouped_linear_backward(dy, *ctx.saved_tensors, ctx.top_k, ctx.source, ctx.target, *needs)
    dx, dweight, dgates = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, dweight, None, None, None, dgates, None, None, None


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor order, Tensor inverse, Tensor offsets, Tensor? gates, "
    "SymInt top_k, str source, str target"
)
library.define(f"grouped_linear({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
library.define(
    f"grouped_linear_backward(Tensor dy, {_ARGUMENTS}, bool needs_x, bool needs_weight, bool needs_gates)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.impl("grouped_linear", _forward, "CompositeExplicitAutograd")
library.impl("grouped_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("modmoe::grouped_linear", _forward_fake, lib=library)
torch.library.register_fake("modmoe::grouped_linear_backward", _backward_fake, lib=library)
torch.library.register_autograd("modmoe::grouped_linear", _autograd, setup_context=_setup_context, lib=library)
