"""Paged attention in Triton: writing keys and values, attending to them, merging parts.

A program computes one head of a tile of rows: up to TILE adjacent rows of one sequence. It walks
over that sequence's keys in steps of KEYS, found through the block table, with a running maximum
and sum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). With SPLIT it
starts afresh every so many keys, and folds the parts in order; so parts computed by programs of
their own (Dao et al., "Flash-Decoding", 2023) and folded by `fold_parts` give the same bits: how a
batch is spread over the GPU does not show in a row's answer. For that, products are not fused with
sums (see FIXED in triton_backend.py).

Keys after a row's own position are masked, and slots after a tile's last row are never read, so
whatever is in them can't reach an answer.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl


@triton.jit
def store(
    k,  # (N, heads, head_size), rows and heads strided
    v,
    key,  # (blocks, block_size, heads, head_size), contiguous
    value,
    slots,  # (N,) int64
    k_row,
    k_head,
    v_row,
    v_head,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # at least HEADS * HEAD_SIZE, a power of two
):
    """Copy the keys and values of one row to their slot. Grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < HEADS * HEAD_SIZE
    head, dim = at // HEAD_SIZE, at % HEAD_SIZE
    target = tl.load(slots + row) * (HEADS * HEAD_SIZE) + at
    tl.store(key + target, tl.load(k + row * k_row + head * k_head + dim, inside), inside)
    tl.store(value + target, tl.load(v + row * v_row + head * v_head + dim, inside), inside)


@triton.jit
def _fold(best, total, acc, other_best, other_total, other_acc):
    """Two partial softmaxes made one: maximum and sum (TILE,), weighted values (TILE, DIM)."""
    new = tl.maximum(best, other_best)
    base = tl.where(new == float("-inf"), 0.0, new)
    a, b = tl.exp2(best - base), tl.exp2(other_best - base)
    return new, total * a + other_total * b, acc * a[:, None] + other_acc * b[:, None]


