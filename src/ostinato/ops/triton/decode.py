"""The fused kernels of a small step: five a layer, chained by programmatic dependent launch.

A decode step reads every weight once, so each kernel asks for weights before anything else. With
PDL a kernel starts while the one before it still runs, loads weights, which no step ever writes,
into registers, and only then waits for what its predecessor wrote. The rules, for every kernel
here: nothing that a step writes is read, and nothing is stored, before `gdc_wait`; every thread
waits; every kernel waits before it ends. PDL is a constexpr: without it (older GPUs, the
interpreter) the same kernels run plainly.

`gemv` serves one row with multiply-adds, `skinny` up to 16 rows with tensor cores, both with a
whole row of weights in flight; `attention` is everything between the QKV projection and the output
projection.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _prefetch(start, BYTES: tl.constexpr, THREADS: tl.constexpr):
    """Ask for bytes to be brought into the L2 cache: this program's share of [start, start + BYTES).

    One request of 256 bytes a thread and round; the end of the range may be asked for twice.
    """
    CHUNK: tl.constexpr = 256
    CHUNKS: tl.constexpr = BYTES // CHUNK
    programs = tl.num_programs(0)
    lane = tl.arange(0, THREADS)
    for at in range(tl.program_id(0) * THREADS, CHUNKS, programs * THREADS):
        chunk = tl.minimum(at + lane, CHUNKS - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 256; mov.u32 $0, 0;",
            "=r,l", [start.to(tl.int64) + chunk * CHUNK], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _silu(gate, dtype: tl.constexpr):
    """Rounded as a model that keeps its activations in `dtype` would."""
    gate = gate.to(dtype).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)


@triton.jit
def gemv(
    x, norm, weight, scale, bias, out, best, best_at, ahead, eps,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, BEST: tl.constexpr, STORE: tl.constexpr,
    AHEAD: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of activations times a block of weight rows. Grid: (N / BLOCK_N).

    x [K], weight [N, K] ([2 N, K] with GATE: out = silu(gate) * up), out [N]. NORM: x is RMS-normed
    first. ADD: out += product. BEST: the largest result of the block and its index go to
    `best`, `best_at` [N / BLOCK_N]; STORE: results go to `out`. BLOCK_K >= K.
    """
    pid = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    whole: tl.constexpr = BLOCK_K == K
    even: tl.constexpr = N % BLOCK_N == 0
    rows = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    if whole and even:
        w = tl.load(rows, eviction_policy="evict_first")
    else:
        inside = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(rows, mask=inside, other=0.0, eviction_policy="evict_first")
    if GATE:
        if whole and even:
            u = tl.load(rows + N * K, eviction_policy="evict_first")
        else:
            u = tl.load(rows + N * K, mask=inside, other=0.0, eviction_policy="evict_first")
    dtype: tl.constexpr = x.dtype.element_ty
    if NORM:
        gain = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(ahead, AHEAD, THREADS)
        gdc_wait()
    v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        v *= tl.rsqrt(tl.sum(v * v, 0) / K + eps)
        # Rounded before and after the weight, as Hugging Face models do.
        v = (v.to(dtype).to(tl.float32) * gain).to(dtype).to(tl.float32)
    total = tl.sum(w.to(tl.float32) * v[None, :], 1)
    if SCALE:
        total *= tl.load(scale + n, mask=n < N, other=0.0)
    if GATE:
        other = tl.sum(u.to(tl.float32) * v[None, :], 1)
        if SCALE:
            other *= tl.load(scale + N + n, mask=n < N, other=0.0)
        total = _silu(total, dtype) * other.to(dtype).to(tl.float32)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(out + n, mask=n < N, other=0.0).to(tl.float32)
    if STORE:
        tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)
    if BEST:
        value, at = tl.max(tl.where(n < N, total, float("-inf")), 0, return_indices=True)
        tl.store(best + pid, value)
        tl.store(best_at + pid, pid * BLOCK_N + at)


