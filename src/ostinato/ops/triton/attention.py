"""Attention of prompts and mixed steps over the paged cache, with lengths that only the device knows.

The grid is an upper bound from padded T and S; each program finds its sequence and query block by
binary search in `query_start`, and leaves if there is none. The query heads of one KV head are
handled together. Rows of `out` that are not live are left alone: `rope_kv_write` zeroed them.
Steps that only decode have a kernel of their own, `decode.attention`.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .pointwise import enter


@triton.jit
def _gather(table, position, inside, block_size: tl.constexpr):
    """int64 cache slots of positions; masked ones are not looked up."""
    block = tl.load(table + position // block_size, mask=inside, other=0).to(tl.int64)
    return block * block_size + position % block_size


@triton.jit(do_not_specialize=["num_seqs"])
def varlen(
    qkv, keys, values, block_table, rows, query_start, seq_lens, out,
    scale, num_seqs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Causal attention for a block of queries of one sequence. Grid: (T / QUERIES + S, KV_HEADS).

    A tile's rows are QUERIES tokens by GROUP_PAD query heads of the same KV head.
    """
    enter(PDL)
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
