"""Logits to tokens on an NVIDIA GPU: the kernels behind `ostinato.sampling.sample`.

Same meaning, same integers, same random numbers as `ostinato/sampling.py`, which says how a token
is drawn. A row is cut into chunks of BLOCK logits, one program each, and what chunks find out is
added up by the kernel after. Weights are integers, so the cut does not show in the result.

Launches, all with fixed grids; a row that does not need one leaves it at once:

    GREEDY   best of each chunk -> best of the row
    SAMPLE   the same, then 8 passes for top-k and 8 for top-p -> weight of each chunk -> draw
    FULL     copy of the raw logits, top 20 -> bias and stop ids -> mask and penalties -> SAMPLE -> rank

A pass resolves 4 bits of the threshold's int32 image, from the top: each chunk sums what lies at or
above each of 16 values of those bits, and the next pass, which starts by adding up the sums of
all chunks, knows which value to take.

Everything between kernels lies in `scratch`, and nothing there means anything between two calls.
Not here: penalty counts, which another op advances; use of dependent launch.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...inputs import FLAG_BIAS, FLAG_LOGPROBS, FLAG_MASK, FLAG_PENALTIES, StaticInputs, StepState
from ...sampling import MAX_INVERSE_TEMPERATURE, MAX_VOCAB, WEIGHT_BITS
from ...types import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS, SamplerVariant

_INVERSE_LIMIT = tl.constexpr(MAX_INVERSE_TEMPERATURE)
_WEIGHT_OF_ONE = tl.constexpr(float(2**WEIGHT_BITS))
_BIAS = tl.constexpr(FLAG_BIAS)
_LOGPROBS = tl.constexpr(FLAG_LOGPROBS)
_MASK = tl.constexpr(FLAG_MASK)
_PENALTIES = tl.constexpr(FLAG_PENALTIES)
_TOP = tl.constexpr(MAX_LOGPROBS)
_BIAS_WIDTH = tl.constexpr(MAX_LOGIT_BIAS)
_STOP_WIDTH = tl.constexpr(MAX_STOP_IDS)
_PASSES = tl.constexpr(8)
_STATES = tl.constexpr(18)  # two searches, each a state before every pass and one after the last
_NONE = tl.constexpr(-(2**63))

_MIN_BLOCK = 1024
_MAX_CHUNKS = 256


def _cut(vocab: int) -> tuple[int, int]:
    """(logits a chunk, chunks a row)."""
    block = max(_MIN_BLOCK, triton.next_power_of_2(-(-vocab // _MAX_CHUNKS)))
    return block, -(-vocab // block)


def _sections(num_seqs: int, vocab: int, variant: SamplerVariant) -> dict[str, tuple[torch.dtype, int]]:
    """Scratch arrays: type and number of elements. The shapes stand beside the kernels' arguments."""
    _, chunks = _cut(vocab)
    i32, i64, f32 = torch.int32, torch.int64, torch.float32
    sections = {"chunk_best": (i32, num_seqs * chunks), "chunk_max": (f32, num_seqs * chunks)}
    sections |= {"row_max": (f32, num_seqs), "draws": (i32, num_seqs)}
    if variant >= SamplerVariant.SAMPLE:
        sections |= {
            "bases": (i32, num_seqs * _STATES.value),
            "targets": (i64, num_seqs * _STATES.value),
            "sums": (i64, num_seqs * 2 * chunks * 16),
            "mass": (i64, num_seqs * chunks),
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
) -> None:
    """Choose one token for each sequence of a step; see `ostinato.sampling.sample`.

    Allocates nothing and never waits for the device. `scratch`: at least
    `scratch_words(S, V, variant)` words, i32 or f32, contiguous, at a multiple of 16 bytes.

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
    t = _views(scratch, num_seqs, vocab, variant)
    block, chunks = _cut(vocab)
    cut: dict[str, Any] = {
        "V": vocab,
        "BLOCK": block,
        "CHUNKS": chunks,
        "CHUNKS_PADDED": triton.next_power_of_2(chunks),
    }
    grid = (num_seqs, chunks)
    per_row = (num_seqs,)
    greedy = variant is SamplerVariant.GREEDY

    if variant is SamplerVariant.FULL:
        _keep_raw[grid](logits, rows, inputs.flags, t["raw"], t["raw_max"], t["chunk_exp"], t["top"], **cut)
        _edit_few[per_row](
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

    _chunk_best[grid](logits, t["chunk_max"], t["chunk_best"], **cut)
    _row_best[per_row](
        rows,
        inputs.temperature,
        t["chunk_max"],
        t["chunk_best"],
        t["row_max"],
        t["draws"],
        out,
        greedy,
        **cut,
    )
    if greedy:
        return

    row_values = (logits, rows, t["draws"], t["row_max"])
    filters = (inputs.temperature, inputs.min_p, inputs.top_k, inputs.top_p)
    search = (t["bases"], t["targets"], t["sums"])
    for by_mass in (False, True):
        for number in range(_PASSES.value):
            _search[grid](*row_values, *filters, *search, number, by_mass, num_warps=8, **cut)
    _chunk_mass[grid](*row_values, *filters, *search, t["mass"], **cut)
    drawing = (t["bases"], t["mass"], positions, inputs.seed, inputs.seed.stride(0), out)
    _draw[per_row](*row_values, *filters, *drawing, **cut)

    if variant is SamplerVariant.FULL:
        _count_above[grid](rows, inputs.flags, t["raw"], out, t["above"], **cut)
        _report[per_row](
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
            num_warps=8,
            **cut,
        )


# --- pieces --------------------------------------------------------------------------------


@triton.jit
def _load(table, s, v, V: tl.constexpr):
    """Logits v of sequence s. NaN is -inf, and so is what lies beyond the vocabulary."""
    x = tl.load(table + s.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    x = tl.where(x != x, float("-inf"), x)
    return tl.where(x == 0.0, 0.0, x)  # -0.0 and 0.0 tie


@triton.jit
def _ordered(x):
    """The int32 image of f32: same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _image(x):
    """The same as uint32, whose top bits can be compared alone."""
    return (_ordered(x) ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _weights(x, largest, temperature, min_p):
    """Weights of logits, i64: `_Weigh` of ostinato/sampling.py."""
    inverse = tl.minimum(tl.div_rn(tl.full((), 1.0, tl.float32), temperature), _INVERSE_LIMIT)
    # Subtract first: the compiler could fuse a product with the difference that follows it.
    e = tl.exp((x - largest) * inverse)
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


@triton.jit
def _enter(
    bases, targets, sums, s, state, number, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    BY_MASS: tl.constexpr, share_of,
):  # fmt: skip
    """Base and target of a search before pass `number` >= 1, from what pass `number - 1` left.

    BY_MASS: the target is the share `share_of` of everything, which the first pass has just summed.
    """
    c = tl.arange(0, CHUNKS_PADDED)[:, None]
    j = tl.arange(0, 16)
    here = sums + ((s * 2 + (number - 1) % 2).to(tl.int64) * CHUNKS + c) * 16 + j[None, :]
    at_least = tl.sum(tl.load(here, mask=c < CHUNKS, other=0), axis=0)  # [16], falling
    target = tl.load(targets + s * _STATES + state - 1)
    if BY_MASS:  # noqa: SIM102  (an outer `if` on a constexpr is decided when compiling)
        if number == 1:
            target = _share(tl.max(at_least, axis=0), share_of)
    digit = tl.sum((at_least >= target).to(tl.int32), axis=0) - 1
    target -= tl.sum(tl.where(j == digit + 1, at_least, 0), axis=0)
    base = tl.load(bases + s * _STATES + state - 1) | (digit << (32 - 4 * number))
    return base, target


# --- best of a row ---------------------------------------------------------------------------


@triton.jit
def _chunk_best(
    logits, chunk_max, chunk_best, V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    """chunk_max, chunk_best: [S, CHUNKS]. Padding too: whatever it holds stays in its own row."""
    s = tl.program_id(0)
    c = tl.program_id(1)
    x = _load(logits, s, c * BLOCK + tl.arange(0, BLOCK), V)
    largest, where = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(chunk_max + s * CHUNKS + c, largest)
    tl.store(chunk_best + s * CHUNKS + c, c * BLOCK + where)


@triton.jit
def _row_best(
    rows, temperature, chunk_max, chunk_best, row_max, draws, out, GREEDY: tl.constexpr,
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    """row_max, draws: [S]; draws is 1 where the best token is not yet the answer."""
    s = tl.program_id(0)
    c = tl.arange(0, CHUNKS_PADDED)
    m = tl.load(chunk_max + s * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
    largest, where = tl.max(m, axis=0, return_indices=True, return_indices_tie_break_left=True)
    row = tl.load(rows + s)
    best = tl.load(chunk_best + s * CHUNKS + where)
    tl.store(out + s, tl.where(row >= 0, best, 0))
    if not GREEDY:
        hot = tl.load(temperature + row, mask=row >= 0, other=0.0) > 0.0
        finite = (largest > float("-inf")) & (largest < float("inf"))
        tl.store(row_max + s, largest)
        tl.store(draws + s, (hot & finite & (row >= 0)).to(tl.int32))


# --- thresholds and the draw -------------------------------------------------------------------


@triton.jit(do_not_specialize=["number"])
def _search(
    logits, rows, draws, row_max, temperature, min_p, top_k, top_p, bases, targets, sums, number,
    BY_MASS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    """One pass. bases, targets: [S, 2, 9]; sums: [S, 2, CHUNKS, 16], the first 2 by parity of the pass."""
    s = tl.program_id(0)
    c = tl.program_id(1)
    if tl.load(draws + s) != 0:
        row = tl.load(rows + s)
        k = tl.load(top_k + row)
        share_of = tl.load(top_p + row)
        by_count = (k > 0) & (k < V)
        lowest = tl.full((), 0, tl.int32)
        if BY_MASS:
            if number == 0:
                # The last digit of top-k, for everybody after this kernel; 0 without top-k keeps all.
                if by_count:
                    lowest, _rest = _enter(bases, targets, sums, s, 8, 8, CHUNKS, CHUNKS_PADDED, False, 1.0)
                if c == 0:
                    tl.store(bases + s * _STATES + 8, lowest)
            wanted = share_of < 1.0
        else:
            wanted = by_count
        if wanted:
            state = number + (9 if BY_MASS else 0)
            base = tl.full((), 0, tl.int32)
            target = k.to(tl.int64)  # top-p learns its own after the first pass
            if number > 0:
                base, target = _enter(
                    bases, targets, sums, s, state, number, CHUNKS, CHUNKS_PADDED, BY_MASS, share_of
                )
                if BY_MASS:
                    lowest = tl.load(bases + s * _STATES + 8)
            if c == 0:
                tl.store(bases + s * _STATES + state, base)
                tl.store(targets + s * _STATES + state, target)

            v = c * BLOCK + tl.arange(0, BLOCK)
            x = _load(logits, s, v, V)
            u = _image(x)
            if BY_MASS:
                largest = tl.load(row_max + s)
                amount = _weights(x, largest, tl.load(temperature + row), tl.load(min_p + row))
                amount = tl.where(u >= lowest.to(tl.uint32, bitcast=True), amount, 0)
            else:
                amount = (v < V).to(tl.int64)
            # In two shifts, since shifting 32 bits by 32 means nothing.
            prefix = (u >> (28 - 4 * number)) >> 4
            wanted_prefix = (base.to(tl.uint32, bitcast=True) >> (28 - 4 * number)) >> 4
            digit = ((u >> (28 - 4 * number)) & 15).to(tl.int32)
            amount = tl.where(prefix == wanted_prefix, amount, 0)
            j = tl.arange(0, 16)
            at_least = tl.sum(tl.where(digit[None, :] >= j[:, None], amount[None, :], 0), axis=1)
            here = ((s * 2 + number % 2).to(tl.int64) * CHUNKS + c) * 16
            tl.store(sums + here + j, at_least)


@triton.jit
def _chunk_mass(
    logits, rows, draws, row_max, temperature, min_p, top_k, top_p, bases, targets, sums, mass,
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    """mass: [S, CHUNKS] i64, the weight that the filters leave."""
    s = tl.program_id(0)
    c = tl.program_id(1)
    if tl.load(draws + s) != 0:
        row = tl.load(rows + s)
        share_of = tl.load(top_p + row)
        lowest = tl.load(bases + s * _STATES + 8)
        if share_of < 1.0:
            lowest, _rest = _enter(bases, targets, sums, s, 17, 8, CHUNKS, CHUNKS_PADDED, True, share_of)
        if c == 0:
            tl.store(bases + s * _STATES + 17, lowest)
        x = _load(logits, s, c * BLOCK + tl.arange(0, BLOCK), V)
        w = _weights(x, tl.load(row_max + s), tl.load(temperature + row), tl.load(min_p + row))
        w = tl.where(_image(x) >= lowest.to(tl.uint32, bitcast=True), w, 0)
        tl.store(mass + s * CHUNKS + c, tl.sum(w, axis=0))


@triton.jit(do_not_specialize=["seed_stride"])
def _draw(
    logits, rows, draws, row_max, temperature, min_p, top_k, top_p, bases, mass, positions, seed,
    seed_stride, out, V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    """The first token at which the running sum of weights exceeds floor(u * sum): its chunk, then itself."""
    s = tl.program_id(0)
    if tl.load(draws + s) != 0:
        row = tl.load(rows + s)
        c = tl.arange(0, CHUNKS_PADDED)
        of_chunk = tl.load(mass + s * CHUNKS + c, mask=c < CHUNKS, other=0)
        total = tl.sum(of_chunk, axis=0)
        u = _uniform(
            tl.load(seed + row * seed_stride), tl.load(seed + row * seed_stride + 1), tl.load(positions + s)
        )
        target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
        chunk = tl.sum((tl.cumsum(of_chunk, axis=0) <= target).to(tl.int32), axis=0)
        target -= tl.sum(tl.where(c < chunk, of_chunk, 0), axis=0)
        x = _load(logits, s, chunk * BLOCK + tl.arange(0, BLOCK), V)
        w = _weights(x, tl.load(row_max + s), tl.load(temperature + row), tl.load(min_p + row))
        lowest = tl.load(bases + s * _STATES + 17)
        w = tl.where(_image(x) >= lowest.to(tl.uint32, bitcast=True), w, 0)
        token = chunk * BLOCK + tl.sum((tl.cumsum(w, axis=0) <= target).to(tl.int32), axis=0)
        tl.store(out + s, tl.minimum(token, V - 1))


# --- everything: before the draw ------------------------------------------------------------------


@triton.jit
def _keep_raw(
    logits, rows, flags, raw, raw_max, chunk_exp, top, V: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    """What log probabilities need, before anything is changed.

    raw: [S, V]; raw_max, chunk_exp: [S, CHUNKS], largest logit and sum of exponentials from there;
    top: [S, CHUNKS, MAX_LOGPROBS] i64, logit and index in one number, the most likely first.
    """
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
    ids_stride, values_stride, stop_stride, V: tl.constexpr,
):  # fmt: skip
    """Bias, then stop ids at positions below min_position."""
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
    V: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    """Mask and penalties. After the bias, which cannot lift a masked token: that order changes nothing."""
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
    CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    """above: [S, CHUNKS], raw logits strictly above the sampled token's."""
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
    CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    """values, ids: [S, 1 + MAX_LOGPROBS]; rank: [S]."""
    s = tl.program_id(0)
    row = tl.load(rows + s)
    if (tl.load(flags + row, mask=row >= 0, other=0) & _LOGPROBS) != 0:
        c = tl.arange(0, CHUNKS_PADDED)
        m = tl.load(raw_max + s * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
        e = tl.load(chunk_exp + s * CHUNKS + c, mask=c < CHUNKS, other=0.0)
        largest = tl.max(m, axis=0)
        total = tl.sum(tl.where(m == float("-inf"), 0.0, e * tl.exp(m - largest)), axis=0)
        total = largest + tl.log(total)
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
