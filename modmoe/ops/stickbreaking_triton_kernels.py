"""Triton kernels of stick-breaking attention; launched by `stickbreaking_triton.py`, counted in docs/kernels.md.

Letters: T queries, S keys, G query heads per key/value head, D head dim, M rows and N keys of a tile. Row r of a
key/value head is query r // G of its query head r % G, so that a group reads each key once.

Sums of logs along the keys of a tile are products with a triangular matrix (`_sum_along_keys`), not scans: a scan
takes the tile through shared memory and back, a product leaves it in registers, in the layout of the other products.
No sum is got as the difference of two others.
"""

# Parameters of kernels have no types that Python knows.
# mypy: disable-error-code=no-untyped-def

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The interpreter has neither libdevice nor products of bf16 numbers (it multiplies their bit patterns).
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_PART = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)

# Logits are cut off here, in base 2: the sigmoid is one in float32, and what it leaves of the stick below any `stop`.
_LARGEST_LOGIT = tl.constexpr(30.0)
# Arguments that change from call to call, as a cache grows. Triton would compile anew where one becomes 1 or a
# multiple of 16, or ceases to be; in these nothing that matters follows from it.
_CHANGING = [
    *("num_queries", "num_keys", "num_rows", "max_pages"),
    *("splits", "first_split", "skip_blocks", "take_blocks"),
    *("first_row_block", "row_blocks", "key_blocks", "grid_blocks"),
]
# Blocks that one step of the running sum in `backward_rows_kernel` takes.
_SUM_BLOCKS = tl.constexpr(16)


