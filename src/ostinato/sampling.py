"""Logits to tokens: the CPU implementation, which is also what the GPU kernels are compared with.

What this module knows: the meaning of `SamplingParams`, read from the device rows of
`StaticInputs` and `StepState`, and nothing of requests. It runs on the CPU, row by row;
`ops/triton/sampling.py` does the same on a GPU.

How a token is drawn. With m the largest logit, token i has the integer weight
floor(exp((x_i - m) / temperature) * 2^44). Filters set weights to zero. The draw is the first
token, in order of index, at which the running sum exceeds floor(u * sum). Integers make every sum
exact, so that neither the order of an addition nor how a row is cut into chunks can change a
token; what is lost is less than 2^-44 of the most likely token's probability, for each token.
Tokens on the CPU and on the GPU are the same but for the last bit of exp: about one in a million
draws may differ.

u is 53 bits of Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as
1, 2, 3; SC 2011), keyed by the row's seed, counter (position, 0, 0, 0).

In every row a NaN logit counts as -inf, and a row without a finite largest logit (everything
masked, or +inf) gives the lowest index of the largest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .inputs import (
    FLAG_BIAS,
    FLAG_LOGPROBS,
    FLAG_MASK,
    FLAG_PENALTIES,
    StaticInputs,
    StepState,
)
from .types import MAX_LOGPROBS, SamplerVariant

Floats = npt.NDArray[np.float32]
Weights = npt.NDArray[np.int64]

WEIGHT_BITS = 44
"""The most likely token weighs 2^WEIGHT_BITS."""
MAX_VOCAB = (1 << (63 - WEIGHT_BITS)) - 1
"""Most tokens whose weights cannot pass 2^63 together: 524287."""
MAX_INVERSE_TEMPERATURE = 1e30
"""Keeps 0 * (1 / temperature) a number for the smallest temperatures."""

_SORT_LIMIT = 2048  # below this, sorting the candidates is cheaper than splitting them again
_ROWS_AT_ONCE = 32  # bounds what prompt_logprobs allocates: 24 bytes a logit
_LOW = np.uint64(0xFFFFFFFF)


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    inputs: StaticInputs,
    state: StepState,
    *,
    variant: SamplerVariant,
    out: torch.Tensor,
) -> None:
    """Choose one token for each sequence of a step.

    Args:
        logits: [S, V] f32, contiguous, raw; FULL overwrites it.
        rows: [S] i32, device row of each sequence; -1 is padding: it gets token 0, whatever
            its logits hold, and nothing else is read or written for it.
        positions: [S] i32, position of the token to choose: the random counter.
        inputs: parameters by device row.
        state: `output_counts` and `prompt_mask` are read by device row. Rows with FLAG_LOGPROBS
            write `logprob_values`, `logprob_ids` and `logprob_rank` by place in `rows`.
        variant: GREEDY reads no parameters; SAMPLE reads temperature, top_k, top_p, min_p and seed;
            FULL reads everything.
        out: [S] i32, the tokens.

    Raises:
        ValueError: a tensor has another device, type or shape.
    """
    _check(logits, rows, positions, out)
    if len(rows) == 0:
        return
    tokens = out.numpy()
    table = logits.numpy()
    row_of = rows.numpy()
    if variant is SamplerVariant.GREEDY:
        tokens[:] = _argmax(table)
        tokens[row_of < 0] = 0
        return

    uniforms = philox_uniform(inputs.seed.numpy()[row_of], positions.numpy()).tolist()
    temperature, min_p, top_k, top_p = (
        field.numpy()[row_of].tolist()
        for field in (inputs.temperature, inputs.min_p, inputs.top_k, inputs.top_p)
    )
    real = [(s, r) for s, r in enumerate(row_of.tolist()) if r >= 0]
    reported: list[int] = []
    raw = None
    if variant is SamplerVariant.FULL:
        flags = inputs.flags.numpy()
        reported = [s for s, r in real if flags[r] & FLAG_LOGPROBS]
        if reported:
            raw = logits[reported]  # a copy
    tokens[:] = 0
    for s, r in real:
        x = table[s]
        if variant is SamplerVariant.FULL:
            _adjust(x, r, int(positions[s]), inputs, state)
        # A tiny temperature takes everything but the largest logit to -inf; nothing is wrong with that.
        with np.errstate(over="ignore"):
            tokens[s] = _draw(
                x,
                temperature=temperature[s],
                min_p=min_p[s],
                top_k=top_k[s],
                top_p=top_p[s],
                uniform=uniforms[s],
            )
    if raw is not None:
        values, ids, rank = prompt_logprobs(raw, out[reported])
        state.logprob_values[reported] = values
        state.logprob_ids[reported] = ids
        state.logprob_rank[reported] = rank


def prompt_logprobs(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log probability of given tokens and of the most likely ones. Any device; allocates.

    Args:
        logits: [T, V] f32, raw.
        targets: [T] i32, in [0, V).

    Returns:
        values: [T, 1 + MAX_LOGPROBS] f32, natural logarithms: the target's, then the most likely
            in order, lowest index first among equals. A vocabulary of fewer tokens is
            filled up with -inf.
        ids: [T, 1 + MAX_LOGPROBS] i32, the tokens they belong to; -1 where filled up.
        rank: [T] i32, 1 + the number of logits strictly above the target's.
    """
    num, vocab = logits.shape
    width = min(MAX_LOGPROBS, vocab)
    values = logits.new_full((num, 1 + MAX_LOGPROBS), -torch.inf)
    ids = torch.full((num, 1 + MAX_LOGPROBS), -1, dtype=torch.int32, device=logits.device)
    rank = torch.empty(num, dtype=torch.int32, device=logits.device)
    # One int64 holds logit and index, so that topk cannot choose among equal logits by itself.
    backwards = torch.arange(vocab - 1, -1, -1, device=logits.device)
    for start in range(0, num, _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, num))
        x = logits[part]
        x = torch.where(x.isnan(), -torch.inf, x) + 0.0  # -0.0 and 0.0 tie
        target = targets[part].to(torch.int64)[:, None]
        top = ((_ordered(x).to(torch.int64) << 32) | backwards).topk(width, sorted=True).values
        chosen = torch.cat([target, (vocab - 1) - (top & 0xFFFFFFFF)], dim=1)
        picked = x.gather(1, chosen)
        total = x.logsumexp(dim=1, keepdim=True)
        # Nothing possible: -inf rather than the NaN of -inf - -inf.
        values[part, : 1 + width] = torch.where(picked == -torch.inf, picked, picked - total)
        ids[part, : 1 + width] = chosen.to(torch.int32)
        rank[part] = 1 + (x > picked[:, :1]).sum(dim=1, dtype=torch.int32)
    return values, ids, rank


