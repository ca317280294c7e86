"""Attention over the paged cache, with lengths that only the device knows.

Decode: each sequence's own tokens are cut into at most SPLITS chunks by a rule that looks at
nothing but its length; partial results go to the workspace and a second kernel merges them in
order. So the grid (S, kv_heads, SPLITS) is the same for every context, and a row's bits depend
neither on its neighbours nor on its place in the batch.

Prefill and mixed: the grid is an upper bound from padded T and S; each program finds its
sequence and query block by binary search in `query_start`, and leaves if there is none.

In both the query heads of one KV head are handled together. Neither kernel writes rows of
`out` that are not live: `rope_kv_write` zeroed them.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cut(length, WINDOW: tl.constexpr, SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr):
    """(first visible token, tokens a chunk) for the last token of a context."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    chunk = tl.cdiv(tl.cdiv(length - first, SPLITS), MIN_CHUNK) * MIN_CHUNK
    return first, tl.maximum(chunk, MIN_CHUNK)


@triton.jit
def _gather(table, position, inside, block_size: tl.constexpr):
    """int64 cache slots of positions; masked ones are not looked up."""
    block = tl.load(table + position // block_size, mask=inside, other=0).to(tl.int64)
    return block * block_size + position % block_size


@triton.jit
def decode_partial(
    qkv, keys, values, block_table, rows, seq_lens, workspace,
    scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of one row for the query heads of one KV head. Grid: (S, KV_HEADS, SPLITS).

    Workspace of a sequence: accumulators [HEADS, SPLITS, DIM], then (maximum, sum)
    [HEADS, SPLITS, 2], float32. Chunks that a row does not have are neither written nor read.
    """
    s = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    length = tl.load(seq_lens + s)
    first, chunk = _cut(length, WINDOW, SPLITS, MIN_CHUNK)
    start = first + split * chunk
    end = tl.minimum(start + chunk, length)
    if start < end:
        g = tl.arange(0, GROUP_PAD)
        d = tl.arange(0, DIM_PAD)
        n = tl.arange(0, BLOCK_N)
        head = h * GROUP + g
        wide = (g < GROUP)[:, None] & (d < DIM)[None, :]
        row = qkv + s * ((HEADS + 2 * KV_HEADS) * DIM)
        q = tl.load(row + head[:, None] * DIM + d[None, :], mask=wide, other=0.0)
        table = block_table + tl.load(rows + s).to(tl.int64) * TABLE_WIDTH
        best = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_PAD,), tl.float32)
        acc = tl.zeros((GROUP_PAD, DIM_PAD), tl.float32)
        for at in range(start, end, BLOCK_N):
            inside = at + n < end
            slot = _gather(table, at + n, inside, BLOCK_SIZE)
            place = slot[:, None] * (KV_HEADS * DIM) + h * DIM + d[None, :]
            loads = inside[:, None] & (d < DIM)[None, :]
            k = tl.load(keys + place, mask=loads, other=0.0)
            v = tl.load(values + place, mask=loads, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(inside[None, :], scores, float("-inf"))
            above = tl.maximum(best, tl.max(scores, 1))  # finite: every block has a token inside
            p = tl.exp2(scores - above[:, None])
            fade = tl.exp2(best - above)
            total = total * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            best = above
        own = workspace + s * (HEADS * SPLITS * (DIM + 2))
        part = head * SPLITS + split
        tl.store(own + part[:, None] * DIM + d[None, :], acc, mask=wide)
        stats = own + HEADS * SPLITS * DIM + part * 2
        tl.store(stats, best, mask=g < GROUP)
        tl.store(stats + 1, total, mask=g < GROUP)


@triton.jit
def decode_merge(
    seq_lens, workspace, out,
    HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of one head of one row, always in the same order. Grid: (S, HEADS)."""
    s = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(seq_lens + s)
    if length > 0:
        first, chunk = _cut(length, WINDOW, SPLITS, MIN_CHUNK)
        j = tl.arange(0, SPLITS)
        d = tl.arange(0, DIM_PAD)
        used = first + j * chunk < length
        own = workspace + s * (HEADS * SPLITS * (DIM + 2))
        part = head * SPLITS + j
        stats = own + HEADS * SPLITS * DIM + part * 2
        best = tl.load(stats, mask=used, other=float("-inf"))
        weight = tl.exp2(best - tl.max(best, 0))
        total = tl.sum(tl.load(stats + 1, mask=used, other=0.0) * weight, 0)
        mask = used[:, None] & (d < DIM)[None, :]
        acc = tl.load(own + part[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        result = tl.sum(acc * weight[:, None], 0) / total
        target = out + s * (HEADS * DIM) + head * DIM + d
        tl.store(target, result.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=["num_seqs"])
def varlen(
    qkv, keys, values, block_table, rows, query_start, seq_lens, out,
    scale, num_seqs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Causal attention for a block of queries of one sequence. Grid: (T / QUERIES + S, KV_HEADS).

    A tile's rows are QUERIES tokens by GROUP_PAD query heads of the same KV head.
    """
    pid = tl.program_id(0)
    h = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = BLOCK_M // GROUP_PAD
    # Sequence s owns the programs from query_start[s] // QUERIES + s on: never too few for its
    # tokens, and strictly rising, so the last s with its first program at or before pid is ours.
    low = 0
    high = num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= pid:
            low = middle
        else:
            high = middle - 1
    begin = tl.load(query_start + low)
    count = tl.load(query_start + low + 1) - begin
    length = tl.load(seq_lens + low)
    skip = (pid - (begin // QUERIES + low)) * QUERIES
    if (length > 0) & (skip < count):
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, DIM_PAD)
        n = tl.arange(0, BLOCK_N)
        query = skip + m // GROUP_PAD
        head = h * GROUP + m % GROUP_PAD
        real = (query < count) & (m % GROUP_PAD < GROUP)
        position = length - count + query
        token = (begin + query).to(tl.int64)
        wide = real[:, None] & (d < DIM)[None, :]
        row = token[:, None] * ((HEADS + 2 * KV_HEADS) * DIM)
        q = tl.load(qkv + row + head[:, None] * DIM + d[None, :], mask=wide, other=0.0)
        table = block_table + tl.load(rows + low).to(tl.int64) * TABLE_WIDTH
        start = 0
        if WINDOW > 0:
            start = tl.maximum(length - count + skip - WINDOW + 1, 0)
        end = length - count + tl.minimum(skip + QUERIES, count)
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, DIM_PAD), tl.float32)
        for at in range(start, end, BLOCK_N):
            past = at + n
            inside = past < end
            slot = _gather(table, past, inside, BLOCK_SIZE)
            place = slot[:, None] * (KV_HEADS * DIM) + h * DIM + d[None, :]
            loads = inside[:, None] & (d < DIM)[None, :]
            k = tl.load(keys + place, mask=loads, other=0.0)
            v = tl.load(values + place, mask=loads, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            seen = past[None, :] <= position[:, None]
            if WINDOW > 0:
                seen &= past[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen & inside[None, :], scores, float("-inf"))
            above = tl.maximum(best, tl.max(scores, 1))
            # With a window a query may see nothing of a block: -inf - -inf would be NaN.
            shift = tl.where(above == float("-inf"), 0.0, above)
            p = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(best - shift)
            total = total * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            best = above
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        target = out + token[:, None] * (HEADS * DIM) + head[:, None] * DIM + d[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=wide)
