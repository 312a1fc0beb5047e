"""Stick-breaking attention in blocks, in plain PyTorch: runs everywhere, and never holds a T x T matrix.

Work goes block of queries by block of queries, each with all the keys it can see, and backward computes each block
again. Letters as in `stickbreaking.py`; t and s are the queries and keys of one block.

The products are taken as products (torch.cumprod, from the diagonal leftwards), not as exponentials of sums of logs.
Nothing is divided and no log is taken, so a factor of 0, where a sigmoid saturates, is harmless in both directions;
and it is the cheaper way: one exponential per element, and no sum of logs whose rounding grows with its size.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rows (queries times heads of a group) and elements of one block's matrices: on CPU few rows, so that little is
# computed beyond the diagonal, and few elements, so that they stay in the cache; elsewhere, enough to fill the device.
_CPU_ELEMENTS = 1 << 19
_CPU_ROWS = 64
_DEVICE_ROWS = 128


class _Block(NamedTuple):
    """Queries [q0, q1) of the flattened key/value heads [n0, n1), and the keys [k0, k1) that they can see.

    `ragged`: documents may start between k0 and k1.
    """

    n0: int
    n1: int
    q0: int
    q1: int
    k0: int
    k1: int
    ragged: bool


class _Problem(NamedTuple):
    """Inputs in the layout of the loops: n = B * Hkv independent problems, query heads of a group side by side.

    q (n, T, G, D), k and v (n, S, D), key_mask (n, S) or None, document_start (n, T) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    document_start: Tensor | None
    scale: float
    attend_current: bool


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
) -> _Problem:
    kv_heads = k.shape[1]
    # CPUs multiply bfloat16 faster than float32, float16 far slower.
    dtype = torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype
    if key_mask is not None:
        key_mask = key_mask.repeat_interleave(kv_heads, dim=0)
    if document_start is not None:
        document_start = document_start.repeat_interleave(kv_heads, dim=0)
    return _Problem(
        _group(q, kv_heads).to(dtype),
        k.flatten(0, 1).to(dtype),
        v.flatten(0, 1).to(dtype),
        key_mask,
        document_start,
        scale,
        attend_current,
    )


