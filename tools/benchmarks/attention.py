"""Attention, one sequence at a time: training steps of the op, and decoding steps against a cache.

Letters: Hq query heads, Hkv key/value heads, T queries, S keys, D head dim. Two kinds of random inputs, by how long a
stick lasts: "short" ones are normal, so that sigmoids are about a half and it lasts some dozens of keys; for "long"
ones the logits are lowered by log S, so that it lasts the whole context and nobody can stop early.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workload import Contender, Run, Workload
from modmoe.ops import reference, stickbreaking_attention

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Mode: TypeAlias = Callable[[Attend], Run]
Kind: TypeAlias = Literal["short", "long"]
KINDS: tuple[Kind, ...] = ("short", "long")

_REFERENCE_ROWS = 512


class Inputs(NamedTuple):
    """q, dout (1, Hq, T, D), k, v (1, Hkv, S, D), drem (1, Hq, T) in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    drem: Tensor


class Shape(NamedTuple):
    query_heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int


def draw(shape: Shape, kind: Kind, device: torch.device, dtype: torch.dtype) -> Inputs:
    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, shape.head_dim, device=device, dtype=dtype)

    q, k, v = (
        normal(shape.query_heads, shape.queries),
        normal(shape.kv_heads, shape.keys),
        normal(shape.kv_heads, shape.keys),
    )
    if kind == "long":
        shift = math.sqrt(math.log(shape.keys) * math.sqrt(shape.head_dim))
        q[..., 0], k[..., 0] = shift, -shift
    drem = torch.randn(q.shape[:3], device=device)
    return Inputs(*(x.requires_grad_() for x in (q, k, v)), torch.randn_like(q), drem)


def training(
    heads: tuple[int, int],
    head_dim: int,
    length: int,
    kind: Kind,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[Contender, ...] = (),
) -> Workload:
    """Forward and backward over a causal sequence; `heads` is (Hq, Hkv), `backend` the one with early stop."""
    shape = Shape(*heads, head_dim, length, length)
    return training_on(
        f"attention training, D {head_dim}, T {length}, {kind} sticks",
        lambda: draw(shape, kind, device, dtype),
        shape,
        dtype,
        (*ours(forward_backward, backend), *peers),
    )


def training_on(
    name: str, draw: Callable[[], Inputs], shape: Shape, dtype: torch.dtype, contenders: tuple[Contender, ...]
) -> Workload:
    # Per pair of a query and a key: two products of D in forward, and in backward these logits again and four more.
    pairs = shape.query_heads * shape.queries**2 / 2
    # Forward moves q, out and k, v; backward q, dout, dq and k, v, dk, dv.
    rows = 5 * shape.query_heads + 6 * shape.kv_heads
    return Workload(
        name=name,
        draw=draw,
        contenders=contenders,
        tokens=shape.queries,
        flops=7 * 2 * shape.head_dim * pairs,
        bytes=rows * shape.queries * shape.head_dim * dtype.itemsize,
    )


def decoding(
    heads: tuple[int, int],
    head_dim: int,
    cache: int,
    kind: Kind,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[Contender, ...] = (),
) -> Workload:
    """One new query against `cache` keys."""
    shape = Shape(*heads, head_dim, 1, cache)
    return Workload(
        name=f"attention decoding, D {head_dim}, cache {cache}, {kind} sticks",
        draw=lambda: draw(shape, kind, device, dtype),
        contenders=(*ours(forward_only, backend), *peers),
        tokens=1,
        flops=2 * 2 * head_dim * cache * heads[0],
        bytes=2 * cache * heads[1] * head_dim * dtype.itemsize,
    )


# Who attends. `mode` is `forward_backward` or `forward_only`.


def ours(mode: Mode, backend: str, attend_current: bool = True) -> tuple[Contender, ...]:
    """One backend with early stop and without."""
    reference = _exact(mode, attend_current)
    stop, read_all = (mode(_stickbreaking(backend, early_stop, attend_current)) for early_stop in (True, False))
    return (
        Contender(backend, stop, reference, "ours"),
        Contender(f"{backend}, all keys", read_all, reference, "ours"),
    )


