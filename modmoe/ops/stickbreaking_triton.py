"""Stick-breaking attention on NVIDIA GPUs, in Triton: what to launch (the kernels: stickbreaking_triton_kernels.py).

Letters: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv, T queries, S keys, D head dim. A tile is some rows
(queries times heads of a group) by some keys. Triton is imported on first use: this module imports without it.
"""

import functools
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Up to this many new queries, the keys are split among programs: the queries alone would leave most of a device idle.
_MAX_SPLIT_QUERIES = 16
# Programs per multiprocessor that a split aims at, the most splits of one launch, and the key blocks below which a
# split is not worth its program.
_PROGRAMS_PER_MULTIPROCESSOR = 4
_MAX_SPLITS = 128
_MIN_SPLIT_BLOCKS = 2
# Keys that are read between two looks at what is left of the sticks.
_KEYS_PER_LOOK = 256
# Numbers of a row that one program of the combination takes.
_COMBINE_DIM = 32
# Backward goes chunk by chunk of the rows, for the memory of its carries: at least so many row blocks of all heads
# together, to fill a device, and of each head, because every chunk adds to all of dk and dv.
_CHUNK_BLOCKS = 512
_CHUNK_BLOCKS_PER_HEAD = 16
_ALL = 2**30


class _Tiles(NamedTuple):
    """Rows and keys of a tile, warps of a program, and stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


class _Keys(NamedTuple):
    """Where keys and values lie: strides are those of (batch or page, head, key or slot of a page)."""

    k: Tensor
    v: Tensor
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    heads: int
    length: int  # at most
    table: Tensor | None = None
    lengths: Tensor | None = None
    page_size: int = 1


def problem(q: Tensor) -> str | None:
    """Say why this implementation cannot run on such tensors here; None if it can."""
    if q.device.type != "cuda" and not (q.device.type == "cpu" and "TRITON_INTERPRET" in os.environ):
        return f"it is for CUDA devices, the tensors are on {q.device.type!r}"
    if q.dtype not in _DTYPES:
        return f"it has no {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"it has head dims up to {MAX_HEAD_DIM}, got {q.shape[-1]}"
    if reason := _import_problem():
        return reason
    if q.device.type == "cpu":
        return _interpreter_problem(q.dtype)
    if torch.version.hip is not None:
        return "it is for NVIDIA devices, this is a ROCm build of torch"
    major, minor = torch.cuda.get_device_capability(q.device)
    return None if major >= 8 else f"it needs compute capability 8.0, the device has {major}.{minor}"


@functools.cache
def _import_problem() -> str | None:
    try:
        from . import stickbreaking_triton_kernels  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


def _interpreter_problem(dtype: torch.dtype) -> str | None:
    import triton

    from .stickbreaking_triton_kernels import forward_kernel

    if isinstance(forward_kernel, triton.JITFunction):
        return "the tensors are on 'cpu' and triton was imported without TRITON_INTERPRET=1"
    return "triton's interpreter gets torch.bfloat16 wrong" if dtype == torch.bfloat16 else None


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
    """Return out and remainder; few queries against many keys run with the keys split among programs."""
    k, v = _dense_rows(k), _dense_rows(v)
    lengths = None if lengths is None else lengths.to(torch.int32).contiguous()
    keys = _Keys(k, v, k.stride()[:3], v.stride()[:3], k.shape[1], k.shape[2], lengths=lengths)
    return _attend(q, keys, key_mask, document_start, scale, attend_current, early_stop)


def paged_forward(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    attend_current: bool,
    early_stop: bool,
) -> tuple[Tensor, Tensor]:
    """Return out and remainder, reading keys and values through the table. See `ops.paged`."""
    _, page_size, heads, _ = k_pages.shape
    k_pages, v_pages = _dense_rows(k_pages), _dense_rows(v_pages)
    k_strides, v_strides = ((x.stride(0), x.stride(2), x.stride(1)) for x in (k_pages, v_pages))
    block_table, lengths = (x.to(torch.int32).contiguous() for x in (block_table, lengths))
    longest = block_table.shape[1] * page_size  # the lengths themselves are known to the device only
    keys = _Keys(k_pages, v_pages, k_strides, v_strides, heads, longest, block_table, lengths, page_size)
    return _attend(q, keys, None, None, scale, attend_current, early_stop)


def _attend(
    q: Tensor,
    keys: _Keys,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    scale: float,
    attend_current: bool,
    early_stop: bool,
) -> tuple[Tensor, Tensor]:
    from .stickbreaking_triton_kernels import combine_kernel, forward_kernel

    q = _dense_rows(q)
    batch, query_heads, num_queries, head_dim = q.shape
    out = q.new_empty(q.shape)
    remainder = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return out, remainder

    groups = query_heads // keys.heads
    tiles = _forward_tiles(q.dtype, head_dim, num_queries * groups)
    row_programs = batch * keys.heads * math.ceil(num_queries * groups / tiles.rows)
    phases = _split_keys(q, row_programs, math.ceil(keys.length / tiles.keys), early_stop)
    total_splits = sum(splits for _, _, splits in phases)
    parts, sticks = out, remainder
    if total_splits > 1:
        parts = q.new_empty(total_splits, *q.shape, dtype=torch.float32)
        sticks = q.new_empty(total_splits, *q.shape[:3], dtype=torch.float32)

    with torch.cuda.device_of(q):
        first_split = 0
        for skip, take, splits in phases:
            forward_kernel[(row_programs, splits)](
                q,
                keys.k,
                keys.v,
                parts,
                sticks,
                *_limits(key_mask, document_start),
                keys.table,
                keys.lengths,
                scale * math.log2(math.e),
                _stop_below(q.dtype, early_stop),
                _look(tiles, early_stop),
                num_queries,
                keys.length,
                keys.heads,
                *q.stride()[:3],
                *keys.k_strides,
                *keys.v_strides,
                1 if keys.table is None else keys.table.shape[1],
                keys.page_size,
                first_split,
                skip,
                take,
                **_constants(q.dtype, head_dim, groups, attend_current, tiles),
                SPLIT=total_splits > 1,
                NEWER=_power_of_2(first_split) if first_split else 0,
            )
            first_split += splits
        if total_splits > 1:
            combine_kernel[(remainder.numel(), math.ceil(head_dim / _COMBINE_DIM))](
                parts,
                sticks,
                out,
                remainder,
                remainder.numel(),
                total_splits,
                HEAD_DIM=head_dim,
                BLOCK_D=_COMBINE_DIM,
                SPLITS=_power_of_2(total_splits),
            )
    return out, remainder


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
    """Return the gradients of q, k and v.

    Chunk by chunk of the rows, one kernel computes dq and stores two carries per row and key block, and another reads
    them and adds to dk and dv, each key block in one program: nothing depends on the order in which programs run.
    """
    from .stickbreaking_triton_kernels import backward_keys_kernel, backward_rows_kernel

    q, k, v, dout = (_dense_rows(x) for x in (q, k, v, dout))
    drem = drem.contiguous()
    batch, query_heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    dq = q.new_empty(q.shape)
    dk, dv = (k.new_zeros(k.shape, dtype=torch.float32) for _ in range(2))
    if q.numel() == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    heads, groups = batch * kv_heads, query_heads // kv_heads
    tiles = _backward_tiles(q.dtype, head_dim)
    row_blocks = math.ceil(num_queries * groups / tiles.rows)
    key_blocks = math.ceil(num_keys / tiles.keys)
    chunk = min(row_blocks, max(_CHUNK_BLOCKS_PER_HEAD, math.ceil(_CHUNK_BLOCKS / heads)))
    sticks = q.new_empty(heads, key_blocks, chunk * tiles.rows, dtype=torch.float32)
    taken = q.new_empty(heads, key_blocks + 1, chunk * tiles.rows, dtype=torch.float32)
    lasts = q.new_empty(heads, chunk, dtype=torch.int32)

    masks = _limits(key_mask, document_start)
    strides = [x for tensor in (q, k, v, dout) for x in tensor.stride()[:3]]
    constants = _constants(q.dtype, head_dim, groups, attend_current, tiles)
    log2_scale = scale * math.log2(math.e)
    with torch.cuda.device_of(q):
        for first in range(0, row_blocks, chunk):
            blocks = min(chunk, row_blocks - first)
            shape = (num_queries, num_keys, kv_heads, *strides, first, blocks, key_blocks)
            backward_rows_kernel[(blocks * heads,)](
                q,
                k,
                v,
                dout,
                drem,
                dq,
                sticks,
                taken,
                lasts,
                *masks,
                log2_scale,
                _stop_below(q.dtype, early_stop),
                _look(tiles, early_stop),
                *shape,
                **constants,
            )
            # The chunk's last query sees keys of these blocks only.
            queries = min(num_queries, math.ceil((first + blocks) * tiles.rows / groups))
            reached = math.ceil((num_keys - num_queries + queries - (not attend_current)) / tiles.keys)
            if reached == 0:
                continue
            backward_keys_kernel[(reached * heads,)](
                q,
                k,
                v,
                dout,
                dk,
                dv,
                sticks,
                taken,
                lasts,
                *masks,
                log2_scale,
                *shape,
                reached,
                **constants,
                LASTS=_power_of_2(chunk),
            )
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# Chosen so that the compiled kernels spill few or no registers (tests/unit/ops/test_stickbreaking_triton.py compiles
# them); none of it is measured.
def _forward_tiles(dtype: torch.dtype, head_dim: int, num_rows: int) -> _Tiles:
    full, wide = dtype == torch.float32, _block_dim(head_dim) > 128
    if num_rows <= 16:
        return _Tiles(16, 64 >> (full + wide), 4, 3)
    if full:
        return _Tiles(32, 16 if wide else 32, 8 if wide else 4, 2)
    return _Tiles(min(64, _power_of_2(num_rows)), 32, 8 if wide else 4, 2 if wide else 3)


def _backward_tiles(dtype: torch.dtype, head_dim: int) -> _Tiles:
    block_dim = _block_dim(head_dim)
    if dtype == torch.float32:
        return _Tiles(16, 32, 4, 2) if block_dim <= 64 else _Tiles(16, 16, 8, 2)
    if block_dim <= 64:
        return _Tiles(64, 32, 4, 2)
    return _Tiles(32, 32, 4 if block_dim <= 128 else 8, 2)


def _split_keys(q: Tensor, row_programs: int, key_blocks: int, early_stop: bool) -> list[tuple[int, int, int]]:
    """Return (newest key blocks left out, key blocks taken, splits) of each launch.

    A split does not know what newer ones leave of the sticks, so with `early_stop` there are two launches: one splits
    the newest keys among enough programs to fill the device, the other all older ones, and its programs first look
    whether anything is left for them.
    """
    if q.shape[2] > _MAX_SPLIT_QUERIES:
        return [(0, _ALL, 1)]
    wanted = math.ceil(_PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(q.device) / row_programs)
    splits = min(wanted, _MAX_SPLITS, math.ceil(key_blocks / _MIN_SPLIT_BLOCKS))
    window = splits * _MIN_SPLIT_BLOCKS
    if splits == 1 or not early_stop or key_blocks < 2 * window:
        return [(0, _ALL, splits)]
    return [(0, window, splits), (window, _ALL, splits)]


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _look(tiles: _Tiles, early_stop: bool) -> int:
    """Key blocks between two looks at the sticks."""
    return _KEYS_PER_LOOK // tiles.keys if early_stop else _ALL


def _stop_below(dtype: torch.dtype, early_stop: bool) -> float:
    """What is left of a stick bounds the weights it can still give; this much, as log2, cannot show in `dtype`."""
    return math.log2(torch.finfo(dtype).eps / 64) if early_stop else -math.inf


def _limits(key_mask: Tensor | None, document_start: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if key_mask is not None:
        key_mask = key_mask.contiguous().view(torch.uint8)
    if document_start is not None:
        document_start = document_start.to(torch.int32).contiguous()
    return key_mask, document_start


def _constants(dtype: torch.dtype, head_dim: int, groups: int, attend_current: bool, tiles: _Tiles) -> dict[str, Any]:
    return {
        "ATTEND": attend_current,
        "G": groups,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block_dim(head_dim),
        "M": tiles.rows,
        "N": tiles.keys,
        "PARTS": 3 if dtype == torch.float32 else 2,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _dense_rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension; the others may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _block_dim(head_dim: int) -> int:
    return max(16, _power_of_2(head_dim))


def _power_of_2(x: int) -> int:
    """The least power of 2 that is not below `x`."""
    return 1 << (x - 1).bit_length()
