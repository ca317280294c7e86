"""The fused kernels of a small step: five a layer, chained by programmatic dependent launch.

A decode step reads every weight once, so each kernel asks for weights before anything else. With
PDL a kernel starts while the one before it still runs, loads weights, which no step ever writes,
into registers, and only then waits for what its predecessor wrote. The rules, for every kernel
here: nothing that a step writes is read, and nothing is stored, before `gdc_wait`; every thread
waits; every kernel waits before it ends. PDL is a constexpr: without it (older GPUs, the
interpreter) the same kernels run plainly.

`gemv` serves one row with multiply-adds and has a whole row of weights in flight; `stream` serves
up to 64 rows, 128 with FP8 weights, with tensor cores and a pipeline of weight tiles; `attention` is
everything between the QKV projection and the output projection. `multiply` launches the first two.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import Linear
from .matmul import COMPILED, widen
from .tune import PARTIALS, SEMAPHORES, Kind, Version


@dataclass(frozen=True)
class Workspace:
    """Memory that outlives a step because of the semaphores in it; the partial sums mean nothing."""

    semaphores: torch.Tensor
    """[SEMAPHORES] int32"""
    partials: torch.Tensor
    """[PARTIALS] float32"""

    @classmethod
    def on(cls, device: torch.device) -> Workspace:
        return cls(
            torch.zeros(SEMAPHORES, dtype=torch.int32, device=device),
            torch.empty(PARTIALS, dtype=torch.float32, device=device),
        )


@triton.jit
def _silu(gate, dtype: tl.constexpr):
    """Rounded as a model that keeps its activations in `dtype` would."""
    gate = gate.to(dtype).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)


@triton.jit
def gemv(
    x, index, norm, weight, scale, bias, out, eps,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHER: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of activations times a block of weight rows. Grid: (N / BLOCK_N).

    x [K], or row index[0] of x [T, K] with GATHER; weight [N, K] ([2 N, K] with GATE: out =
    silu(gate) * up), E4M3 as bytes with SCALE; out [N]. NORM: x is RMS-normed first. ADD: out +=
    product. BLOCK_K >= K.
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
        w = tl.load(rows, mask=inside, other=0, eviction_policy="evict_first")
    if GATE:
        up = rows + tl.full((), N, tl.int64) * K
        if whole and even:
            u = tl.load(up, eviction_policy="evict_first")
        else:
            u = tl.load(up, mask=inside, other=0, eviction_policy="evict_first")
    dtype: tl.constexpr = x.dtype.element_ty
    if NORM:
        gain = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = x
    if GATHER:
        row += tl.load(index).to(tl.int64) * K
    v = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        v *= tl.rsqrt(tl.sum(v * v, 0) / K + eps)
        # Rounded before and after the weight, as Hugging Face models do.
        v = (v.to(dtype).to(tl.float32) * gain).to(dtype).to(tl.float32)
    if SCALE:
        w = widen(w, dtype, PACKED)
    total = tl.sum(w.to(tl.float32) * v[None, :], 1)
    if SCALE:
        total *= tl.load(scale + n, mask=n < N, other=0.0)
    if GATE:
        if SCALE:
            u = widen(u, dtype, PACKED)
        other = tl.sum(u.to(tl.float32) * v[None, :], 1)
        if SCALE:
            other *= tl.load(scale + N + n, mask=n < N, other=0.0)
        total = _silu(total, dtype) * other.to(dtype).to(tl.float32)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(out + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _load_weights(at, n, k, end, columns, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr):
    """A tile of weights, zero outside; `at` points to it, `k` counts from the start of a row."""
    if EVEN_K and EVEN_N:
        w = tl.load(at, eviction_policy="evict_first")
    elif EVEN_K:
        w = tl.load(at, mask=(n < columns)[:, None], other=0, eviction_policy="evict_first")
    else:
        inside = (n < columns)[:, None] & (k < end)[None, :]
        w = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
    return w


@triton.jit
def _accumulate(
    x_at, norm_at, w, u, total, other, squares, real, k, end,
    EVEN_K: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, SCALE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One tile's products onto the sums, and its squares of x. The weights are the right operand."""
    if EVEN_K:
        a = tl.load(x_at, mask=real[:, None], other=0.0)
    else:
        a = tl.load(x_at, mask=real[:, None] & (k < end)[None, :], other=0.0)
    dtype: tl.constexpr = a.dtype
    if NORM:
        gain = tl.load(norm_at) if EVEN_K else tl.load(norm_at, mask=k < end, other=0.0)
        wide = a.to(tl.float32)
        squares += wide * wide
        a = (wide * gain.to(tl.float32)[None, :]).to(dtype)
    if SCALE:
        w = widen(w, dtype, PACKED)
    total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
    if GATE:
        if SCALE:
            u = widen(u, dtype, PACKED)
        other = tl.dot(a, tl.trans(u), other, input_precision="ieee")
    return total, other, squares