def pytorch(mode: Mode) -> Contender:
    return Contender("torch", mode(_stickbreaking("torch", early_stop=True)), _exact(mode), "baseline")


def public_triton() -> Contender:
    """https://github.com/shawntan/stickbreaking-attention"""
    return Contender("stickbreaking_attention", forward_backward(_public_triton), _exact(forward_backward))


def softmax_training() -> tuple[Contender, ...]:
    """FlashAttention-2 by both its names: another function, at the price that ours is compared with."""
    reference = in_blocks(_exact_softmax)
    return (
        Contender("flash_attn (softmax)", forward_backward(_flash_attn), reference),
        Contender("SDPA flash (softmax)", forward_backward(_sdpa_flash), reference),
    )


# How an attention function is run.


def forward_backward(attend: Attend) -> Run:
    def run(x: Inputs) -> dict[str, Tensor]:
        outputs = attend(x.q, x.k, x.v)
        incoming = [grad.to(out.dtype) for out, grad in zip(outputs, (x.dout, x.drem), strict=False)]
        grads = torch.autograd.grad(outputs, (x.q, x.k, x.v), incoming)
        return {"out": outputs[0].detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    return run


def forward_only(attend: Attend) -> Run:
    @torch.no_grad()
    def run(x: Inputs) -> dict[str, Tensor]:
        return {"out": attend(x.q, x.k, x.v)[0]}

    return run


def in_blocks(attend: Attend) -> Run:
    """As `forward_backward`, one head and some queries at a time: for functions that hold all their weights."""
    step = forward_backward(attend)

    def run(x: Inputs) -> dict[str, Tensor]:
        shapes = {"out": x.q, "dq": x.q, "dk": x.k, "dv": x.v}
        results = {name: torch.zeros_like(like, requires_grad=False) for name, like in shapes.items()}
        groups = x.q.shape[1] // x.k.shape[1]
        for head in range(x.q.shape[1]):
            for start in range(0, x.q.shape[2], _REFERENCE_ROWS):
                end = min(start + _REFERENCE_ROWS, x.q.shape[2])
                kv_head = head // groups
                rows = (slice(None), slice(head, head + 1), slice(start, end))
                keys = (slice(None), slice(kv_head, kv_head + 1), slice(0, end))
                parts = (t.detach().requires_grad_() for t in (x.q[rows], x.k[keys], x.v[keys]))
                block = step(Inputs(*parts, x.dout[rows], x.drem[rows]))
                for name, where in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
                    results[name][where] += block[name]
        return results

    return run


@functools.cache  # one function for all contenders, so that it runs once
def _exact(mode: Mode, attend_current: bool = True) -> Run:
    attend = functools.partial(_exact_stickbreaking, attend_current=attend_current)
    return in_blocks(attend) if mode is forward_backward else mode(attend)


# Attention functions: q (B, Hq, T, D), k and v (B, Hkv, S, D) -> (out,) or (out, remainder).


def _stickbreaking(backend: str, early_stop: bool, attend_current: bool = True) -> Attend:
    return functools.partial(
        stickbreaking_attention, backend=backend, early_stop=early_stop, attend_current=attend_current
    )


def _exact_stickbreaking(q: Tensor, k: Tensor, v: Tensor, attend_current: bool) -> tuple[Tensor, ...]:
    return reference.stickbreaking_attention(q, k, v, q.shape[-1] ** -0.5, attend_current, None, None)[:2]


def _exact_softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    num_queries, num_keys = q.shape[2], k.shape[2]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    return (F.scaled_dot_product_attention(q, k, v, attn_mask=visible),)


def _public_triton(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    from stickbreaking_attention import sb_attn

    outputs: tuple[Tensor, ...] = sb_attn(q, k, v, attend_current=True)
    return outputs


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
    return (out.transpose(1, 2),)


def _sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)