@triton.jit
def _rows(row_block, num_queries, G: tl.constexpr, M: tl.constexpr):
    """Return which rows of a block exist, and the query and the query head in its group of each."""
    row = row_block * M + tl.arange(0, M)
    return row < num_queries * G, tl.minimum(row // G, num_queries - 1), row % G


@triton.jit
def _first_keys(start_ptr, batch, query, inside, num_queries, M: tl.constexpr):
    """The first key that each row may see; rows that do not exist see none."""
    start = tl.zeros((M,), tl.int32)
    if start_ptr is not None:
        start = tl.load(start_ptr + batch * num_queries + query, mask=inside, other=2147483647)
    return start


@triton.jit
def _key_blocks(row_block, start, oldest, num_queries, G: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Return (first, whole, end): a row block sees no key outside the key blocks [first, end); those of [first, whole)
    are before the diagonal of all its rows."""
    newest_query = tl.minimum((row_block * M + M - 1) // G, num_queries - 1)
    end = tl.cdiv(tl.maximum(oldest + newest_query + 1, 0), N)
    whole = tl.maximum(oldest + row_block * M // G + 1, 0) // N
    first = tl.minimum(tl.maximum(tl.min(start), 0) // N, end)
    return first, whole, end


@triton.jit
def _unspent(stick, start, block, N: tl.constexpr):
    """The largest log2 of a stick among the rows that see keys before `block`."""
    return tl.max(tl.where(start < block * N, stick, float("-inf")))


@triton.jit
def _load_tile(row_ptr, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of HEAD_DIM numbers, with zeros for rows that are not `inside` and up to BLOCK_D."""
    dim = tl.arange(0, BLOCK_D)
    mask = inside[:, None] if HEAD_DIM == BLOCK_D else inside[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(row_ptr[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(row_ptr, tile, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dim = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(row_ptr[:, None] + dim[None, :], tile.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _logits(q, k, scale):
    """Logits to base 2; `scale` holds log2(e). NaN stays NaN."""
    z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.minimum(z, _LARGEST_LOGIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _hide(z, position, start, mask_ptr, key, seen, NEWEST: tl.constexpr, HAS_START: tl.constexpr):
    """Logit -inf, hence weight 0 and nothing taken of the stick, for keys that a row must not see."""
    if NEWEST:
        z = tl.where(key[None, :] <= position[:, None], z, float("-inf"))
    if HAS_START:
        z = tl.where(key[None, :] >= start[:, None], z, float("-inf"))
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + key, mask=seen, other=0)
        z = tl.where((kept != 0)[None, :], z, float("-inf"))
    return z


@triton.jit
def _log_keep(odds, PARTS: tl.constexpr):
    """log2(1 - sigmoid) = -log2(1 + odds), precise for small odds too, of which a long context adds up thousands."""
    series = odds * (1.0 - odds * (0.5 - odds * (0.33333334 - odds * 0.25))) * 1.4426950408889634
    # Two parts mean 16-bit inputs, for which the fast logarithm (absolute error 2 ** -22) is good enough.
    log = libdevice.fast_log2f(1.0 + odds) if PARTS == 2 and not _INTERPRETED else tl.log2(1.0 + odds)
    return -tl.where(odds < 0.015625, series, log)


@triton.jit
def _sum_along_keys(x, ones, PARTS: tl.constexpr):
    """x @ ones in float32, for a matrix of zeros and ones: x is cut into PARTS bf16 numbers of 8 bits each."""
    part = x.to(_PART)
    total = tl.dot(part, ones, input_precision="ieee")
    for _ in tl.static_range(PARTS - 1):
        x -= part.to(tl.float32)
        part = x.to(_PART)
        total = tl.dot(part, ones, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=_CHANGING)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # (splits, B, Hq, T, D)
    rem_ptr,  # (splits, B, Hq, T)
    mask_ptr,  # (B, S) or None
    start_ptr,  # (B, T) or None
    table_ptr,  # (B, max_pages) or None
    lengths_ptr,  # (B,) or None
    scale,
    stop,
    look,
    num_queries,
    num_keys,
    kv_heads,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    max_pages,
    page_size,
    first_split,
    skip_blocks,
    take_blocks,
    ATTEND: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    NEWER: tl.constexpr,
):
    """M rows and the key blocks of one split, newest first: grid (row blocks * B * Hkv, splits).

    Splits are numbered from the newest. A launch leaves out the newest `skip_blocks` key blocks and shares the next
    `take_blocks` among its splits; its outputs go to splits `first_split` and on, with the log2 of what is left of the
    sticks in place of the remainder (SPLIT). NEWER: first_split, rounded up to a power of 2, or 0.
    """
    row_blocks = tl.cdiv(num_queries * G, M)
    head = tl.program_id(0) // row_blocks  # of B * Hkv
    row_block = row_blocks - 1 - tl.program_id(0) % row_blocks  # most keys first
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)
    if mask_ptr is not None:
        mask_ptr += batch * num_keys
    if lengths_ptr is not None:
        num_keys = tl.minimum(tl.load(lengths_ptr + batch), num_keys)

    inside, query, group = _rows(row_block, num_queries, G, M)
    query_head = kv_head * G + group
    q_rows = q_ptr + batch * q_batch + query_head * q_head + query.to(tl.int64) * q_time
    q = _load_tile(q_rows, inside, HEAD_DIM, BLOCK_D)
    start = _first_keys(start_ptr, batch, query, inside, num_queries, M)
    oldest = num_keys - num_queries - (0 if ATTEND else 1)  # the last key that query 0 sees
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head

    # Of the blocks that the rows see, [last, block) belong to this split.
    last, whole, end = _key_blocks(row_block, start, oldest, num_queries, G, M, N)
    block = tl.maximum(end - skip_blocks, last)
    last = tl.maximum(last, block - take_blocks)
    share = tl.cdiv(block - last, tl.num_programs(1))
    block = tl.maximum(block - tl.program_id(1) * share, last)
    last = tl.maximum(last, block - share)

    out_row = (batch * kv_heads * G + query_head) * num_queries + query
    split_rows = (tl.num_programs(0) // row_blocks).to(tl.int64) * G * num_queries
    if NEWER > 0:  # nothing to do if newer splits have used up the sticks
        split = tl.arange(0, NEWER)
        there = (split < first_split)[:, None] & inside[None, :]
        sticks = tl.load(rem_ptr + split[:, None] * split_rows + out_row[None, :], mask=there, other=0.0)
        left = tl.where(inside, tl.sum(sticks, 0), float("-inf"))
        last = tl.where(tl.max(left) > stop, last, block)

    index = tl.arange(0, N)
    newer_than = (index[:, None] > index[None, :]).to(_PART)
    stick = tl.where(inside, 0.0, float("-inf"))  # log2 of what is left
    acc = tl.zeros((M, BLOCK_D), tl.float32)
    for part in tl.static_range(2):  # blocks that reach past the diagonal; the others
        bound = tl.maximum(whole, last) if part == 0 else last
        while (block > bound) & (_unspent(stick, start, block, N) > stop):
            # A `for` loop inside the `while`, because only in those loads run ahead.
            for _ in range(tl.minimum(look, block - bound)):
                block -= 1
                key = block * N + index
                seen = key < num_keys
                page = batch
                slot = key
                if table_ptr is not None:
                    page = tl.load(table_ptr + batch * max_pages + key // page_size, mask=seen, other=0).to(tl.int64)
                    slot = key % page_size
                k = _load_tile(k_ptr + page * k_batch + slot.to(tl.int64) * k_time, seen, HEAD_DIM, BLOCK_D)
                z = _hide(
                    _logits(q, k, scale), oldest + query, start, mask_ptr, key, seen, part == 0, start_ptr is not None
                )
                log_keep = _log_keep(tl.exp2(z), PARTS)
                weights = tl.exp2(z + log_keep + _sum_along_keys(log_keep, newer_than, PARTS) + stick[:, None])
                v = _load_tile(v_ptr + page * v_batch + slot.to(tl.int64) * v_time, seen, HEAD_DIM, BLOCK_D)
                acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
                stick += tl.sum(log_keep, 1)

    out_row += (first_split + tl.program_id(1)) * split_rows
    tl.store(rem_ptr + out_row, stick if SPLIT else tl.exp2(stick), mask=inside)
    _store_tile(out_ptr + out_row * HEAD_DIM, acc, inside, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_CHANGING)
def combine_kernel(
    parts_ptr,  # (splits, rows, D)
    sticks_ptr,  # (splits, rows), log2
    out_ptr,  # (rows, D)
    rem_ptr,  # (rows,)
    num_rows,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Put the splits of one row together, BLOCK_D of its D numbers: out = sum_c out_c * (what newer splits left).

    Grid (rows, D / BLOCK_D); SPLITS: splits, rounded up to a power of 2.
    """
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, SPLITS)
    previous = tl.load(sticks_ptr + (split - 1) * num_rows + row, mask=(split > 0) & (split <= splits), other=0.0)
    newer = tl.cumsum(previous, 0)
    there = (split < splits)[:, None] & (dim < HEAD_DIM)[None, :]
    rows = (split * num_rows + row) * HEAD_DIM
    parts = tl.load(parts_ptr + rows[:, None] + dim[None, :], mask=there, other=0.0)
    out = tl.sum(tl.exp2(newer)[:, None] * parts, 0)
    tl.store(out_ptr + row * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
    sticks = tl.load(sticks_ptr + split * num_rows + row, mask=split < splits, other=0.0)
    tl.store(rem_ptr + row, tl.exp2(tl.sum(sticks, 0)))


@triton.jit(do_not_specialize=_CHANGING)
def backward_rows_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    drem_ptr,  # (B, Hq, T)
    dq_ptr,  # (B, Hq, T, D)
    sticks_ptr,  # (B * Hkv, key blocks, rows of the chunk)
    taken_ptr,  # (B * Hkv, key blocks + 1, rows of the chunk)
    lasts_ptr,  # (B * Hkv, row blocks of the chunk)
    mask_ptr,  # (B, S) or None
    start_ptr,  # (B, T) or None
    scale,
    stop,
    look,
    num_queries,
    num_keys,
    kv_heads,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    dout_batch,
    dout_head,
    dout_time,
    first_row_block,
    row_blocks,
    key_blocks,
    ATTEND: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dq of M rows, and for every key block they read what `backward_keys_kernel` needs of the other blocks.

    With a_ij = A_ij <dout_i, v_j>:  dz_ij = a_ij - sigmoid(z_ij) (rem_i drem_i + sum_{l<=j} a_il).

    Stored are the log of the stick on entry (`sticks`, summed from the right), and rem_i drem_i plus the a of all
    older blocks (`taken`, summed from the left); as differences from a total they would lose small terms beside large
    ones. Blocks come newest first, when the a of older ones are not known yet; so the sum of sigmoid(z_ij) k_j is
    kept, and what a block's a take from dq, for all newer keys together, is subtracted when the block comes.
    """
    head = tl.program_id(0) // row_blocks  # of B * Hkv
    local_block = row_blocks - 1 - tl.program_id(0) % row_blocks  # most keys first
    row_block = first_row_block + local_block
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)

    inside, query, group = _rows(row_block, num_queries, G, M)
    query_head = kv_head * G + group
    q_rows = q_ptr + batch * q_batch + query_head * q_head + query.to(tl.int64) * q_time
    q = _load_tile(q_rows, inside, HEAD_DIM, BLOCK_D)
    dout_rows = dout_ptr + batch * dout_batch + query_head * dout_head + query.to(tl.int64) * dout_time
    dout = _load_tile(dout_rows, inside, HEAD_DIM, BLOCK_D)
    start = _first_keys(start_ptr, batch, query, inside, num_queries, M)
    oldest = num_keys - num_queries - (0 if ATTEND else 1)  # the last key that query 0 sees
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    if mask_ptr is not None:
        mask_ptr += batch * num_keys

    last, whole, end = _key_blocks(row_block, start, oldest, num_queries, G, M, N)
    chunk_rows = row_blocks * M
    local_row = local_block * M + tl.arange(0, M)
    sticks_ptr += head.to(tl.int64) * key_blocks * chunk_rows
    taken_ptr += head.to(tl.int64) * (key_blocks + 1) * chunk_rows

    index = tl.arange(0, N)
    newer_than = (index[:, None] > index[None, :]).to(_PART)
    up_to = (index[:, None] <= index[None, :]).to(_PART)
    stick = tl.where(inside, 0.0, float("-inf"))
    dq = tl.zeros((M, BLOCK_D), tl.float32)
    sigmoid_k = tl.zeros((M, BLOCK_D), tl.float32)
    block = end
    for part in tl.static_range(2):
        bound = tl.maximum(whole, last) if part == 0 else last
        while (block > bound) & (_unspent(stick, start, block, N) > stop):
            for _ in range(tl.minimum(look, block - bound)):
                block -= 1
                key = block * N + index
                seen = key < num_keys
                k = _load_tile(k_ptr + key.to(tl.int64) * k_time, seen, HEAD_DIM, BLOCK_D)
                z = _hide(
                    _logits(q, k, scale), oldest + query, start, mask_ptr, key, seen, part == 0, start_ptr is not None
                )
                odds = tl.exp2(z)
                sigmoid = odds / (1.0 + odds)
                log_keep = _log_keep(odds, PARTS)
                weights = sigmoid * tl.exp2(_sum_along_keys(log_keep, newer_than, PARTS) + stick[:, None])
                v = _load_tile(v_ptr + key.to(tl.int64) * v_time, seen, HEAD_DIM, BLOCK_D)
                a = weights * tl.dot(dout, tl.trans(v), input_precision="ieee")
                total = tl.sum(a, 1)
                dq -= total[:, None] * sigmoid_k
                own = a - sigmoid * _sum_along_keys(a, up_to, PARTS)
                dq = tl.dot(own.to(k.dtype), k, dq, input_precision="ieee")
                sigmoid_k = tl.dot(sigmoid.to(k.dtype), k, sigmoid_k, input_precision="ieee")
                tl.store(sticks_ptr + block.to(tl.int64) * chunk_rows + local_row, stick)
                tl.store(taken_ptr + (block + 1).to(tl.int64) * chunk_rows + local_row, total)
                stick += tl.sum(log_keep, 1)

    query_row = (batch * kv_heads * G + query_head) * num_queries + query
    drest = tl.exp2(stick) * tl.load(drem_ptr + query_row, mask=inside, other=0.0)
    dq -= drest[:, None] * sigmoid_k
    _store_tile(dq_ptr + query_row * HEAD_DIM, dq * (scale * 0.6931471805599453), inside, HEAD_DIM, BLOCK_D)

    tl.store(lasts_ptr + head.to(tl.int64) * row_blocks + local_block, block)
    tl.store(taken_ptr + block.to(tl.int64) * chunk_rows + local_row, drest)
    # Sums of blocks become running sums, from the oldest. Other threads wrote them.
    tl.debug_barrier()
    running = tl.zeros((M,), tl.float32)
    step = tl.arange(0, _SUM_BLOCKS)
    for first_slot in range(block, end + 1, _SUM_BLOCKS):
        slot = first_slot + step
        slots_ptr = taken_ptr + slot.to(tl.int64)[None, :] * chunk_rows + local_row[:, None]
        sums = tl.load(slots_ptr, mask=(slot <= end)[None, :], other=0.0)
        sums = running[:, None] + tl.cumsum(sums, 1)
        tl.store(slots_ptr, sums, mask=(slot <= end)[None, :])
        # Its last column. Adding up the sums instead fails an assertion of Triton 3.6 and 3.7.
        running = tl.sum(tl.where(step == _SUM_BLOCKS - 1, sums, 0.0), 1)


@triton.jit(do_not_specialize=_CHANGING)
def backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,  # (B, Hkv, S, D) float32
    dv_ptr,
    sticks_ptr,
    taken_ptr,
    lasts_ptr,
    mask_ptr,
    start_ptr,
    scale,
    num_queries,
    num_keys,
    kv_heads,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    dout_batch,
    dout_head,
    dout_time,
    first_row_block,
    row_blocks,
    key_blocks,
    grid_blocks,
    ATTEND: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    LASTS: tl.constexpr,
):
    """Add to dk and dv of a key block what the chunk's rows give, oldest row first: grid (grid_blocks * B * Hkv,).

    LASTS: row_blocks of the largest chunk, rounded up to a power of 2.
    """
    head = tl.program_id(0) // grid_blocks
    block = tl.program_id(0) % grid_blocks
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)
    oldest = num_keys - num_queries - (0 if ATTEND else 1)

    # Row blocks [first, last) of the chunk read this key block, apart from some in between; from `whole` on, all their
    # rows see all its keys.
    lasts_ptr += head.to(tl.int64) * row_blocks
    local = tl.arange(0, LASTS)
    lasts = tl.load(lasts_ptr + local, mask=local < row_blocks, other=2147483647)
    last = first_row_block + tl.max(tl.where(lasts <= block, local + 1, 0))
    first = tl.maximum(tl.maximum(block * N - oldest, 0) * G // M, first_row_block)
    whole = tl.cdiv(tl.maximum(block * N + N - 1 - oldest, 0) * G, M)

    index = tl.arange(0, N)
    key = block * N + index
    seen = key < num_keys
    k_rows = k_ptr + batch * k_batch + kv_head * k_head + key.to(tl.int64) * k_time
    k = _load_tile(k_rows, seen, HEAD_DIM, BLOCK_D)
    v_rows = v_ptr + batch * v_batch + kv_head * v_head + key.to(tl.int64) * v_time
    v = _load_tile(v_rows, seen, HEAD_DIM, BLOCK_D)
    if mask_ptr is not None:
        mask_ptr += batch * num_keys
    q_ptr += batch * q_batch + kv_head * G * q_head
    dout_ptr += batch * dout_batch + kv_head * G * dout_head
    chunk_rows = row_blocks * M
    sticks_ptr += (head.to(tl.int64) * key_blocks + block) * chunk_rows
    taken_ptr += (head.to(tl.int64) * (key_blocks + 1) + block) * chunk_rows

    newer_than = (index[:, None] > index[None, :]).to(_PART)
    up_to = (index[:, None] <= index[None, :]).to(_PART)
    dk = tl.zeros((N, BLOCK_D), tl.float32)
    dv = tl.zeros((N, BLOCK_D), tl.float32)
    for part in tl.static_range(2):
        begin = first if part == 0 else tl.maximum(first, whole)
        bound = tl.minimum(whole, last) if part == 0 else last
        for row_block in range(begin, bound):
            inside, query, group = _rows(row_block, num_queries, G, M)
            q_rows = q_ptr + group.to(tl.int64) * q_head + query.to(tl.int64) * q_time
            q = _load_tile(q_rows, inside, HEAD_DIM, BLOCK_D)
            dout_rows = dout_ptr + group.to(tl.int64) * dout_head + query.to(tl.int64) * dout_time
            dout = _load_tile(dout_rows, inside, HEAD_DIM, BLOCK_D)
            # Rows that stopped before this block have nothing stored for it.
            local_row = (row_block - first_row_block) * M + tl.arange(0, M)
            stored = inside & (tl.load(lasts_ptr + local_row // M) <= block)
            stick = tl.load(sticks_ptr + local_row, mask=stored, other=float("-inf"))
            taken = tl.load(taken_ptr + local_row, mask=stored, other=0.0)

            start = _first_keys(start_ptr, batch, query, inside, num_queries, M)
            z = _hide(
                _logits(q, k, scale), oldest + query, start, mask_ptr, key, seen, part == 0, start_ptr is not None
            )
            odds = tl.exp2(z)
            sigmoid = odds / (1.0 + odds)
            newer = _sum_along_keys(_log_keep(odds, PARTS), newer_than, PARTS)
            weights = sigmoid * tl.exp2(newer + stick[:, None])
            dv = tl.dot(tl.trans(weights.to(dout.dtype)), dout, dv, input_precision="ieee")
            a = weights * tl.dot(dout, tl.trans(v), input_precision="ieee")
            dz = a - sigmoid * (taken[:, None] + _sum_along_keys(a, up_to, PARTS))
            dk = tl.dot(tl.trans(dz.to(q.dtype)), q, dk, input_precision="ieee")

    key_row = head.to(tl.int64) * num_keys + key
    dk_rows = dk_ptr + key_row * HEAD_DIM
    dv_rows = dv_ptr + key_row * HEAD_DIM
    dk = dk * (scale * 0.6931471805599453) + _load_tile(dk_rows, seen, HEAD_DIM, BLOCK_D)
    dv += _load_tile(dv_rows, seen, HEAD_DIM, BLOCK_D)
    _store_tile(dk_rows, dk, seen, HEAD_DIM, BLOCK_D)
    _store_tile(dv_rows, dv, seen, HEAD_DIM, BLOCK_D)