def ending_together(
    tensors: Sequence[Tensor], key_mask: Tensor | None, lengths: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Copy what a cache with room for more holds of each sequence, so that all sequences end at the last slot.

    Args:
        tensors: (B, heads, S, D) each, with the sequences at the beginning.
        key_mask: (B, S) bool, keys that exist; None is all.
        lengths: (B,) integer, of the sequences.

    Returns:
        The copies, with any keys of a sequence in front of it; (B, S) bool, which of their keys exist.
    """
    num_slots = tensors[0].shape[2]
    index = torch.arange(num_slots, device=lengths.device) - (num_slots - lengths[:, None])
    exists = index >= 0
    index = index.clamp(min=0)
    moved = [x.take_along_dim(index[:, None, :, None], 2) for x in tensors]
    return moved, exists if key_mask is None else exists & key_mask.gather(1, index)


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, T, ...) -> (B * Hkv, T, G, ...), contiguous."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).transpose(2, 3).flatten(0, 1).contiguous()


def _ungroup(x: Tensor, kv_heads: int) -> Tensor:
    """(B * Hkv, T, G, ...) -> (B, Hq, T, ...), contiguous."""
    return x.unflatten(0, (x.shape[0] // kv_heads, kv_heads)).transpose(2, 3).flatten(1, 2).contiguous()


def _blocks(p: _Problem) -> Iterator[_Block]:
    n, num_queries, groups, _ = p.q.shape
    num_keys = p.k.shape[1]
    if p.q.numel() == 0:
        return
    on_cpu = p.q.device.type == "cpu"
    q_step = max(1, (_CPU_ROWS if on_cpu else _DEVICE_ROWS) // groups)
    n_step = max(1, _CPU_ELEMENTS // (groups * min(q_step, num_queries) * num_keys)) if on_cpu else n
    for n0 in range(0, n, n_step):
        n1 = min(n, n0 + n_step)
        for q0 in range(0, num_queries, q_step):
            q1 = min(num_queries, q0 + q_step)
            k0, k1 = 0, num_keys - num_queries + q1
            ragged = p.document_start is not None
            if p.document_start is not None and on_cpu:  # elsewhere this would be a host sync
                first, last = (int(x) for x in p.document_start[n0:n1, q0:q1].aminmax())
                k0 = min(max(first, 0), k1 - 1)
                ragged = last > k0
            yield _Block(n0, n1, q0, q1, k0, k1, ragged)


def _rows(x: Tensor, block: _Block) -> Tensor:
    """The block's queries of a grouped tensor: (n, T, G, D) -> (n, t * G, D), a view."""
    return x[block.n0 : block.n1, block.q0 : block.q1].flatten(1, 2)


class _Scratch:
    """Memory for one block's matrices, reused by all blocks: fresh memory costs a page fault every 4 kB."""

    def __init__(self, p: _Problem, blocks: list[_Block]) -> None:
        rows = [(b.n1 - b.n0) * (b.q1 - b.q0) * p.q.shape[2] for b in blocks]
        size = max((n * (b.k1 - b.k0) for n, b in zip(rows, blocks, strict=True)), default=0)
        dtype = torch.promote_types(p.q.dtype, torch.float32)
        self.beta = p.q.new_empty(size, dtype=dtype)
        self.stick = p.q.new_empty(size + max(rows, default=0), dtype=dtype)
        self.weights = p.q.new_empty(size, dtype=dtype)
        # Factors and results of matrix products, where those are in a lower precision.
        self.low = None if dtype == p.q.dtype else p.q.new_empty(size)

    def bmm(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        if self.low is None:
            return torch.bmm(a, b, out=out)
        return out.copy_(torch.bmm(a, b, out=_view(self.low, out.shape)))

    def factor(self, x: Tensor) -> Tensor:
        """`x` in the precision of the matrix products; valid until the next call of either method."""
        return x if self.low is None else _view(self.low, x.shape).copy_(x)


def problem(q: Tensor) -> str | None:
    """Say why this implementation cannot run on such tensors: never."""
    return None


def _view(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _weights(p: _Problem, block: _Block, scratch: _Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigmoid(z) and the weights, (n, t * G, s), and the remainder, (n, t, G), of one block."""
    n0, n1, q0, q1, k0, k1, _ = block
    n, t, groups, s = n1 - n0, q1 - q0, p.q.shape[2], k1 - k0
    shape = (n, t * groups, s)
    beta = scratch.bmm(_rows(p.q, block), p.k[n0:n1, k0:k1].mT, _view(scratch.beta, shape))
    beta.mul_(p.scale).sigmoid_()
    _hide(beta.view(n, t, groups, s), p, block)
    stick = _view(scratch.stick, (n, t * groups, s + 1))
    stick[..., 0] = 1
    torch.sub(1, beta.flip(-1), out=stick[..., 1:])
    stick.cumprod_(-1)
    weights = torch.mul(beta, stick[..., :-1].flip(-1), out=_view(scratch.weights, shape))
    return beta, weights, stick[..., -1].view(n, t, groups)


def _hide(beta: Tensor, p: _Problem, block: _Block) -> None:
    """Zero the sigmoids of keys that a query must not see: they get no weight and take nothing of the stick."""
    n0, n1, q0, q1, k0, k1, _ = block
    t, s = q1 - q0, k1 - k0
    if t > 1 or not p.attend_current:
        # The last t columns are the block's own positions; no other column reaches past the diagonal.
        own = min(s, t)
        causal = torch.ones(t, own, dtype=beta.dtype, device=beta.device).tril_(own - t - (not p.attend_current))
        beta[..., s - own :].mul_(causal[:, None])
    if p.key_mask is not None:
        beta.mul_(p.key_mask[n0:n1, None, None, k0:k1])
    if block.ragged and p.document_start is not None:
        index = torch.arange(k0, k1, device=beta.device)
        beta.mul_((index >= p.document_start[n0:n1, q0:q1, None, None]).to(beta.dtype))


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
    """Return out and remainder; old keys are read even when the stick is used up."""
    if lengths is not None:
        if document_start is not None:
            document_start = document_start + (k.shape[2] - lengths)[:, None]
        (k, v), key_mask = ending_together((k, v), key_mask, lengths)
    p = _problem(q, k, v, key_mask, document_start, scale, attend_current)
    out = torch.empty_like(p.q)
    remainder = out.new_empty(out.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    blocks = list(_blocks(p))
    scratch = _Scratch(p, blocks)
    for block in blocks:
        n0, n1, q0, q1, k0, k1, _ = block
        _, weights, rest = _weights(p, block, scratch)
        _rows(out, block).copy_(torch.bmm(scratch.factor(weights), p.v[n0:n1, k0:k1]))
        remainder[n0:n1, q0:q1] = rest
    return _ungroup(out, k.shape[1]).to(q.dtype), _ungroup(remainder, k.shape[1])


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
    """dz_ij = a_ij - sigmoid(z_ij) * (rem_i * drem_i + sum_{l<=j} a_il), with a_ij = A_ij * <dout_i, v_j>."""
    p = _problem(q, k, v, key_mask, document_start, scale, attend_current)
    dout = _group(dout, k.shape[1]).to(p.q.dtype)
    drem = _group(drem, k.shape[1])
    dq = torch.empty_like(p.q)
    # Several blocks of queries add to the same keys: in float32, in the order of the blocks.
    dk = torch.zeros_like(p.k, dtype=drem.dtype)
    dv = torch.zeros_like(dk)
    blocks = list(_blocks(p))
    scratch = _Scratch(p, blocks)
    for block in blocks:
        n0, n1, q0, q1, k0, k1, _ = block
        beta, weights, rest = _weights(p, block, scratch)
        drest = (rest * drem[n0:n1, q0:q1]).flatten(1)
        dout_rows = _rows(dout, block)
        dv[n0:n1, k0:k1] += torch.bmm(scratch.factor(weights).mT, dout_rows)
        # From here on the memory of the stick is free.
        dweights = scratch.bmm(dout_rows, p.v[n0:n1, k0:k1].mT, _view(scratch.stick, weights.shape))
        a = weights.mul_(dweights)
        taken = torch.cumsum(a, -1, out=dweights).add_(drest[..., None])
        dz = scratch.factor(a.addcmul_(beta, taken, value=-1))
        torch.mul(torch.bmm(dz, p.k[n0:n1, k0:k1]), scale, out=_rows(dq, block))
        dk[n0:n1, k0:k1] += torch.bmm(dz.mT, _rows(p.q, block))
    return (
        _ungroup(dq, k.shape[1]).to(q.dtype),
        dk.mul_(scale).view_as(k).to(k.dtype),
        dv.view_as(v).to(v.dtype),
    )