@triton.jit
def _finish(
    total, other, squares, scale, bias, out, eps, m, n, real, width, columns,
    NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """From sums to results. squares [BLOCK_M] are the sums of each row's squares."""
    if NORM:
        factor = tl.rsqrt(squares / width + eps)[:, None]
        total *= factor
    if SCALE:
        total *= tl.load(scale + n, mask=n < columns, other=0.0)[None, :]
    if GATE:
        if NORM:
            other *= factor
        if SCALE:
            other *= tl.load(scale + columns + n, mask=n < columns, other=0.0)[None, :]
        total = _silu(total, dtype) * other.to(dtype).to(tl.float32)
    if BIAS:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * columns + n[None, :]
    kept = real[:, None] & (n < columns)[None, :]
    if ADD:
        total += tl.load(place, mask=kept, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["num_rows"])
def stream(
    x, index, norm, weight, scale, bias, out, partials, semaphores, eps,
    num_rows, width, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    GATHER: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`gemv` for up to BLOCK_M rows, on tensor cores. Grid: (columns / BLOCK_N, SPLITS).

    x [num_rows, width], or its rows `index` [num_rows] with GATHER; out [num_rows, columns].
    Weights pass through a pipeline of tiles, the first of which is asked for before the wait. The norm's weight is applied to x, its factor to the
    result. With SPLITS the inner dimension is shared out, the parts go to `partials`, and whoever
    of a block of columns finishes last adds them in order.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = x.dtype.element_ty
    share = tl.cdiv(tl.cdiv(width, BLOCK_K), SPLITS) * BLOCK_K
    start = split * share
    end = tl.minimum(start + share, width)
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = start + tl.arange(0, BLOCK_K)
    w_at = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    u_at = w_at + columns.to(tl.int64) * width
    w = _load_weights(w_at, n, k, end, columns, EVEN_K, EVEN_N)
    u = w
    if GATE:
        u = _load_weights(u_at, n, k, end, columns, EVEN_K, EVEN_N)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    real = m < num_rows
    source = m
    if GATHER:
        source = tl.load(index + m, mask=real, other=0)
    x_at = x + source.to(tl.int64)[:, None] * width + k[None, :]
    norm_at = norm + k
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    other = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    total, other, squares = _accumulate(
        x_at, norm_at, w, u, total, other, squares, real, k, end, EVEN_K, NORM, GATE, SCALE, PACKED
    )
    for _ in tl.range(start + BLOCK_K, end, BLOCK_K):
        k += BLOCK_K
        w_at += BLOCK_K
        u_at += BLOCK_K
        x_at += BLOCK_K
        norm_at += BLOCK_K
        w = _load_weights(w_at, n, k, end, columns, EVEN_K, EVEN_N)
        u = w
        if GATE:
            u = _load_weights(u_at, n, k, end, columns, EVEN_K, EVEN_N)
        total, other, squares = _accumulate(
            x_at, norm_at, w, u, total, other, squares, real, k, end, EVEN_K, NORM, GATE, SCALE, PACKED
        )
    sums = tl.sum(squares, 1)
    if SPLITS == 1:
        _finish(
            total, other, sums, scale, bias, out, eps, m, n, real, width, columns,
            NORM, GATE, ADD, BIAS, SCALE, dtype,
        )  # fmt: skip
    else:
        TILE: tl.constexpr = BLOCK_M * BLOCK_N
        SIZE: tl.constexpr = TILE * (2 if GATE else 1) + BLOCK_M
        tile = m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts = partials + block * (SPLITS * SIZE)
        own = parts + split * SIZE
        tl.store(own + tile, total, mask=real[:, None])
        if GATE:
            tl.store(own + TILE + tile, other, mask=real[:, None])
        if NORM:
            tl.store(own + SIZE - BLOCK_M + m, sums, mask=real)
        tl.debug_barrier()  # every thread's part is stored before the count goes up
        if tl.atomic_add(semaphores + block, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            other = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            sums = tl.zeros((BLOCK_M,), tl.float32)
            for _part in tl.static_range(SPLITS):
                total += tl.load(parts + tile, mask=real[:, None], other=0.0, cache_modifier=".cg")
                if GATE:
                    other += tl.load(parts + TILE + tile, mask=real[:, None], other=0.0, cache_modifier=".cg")
                if NORM:
                    sums += tl.load(parts + SIZE - BLOCK_M + m, mask=real, other=0.0, cache_modifier=".cg")
                parts += SIZE
            _finish(
                total, other, sums, scale, bias, out, eps, m, n, real, width, columns,
                NORM, GATE, ADD, BIAS, SCALE, dtype,
            )  # fmt: skip
            tl.store(semaphores + block, 0)


def multiply(
    version: Version,
    x: torch.Tensor,
    linear: Linear,
    out: torch.Tensor,
    workspace: Workspace,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    index: torch.Tensor | None = None,
    gate: bool = False,
    add: bool = False,
    pdl: bool = False,
) -> None:
    """out = linear(x) in one kernel; sums in float32, rounded once.

    Args:
        version: of kind `gemv` for one row, or `stream` for up to `version.rows`.
        x: [T, in].
        linear: its bias and scale are applied.
        out: [rows, out], [rows, out / 2] with `gate`.
        workspace: used where the version splits the inner dimension.
        norm: [in], the weight of an RMS norm of x.
        eps: of that norm.
        index: [rows] int32: which rows of x; None: all.
        gate: the first half of the outputs are gates: out = silu(gate) * up.
        add: onto what `out` holds.
        pdl: launch dependently.
    """
    weight, columns, depth = linear.weight, out.shape[1], linear.in_features
    scaled = linear.scale is not None
    # A tensor that a kernel does not look at is `out`.
    norm_at, index_at, scale, bias = (
        out if t is None else t for t in (norm, index, linear.scale, linear.bias)
    )
    flags = {
        "GATHER": index is not None, "NORM": norm is not None, "GATE": gate, "ADD": add,
        "BIAS": linear.bias is not None, "SCALE": scaled,
        "PACKED": COMPILED and x.dtype is not torch.float32,
        "PDL": pdl, "launch_pdl": pdl, "num_warps": version.warps,
    }  # fmt: skip
    operands = (x, index_at, norm_at, weight.view(torch.uint8) if scaled else weight, scale, bias)
    if version.kind is Kind.GEMV:
        gemv[(cdiv(columns, version.columns),)](
            *operands, out, eps,
            K=depth, N=columns, BLOCK_N=version.columns, BLOCK_K=next_power_of_2(depth), **flags,
        )  # fmt: skip
    else:
        stream[(cdiv(columns, version.columns), version.splits)](
            *operands, out, workspace.partials, workspace.semaphores, eps,
            out.shape[0], depth, columns,
            BLOCK_M=version.rows, BLOCK_N=version.columns, BLOCK_K=version.depth, SPLITS=version.splits,
            EVEN_K=depth % (version.depth * version.splits) == 0, EVEN_N=columns % version.columns == 0,
            num_stages=version.stages, **flags,
        )  # fmt: skip


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
    workspace, semaphores, out, eps, scale, num_seqs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
    TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr,
    SEQS_PAD: tl.constexpr, GROUP_PAD: tl.constexpr, HALF_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
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
                        places = (h * GROUP + q_head) * SPLITS + j
                        top = tl.load(stats + places * 2, mask=used, other=float("-inf"))
                        weight = tl.exp2(top - tl.max(top, 0))
                        whole = tl.sum(tl.load(stats + places * 2 + 1, mask=used, other=0.0) * weight, 0)
                        parts = tl.load(
                            space + places[:, None] * DIM + d[None, :],
                            mask=used[:, None] & inside_dim[None, :], other=0.0,
                        )  # fmt: skip
                        result = tl.sum(parts * weight[:, None], 0) / whole
                        tl.store(
                            head_out + q_head * DIM + d, result.to(out.dtype.element_ty), mask=inside_dim
                        )
                    tl.store(mine, 0)
