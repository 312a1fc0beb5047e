"""Stick-breaking attention: the entry point to its implementations.

    A_ij  = sigmoid(z_ij) prod_{j<l<=i} (1 - sigmoid(z_il))
    out_i = sum_j A_ij v_j,   rem_i = prod_{l<=i} (1 - sigmoid(z_il))

(arXiv:2410.17980; the strict form takes j < i and l < i.) Letters: B batch, Hq query heads, Hkv key/value heads,
G = Hq / Hkv, T queries, S keys, D head dim.
"""

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference, stickbreaking_cpp, stickbreaking_torch, stickbreaking_triton
from .backend import (
    DTYPES,
    autocast_dtype,
    choose_backend,
    library,
    no_second_derivative,
    requested_backend,
    without_autocast,
)

# Best first. The reference stands apart: autograd goes through it, and it alone returns weights.
_IMPLEMENTATIONS = {"cpp": stickbreaking_cpp, "triton": stickbreaking_triton, "torch": stickbreaking_torch}
BACKENDS = (*_IMPLEMENTATIONS, "reference")


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
    lengths: Tensor | None = None,
    return_weights: bool = False,
    early_stop: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Causal stick-breaking attention (arXiv:2410.17980), with grouped key/value heads, packing and a cache.

    Every query breaks pieces off a stick of length 1, the nearest key first; what is left is the remainder. Rows of
    weights sum to 1 - remainder. Memory is linear in T unless the weights are asked for. Under autocast q, k and v are
    cast to its dtype; products and sums along keys are in float32 (float64 for float64 inputs).

    Args:
        q: (B, Hq, T, D) in float32, float64, bfloat16 or float16; the queries are the last T of the S positions.
        k: (B, Hkv, S, D), S >= T. Query head h reads key/value head h // (Hq / Hkv).
        v: (B, Hkv, S, D).
        scale: factor of q . k, default D ** -0.5.
        attend_current: True: a query sees its own position (ModuleFormer). False: only earlier ones.
        key_mask: (B, S) bool; a False key gets weight 0 and takes nothing of the stick, as if it were absent;
            its numbers must be finite all the same, for 0 * nan is nan.
        cu_seqlens: (n + 1,) int32 or int64, starts of packed documents over the flattened B * T positions, then
            B * T; documents do not cross rows. Needs T == S. Values are not checked.
        document_start: (B, T) integer, index of the first key that each query may see; the general form of
            `cu_seqlens`, give one of them.
        lengths: (B,) int32 or int64, T to S: of a cache with room for more, how many keys each sequence has. Its
            queries are the last T of them, and what lies behind is not read. There is no gradient. On other devices
            than the CPU, where a look would stop the device, values are not checked.
        return_weights: also return the weights (B, Hq, T, S), through the reference.
        early_stop: let a block of queries stop reading older keys once all its sticks are used up; what it leaves out,
            of the remainder too, is below the resolution of q's dtype. A permission: "torch" and "reference" read all
            keys.
        backend: see `modmoe.ops.backend`; weights come from "reference" alone.

    Returns:
        out (B, Hq, T, D) in the dtype of q; remainder (B, Hq, T) in float32 (float64); with `return_weights`, also the
        weights in that dtype. All are differentiable.

    Raises:
        ValueError: shapes that do not fit, T > S, Hq not a multiple of Hkv, both `cu_seqlens` and `document_start`,
            lengths below T or above S.
        TypeError: dtypes that differ or are not what is said above.
        RuntimeError: tensors on several devices, a gradient wanted with `lengths`, or a backend that cannot be had.
    """
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))
    _check(q, k, v, key_mask, cu_seqlens, document_start, lengths)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if cu_seqlens is not None:
        document_start = _document_start(cu_seqlens, q.shape[0], q.shape[2])
    name = requested_backend("stickbreaking_attention", backend, BACKENDS)
    if return_weights and name not in ("auto", "reference"):
        raise RuntimeError(f"stickbreaking_attention: backend {name!r} has no weights to return, 'reference' has them")
    if return_weights or name == "reference":
        result = reference.stickbreaking_attention(q, k, v, scale, attend_current, key_mask, document_start, lengths)
        return result if return_weights else result[:2]
    out, remainder = torch.ops.modmoe.stickbreaking_attention(
        q, k, v, key_mask, document_start, scale, attend_current, early_stop, name, lengths
    )
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
    lengths: Tensor | None,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "q must be (B, Hq, T, D) and k, v (B, Hkv, S, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(
            f"q and k must share batch and a head dim of 1 or more, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {q.shape[1]} and {k.shape[1]}")
    if num_queries > num_keys:
        raise ValueError(f"queries are the last positions of the keys, got {num_queries} queries, {num_keys} keys")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError(f"q, k and v must share one dtype of {DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}")
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
    if lengths is not None:
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must have shape ({batch},), got {tuple(lengths.shape)}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise RuntimeError("attention with lengths has no gradient: call it under torch.no_grad()")
    devices = {t.device for t in (q, k, v, key_mask, cu_seqlens, document_start, lengths) if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


def _implementation(name: str, q: Tensor) -> ModuleType:
    problems = {key: partial(module.problem, q) for key, module in _IMPLEMENTATIONS.items()}
    return _IMPLEMENTATIONS[choose_backend("stickbreaking_attention", name, problems)]


def check_lengths(lengths: Tensor, num_queries: int, num_keys: int) -> None:
    """Look at numbers on the CPU.

    Raises:
        ValueError: a sequence with fewer keys than queries, or with more than there is room for.
    """
    if bool(((lengths < num_queries) | (lengths > num_keys)).any()):
        raise ValueError(
            f"lengths must be between the {num_queries} queries and the {num_keys} keys there is room for, "
            f"got {lengths.tolist()}"
        )


@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
    early_stop: bool,
    backend: str,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if lengths is not None and lengths.device.type == "cpu":
        check_lengths(lengths, q.shape[2], k.shape[2])
    run = _implementation(backend, q).forward
    result: tuple[Tensor, Tensor] = run(q, k, v, key_mask, document_start, scale, attend_current, early_stop, lengths)
    return result


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
    early_stop: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz_ij = a_ij - sigmoid(z_ij) * (rem_i * drem_i + sum_{l<=j} a_il), with a_ij = A_ij * <dout_i, v_j>."""
    run = _implementation(backend, q).backward
    result: tuple[Tensor, Tensor, Tensor] = run(
        dout, drem, q, k, v, key_mask, document_start, scale, attend_current, early_stop
    )
    return result


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
    early_stop: bool,
    backend: str,
    lengths: Tensor | None = None,
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
    early_stop: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.attend_current, ctx.early_stop, ctx.backend, _lengths = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dout: Tensor, drem: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.modmoe.stickbreaking_attention_backward(
        dout, drem, *ctx.saved_tensors, ctx.scale, ctx.attend_current, ctx.early_stop, ctx.backend
    )
    return *grads, *(None,) * 7


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? document_start, float scale, bool attend_current, "
    "bool early_stop, str backend"
)
library.define(
    f"stickbreaking_attention({_ARGUMENTS}, Tensor? lengths=None) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
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
no_second_derivative("stickbreaking_attention")