def philox(key: npt.NDArray[Any], position: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Philox4x32-10 of the counters (position, 0, 0, 0).

    Args:
        key: [N, 2] int32 or uint32, low and high word of the seed.
        position: [N] or [N, 4] int32 or uint32; 4 are the words of whole counters.

    Returns:
        [4, N], words below 2^32.
    """
    words = position.astype(np.uint32).astype(np.uint64)
    counter = np.zeros((4, len(words)), dtype=np.uint64)
    counter[: 1 if words.ndim == 1 else 4] = words.T
    # Words 0 and 2 are multiplied, words 1 and 3 only mixed in: two arrays save half the calls.
    even, odd = counter[0::2], counter[1::2]
    keys = key.astype(np.uint32).astype(np.uint64).T
    multiplier = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
    weyl = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
    shift = np.uint64(32)
    for _ in range(10):
        product = (even * multiplier)[::-1]
        even, odd = (product >> shift) ^ odd ^ keys, product & _LOW
        keys = (keys + weyl) & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def philox_uniform(
    seed_pair: torch.Tensor | npt.NDArray[Any], positions: torch.Tensor | npt.NDArray[Any]
) -> torch.Tensor:
    """One uniform number a row from (seed, position): `seed_pair` [N, 2] and `positions` [N], i32.

    Returns [N] f64 on the CPU, multiples of 2^-53 in [0, 1), from words 0 and 1. 53 bits,
    because tokens less likely than 2^-24 could not be drawn fairly with 24.
    """
    words = philox(_host(seed_pair), _host(positions))
    bits = (words[0] >> np.uint64(5)) * np.uint64(1 << 26) + (words[1] >> np.uint64(6))
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)


def _host(values: torch.Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values


def _check(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous f32 [S, V], got {logits.dtype} {list(logits.shape)}")
    num_seqs, vocab = logits.shape
    if not 0 < vocab <= MAX_VOCAB:
        raise ValueError(f"the vocabulary must have 1 to {MAX_VOCAB} tokens, got {vocab}")
    for name, tensor in (("rows", rows), ("positions", positions), ("out", out)):
        if tensor.shape != (num_seqs,) or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be i32 [{num_seqs}], got {tensor.dtype} {list(tensor.shape)}")
    if logits.device.type != "cpu":
        raise ValueError(f"this sampler runs on the CPU, got logits on {logits.device}")


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """The int32 image of f32: the same order, and equal for equal bits."""
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _argmax(table: Floats) -> npt.NDArray[np.int64]:
    """Lowest index of the largest of each row; [S, V] -> [S]."""
    # Row by row: numpy vectorises only the flat case.
    best = np.array([x.argmax() for x in table])
    for s in np.flatnonzero(np.isnan(table[np.arange(len(table)), best])):
        best[s] = _without_nan(table[s]).argmax()
    return best


def _without_nan(x: Floats) -> Floats:
    return np.where(np.isnan(x), np.float32(-np.inf), x)


def _adjust(x: Floats, r: int, position: int, inputs: StaticInputs, state: StepState) -> None:
    """Mask, bias and penalties of device row r, in place; x: [V]."""
    vocab = len(x)
    flags = int(inputs.flags[r])
    np.copyto(x, -np.inf, where=np.isnan(x))
    if flags & FLAG_MASK:
        np.copyto(x, -np.inf, where=~_bits(inputs.mask[r], vocab))
    if position < int(inputs.min_position[r]):
        stop = inputs.stop_ids[r, : int(inputs.num_stop_ids[r])].numpy()
        x[stop[(stop >= 0) & (stop < vocab)]] = -np.inf
    if flags & FLAG_BIAS:
        count = int(inputs.num_bias[r])
        ids = inputs.bias_ids[r, :count].numpy()
        known = (ids >= 0) & (ids < vocab)
        x[ids[known]] += inputs.bias_values[r, :count].numpy()[known]
    if flags & FLAG_PENALTIES:
        counts = state.output_counts[r, :vocab].numpy()
        generated = counts > 0
        repetition = np.float32(inputs.repetition_penalty[r])
        frequency = np.float32(inputs.frequency_penalty[r])
        seen = np.flatnonzero(generated | _bits(state.prompt_mask[r], vocab))
        some = x[seen]
        some = np.where(some > 0, some / repetition, some * repetition)
        some -= frequency * counts[seen].astype(np.float32)
        some -= np.float32(inputs.presence_penalty[r]) * generated[seen]
        x[seen] = some


def _bits(words: torch.Tensor, count: int) -> npt.NDArray[np.bool_]:
    """The first `count` bits of int32 words, lowest first."""
    octets = np.ascontiguousarray(words.numpy()).view(np.uint8)
    return np.unpackbits(octets, count=count, bitorder="little").view(np.bool_)


def _draw(x: Floats, *, temperature: float, min_p: float, top_k: int, top_p: float, uniform: float) -> int:
    """One token of one row; x: [V]."""
    best = int(x.argmax())
    if np.isnan(x[best]):
        x = _without_nan(x)
        best = int(x.argmax())
    if temperature == 0 or not np.isfinite(x[best]):
        return best

    weigh = _Weigh(x[best], temperature, min_p)
    weights = weigh(x)
    lowest = None
    if 0 < top_k < len(x):
        lowest = np.partition(x, len(x) - top_k)[len(x) - top_k]
    if top_p < 1:
        lowest = _top_p(x, weights, weigh, lowest, top_p)
    if lowest is None:
        return _pick(np.cumsum(weights), uniform)
    kept = np.flatnonzero(x >= lowest)
    return int(kept[_pick(np.cumsum(weights[kept]), uniform)])


class _Weigh:
    """Weights of logits: 2^44 for the largest, 0 for what min-p removes. f32 [N] -> i64 [N]."""

    def __init__(self, largest: np.float32, temperature: float, min_p: float) -> None:
        self.largest = largest
        self.inverse = min(np.float32(1) / np.float32(temperature), np.float32(MAX_INVERSE_TEMPERATURE))
        self.min_p = np.float32(min_p)

    def __call__(self, x: Floats) -> Weights:
        # Subtract first: no compiler can then fuse the two roundings into one.
        e = (x - self.largest) * self.inverse
        np.exp(e, out=e)
        if self.min_p > 0:
            e *= e >= self.min_p
        e *= np.float32(2.0**WEIGHT_BITS)
        with np.errstate(invalid="ignore"):  # NaN parameters of rows that are not live
            return e.astype(np.int64)


def _top_p(x: Floats, weights: Weights, weigh: _Weigh, lowest: np.float32 | None, top_p: float) -> np.float32:
    """The largest t at which tokens with logit >= t hold the share top_p of the weight at x >= lowest."""
    if lowest is not None:
        kept = np.flatnonzero(x >= lowest)
        x, weights = x[kept], weights[kept]
    total = int(weights.sum())
    target = share(total, top_p)
    # All tokens below this weight together weigh less than what top-p may remove.
    x = x[np.flatnonzero(weights >= max((total - target) // len(x), 1))]
    while len(x) > _SORT_LIMIT:
        half = len(x) // 2
        x = np.partition(x, half)
        above = int(weigh(x[half:]).sum())
        if above < target:
            target -= above
            x = x[:half]
        else:
            x = x[half:]
    x = np.sort(x)[::-1]
    last = int(np.searchsorted(np.cumsum(weigh(x)), target))
    return np.float32(x[last])


def share(total: int, fraction: float) -> int:
    """floor(fraction * total), at least 1: how much weight top-p has to keep. In float64, as on the GPU."""
    return max(int(np.float64(fraction) * np.float64(total)), 1)


def _pick(sums: Weights, uniform: float) -> int:
    """The first index at which the running sum exceeds floor(uniform * sum)."""
    total = int(sums[-1])
    target = min(int(np.float64(uniform) * np.float64(total)), total - 1)
    return int(np.searchsorted(sums, target, side="right"))
