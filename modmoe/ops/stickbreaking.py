"""Stick-breaking attention without a T x T matrix, in plain PyTorch.

    A_ij  = sigmoid(z_ij) prod_{j<l<=i} (1 - sigmoid(z_il))
    out_i = sum_j A_ij v_j,   rem_i = prod_{l<=i} (1 - sigmoid(z_il))

(arXiv:2410.17980; the strict form takes j < i and l < i.) Work goes block of queries by block of queries, each with
all the keys it can see, and backward computes each block again. Letters: B batch, Hq query heads, Hkv key/value
heads, G = Hq / Hkv, T queries, S keys, D head dim; t and s are the queries and keys of one block.

The products are taken as products (torch.cumprod, from the diagonal leftwards), not as exponentials of sums of logs.
Nothing is divided and no log is taken, so a factor of 0, where a sigmoid saturates, is harmless in both directions;
and it is the cheaper way: one exponential per element, and no sum of logs whose rounding grows with its size.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import autocast_dtype, library, resolve_backend, without_autocast

# Rows (queries times heads of a group) and elements of one block's matrices: on CPU few rows, so that little is
# computed beyond the diagonal, and few elements, so that they stay in the cache; elsewhere, enough to fill the device.
_CPU_ELEMENTS = 1 << 19
_CPU_ROWS = 64
_DEVICE_ROWS = 128


def stickbreaking_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = True,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    document_start: Tensor | None = None,
    return_weights: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Causal stick-breaking attention (arXiv:2410.17980), with grouped key/value heads, packing and a cache.

    Every query breaks pieces off a stick of length 1, the nearest key first; what is left is the remainder. Rows of
    weights sum to 1 - remainder. Memory is linear in T unless the weights are asked for. Under autocast q, k and v are
    cast to its dtype; products and sums along keys are in float32 (float64 for float64 inputs).

    Args:
        q: (B, Hq, T, D); the queries are the last T of the S positions.
        k: (B, Hkv, S, D), S >= T. Query head h reads key/value head h // (Hq / Hkv).
        v: (B, Hkv, S, D).
        scale: factor of q . k, default D ** -0.5.
        attend_current: True: a query sees its own position (ModuleFormer). False: only earlier ones.
        key_mask: (B, S) bool; a False key gets weight 0 and takes nothing of the stick, as if it were absent.
        cu_seqlens: (n + 1,) int32 or int64, starts of packed documents over the flattened B * T positions, then
            B * T; documents do not cross rows. Needs T == S. Values are not checked.
        document_start: (B, T) integer, index of the first key that each query may see; the general form of
            `cu_seqlens`, give one of them.
        return_weights: also return the weights (B, Hq, T, S), through the reference.
        backend: see `modmoe.ops.backend`.

    Returns:
        out (B, Hq, T, D) in the dtype of q; remainder (B, Hq, T) in float32 (float64); with `return_weights`, also the
        weights in that dtype. All are differentiable.

    Raises:
        ValueError: shapes that do not fit, T > S, Hq not a multiple of Hkv, both `cu_seqlens` and `document_start`.
        TypeError: dtypes that differ or are not what is said above.
        RuntimeError: tensors on several devices, or a backend that cannot be had.
    """
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
    _check(q, k, v, key_mask, cu_seqlens, document_start)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if cu_seqlens is not None:
        document_start = _document_start(cu_seqlens, q.shape[0], q.shape[2])
    available = ("reference",) if return_weights else ("torch", "reference")
    if resolve_backend("stickbreaking_attention", backend, available) == "reference":
        result = reference.stickbreaking_attention(q, k, v, scale, attend_current, key_mask, document_start)
        return result if return_weights else result[:2]
    out, remainder = torch.ops.modmoe.stickbreaking_attention(q, k, v, key_mask, document_start, scale, attend_current)
    return out, remainder


def _document_start(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """Turn packed boundaries into the first visible key of each query, (B, T), without a host sync."""
    position = torch.arange(batch * length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.to(torch.int64), position, right=True) - 1
    start = cu_seqlens[document].view(batch, length)
    return start - position.view(batch, length)[:, :1]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    document_start: Tensor | None,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "q must be (B, Hq, T, D) and k, v (B, Hkv, S, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must share batch and head dim, got {tuple(q.shape)} and {tuple(k.shape)}")
    batch, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {q.shape[1]} and {k.shape[1]}")
    if num_queries > num_keys:
        raise ValueError(f"queries are the last positions of the keys, got {num_queries} queries, {num_keys} keys")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise TypeError(f"q, k and v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool (True = keep), got {key_mask.dtype}")
        if key_mask.shape != (batch, num_keys):
            raise ValueError(f"key_mask must have shape ({batch}, {num_keys}), got {tuple(key_mask.shape)}")
    if cu_seqlens is not None:
        if document_start is not None:
            raise ValueError("give cu_seqlens or document_start, not both")
        if num_queries != num_keys:
            raise ValueError(f"cu_seqlens needs as many queries as keys, got {num_queries} and {num_keys}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens must be 1-D with 2 entries or more, got {tuple(cu_seqlens.shape)}")
    if document_start is not None:
        if document_start.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"document_start must be int32 or int64, got {document_start.dtype}")
        if document_start.shape != (batch, num_queries):
            raise ValueError(
                f"document_start must have shape ({batch}, {num_queries}), got {tuple(document_start.shape)}"
            )
    devices = {t.device for t in (q, k, v, key_mask, cu_seqlens, document_start) if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


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


def _group(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, T, ...) -> (B * Hkv, T, G, ...), contiguous."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).transpose(2, 3).flatten(0, 1).contiguous()


def _ungroup(x: Tensor, kv_heads: int) -> Tensor:
    """(B * Hkv, T, G, ...) -> (B, Hq, T, ...), contiguous."""
    return x.unflatten(0, (x.shape[0] // kv_heads, kv_heads)).transpose(2, 3).flatten(1, 2).contiguous()


def _blocks(p: _Problem) -> Iterator[_Block]:
    n, num_queries, groups, _ = p.q.shape
    num_keys = p.k.shape[1]
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


@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
) -> tuple[Tensor, Tensor]:
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


@without_autocast
def _backward(
    dout: Tensor,
    drem: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
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


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
) -> tuple[Tensor, Tensor]:
    remainder = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), remainder


def _backward_fake(
    dout: Tensor,
    drem: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.attend_current = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dout: Tensor, drem: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.modmoe.stickbreaking_attention_backward(
        dout, drem, *ctx.saved_tensors, ctx.scale, ctx.attend_current
    )
    return *grads, None, None, None, None


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? document_start, float scale, bool attend_current"
library.define(f"stickbreaking_attention({_ARGUMENTS}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
library.define(
    f"stickbreaking_attention_backward(Tensor dout, Tensor drem, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.impl("stickbreaking_attention", _forward, "CompositeExplicitAutograd")
library.impl("stickbreaking_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("modmoe::stickbreaking_attention", _forward_fake, lib=library)
torch.library.register_fake("modmoe::stickbreaking_attention_backward", _backward_fake, lib=library)
torch.library.register_autograd(
    "modmoe::stickbreaking_attention", _autograd, setup_context=_setup_context, lib=library
)