@triton.jit(do_not_specialize=["num_rows"])
def skinny(
    x, norm, weight, scale, bias, out, best, best_at, eps, num_rows,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, SLICES: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, BEST: tl.constexpr, STORE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`gemv` for up to BLOCK_M rows, on tensor cores. Grid: (N / BLOCK_N).

    x [num_rows, K], out [num_rows, N]; best, best_at [num_rows, N / BLOCK_N]. The inner dimension
    is cut into SLICES, one for each warp: a batched product whose parts are added at the end.
    BLOCK_K * SLICES >= K. The norm's factor is applied to the result, its weight to x.
    """
    pid = tl.program_id(0)
    i = tl.arange(0, SLICES)[:, None, None]
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    k = i * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    rows = weight + n.to(tl.int64)[None, :, None] * K + k
    if K == BLOCK_K * SLICES and N % BLOCK_N == 0:
        w = tl.load(rows, eviction_policy="evict_first")
    else:
        inside = (n < N)[None, :, None] & (k < K)
        w = tl.load(rows, mask=inside, other=0.0, eviction_policy="evict_first")
    if GATE:
        if K == BLOCK_K * SLICES and N % BLOCK_N == 0:
            u = tl.load(rows + N * K, eviction_policy="evict_first")
        else:
            u = tl.load(rows + N * K, mask=inside, other=0.0, eviction_policy="evict_first")
    dtype: tl.constexpr = x.dtype.element_ty
    if NORM:
        gain = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.arange(0, BLOCK_M)
    here = m < num_rows
    v = tl.load(x + m[None, :, None] * K + k, mask=here[None, :, None] & (k < K), other=0.0)
    if NORM:
        wide = v.to(tl.float32)
        factor = tl.rsqrt(tl.sum(tl.sum(wide * wide, 2), 0) / K + eps)
        v = (wide * gain).to(dtype)
    v = tl.permute(v, (0, 2, 1))
    total = tl.sum(tl.dot(w.to(dtype), v, input_precision="ieee"), 0)  # [BLOCK_N, BLOCK_M]
    if GATE:
        other = tl.sum(tl.dot(u.to(dtype), v, input_precision="ieee"), 0)
    if NORM:
        total *= factor[None, :]
    if SCALE:
        total *= tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    if GATE:
        if NORM:
            other *= factor[None, :]
        if SCALE:
            other *= tl.load(scale + N + n, mask=n < N, other=0.0)[:, None]
        total = _silu(total, dtype) * other.to(dtype).to(tl.float32)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    place = out + m[None, :].to(tl.int64) * N + n[:, None]
    kept = here[None, :] & (n < N)[:, None]
    if ADD:
        total += tl.load(place, mask=kept, other=0.0).to(tl.float32)
    if STORE:
        tl.store(place, total.to(out.dtype.element_ty), mask=kept)
    if BEST:
        value, at = tl.max(tl.where((n < N)[:, None], total, float("-inf")), 0, return_indices=True)
        blocks = tl.num_programs(0)
        tl.store(best + m * blocks + pid, value, mask=here)
        tl.store(best_at + m * blocks + pid, pid * BLOCK_N + at, mask=here)


@triton.jit
def _rotate(row, norm, cos, sin, many, head, inside, i, eps, NORM: tl.constexpr, HALF: tl.constexpr):
    """Heads of a token, normed where the model does, and rotated: two halves in the row's dtype."""
    dtype: tl.constexpr = row.dtype.element_ty
    low = tl.load(row + head, mask=many, other=0.0).to(tl.float32)
    high = tl.load(row + HALF + head, mask=many, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF)
        factor = tl.rsqrt(mean + eps)[:, None]
        gain_low = tl.load(norm + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        gain_high = tl.load(norm + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        low = (gain_low * (low * factor).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        high = (gain_high * (high * factor).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@triton.jit
def _chunks(length, WINDOW: tl.constexpr, SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr):
    """(first visible token, tokens a chunk, chunks) of a row; a row of length 0 has one, empty."""
    first = tl.zeros_like(length)
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    seen = length - first
    chunk = tl.maximum((seen + SPLITS * MIN_CHUNK - 1) // (SPLITS * MIN_CHUNK), 1) * MIN_CHUNK
    return first, chunk, tl.maximum((seen + chunk - 1) // chunk, 1)


@triton.jit(do_not_specialize=["num_seqs"])
def attention(
    qkv, positions, slots, rope, q_norm, k_norm, keys, values, block_table, rows, seq_lens,
    workspace, semaphores, out, ahead, eps, scale, num_seqs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
    TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr,
    SEQS_PAD: tl.constexpr, GROUP_PAD: tl.constexpr, HALF_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, NORM: tl.constexpr,
    AHEAD: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Head norm, rotary embedding, KV write and attention for one token of each row.

    Each row's own tokens are cut into chunks by a rule that looks at nothing but its length. The
    grid, of any size, shares out (chunk, KV head) pairs; partial results go to the workspace, and
    whoever finishes a row's last chunk merges them in order. So a row's bits depend neither on
    its neighbours nor on the grid. The new token's key and value are written by the program that
    has its chunk, and taken from registers there.

    workspace of a sequence: accumulators [HEADS, SPLITS, DIM], then (maximum, sum)
    [HEADS, SPLITS, 2], float32. semaphores [S, KV_HEADS] int32: zero before and after.
    """
    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(ahead, AHEAD, THREADS)
        gdc_wait()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DIM: tl.constexpr = 2 * HALF
    dtype: tl.constexpr = qkv.dtype.element_ty
    kind: tl.constexpr = keys.dtype.element_ty
    g = tl.arange(0, GROUP_PAD)
    i = tl.arange(0, HALF_PAD)
    d = tl.arange(0, DIM_PAD)
    t = tl.arange(0, BLOCK_N)
    inside_half = i < HALF
    inside_dim = d < DIM
    many = (g < GROUP)[:, None] & inside_half[None, :]
    one = inside_half[None, :]

    r = tl.arange(0, SEQS_PAD)
    lengths = tl.load(seq_lens + r, mask=r < num_seqs, other=0)
    _, _, counts = _chunks(lengths, WINDOW, SPLITS, MIN_CHUNK)
    counts = tl.where(r < num_seqs, counts, 0)
    ends = tl.cumsum(counts, 0)
    total_items = tl.sum(counts, 0) * KV_HEADS

    for item in range(tl.program_id(0), total_items, tl.num_programs(0)):
        h = item % KV_HEADS
        at_chunk = item // KV_HEADS
        before = ends <= at_chunk
        s = tl.sum(before.to(tl.int32), 0)
        split = at_chunk - tl.sum(tl.where(before, counts, 0), 0)
        s = s.to(tl.int64)
        length = tl.load(seq_lens + s)
        head_out = out + s * (HEADS * DIM) + h * (GROUP * DIM)
        wide = (g < GROUP)[:, None] & inside_dim[None, :]
        if length == 0:
            zero = tl.zeros((GROUP_PAD, DIM_PAD), out.dtype.element_ty)
            tl.store(head_out + g[:, None] * DIM + d[None, :], zero, mask=wide)
        else:
            first, chunk, count = _chunks(length, WINDOW, SPLITS, MIN_CHUNK)
            start = first + split * chunk
            end = tl.minimum(start + chunk, length)
            row = qkv + s * ((HEADS + 2 * KV_HEADS) * DIM)
            table = block_table + tl.load(rows + s).to(tl.int64) * TABLE_WIDTH
            angles = rope + tl.load(positions + s).to(tl.int64) * DIM
            cos = tl.load(angles + i, mask=inside_half, other=0.0)[None, :]
            sin = tl.load(angles + HALF + i, mask=inside_half, other=0.0)[None, :]
            head = h * (GROUP * DIM) + g[:, None] * DIM + i[None, :]
            q_low, q_high = _rotate(row, q_norm, cos, sin, many, head, inside_half, i, eps, NORM, HALF)
            own = (HEADS + h) * DIM + i[None, :]
            k_low, k_high = _rotate(row, k_norm, cos, sin, one, own, inside_half, i, eps, NORM, HALF)
            k_low = k_low.to(kind)
            k_high = k_high.to(kind)
            v_new = tl.load(row + (HEADS + KV_HEADS + h) * DIM + d, mask=inside_dim, other=0.0).to(kind)
            if end == length:
                place = tl.load(slots + s).to(tl.int64) * (KV_HEADS * DIM) + h * DIM
                tl.store(keys + place + i[None, :], k_low, mask=one)
                tl.store(keys + place + HALF + i[None, :], k_high, mask=one)
                tl.store(values + place + d, v_new, mask=inside_dim)
            best = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
            total = tl.zeros((GROUP_PAD,), tl.float32)
            acc = tl.zeros((GROUP_PAD, DIM_PAD), tl.float32)
            for at in range(start, end, BLOCK_N):
                past = at + t
                inside = past < end
                newest = past == length - 1
                old = inside & (newest == 0)
                block = tl.load(table + past // BLOCK_SIZE, mask=old, other=0).to(tl.int64)
                place = (block * BLOCK_SIZE + past % BLOCK_SIZE) * (KV_HEADS * DIM) + h * DIM
                half = old[:, None] & one
                low = tl.load(keys + place[:, None] + i[None, :], mask=half, other=0.0)
                high = tl.load(keys + place[:, None] + HALF + i[None, :], mask=half, other=0.0)
                v = tl.load(
                    values + place[:, None] + d[None, :], mask=old[:, None] & inside_dim[None, :], other=0.0
                )
                low = tl.where(newest[:, None], k_low, low)
                high = tl.where(newest[:, None], k_high, high)
                v = tl.where(newest[:, None], v_new[None, :], v)
                scores = tl.dot(q_low, tl.trans(low).to(dtype), input_precision="ieee")
                scores = tl.dot(q_high, tl.trans(high).to(dtype), scores, input_precision="ieee")
                scores = tl.where(inside[None, :], scores * scale, float("-inf"))
                above = tl.maximum(best, tl.max(scores, 1))  # finite: every block has a token inside
                p = tl.exp2(scores - above[:, None])
                fade = tl.exp2(best - above)
                total = total * fade + tl.sum(p, 1)
                acc = tl.dot(p.to(dtype), v.to(dtype), acc * fade[:, None], input_precision="ieee")
                best = above
            if count == 1:
                result = (acc / total[:, None]).to(out.dtype.element_ty)
                tl.store(head_out + g[:, None] * DIM + d[None, :], result, mask=wide)
            else:
                space = workspace + s * (HEADS * SPLITS * (DIM + 2))
                part = (h * GROUP + g) * SPLITS + split
                tl.store(space + part[:, None] * DIM + d[None, :], acc, mask=wide)
                stats = space + HEADS * SPLITS * DIM
                tl.store(stats + part * 2, best, mask=g < GROUP)
                tl.store(stats + part * 2 + 1, total, mask=g < GROUP)
                tl.debug_barrier()  # every thread's part is stored before the count goes up
                mine = semaphores + s * KV_HEADS + h
                if tl.atomic_add(mine, 1, sem="acq_rel") == count - 1:
                    tl.debug_barrier()
                    j = tl.arange(0, SPLITS)
                    used = j < count
                    for q_head in tl.static_range(GROUP):
                        part = (h * GROUP + q_head) * SPLITS + j
                        top = tl.load(stats + part * 2, mask=used, other=float("-inf"))
                        weight = tl.exp2(top - tl.max(top, 0))
                        whole = tl.sum(tl.load(stats + part * 2 + 1, mask=used, other=0.0) * weight, 0)
                        parts = tl.load(
                            space + part[:, None] * DIM + d[None, :],
                            mask=used[:, None] & inside_dim[None, :], other=0.0,
                        )  # fmt: skip
                        result = tl.sum(parts * weight[:, None], 0) / whole
                        tl.store(
                            head_out + q_head * DIM + d, result.to(out.dtype.element_ty), mask=inside_dim
                        )
                    tl.store(mine, 0)
