"""Stick-breaking attention to a paged cache: keys and values lie in pages of a pool, found through a table.

For decoding, so without gradients. Letters: B sequences, Hq query and Hkv key/value heads, T new tokens, D head dim.
"""

import torch
from torch import Tensor

from . import stickbreaking_triton
from .backend import DTYPES, autocast_dtype, choose_backend, library, requested_backend, without_autocast
from .stickbreaking import check_lengths, stickbreaking_attention

_OP = "stickbreaking_paged_attention"
BACKENDS = ("triton", "torch")


def stickbreaking_paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = True,
    early_stop: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal stick-breaking attention of each sequence's last T tokens to its keys in a paged cache.

    "triton" reads the pages where they are. "torch", which runs on every device, first copies the pages of the table
    together, and where it is not asked for by name leaves the rest to what `stickbreaking_attention` chooses.

    Args:
        q: (B, Hq, T, D); the queries are the last T of a sequence's `lengths` positions.
        k_pages: (num_pages, page_size, Hkv, D). Query head h reads key/value head h // (Hq / Hkv).
        v_pages: as `k_pages`.
        block_table: (B, max_pages) int32 or int64; key j of sequence b is at `[block_table[b, j // page_size],
            j % page_size]`. Entries past a sequence's length are not used.
        lengths: (B,) int32 or int64, keys of each sequence, its T new ones included. On other devices than the CPU,
            where a look would stop the device, values of `block_table` and `lengths` are not checked.
        scale: factor of q . k, default D ** -0.5.
        attend_current: see `stickbreaking_attention`, as are `early_stop` and `backend`.

    Returns:
        out (B, Hq, T, D) in the dtype of q; remainder (B, Hq, T) in float32 (float64).

    Raises:
        ValueError: shapes that do not fit, lengths below T or beyond the table, page numbers that do not exist.
        TypeError: dtypes that differ or are not what is said above.
        RuntimeError: inputs that require a gradient, tensors on several devices, or a backend that cannot be had.
    """
    q, k_pages, v_pages = (x.to(autocast_dtype(x)) for x in (q, k_pages, v_pages))
    _check(q, k_pages, v_pages, block_table, lengths)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    name = requested_backend(_OP, backend, BACKENDS)
    out, remainder = torch.ops.modmoe.stickbreaking_paged_attention(
        q, k_pages, v_pages, block_table, lengths, scale, attend_current, early_stop, name
    )
    return out, remainder


def _check(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    tensors = (q, k_pages, v_pages, block_table, lengths)
    if q.dim() != 4 or k_pages.dim() != 4 or k_pages.shape != v_pages.shape or q.shape[3] != k_pages.shape[3]:
        raise ValueError(
            "q must be (B, Hq, T, D) and k_pages, v_pages (num_pages, page_size, Hkv, D), "
            f"got {tuple(q.shape)}, {tuple(k_pages.shape)}, {tuple(v_pages.shape)}"
        )
    if 0 in k_pages.shape or q.shape[1] % k_pages.shape[2]:
        raise ValueError(
            "there must be pages with slots and a head dim, and query heads a multiple of key/value heads, "
            f"got {q.shape[1]} query heads and pages {tuple(k_pages.shape)}"
        )
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"block_table must be ({q.shape[0]}, max_pages) and lengths ({q.shape[0]},), "
            f"got {tuple(block_table.shape)} and {tuple(lengths.shape)}"
        )
    if not q.dtype == k_pages.dtype == v_pages.dtype or q.dtype not in DTYPES:
        raise TypeError(
            f"q and pages must share one dtype of {DTYPES}, got {q.dtype}, {k_pages.dtype}, {v_pages.dtype}"
        )
    for name, x in (("block_table", block_table), ("lengths", lengths)):
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if len({x.device for x in tensors}) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {sorted({str(x.device) for x in tensors})}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_pages, v_pages)):
        raise RuntimeError("attention to a paged cache has no gradient: call it under torch.no_grad()")


def _check_values(block_table: Tensor, lengths: Tensor, num_queries: int, num_pages: int, page_size: int) -> None:
    """Look at the numbers in the table; tensors on the CPU."""
    check_lengths(lengths, num_queries, block_table.shape[1] * page_size)
    used = torch.arange(block_table.shape[1]) * page_size < lengths[:, None]
    if bool((used & ((block_table < 0) | (block_table >= num_pages))).any()):
        raise ValueError(f"there are {num_pages} pages, block_table names {block_table[used].unique().tolist()}")


@without_autocast
def _forward(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    attend_current: bool,
    early_stop: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        _check_values(block_table, lengths, q.shape[2], *k_pages.shape[:2])
    usable = {"triton": lambda: stickbreaking_triton.problem(q), "torch": lambda: None}
    if choose_backend(_OP, backend, usable) == "triton":
        return stickbreaking_triton.paged_forward(
            q, k_pages, v_pages, block_table, lengths, scale, attend_current, early_stop
        )
    if q.numel() == 0:
        return _forward_fake(q, k_pages, v_pages, block_table, lengths, scale, attend_current, early_stop, backend)
    k, v = _gather(k_pages, v_pages, block_table, lengths)
    out, remainder = stickbreaking_attention(
        q,
        k,
        v,
        scale=scale,
        attend_current=attend_current,
        lengths=lengths,
        early_stop=early_stop,
        backend=None if backend == "auto" else "torch",
    )
    return out, remainder


def _gather(k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Copy the pages of the table to keys and values (B, Hkv, S, D); of pages past a sequence's length, any."""
    page_size = k_pages.shape[1]
    num_pages = block_table.shape[1]
    if lengths.device.type == "cpu" and lengths.numel():  # elsewhere this would be a host sync
        num_pages = -(-int(lengths.max()) // page_size)
    used = torch.arange(num_pages, device=lengths.device) * page_size < lengths[:, None]
    page = torch.where(used, block_table[:, :num_pages], 0)
    k, v = (x[page].flatten(1, 2).transpose(1, 2) for x in (k_pages, v_pages))
    return k, v


def _forward_fake(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    attend_current: bool,
    early_stop: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


library.define(
    f"{_OP}(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor lengths, float scale, "
    "bool attend_current, bool early_stop, str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.impl(_OP, _forward, "CompositeExplicitAutograd")
torch.library.register_fake(f"modmoe::{_OP}", _forward_fake, lib=library)
