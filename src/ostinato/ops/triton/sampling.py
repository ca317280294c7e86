"""Logits to tokens on an NVIDIA GPU: the kernels behind `ostinato.sampling.sample`.

Same meaning, same integers, same random numbers as `ostinato/sampling.py`, which says how a token
is drawn. Each kernel gives a row many programs, but for the last, which does with what they found.
All that programs add up together is integers, so neither how a row is cut nor the order in which
programs run shows in a token.

Launches, all with fixed grids; a row that does not need one leaves it at once:

    GREEDY   best of each chunk -> best of the row
    SAMPLE   best of each chunk -> count -> weigh -> narrow -> draw
    FULL     copy of the raw logits, top 20 -> bias and stop ids -> mask and penalties -> SAMPLE -> rank

Where a GPU has clusters, `ops/cuda/sample.cu` does all of SAMPLE in one launch, in the same way.

The least likely token that top-k or top-p keeps is found by narrowing, never by sorting. The depth
of a token is (m - x) / temperature, m the largest logit; at a depth of 31 its weight is 0.

    count    tokens by depth, in 128 coarse bins. The k-th token then lies in one of them. The weight
             of a bin's tokens is known to 13 %, which leaves two or three for the threshold of top-p.
    weigh    only in those: exact counts and weights in 1024 fine bins each
    narrow   only in the fine bin or two then left: the tokens themselves, a few dozen of 128256,
             into a list; and for each tile the weight of what is kept for certain
    draw     bisects the list, which gives the threshold, and draws

The list may be too short where nearly all logits look alike (temperatures of a thousand, say). That
costs time, not exactness: the whole row is bisected instead.

Everything between kernels lies in `scratch`, and nothing there means anything between two calls:
the first kernel clears what later ones add to. With PDL all kernels are launched dependently, and
wait before they touch memory.
Not here: penalty counts, which another op advances.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ...inputs import FLAG_BIAS, FLAG_LOGPROBS, FLAG_MASK, FLAG_PENALTIES, StaticInputs, StepState
from ...sampling import MAX_INVERSE_TEMPERATURE, MAX_VOCAB, WEIGHT_BITS
from ...types import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS, SamplerVariant
from .. import Peaks

if TYPE_CHECKING:
    from ..cuda.sample import ClusterSampler

_INVERSE_LIMIT = tl.constexpr(MAX_INVERSE_TEMPERATURE)
_WEIGHT_OF_ONE = tl.constexpr(float(2**WEIGHT_BITS))
_BIAS = tl.constexpr(FLAG_BIAS)
_LOGPROBS = tl.constexpr(FLAG_LOGPROBS)
_MASK = tl.constexpr(FLAG_MASK)
_PENALTIES = tl.constexpr(FLAG_PENALTIES)
_TOP = tl.constexpr(MAX_LOGPROBS)
_BIAS_WIDTH = tl.constexpr(MAX_LOGIT_BIAS)
_STOP_WIDTH = tl.constexpr(MAX_STOP_IDS)
_NONE = tl.constexpr(-(2**63))
_NO_INDEX = tl.constexpr(2**31 - 1)

_BOUND_OF_ONE = tl.constexpr(float(2**40))  # bounds stay below 2^63

_BOTTOM = tl.constexpr(31.0)  # exp(-31) * 2^44 < 1
_COARSE = tl.constexpr(128)
_COARSE_STEP = tl.constexpr(0.125)  # the last bin reaches down to the bottom
_FINE = tl.constexpr(1024)
_LIST = tl.constexpr(1024)
_SHORT = tl.constexpr(256)  # entries of the list, or logits of a row, looked at together
_FEW = tl.constexpr(16)  # entries of the list added to their tiles at once
_LONG = tl.constexpr(4096)
_TWO_32 = tl.constexpr(2**32)

# `counts`, i32 [S, _COUNTS]: coarse bins, fine bins of top-k, then
_FINE_COUNTS = tl.constexpr(128)
_LISTED = tl.constexpr(1152)  # tokens in the list, or that it had no room for
_BY_COUNT = tl.constexpr(1153)  # whether there is a k-th token with a weight
_BIN_K = tl.constexpr(1154)  # its coarse bin
_LOW_K = tl.constexpr(1155)  # its fine bin
_FIRST = tl.constexpr(1156)  # coarse bins of top-p's threshold
_LAST = tl.constexpr(1157)
_LOW_P = tl.constexpr(1158)  # fine bins of it
_HIGH_P = tl.constexpr(1159)
_COUNTS = tl.constexpr(1184)
# `sums`, i64 [S, _SUMS]: weights in the fine bins of top-k and of top-p, then
_BY_MASS = tl.constexpr(1024)
_ALL = tl.constexpr(2048)  # weight of the row
_ABOVE_K = tl.constexpr(2049)  # weight above the coarse bin of top-k
_ABOVE_P = tl.constexpr(2050)  # weight above the coarse bins of top-p
_EXTREMES_K = tl.constexpr(2051)  # of images in the list: 1 + the largest, 2^32 - the smallest
_EXTREMES_P = tl.constexpr(2053)
_REST_K = tl.constexpr(2055)  # tokens of its fine bin that are among the top k
_TOTAL = tl.constexpr(2056)  # weight that top-p takes its share of; with top-k: above its fine bin
_KEPT = tl.constexpr(2057)  # weight above the fine bins of top-p
_SUMS = tl.constexpr(2064)

_MIN_BLOCK = 1024
_MAX_BLOCK = 4096
_MAX_CHUNKS = 256
_ENOUGH_PROGRAMS = 2048
_MAX_TILES = 16
_FEW_PROGRAMS = 512


def _cut(num_seqs: int, vocab: int) -> tuple[int, int]:
    """(logits a chunk, chunks a row): small chunks only where they are needed to fill the GPU."""
    block = _least_block(vocab)
    while block < _MAX_BLOCK and num_seqs * -(-vocab // block) > _ENOUGH_PROGRAMS:
        block *= 2
    return block, -(-vocab // block)


def _tiles(num_seqs: int, tiles_of_row: int) -> int:
    """Tiles that a program of `_weigh` and `_narrow` goes through: each begins with sums over bins."""
    tiles = 1
    while tiles < _MAX_TILES and num_seqs * -(-tiles_of_row // (2 * tiles)) >= _FEW_PROGRAMS:
        tiles *= 2
    return tiles


def _least_block(vocab: int) -> int:
    return max(_MIN_BLOCK, int(triton.next_power_of_2(-(-vocab // _MAX_CHUNKS))))


def _sections(num_seqs: int, vocab: int, variant: SamplerVariant) -> dict[str, tuple[torch.dtype, int]]:
    """Scratch arrays: type and number of elements. The shapes stand beside the kernels' arguments."""
    chunks = -(-vocab // _least_block(vocab))  # the most that `_cut` makes: more sequences never need less
    i32, i64, f32 = torch.int32, torch.int64, torch.float32
    sections = {"chunk_best": (i32, num_seqs * chunks), "chunk_max": (f32, num_seqs * chunks)}
    if variant >= SamplerVariant.SAMPLE:
        sections |= {
            "counts": (i32, num_seqs * _COUNTS.value),
            "sums": (i64, num_seqs * _SUMS.value),
            "mass": (i64, num_seqs * chunks),
            "list_logit": (f32, num_seqs * _LIST.value),
            "list_token": (i32, num_seqs * _LIST.value),
        }
    if variant is SamplerVariant.FULL:
        sections |= {
            "raw": (f32, num_seqs * vocab),
            "chunk_exp": (f32, num_seqs * chunks),
            "raw_max": (f32, num_seqs * chunks),
            "top": (i64, num_seqs * chunks * MAX_LOGPROBS),
            "above": (i32, num_seqs * chunks),
        }
    return sections


def scratch_words(max_seqs: int, vocab: int, variant: SamplerVariant = SamplerVariant.FULL) -> int:
    """32-bit words of scratch that up to `max_seqs` sequences need. FULL keeps a copy of the logits."""
    sections = _sections(max_seqs, vocab, variant).values()
    return sum(_padded(dtype.itemsize * count // 4) for dtype, count in sections)


def _padded(words: int) -> int:
    return (words + 31) // 32 * 32  # 128 bytes


def _views(
    scratch: torch.Tensor, num_seqs: int, vocab: int, variant: SamplerVariant
) -> dict[str, torch.Tensor]:
    words = scratch.view(torch.int32)
    views = {}
    start = 0
    for name, (dtype, count) in _sections(num_seqs, vocab, variant).items():
        size = dtype.itemsize * count // 4
        views[name] = words[start : start + size].view(dtype)
        start += _padded(size)
    return views


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    inputs: StaticInputs,
    state: StepState,
    *,
    variant: SamplerVariant,
    out: torch.Tensor,
    scratch: torch.Tensor,
    pdl: bool = False,
    draw: ClusterSampler | None = None,
    largest: torch.Tensor | None = None,
) -> None:
    """Choose one token for each sequence of a step; see `ostinato.sampling.sample`.

    Allocates nothing and never waits for the device. `scratch`: at least
    `scratch_words(S, V, variant)` words, i32 or f32, contiguous, at a multiple of 16 bytes.
    `pdl`: launch dependently (compute capability 9.0 and later). `draw`: does all from the count to the draw
    in one kernel, where it can. `largest`: f32 [S, N], the largest logits of parts of each row, any cut.

    Raises:
        ValueError: a tensor has another type or shape, or scratch is too small.
    """
    num_seqs, vocab = logits.shape
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous f32 [S, V], got {logits.dtype} {list(logits.shape)}")
    if not 0 < vocab <= MAX_VOCAB:
        raise ValueError(f"the vocabulary must have 1 to {MAX_VOCAB} tokens, got {vocab}")
    for name, tensor in (("rows", rows), ("positions", positions), ("out", out)):
        if tensor.shape != (num_seqs,) or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be i32 [{num_seqs}], got {tensor.dtype} {list(tensor.shape)}")
    need = scratch_words(num_seqs, vocab, variant)
    if scratch.numel() < need or scratch.dtype.itemsize != 4:
        raise ValueError(f"scratch must have {need} 32-bit words, got {scratch.numel()} of {scratch.dtype}")
    if num_seqs == 0:
        return
    if variant is SamplerVariant.GREEDY:
        greedy(logits, rows, out=out, scratch=scratch, pdl=pdl)
        return
    t = _views(scratch, num_seqs, vocab, variant)
    cut, launch = _chunked(num_seqs, vocab, pdl), _launch(pdl)
    chunks = cut["CHUNKS"]
    grid = (num_seqs, chunks)

    if variant is SamplerVariant.FULL:
        _keep_raw[grid](logits, rows, inputs.flags, t["raw"], t["raw_max"], t["chunk_exp"], t["top"], **cut)
        _edit_few[(num_seqs,)](
            logits,
            rows,
            positions,
            inputs.flags,
            inputs.num_bias,
            inputs.bias_ids,
            inputs.bias_values,
            inputs.min_position,
            inputs.num_stop_ids,
            inputs.stop_ids,
            inputs.bias_ids.stride(0),
            inputs.bias_values.stride(0),
            inputs.stop_ids.stride(0),
            V=vocab,
            **launch,
        )
        _adjust[grid](
            logits,
            rows,
            inputs.flags,
            inputs.mask,
            state.output_counts,
            state.prompt_mask,
            inputs.presence_penalty,
            inputs.frequency_penalty,
            inputs.repetition_penalty,
            inputs.mask.stride(0),
            state.output_counts.stride(0),
            state.prompt_mask.stride(0),
            **cut,
        )

    if variant is SamplerVariant.FULL:
        largest = None  # of logits before they were edited
    if draw is None or not draw.run(logits, rows, positions, inputs, out=out, largest=largest):
        _draw_by_kernels(logits, rows, positions, inputs, out, t, cut, launch)

    if variant is SamplerVariant.FULL:
        _count_above[grid](rows, inputs.flags, t["raw"], out, t["above"], **cut)
        _report[(num_seqs,)](
            rows,
            inputs.flags,
            t["raw"],
            t["raw_max"],
            t["chunk_exp"],
            t["top"],
            t["above"],
            out,
            state.logprob_values,
            state.logprob_ids,
            state.logprob_rank,
            state.logprob_values.stride(0),
            state.logprob_ids.stride(0),
            TOP_PADDED=triton.next_power_of_2(chunks * MAX_LOGPROBS),
            **(cut | {"num_warps": 8}),
        )


def greedy(
    logits: torch.Tensor, rows: torch.Tensor, *, out: torch.Tensor, scratch: torch.Tensor, pdl: bool = False
) -> None:
    """The best tokens: `sample` where that is all."""
    num_seqs, vocab = logits.shape
    t, cut = _views(scratch, num_seqs, vocab, SamplerVariant.GREEDY), _chunked(num_seqs, vocab, pdl)
    partials = (t["chunk_max"], t["chunk_best"])
    _chunk_best[num_seqs, cut["CHUNKS"]](logits, rows, *partials, *partials, CLEAR=0, **cut)
    pick(*partials, rows, parts=cut["CHUNKS"], out=out, pdl=pdl)


def peaks_in(workspace: torch.Tensor, num_seqs: int, parts: int) -> Peaks:
    """Room for the peaks of S rows, at the beginning of a workspace of `scratch_words`.

    A part has 64 logits at least, or is a row's only one, so the chunks that `sample` makes of as many rows, or its copy
    of the logits, need more.
    """
    words = workspace.view(torch.int32)
    values, tokens = words[: 2 * num_seqs * parts].view(2, num_seqs, parts)
    return Peaks(values.view(torch.float32), tokens)


def pick(
    values: torch.Tensor,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    *,
    parts: int,
    out: torch.Tensor,
    pdl: bool = False,
) -> None:
    """out[s] = the first best token of what is known of its parts, 0 for padding.

    values f32 and tokens i32: [S, parts], contiguous.
    """
    _argmax_partials[(len(rows),)](
        values, tokens, rows, out,
        BLOCKS=parts, BLOCKS_PADDED=triton.next_power_of_2(parts), num_warps=4, **_launch(pdl),
    )  # fmt: skip


def _draw_by_kernels(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    inputs: StaticInputs,
    out: torch.Tensor,
    t: dict[str, torch.Tensor],
    cut: dict[str, Any],
    launch: dict[str, Any],
) -> None:
    """SAMPLE, launch by launch."""
    num_seqs, vocab = logits.shape
    chunks = cut["CHUNKS"]
    # BLOCK is one load of a program; from `_weigh` on a program goes through tiles.
    grid = (num_seqs, chunks)
    partials, whole = (t["chunk_max"], t["chunk_best"]), (t["counts"], t["sums"])
    clear = triton.next_power_of_2(-(-_SUMS.value // chunks))
    _chunk_best[grid](logits, rows, *partials, *whole, CLEAR=clear, **cut)
    params = (inputs.temperature, inputs.min_p, inputs.top_k, inputs.top_p)
    common = (logits, rows, *partials, *params, *whole)
    _count[grid](*common, **cut)
    tile = _least_block(vocab)
    tiles_of_row = -(-vocab // tile)
    tiles = _tiles(num_seqs, tiles_of_row)
    by_tile = (num_seqs, -(-tiles_of_row // tiles))
    warps = 4 if tiles == 1 else 8
    best = {"V": vocab, "TILE": tile, "CHUNKS": chunks, "CHUNKS_PADDED": cut["CHUNKS_PADDED"]} | launch
    _weigh[by_tile](*common, TILES=tiles, num_warps=warps, **best)
    lists = (t["mass"], t["list_logit"], t["list_token"])
    _narrow[by_tile](*common, *lists, TILES=tiles, num_warps=warps, **best)
    _draw[(num_seqs,)](
        *common,
        *lists,
        positions,
        inputs.seed,
        inputs.seed.stride(0),
        out,
        TILES_OF_ROW=tiles_of_row,
        TILES_PADDED=triton.next_power_of_2(tiles_of_row),
        num_warps=8,
        **best,
    )


def _chunked(num_seqs: int, vocab: int, pdl: bool) -> dict[str, Any]:
    """Options of launches with a program for each chunk of a row."""
    block, chunks = _cut(num_seqs, vocab)
    return {
        "V": vocab,
        "BLOCK": block,
        "CHUNKS": chunks,
        "CHUNKS_PADDED": triton.next_power_of_2(chunks),
        "num_warps": 4 if block <= 1024 else 8,
    } | _launch(pdl)


def _launch(pdl: bool) -> dict[str, Any]:
    """Options of every launch."""
    # A product fused with the difference after it in one kernel and not in another: two different bins.
    return {"PDL": pdl, "launch_pdl": pdl, "enable_fp_fusion": False}


# --- pieces --------------------------------------------------------------------------------


@triton.jit
def _enter(PDL: tl.constexpr):
    """First line of every kernel: let the next one be launched, wait for the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _load(table, s, v, V: tl.constexpr):
    """Logits v of sequence s. NaN is -inf, and so is what lies beyond the vocabulary."""
    return _plain(_load_raw(table, s, v, V, V))


@triton.jit
def _load_raw(table, s, v, end, V: tl.constexpr):
    """Logits v < `end` of sequence s as they are: for depths and weights, where NaN falls out by itself."""
    return tl.load(table + s.to(tl.int64) * V + v, mask=v < end, other=float("-inf"))


@triton.jit
def _scattered(start, row):
    """`start`, row being 0 or more, in a way that hides its alignment from the compiler.

    It would give each thread four neighbours, and then move them to where atomics want them.
    """
    return start + (row >> 31)


@triton.jit
def _plain(x):
    x = tl.where(x != x, float("-inf"), x)
    return tl.where(x == 0.0, 0.0, x)  # -0.0 and 0.0 tie


@triton.jit
def _ordered(x):
    """The int32 image of f32: same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _image(x):
    """The same in [0, 2^32), as int64."""
    return _ordered(x).to(tl.int64) + 2147483648


@triton.jit
def _inverse(temperature):
    return tl.minimum(tl.div_rn(tl.full((), 1.0, tl.float32), temperature), _INVERSE_LIMIT)


@triton.jit
def _draws(largest, temperature):
    """Whether a row is more than its best token."""
    return (temperature > 0.0) & (largest > float("-inf")) & (largest < float("inf"))


@triton.jit
def _depth(x, largest, inverse):
    return (largest - x) * inverse


@triton.jit
def _weights(depth, min_p):
    """Weights, i64: `_Weigh` of ostinato/sampling.py."""
    e = tl.exp(-depth)
    e = tl.where(e >= min_p, e, 0.0)
    return (e * _WEIGHT_OF_ONE).to(tl.int64)


@triton.jit
def _share(total, fraction):
    """floor(fraction * total), at least 1."""
    return tl.maximum((fraction.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _uniform(low, high, position):
    """f64 from Philox4x32-10 of counter (position, 0, 0, 0), in uint64 so that products are whole."""
    mask = tl.full((), 0xFFFFFFFF, tl.uint64)
    k0 = low.to(tl.int64).to(tl.uint64) & mask
    k1 = high.to(tl.int64).to(tl.uint64) & mask
    c0 = position.to(tl.int64).to(tl.uint64) & mask
    c1 = c0 ^ c0
    c2 = c1
    c3 = c1
    m0 = tl.full((), 0xD2511F53, tl.uint64)
    m1 = tl.full((), 0xCD9E8D57, tl.uint64)
    w0 = tl.full((), 0x9E3779B9, tl.uint64)
    w1 = tl.full((), 0xBB67AE85, tl.uint64)
    for _ in tl.static_range(10):
        p0 = c0 * m0
        p1 = c2 * m1
        c0 = (p1 >> 32) ^ c1 ^ k0
        c2 = (p0 >> 32) ^ c3 ^ k1
        c1 = p1 & mask
        c3 = p0 & mask
        k0 = (k0 + w0) & mask
        k1 = (k1 + w1) & mask
    bits = ((c0 >> 5) << 26) + (c1 >> 6)
    return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


# --- best of a row ---------------------------------------------------------------------------


@triton.jit
def _chunk_best(
    logits, rows, chunk_max, chunk_best, counts, sums, CLEAR: tl.constexpr,
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """chunk_max, chunk_best: [S, CHUNKS]. CLEAR: how much of what later kernels add to is set to 0."""
    _enter(PDL)
    s = tl.program_id(0)
    c = tl.program_id(1)
    if tl.load(rows + s) >= 0:
        x = _load(logits, s, c * BLOCK + tl.arange(0, BLOCK), V)
        largest, where = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(chunk_max + s * CHUNKS + c, largest)
        tl.store(chunk_best + s * CHUNKS + c, c * BLOCK + where)
        if CLEAR:
            i = c * CLEAR + tl.arange(0, CLEAR)
            tl.store(sums + s * _SUMS + i, tl.zeros((CLEAR,), tl.int64), mask=i < _SUMS)
            tl.store(counts + s * _COUNTS + i, tl.zeros((CLEAR,), tl.int32), mask=i < _COUNTS)


@triton.jit
def _best(values, indices, s, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr):
    """Largest of a row's partials, and the lowest index that has it."""
    b = tl.arange(0, BLOCKS_PADDED)
    m = _plain(tl.load(values + s * BLOCKS + b, mask=b < BLOCKS, other=float("-inf")))
    i = tl.load(indices + s * BLOCKS + b, mask=b < BLOCKS, other=_NO_INDEX)
    largest = tl.max(m, axis=0)
    return largest, tl.min(tl.where(m == largest, i, _NO_INDEX), axis=0)


@triton.jit
def _argmax_partials(
    values, indices, rows, out, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr, PDL: tl.constexpr
):
    """values, indices: [S, BLOCKS]; out: [S], 0 for padding."""
    _enter(PDL)
    s = tl.program_id(0)
    _, best = _best(values, indices, s, BLOCKS, BLOCKS_PADDED)
    tl.store(out + s, tl.where(tl.load(rows + s) >= 0, best, 0))


# --- thresholds and the draw -------------------------------------------------------------------


@triton.jit
def _coarse_edge(i):
    return tl.where(i < _COARSE, i.to(tl.float32) * _COARSE_STEP, _BOTTOM)


@triton.jit
def _coarse_bin(depth):
    return tl.minimum((tl.minimum(depth, _BOTTOM) * (1.0 / _COARSE_STEP)).to(tl.int32), _COARSE - 1)


@triton.jit
def _fine_scale(first, last):
    """Depth at which coarse bins first to last begin and end, and fine bins per unit of depth."""
    top = _coarse_edge(first)
    bottom = _coarse_edge(last + 1)
    return top, bottom, tl.div_rn(tl.full((), _FINE, tl.float32), bottom - top)


@triton.jit
def _fine(depth, top, scale):
    """Place among fine bins, whose whole part is the bin; at _FINE too it is the last one.

    Each step is monotone under rounding: a larger logit never lands in a later bin.
    """
    return (depth - top) * scale


@triton.jit
def _coarse_bins(counts, s, k, share_of, min_p, by_count):
    """Where the coarse counts leave room for the thresholds.

    Returns the bin of the k-th token, the tokens above that bin, whether there is a k-th token with
    a weight, and the first and last bin that the threshold of top-p can lie in.
    """
    i = tl.arange(0, _COARSE)
    n = tl.load(counts + s * _COUNTS + i)
    up_to = tl.cumsum(n, axis=0)
    by_count = by_count & (tl.sum(n, axis=0) >= k)
    bin_k = tl.where(by_count, tl.sum((up_to < k).to(tl.int32), axis=0), _COARSE)
    above_k = tl.sum(tl.where(i < bin_k, n, 0), axis=0)

    # Bounds of each bin's weight, in 2^40ths of the most likely token's. A thousandth covers exp.
    most_each = tl.exp(-_coarse_edge(i)) * 1.001
    least_each = tl.where(i < _COARSE - 1, tl.exp(-_coarse_edge(i + 1)) * 0.999, 0.0)
    most = tl.where((most_each < min_p) | (i > bin_k), 0, n * ((most_each * _BOUND_OF_ONE).to(tl.int64) + 1))
    least = tl.where((least_each < min_p) | (i >= bin_k), 0, n * (least_each * _BOUND_OF_ONE).to(tl.int64))
    most_above = tl.cumsum(most, axis=0)
    least_above = tl.cumsum(least, axis=0)
    most_below = tl.sum(most, axis=0) - most_above
    least_below = tl.sum(least, axis=0) - least_above
    # The threshold is the first at which above * (1 - share) >= below * share.
    rest_of = 1.0 - share_of
    never = most_above.to(tl.float32) * rest_of < least_below.to(tl.float32) * share_of
    surely = least_above.to(tl.float32) * rest_of >= most_below.to(tl.float32) * share_of
    first = tl.sum(never.to(tl.int32), axis=0)
    last = tl.sum(1 - surely.to(tl.int32), axis=0)
    return bin_k, above_k, by_count, first, last


@triton.jit
def _count(
    logits, rows, chunk_max, chunk_best, temperature, min_p, top_k, top_p, counts, sums,
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Tokens in coarse bins, for rows with a filter."""
    _enter(PDL)
    s = tl.program_id(0)
    c = tl.program_id(1)
    row = tl.load(rows + s)
    if row >= 0:
        x = _load_raw(logits, s, c * BLOCK + tl.arange(0, BLOCK), V, V)
        largest, _best_token = _best(chunk_max, chunk_best, s, CHUNKS, CHUNKS_PADDED)
        hot = tl.load(temperature + row)
        k = tl.load(top_k + row)
        filtered = ((k > 0) & (k < V)) | (tl.load(top_p + row) < 1.0)
        if filtered & _draws(largest, hot):
            depth = _depth(x, largest, _inverse(hot))
            n = tl.histogram(_coarse_bin(depth), _COARSE, mask=depth < _BOTTOM)
            i = tl.arange(0, _COARSE)
            tl.atomic_add(counts + s * _COUNTS + i, n, mask=n > 0, sem="relaxed")


@triton.jit
def _add_to_bins(bins, place, amount, inside, crowded):
    """bins[place] += amount where `inside`.

    `crowded`: expect most tokens here, perhaps in one bin (all logits equal, say), where adding one by
    one would queue.
    """
    bin = tl.minimum(tl.where(inside, place, 0.0).to(tl.int32), _FINE - 1)
    if crowded:
        lowest = tl.min(tl.where(inside, bin, _FINE), axis=0)
        if lowest == tl.max(tl.where(inside, bin, 0), axis=0):
            tl.atomic_add(bins + lowest, tl.sum(tl.where(inside, amount, 0), axis=0), sem="relaxed")
            inside = inside & (bin > lowest)
    tl.atomic_add(bins + bin, amount, mask=inside, sem="relaxed")


@triton.jit
def _weigh(
    logits, rows, chunk_max, chunk_best, temperature, min_p, top_k, top_p, counts, sums,
    V: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tokens and weights in the fine bins of where the thresholds can lie, and weights above."""
    _enter(PDL)
    s = tl.program_id(0)
    row = tl.load(rows + s)
    if row >= 0:
        start = _scattered(tl.program_id(1) * (TILE * TILES), row)
        x = _load_raw(logits, s, start + tl.arange(0, TILE), V, V)
        largest, _best_token = _best(chunk_max, chunk_best, s, CHUNKS, CHUNKS_PADDED)
        hot = tl.load(temperature + row)
        smallest = tl.load(min_p + row)
        k = tl.load(top_k + row)
        share_of = tl.load(top_p + row)
        by_mass = share_of < 1.0
        by_count = (k > 0) & (k < V)
        if (by_count | by_mass) & _draws(largest, hot):
            bin_k, _taken, by_count, first, last = _coarse_bins(counts, s, k, share_of, smallest, by_count)
            i = tl.arange(0, _COARSE)
            n = tl.load(counts + s * _COUNTS + i)
            crowded_k = 2 * tl.sum(tl.where(i == bin_k, n, 0), axis=0) > V
            crowded_p = 2 * tl.sum(tl.where((i >= first) & (i <= last), n, 0), axis=0) > V
            begin_k, end_k, scale_k = _fine_scale(tl.minimum(bin_k, _COARSE - 1), bin_k)
            begin_p, end_p, scale_p = _fine_scale(first, last)
            inverse = _inverse(hot)
            mine = sums + s * _SUMS
            all_weight = tl.zeros((TILE,), tl.int64)
            above_k = tl.zeros((TILE,), tl.int64)
            above_p = tl.zeros((TILE,), tl.int64)
            for tile in tl.range(0, TILES):
                depth = _depth(x, largest, inverse)
                if TILES > 1:  # on its way while this tile is worked on
                    start += TILE
                    x = _load_raw(logits, s, start + tl.arange(0, TILE), tl.where(tile < TILES - 1, V, 0), V)
                w = _weights(depth, smallest)
                if by_count:
                    place = _fine(depth, begin_k, scale_k)
                    inside = (depth >= begin_k) & (depth < end_k)
                    one = inside.to(tl.int32)
                    _add_to_bins(counts + s * _COUNTS + _FINE_COUNTS, place, one, inside, crowded_k)
                    _add_to_bins(mine, place, w, inside, crowded_k)
                    above_k += tl.where(depth < begin_k, w, 0)
                if by_mass:
                    inside = (depth >= begin_p) & (depth < end_p)
                    _add_to_bins(mine + _BY_MASS, _fine(depth, begin_p, scale_p), w, inside, crowded_p)
                    above_p += tl.where(depth < begin_p, w, 0)
                    all_weight += w
            if by_count:
                tl.atomic_add(mine + _ABOVE_K, tl.sum(above_k, axis=0), sem="relaxed")
            if by_mass:
                tl.atomic_add(mine + _ABOVE_P, tl.sum(above_p, axis=0), sem="relaxed")
                tl.atomic_add(mine + _ALL, tl.sum(all_weight, axis=0), sem="relaxed")


@triton.jit
def _after(bin):
    """The place where a fine bin ends; the last one has all that rounding put behind it."""
    return tl.where(bin < _FINE - 1, bin.to(tl.float32) + 1.0, float("inf"))


@triton.jit
def _note_extremes(extremes, image, member):
    """extremes: 1 + the largest image and 2^32 - the smallest, both 0 before."""
    tl.atomic_max(extremes, tl.max(tl.where(member, 1 + image, 0), axis=0), sem="relaxed")
    tl.atomic_max(extremes + 1, tl.max(tl.where(member, _TWO_32 - image, 0), axis=0), sem="relaxed")


@triton.jit
def _narrow(
    logits, rows, chunk_max, chunk_best, temperature, min_p, top_k, top_p, counts, sums, mass,
    list_logit, list_token, V: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The fine bins of the thresholds, what is in them, and the weight that each tile keeps for certain.

    mass: [S, ceil(V / TILE)] i64; list_logit, list_token: [S, _LIST].
    """
    _enter(PDL)
    s = tl.program_id(0)
    c = tl.program_id(1)
    row = tl.load(rows + s)
    if row >= 0:
        start = c * (TILE * TILES)
        x = _load_raw(logits, s, start + tl.arange(0, TILE), V, V)
        largest, _best_token = _best(chunk_max, chunk_best, s, CHUNKS, CHUNKS_PADDED)
        hot = tl.load(temperature + row)
        if _draws(largest, hot):
            inverse = _inverse(hot)
            smallest = tl.load(min_p + row)
            k = tl.load(top_k + row)
            share_of = tl.load(top_p + row)
            by_mass = share_of < 1.0
            by_count = (k > 0) & (k < V)
            numbers = counts + s * _COUNTS
            mine = sums + s * _SUMS
            # Kept for certain: place < low. In question: place < high, if the depth is below `end`.
            zero = tl.full((), 0.0, tl.float32)
            begin = zero
            end = zero
            scale = zero + 1.0
            low = zero + _BOTTOM
            high = zero
            begin_k = zero
            end_k = zero
            scale_k = zero
            low_k = tl.full((), 0, tl.int32)
            low_p = low_k
            high_p = low_k
            if by_count | by_mass:
                bin_k, taken, by_count, first, last = _coarse_bins(counts, s, k, share_of, smallest, by_count)
                i = tl.arange(0, _FINE)
                total = tl.load(mine + _ALL)  # what top-p takes its share of
                total_most = total
                if by_count:
                    n = tl.load(numbers + _FINE_COUNTS + i)
                    g = tl.load(mine + i)
                    low_k = tl.sum((tl.cumsum(n, axis=0) + taken < k).to(tl.int32), axis=0)
                    total = tl.load(mine + _ABOVE_K) + tl.sum(tl.where(i < low_k, g, 0), axis=0)
                    total_most = total + tl.sum(tl.where(i == low_k, g, 0), axis=0)
                    begin_k, end_k, scale_k = _fine_scale(bin_k, bin_k)
                    begin, end, scale = begin_k, end_k, scale_k
                    low = low_k.to(tl.float32)
                    high = _after(low_k)
                    if c == 0:
                        rest = k - taken - tl.sum(tl.where(i < low_k, n, 0), axis=0)
                        tl.store(mine + _REST_K, rest.to(tl.int64))
                if by_mass:
                    g = tl.load(mine + _BY_MASS + i)
                    above = tl.load(mine + _ABOVE_P)
                    up_to = tl.cumsum(g, axis=0) + above
                    low_p = tl.sum((up_to < _share(total, share_of)).to(tl.int32), axis=0)
                    high_p = tl.sum((up_to < _share(total_most, share_of)).to(tl.int32), axis=0)
                    begin, end, scale = _fine_scale(first, last)
                    low = low_p.to(tl.float32)
                    high = _after(high_p)
                    if c == 0:
                        tl.store(mine + _KEPT, above + tl.sum(tl.where(i < low_p, g, 0), axis=0))
                if c == 0:
                    tl.store(mine + _TOTAL, total)
                    tl.store(numbers + _BY_COUNT, by_count.to(tl.int32))
                    tl.store(numbers + _BIN_K, bin_k)
                    tl.store(numbers + _LOW_K, low_k)
                    tl.store(numbers + _FIRST, first)
                    tl.store(numbers + _LAST, last)
                    tl.store(numbers + _LOW_P, low_p)
                    tl.store(numbers + _HIGH_P, high_p)

            for tile in tl.range(0, TILES):
                y = x
                v = start + tl.arange(0, TILE)
                if TILES > 1:
                    start += TILE
                    x = _load_raw(logits, s, start + tl.arange(0, TILE), tl.where(tile < TILES - 1, V, 0), V)
                depth = _depth(y, largest, inverse)
                place = _fine(depth, begin, scale)
                kept = place < low
                edge = (place >= low) & (place < high) & (depth < end)
                listed = edge
                edge_k = edge
                if by_count & by_mass:
                    place = _fine(depth, begin_k, scale_k)
                    edge_k = (place >= low_k.to(tl.float32)) & (place < _after(low_k)) & (depth < end_k)
                    listed = edge | edge_k
                many = tl.sum(listed.to(tl.int32), axis=0)
                if many > 0:
                    plain = _plain(y)
                    slot = tl.atomic_add(numbers + _LISTED, many, sem="relaxed")
                    slot += tl.cumsum(listed.to(tl.int32), axis=0) - 1
                    tl.store(list_logit + s * _LIST + slot, plain, mask=listed & (slot < _LIST))
                    tl.store(list_token + s * _LIST + slot, v, mask=listed & (slot < _LIST))
                    # Without top-p the first, without top-k the second are never read.
                    _note_extremes(mine + _EXTREMES_P, _image(plain), edge)
                    _note_extremes(mine + _EXTREMES_K, _image(plain), edge_k)
                w = _weights(depth, smallest)
                of_row = c * TILES + tile
                weight = tl.sum(tl.where(kept, w, 0), axis=0)
                tl.store(mass + s * tl.cdiv(V, TILE) + of_row, weight, mask=of_row < tl.cdiv(V, TILE))


@triton.jit
def _at_least(
    table, length, image, largest, inverse, min_p, first, last, low, high,
    BY_MASS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Tokens, or their weight, with that image or a larger one, in fine bins low to high of `table` [length]."""
    begin, end, scale = _fine_scale(first, last)
    found = tl.zeros((SPAN,), tl.int64)
    start = tl.full((), 0, tl.int32)
    while start < length:
        i = start + tl.arange(0, SPAN)
        x = _plain(tl.load(table + i, mask=i < length, other=float("-inf")))
        depth = _depth(x, largest, inverse)
        place = _fine(depth, begin, scale)
        inside = (place >= low) & (place < _after(high)) & (depth < end) & (_image(x) >= image)
        if BY_MASS:
            found += tl.where(inside, _weights(depth, min_p), 0)
        else:
            found += inside.to(tl.int64)
        start += SPAN
    return tl.sum(found, axis=0)


@triton.jit
def _bisect(
    table, length, target, extremes, largest, inverse, min_p, first, last, low, high,
    BY_MASS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The largest image at which `_at_least` is `target` or more."""
    upper = tl.load(extremes) - 1
    lower = _TWO_32 - tl.load(extremes + 1)
    while lower < upper:
        middle = lower + ((upper - lower + 1) >> 1)
        found = _at_least(
            table, length, middle, largest, inverse, min_p, first, last, low, high, BY_MASS, SPAN
        )
        lower = tl.where(found >= target, middle, lower)
        upper = tl.where(found >= target, upper, middle - 1)
    return lower


@triton.jit
def _threshold(
    table, length, numbers, mine, by_mass, share_of, largest, inverse, min_p, SPAN: tl.constexpr
):  # fmt: skip
    """Image of the least likely token kept. All of the fine bins in question lie in `table` [length]."""
    lowest = tl.full((), 0, tl.int64)
    total = tl.load(mine + _TOTAL)
    if tl.load(numbers + _BY_COUNT) != 0:
        bin = tl.load(numbers + _BIN_K)
        low = tl.load(numbers + _LOW_K)
        lowest = _bisect(
            table, length, tl.load(mine + _REST_K), mine + _EXTREMES_K,
            largest, inverse, min_p, bin, bin, low, low, False, SPAN,
        )  # fmt: skip
        if by_mass:
            total += _at_least(table, length, lowest, largest, inverse, min_p, bin, bin, low, low, True, SPAN)
    if by_mass:
        lowest = _bisect(
            table, length, _share(total, share_of) - tl.load(mine + _KEPT), mine + _EXTREMES_P,
            largest, inverse, min_p, tl.load(numbers + _FIRST), tl.load(numbers + _LAST),
            tl.load(numbers + _LOW_P), tl.load(numbers + _HIGH_P), True, SPAN,
        )  # fmt: skip
    return lowest


@triton.jit(do_not_specialize=["seed_stride"])
def _draw(
    logits, rows, chunk_max, chunk_best, temperature, min_p, top_k, top_p, counts, sums, mass,
    list_logit, list_token, positions, seed, seed_stride, out, V: tl.constexpr, TILE: tl.constexpr,
    TILES_OF_ROW: tl.constexpr, TILES_PADDED: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The threshold, then the first token at which the running sum of weights exceeds floor(u * sum)."""
    _enter(PDL)
    s = tl.program_id(0)
    row = tl.load(rows + s)
    if row >= 0:
        largest, token = _best(chunk_max, chunk_best, s, CHUNKS, CHUNKS_PADDED)
        hot = tl.load(temperature + row)
        if _draws(largest, hot):
            inverse = _inverse(hot)
            smallest = tl.load(min_p + row)
            k = tl.load(top_k + row)
            share_of = tl.load(top_p + row)
            by_mass = share_of < 1.0
            numbers = counts + s * _COUNTS
            mine = sums + s * _SUMS
            table = logits + s.to(tl.int64) * V
            logit_of = list_logit + s * _LIST
            entries = tl.load(numbers + _LISTED)
            in_list = entries <= _LIST
            lowest = tl.full((), 0, tl.int64)
            if ((k > 0) & (k < V)) | by_mass:
                if in_list:
                    lowest = _threshold(
                        logit_of,
                        entries,
                        numbers,
                        mine,
                        by_mass,
                        share_of,
                        largest,
                        inverse,
                        smallest,
                        _SHORT,
                    )
                else:
                    lowest = _threshold(
                        table, V, numbers, mine, by_mass, share_of, largest, inverse, smallest, _LONG
                    )
            masses = mass + s * TILES_OF_ROW
            if entries > _LIST:
                for tile in tl.range(0, TILES_OF_ROW):
                    x = _load(logits, s, tile * TILE + tl.arange(0, TILE), V)
                    w = _weights(_depth(x, largest, inverse), smallest)
                    tl.store(masses + tile, tl.sum(tl.where(_image(x) >= lowest, w, 0), axis=0))
                tl.debug_barrier()

            i = tl.arange(0, TILES_PADDED)
            of_tile = tl.load(masses + i, mask=i < TILES_OF_ROW, other=0)
            start = tl.full((), 0, tl.int32)
            while start < tl.where(in_list, entries, 0):  # what the list adds to the weights of its tiles
                j = start + tl.arange(0, _FEW)
                y = tl.load(logit_of + j, mask=j < entries, other=float("-inf"))
                tile_of = tl.load(list_token + s * _LIST + j, mask=j < entries, other=0) // TILE
                extra = _weights(_depth(y, largest, inverse), smallest)
                extra = tl.where((j < entries) & (_image(y) >= lowest), extra, 0)
                of_tile += tl.sum(tl.where(tile_of[None, :] == i[:, None], extra[None, :], 0), axis=1)
                start += _FEW
            up_to = tl.cumsum(of_tile, axis=0)
            total = tl.max(up_to, axis=0)
            u = _uniform(
                tl.load(seed + row * seed_stride),
                tl.load(seed + row * seed_stride + 1),
                tl.load(positions + s),
            )
            target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
            tile = tl.sum((up_to <= target).to(tl.int32), axis=0)
            before = tl.max(tl.where(up_to <= target, up_to, 0), axis=0)
            x = _load(logits, s, tile * TILE + tl.arange(0, TILE), V)
            w = _weights(_depth(x, largest, inverse), smallest)
            w = tl.where(_image(x) >= lowest, w, 0)
            token = tile * TILE + tl.sum((tl.cumsum(w, axis=0) + before <= target).to(tl.int32), axis=0)
        tl.store(out + s, token)
    else:
        tl.store(out + s, 0)


# --- everything: before the draw ------------------------------------------------------------------


@triton.jit
def _keep_raw(
    logits, rows, flags, raw, raw_max, chunk_exp, top, V: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What log probabilities need, before anything is changed.

    raw: [S, V]; raw_max, chunk_exp: [S, CHUNKS], largest logit and sum of exponentials from there;
    top: [S, CHUNKS, MAX_LOGPROBS] i64, logit and index in one number, the most likely first.
    """
    _enter(PDL)
    s = tl.program_id(0)
    c = tl.program_id(1)
    row = tl.load(rows + s)
    if (tl.load(flags + row, mask=row >= 0, other=0) & _LOGPROBS) != 0:
        v = c * BLOCK + tl.arange(0, BLOCK)
        x = _load(logits, s, v, V)
        tl.store(raw + s.to(tl.int64) * V + v, x, mask=v < V)
        largest = tl.max(x, axis=0)
        e = tl.where(x == float("-inf"), 0.0, tl.exp(x - largest))
        tl.store(raw_max + s * CHUNKS + c, largest)
        tl.store(chunk_exp + s * CHUNKS + c, tl.sum(e, axis=0))
        left = tl.where(v < V, (_ordered(x).to(tl.int64) << 32) | (2147483647 - v).to(tl.int64), _NONE)
        for i in tl.range(0, _TOP):
            best = tl.max(left, axis=0)
            tl.store(top + (s * CHUNKS + c) * _TOP + i, best)
            left = tl.where(left == best, _NONE, left)


@triton.jit(do_not_specialize=["ids_stride", "values_stride", "stop_stride"])
def _edit_few(
    logits, rows, positions, flags, num_bias, bias_ids, bias_values, min_position, num_stop_ids, stop_ids,
    ids_stride, values_stride, stop_stride, V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Bias, then stop ids at positions below min_position."""
    _enter(PDL)
    s = tl.program_id(0)
    row = tl.load(rows + s)
    if row >= 0:
        here = logits + s.to(tl.int64) * V
        if (tl.load(flags + row) & _BIAS) != 0:
            i = tl.arange(0, _BIAS_WIDTH)
            v = tl.load(bias_ids + row * ids_stride + i, mask=i < tl.load(num_bias + row), other=-1)
            known = (v >= 0) & (v < V)
            bias = tl.load(bias_values + row * values_stride + i, mask=known, other=0.0)
            tl.store(here + v, tl.load(here + v, mask=known, other=0.0) + bias, mask=known)
        if tl.load(positions + s) < tl.load(min_position + row):
            tl.debug_barrier()  # another thread may have biased the same token
            i = tl.arange(0, _STOP_WIDTH)
            v = tl.load(stop_ids + row * stop_stride + i, mask=i < tl.load(num_stop_ids + row), other=-1)
            tl.store(here + v, tl.full((_STOP_WIDTH,), float("-inf"), tl.float32), mask=(v >= 0) & (v < V))


@triton.jit(do_not_specialize=["mask_stride", "counts_stride", "prompt_stride"])
def _adjust(
    logits, rows, flags, mask, output_counts, prompt_mask,
    presence_penalty, frequency_penalty, repetition_penalty,
    mask_stride, counts_stride, prompt_stride,
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Mask and penalties. After the bias, which cannot lift a masked token: that order changes nothing."""
    _enter(PDL)
    s = tl.program_id(0)
    c = tl.program_id(1)
    row = tl.load(rows + s)
    if row >= 0:
        flag = tl.load(flags + row)
        if (flag & (_MASK | _PENALTIES)) != 0:
            v = c * BLOCK + tl.arange(0, BLOCK)
            real = v < V
            x = _load(logits, s, v, V)
            # In int64: rows times vocabulary may pass 2^31.
            row64 = row.to(tl.int64)
            if (flag & _MASK) != 0:
                words = tl.load(mask + row64 * mask_stride + v // 32, mask=real, other=0)
                x = tl.where(((words >> (v % 32)) & 1) != 0, x, float("-inf"))
            if (flag & _PENALTIES) != 0:
                count = tl.load(output_counts + row64 * counts_stride + v, mask=real, other=0).to(tl.float32)
                words = tl.load(prompt_mask + row64 * prompt_stride + v // 32, mask=real, other=0)
                generated = count > 0.0
                seen = generated | (((words >> (v % 32)) & 1) != 0)
                repetition = tl.load(repetition_penalty + row)
                repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
                x = tl.where(seen, repeated, x)
                x = x - tl.load(frequency_penalty + row) * count
                x = x - tl.where(generated, tl.load(presence_penalty + row), 0.0)
            tl.store(logits + s.to(tl.int64) * V + v, x, mask=real)


# --- everything: after the draw --------------------------------------------------------------------


@triton.jit
def _count_above(
    rows, flags, raw, out, above, V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """above: [S, CHUNKS], raw logits strictly above the sampled token's."""
    _enter(PDL)
    s = tl.program_id(0)
    c = tl.program_id(1)
    row = tl.load(rows + s)
    if (tl.load(flags + row, mask=row >= 0, other=0) & _LOGPROBS) != 0:
        mine = tl.load(raw + s.to(tl.int64) * V + tl.load(out + s))
        x = _load(raw, s, c * BLOCK + tl.arange(0, BLOCK), V)
        tl.store(above + s * CHUNKS + c, tl.sum((x > mine).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["values_stride", "ids_stride"])
def _report(
    rows, flags, raw, raw_max, chunk_exp, top, above, out, values, ids, rank, values_stride,
    ids_stride, TOP_PADDED: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """values, ids: [S, 1 + MAX_LOGPROBS]; rank: [S]."""
    _enter(PDL)
    s = tl.program_id(0)
    row = tl.load(rows + s)
    if (tl.load(flags + row, mask=row >= 0, other=0) & _LOGPROBS) != 0:
        c = tl.arange(0, CHUNKS_PADDED)
        m = tl.load(raw_max + s * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
        e = tl.load(chunk_exp + s * CHUNKS + c, mask=c < CHUNKS, other=0.0)
        largest = tl.max(m, axis=0)
        total = tl.sum(tl.where(m == float("-inf"), 0.0, e * tl.exp(m - largest)), axis=0)
        # Beside +inf nothing else is possible: -inf rather than the NaN of exp(inf - inf).
        total = tl.where(largest < float("inf"), largest + tl.log(total), largest)
        counts = tl.load(above + s * CHUNKS + c, mask=c < CHUNKS, other=0)
        tl.store(rank + s, 1 + tl.sum(counts, axis=0))

        row_of_raw = raw + s.to(tl.int64) * V
        token = tl.load(out + s)
        mine = tl.load(row_of_raw + token)
        # Nothing possible: -inf rather than the NaN of -inf - -inf.
        tl.store(values + s * values_stride, tl.where(mine == float("-inf"), mine, mine - total))
        tl.store(ids + s * ids_stride, token)
        i = tl.arange(0, TOP_PADDED)
        left = tl.load(top + s * (CHUNKS * _TOP) + i, mask=i < CHUNKS * _TOP, other=_NONE)
        for n in tl.range(0, _TOP):
            best = tl.max(left, axis=0)
            v = 2147483647 - (best & 0xFFFFFFFF).to(tl.int32)
            some = best != _NONE
            x = tl.load(row_of_raw + v, mask=some, other=float("-inf"))
            tl.store(values + s * values_stride + 1 + n, tl.where(x == float("-inf"), x, x - total))
            tl.store(ids + s * ids_stride + 1 + n, tl.where(some, v, -1))
            left = tl.where(left == best, _NONE, left)