@triton.jit
def _attend_part(
    q,  # (TILE, DIM) values
    positions,  # (TILE,) values; -1 for rows that are none
    last,  # the greatest of them
    start,  # first key of this part
    end,  # the one after its last
    key,  # pointers to this head in the cache
    value,
    table,  # pointer to the sequence's blocks
    scale,  # of scores, for powers of two
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Maximum, sum and weighted values of each row over the keys start .. end-1."""
    dims = tl.arange(0, DIM)
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DIM], tl.float32)
    for first in range(start, tl.minimum(end, last + 1), KEYS):
        keys = first + tl.arange(0, KEYS)
        live = keys <= last
        block = tl.load(table + keys // BLOCK_SIZE, live, 0).to(tl.int64)
        slot = (block * BLOCK_SIZE + keys % BLOCK_SIZE) * (HEADS * HEAD_SIZE)
        at = slot[:, None] + dims[None, :]
        there = live[:, None] & (dims < HEAD_SIZE)[None, :]
        k = tl.load(key + at, there, 0.0)  # (KEYS, DIM)
        if TILE == 1:  # one row: its products are sums; tensor cores would compute 15 rows of zeros
            scores = tl.sum(k.to(tl.float32) * q.to(tl.float32), 1)[None, :]
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = keys[None, :] <= positions[:, None]
        scores = tl.where(seen, scores * scale, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = tl.load(value + at, there, 0.0)
        if TILE == 1:
            acc += tl.sum(tl.trans(weights) * v.to(tl.float32), 0)[None, :]
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        best = new
    return best, total, acc


@triton.jit(do_not_specialize=["table_stride", "num_rows"])  # they vary: no compiling for each
def attend(
    q,  # (N, heads, head_size), rows and heads strided
    key,  # (blocks, block_size, heads, head_size), contiguous
    value,
    out,  # (N, heads, head_size), contiguous; unused with PARTS
    part_best,  # (parts, N, heads) float32, with PARTS
    part_total,
    part_acc,  # (parts, N, heads, head_size) float32, with PARTS
    tiles,  # (tiles, 2) int32: first row, number of rows
    positions,  # (N,) int64
    sequence_of,  # (N,) int32
    block_tables,  # (S, table_stride) int32
    scale,
    q_row,
    q_head,
    table_stride,
    num_rows,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,  # at least HEAD_SIZE, a power of two
    SPLIT: tl.constexpr,  # keys of a part; 0: all of them
    PARTS: tl.constexpr,  # each part has a program of its own
):
    """Attend with one head of one tile of rows. Grid (tiles, heads, parts or 1)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    within = tl.arange(0, TILE)
    rows = (first + within).to(tl.int64)
    dims = tl.arange(0, DIM)
    wanted = within < count
    there = wanted[:, None] & (dims < HEAD_SIZE)[None, :]
    position = tl.load(positions + rows, wanted, -1).to(tl.int32)
    last = tl.load(positions + first + count - 1).to(tl.int32)
    table = block_tables + tl.load(sequence_of + first).to(tl.int64) * table_stride
    query = tl.load(q + rows[:, None] * q_row + head * q_head + dims[None, :], there, 0.0)
    key += head * HEAD_SIZE
    value += head * HEAD_SIZE
    if PARTS:
        start = tl.program_id(2) * SPLIT
        if start <= last:
            best, total, acc = _attend_part(
                query, position, last, start, start + SPLIT, key, value, table, scale,
                HEADS, HEAD_SIZE, BLOCK_SIZE, TILE, KEYS, DIM,
            )  # fmt: skip
            at = (tl.program_id(2).to(tl.int64) * num_rows + rows) * HEADS + head
            tl.store(part_best + at, best, wanted)
            tl.store(part_total + at, total, wanted)
            tl.store(part_acc + at[:, None] * HEAD_SIZE + dims[None, :], acc, there)
    else:
        best, total, acc = _attend_part(
            query, position, last, 0, SPLIT if SPLIT else last + 1, key, value, table, scale,
            HEADS, HEAD_SIZE, BLOCK_SIZE, TILE, KEYS, DIM,
        )  # fmt: skip
        if SPLIT:
            for start in range(SPLIT, last + 1, SPLIT):
                part_b, part_t, part_a = _attend_part(
                    query, position, last, start, start + SPLIT, key, value, table, scale,
                    HEADS, HEAD_SIZE, BLOCK_SIZE, TILE, KEYS, DIM,
                )  # fmt: skip
                best, total, acc = _fold(best, total, acc, part_b, part_t, part_a)
        at = (rows * HEADS + head)[:, None] * HEAD_SIZE + dims[None, :]
        total = tl.where(wanted, total, 1.0)
        tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["num_rows"])
def fold_parts(
    out,
    part_best,
    part_total,
    part_acc,
    tiles,
    positions,
    num_rows,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Fold the parts that `attend` left of one head of one tile, in order. Grid (tiles, heads)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    within = tl.arange(0, TILE)
    rows = (first + within).to(tl.int64)
    dims = tl.arange(0, DIM)
    wanted = within < count
    there = wanted[:, None] & (dims < HEAD_SIZE)[None, :]
    last = tl.load(positions + first + count - 1).to(tl.int32)
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DIM], tl.float32)
    for part in range(last // SPLIT + 1):
        at = (rows + part * num_rows.to(tl.int64)) * HEADS + head
        part_b = tl.load(part_best + at, wanted, float("-inf"))
        part_t = tl.load(part_total + at, wanted, 0.0)
        part_a = tl.load(part_acc + at[:, None] * HEAD_SIZE + dims[None, :], there, 0.0)
        best, total, acc = _fold(best, total, acc, part_b, part_t, part_a)
    at = (rows * HEADS + head)[:, None] * HEAD_SIZE + dims[None, :]
    tl.store(
        out + at, (acc / tl.where(wanted, total, 1.0)[:, None]).to(out.dtype.element_ty), there
    )
