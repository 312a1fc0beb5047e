"""The grouped linear map in PyTorch: rows are brought into sorted order, multiplied, and brought to where they go.

The products themselves can be exchanged; see `Products`. Letters as in `grouped_linear.py`.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import without_autocast

_GRANULE = 32  # rows


class Products(NamedTuple):
    """The matrix products of sorted rows that forward and backward are made of.

    Attributes:
        multiply: (S, in) rows, (E, in, out) weight, (E,) offsets -> (S, out), each row times the matrix of its expert.
        outer: (S, out) and (S, in) rows, (E,) offsets -> (E, out, in), the sum of left x right over an expert's rows.
    """

    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor], Tensor]


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
    products: Products | None = None,
) -> Tensor:
    """See `ops.grouped_linear`."""
    multiply, _ = products or Products(_multiply, _outer)
    y = multiply(_to_sorted(x, order, top_k, source), weight.mT, offsets)
    return _from_sorted(y, order, inverse, gates, top_k, target)


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
    products: Products | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and gates; an empty tensor where one is not needed."""
    multiply, outer = products or Products(_multiply, _outer)
    dx, dweight, dgates = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    dy_rows = _to_sorted(dy, order, top_k, target)
    x_rows = _to_sorted(x, order, top_k, source) if needs_weight or needs_gates else None
    if needs_x or needs_gates:
        # Before the gates: the gate's gradient is <dy_r W_e, x_r>, so the ungated output need not be kept.
        u = multiply(dy_rows, weight, offsets)
        if needs_gates:
            assert gates is not None
            assert x_rows is not None
            dots = (u.to(_work_dtype(u.dtype)) * x_rows).sum(-1)
            dgates = zero_past(dots, offsets).index_select(0, inverse).view_as(gates).to(gates.dtype)
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
        dweight = outer(dy_rows, x_rows, offsets)
    return dx, dweight, dgates


# Ragged products. On CPU a loop over the experts that have rows: the offsets are host memory anyway, and matrix
# products are nine tenths of the time. Elsewhere grouped_mm: for bfloat16 on compute capability 9.0 and 10.0 a kernel
# that reads the offsets on the device; for all else PyTorch's own loop, for whose offsets the host waits.


def _multiply(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """(S, in) rows times (E, in, out) weight of their expert -> (S, out)."""
    if not _loops(rows):
        return _multiply_on_device(rows, weight, offsets)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    end = 0
    for expert, start, end in _spans(offsets, rows):
        torch.mm(rows[start:end], weight[expert], out=out[start:end])
    out[end:] = 0
    return out


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """(S, out) and (S, in) rows -> (E, out, in), the sum over each expert's rows of left x right."""
    if not _loops(left):
        return _outer_on_device(left, right, offsets)
    out = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for expert, start, end in _spans(offsets, left):
        out[expert].addmm_(left[start:end].T, right[start:end])
    return out


def _spans(offsets: Tensor, rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first row, past the last row), in order; experts without rows are left out.

    Raises:
        RuntimeError: offsets that fall, or go beyond the rows.

    oneDNN, which multiplies in bfloat16 and float16, compiles a kernel for each new shape (three times the work of a
    small product) and keeps the last thousand. Cutting at a multiple of 32 rows makes shapes come back.
    """
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if not start <= end <= len(rows):
            raise RuntimeError(f"offsets must rise from 0 to at most {len(rows)} rows, got {end} for expert {expert}")
        if rows.dtype.itemsize == 2 and end - start > _GRANULE:
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
    return zero_past(out, offsets)  # grouped_mm leaves rows past the last offset uninitialised


def _outer_on_device(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    out = F.grouped_mm(_pad_width(left).T, _pad_width(right), offs=offsets)[:, : left.shape[1], : right.shape[1]]
    return zero_empty(out, offsets)


def zero_past(rows: Tensor, offsets: Tensor) -> Tensor:
    """Put zeros into rows that nobody owns."""
    past = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
    return rows.masked_fill(past.view(-1, *(1,) * (rows.dim() - 1)), 0)


def zero_empty(matrices: Tensor, offsets: Tensor) -> Tensor:
    """Put zeros into the (E, ., .) matrices of experts without rows."""
    empty = offsets == F.pad(offsets, (1, 0))[:-1]
    return matrices.masked_fill(empty[:, None, None], 0)


def _missing(width: int, dtype: torch.dtype) -> int:
    return -width % (16 // dtype.itemsize)  # grouped_mm wants strides that are multiples of 16 bytes


def _pad_width(rows: Tensor) -> Tensor:
    missing = _missing(rows.shape[1], rows.dtype)
    return F.pad(rows, (0, missing)) if missing else aligned(_dense(rows))


def _pad_matrix(weight: Tensor) -> Tensor:
    """Pad both matrix dims of (E, in, out), and keep the memory order."""
    if weight.stride(-1) != 1 and weight.stride(-2) == 1:
        return _pad_matrix(weight.mT).mT
    rows, columns = (_missing(size, weight.dtype) for size in weight.shape[1:])
    return F.pad(weight, (0, columns, 0, rows)) if rows or columns else aligned(_dense(weight))


def _dense(x: Tensor) -> Tensor:
    """Contiguous `x`, with the usual strides even where a size is 1: grouped_mm looks at these as well."""
    usual = tuple(math.prod(x.shape[dim + 1 :]) for dim in range(x.dim()))
    return x if x.stride() == usual else x.clone(memory_format=torch.contiguous_format)


def aligned(x: Tensor) -> Tensor:
    """Return `x`, or a copy if it does not begin at a multiple of 16 bytes: neither grouped_mm nor TMA takes it so."""
    return x.clone() if x.data_ptr() % 16 else x


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
    if gates is not None:
        slots = slots * gates[..., None].to(slots.dtype)  # no matrix product: it could be in tf32
    return slots.sum(1).to(rows.dtype)


def _sorted_gates(gates: Tensor, order: Tensor) -> Tensor:
    return gates.reshape(-1).index_select(0, order)[:, None]


def _scale(rows: Tensor, gates: Tensor) -> Tensor:
    return (rows * gates).to(rows.dtype)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
