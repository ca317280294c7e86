"""Sampling on the CPU against sort-based float64 references, and the generator against its authors' vectors."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from ostinato import sampling
from ostinato.inputs import FLAG_BIAS, FLAG_LOGPROBS, FLAG_MASK, FLAG_PENALTIES
from ostinato.sampling import philox, philox_uniform, prompt_logprobs, sample
from ostinato.types import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS, SamplerVariant

GREEDY, SAMPLE, FULL = SamplerVariant.GREEDY, SamplerVariant.SAMPLE, SamplerVariant.FULL
P_VALUE = 1e-4
NEXT_TO_ONE = 1 - 2.0**-53


# --- helpers, used by the Triton tests too -----------------------------------------------


def make_inputs(rows: int, vocab: int, device: str = "cpu", **params: Any) -> SimpleNamespace:
    """The fields of StaticInputs that sampling reads, at the values of a default SamplingParams."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    f32 = torch.float32
    inputs = SimpleNamespace(
        temperature=zeros(rows, dtype=f32) + 1,
        top_p=zeros(rows, dtype=f32) + 1,
        min_p=zeros(rows, dtype=f32),
        top_k=zeros(rows),
        seed=zeros(rows, 2),
        flags=zeros(rows),
        presence_penalty=zeros(rows, dtype=f32),
        frequency_penalty=zeros(rows, dtype=f32),
        repetition_penalty=zeros(rows, dtype=f32) + 1,
        min_position=zeros(rows),
        num_stop_ids=zeros(rows),
        stop_ids=zeros(rows, MAX_STOP_IDS),
        num_bias=zeros(rows),
        bias_ids=zeros(rows, MAX_LOGIT_BIAS),
        bias_values=zeros(rows, MAX_LOGIT_BIAS, dtype=f32),
        mask=zeros(rows, (vocab + 31) // 32),
    )
    for name, value in params.items():
        field = getattr(inputs, name)
        field[:] = torch.as_tensor(value, dtype=field.dtype)
    return SimpleNamespace(**{k: v.to(device) for k, v in vars(inputs).items()})


def make_state(rows: int, vocab: int, device: str = "cpu") -> SimpleNamespace:
    """The fields of StepState that sampling touches; what it writes starts as a canary."""
    wide = 1 + MAX_LOGPROBS
    return SimpleNamespace(
        output_counts=torch.zeros(rows, vocab, dtype=torch.int16, device=device),
        prompt_mask=torch.zeros(rows, (vocab + 31) // 32, dtype=torch.int32, device=device),
        logprob_values=torch.full((rows, wide), 77.0, device=device),
        logprob_ids=torch.full((rows, wide), -77, dtype=torch.int32, device=device),
        logprob_rank=torch.full((rows,), -77, dtype=torch.int32, device=device),
    )


def pack(bits: torch.Tensor) -> torch.Tensor:
    """[..., V] bool -> [..., ceil(V / 32)] int32, lowest bit first."""
    vocab = bits.shape[-1]
    words = (vocab + 31) // 32
    padded = torch.zeros(*bits.shape[:-1], words * 32, dtype=torch.int64)
    padded[..., :vocab] = bits
    weights = 2 ** torch.arange(32, dtype=torch.int64)
    return (padded.view(*bits.shape[:-1], words, 32) * weights).sum(-1).to(torch.int32)


def full_case(
    num: int, vocab: int, seed: int, *, scale: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SimpleNamespace, SimpleNamespace]:
    """Logits [num, V], rows, positions, inputs and state in which every feature occurs, in mixtures."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(num, generator=g) * (high - low) + low

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape or (num,), generator=g)

    def some(share: float, values: torch.Tensor, otherwise: float) -> torch.Tensor:
        return torch.where(torch.rand(num, generator=g) < share, values, otherwise)

    allowed = torch.rand(num, vocab, generator=g) < 0.6
    allowed[:, vocab // 2] = True
    biased = min(vocab, 40)
    inputs = make_inputs(
        num,
        vocab,
        temperature=some(0.8, uniform(0.3, 2.0), 0.0),
        top_p=some(0.6, uniform(0.05, 0.99), 1.0),
        min_p=some(0.4, uniform(0.0, 0.3), 0.0),
        top_k=some(0.5, integers(1, vocab + 5), 0),
        seed=integers(-(2**31), 2**31, num, 2),
        flags=integers(0, 16),
        presence_penalty=uniform(-2, 2),
        frequency_penalty=uniform(-2, 2),
        repetition_penalty=uniform(0.5, 2),
        min_position=some(0.5, integers(50, 150), 0),
        num_stop_ids=integers(0, 9),
        num_bias=integers(0, biased + 1),
        mask=pack(allowed),
    )
    inputs.stop_ids[:] = integers(0, vocab, num, MAX_STOP_IDS)
    for r in range(num):
        inputs.bias_ids[r, :biased] = torch.randperm(vocab, generator=g)[:biased]
    inputs.bias_values[:, :biased] = torch.randn(num, biased, generator=g) * 5
    state = make_state(num, vocab)
    state.output_counts[:] = integers(-8, 4, num, vocab).clamp(min=0)
    state.prompt_mask[:] = pack(torch.rand(num, vocab, generator=g) < 0.2)
    logits = torch.randn(num, vocab, generator=g) * scale
    rows = torch.randperm(num, generator=g).to(torch.int32)
    positions = integers(0, 200).to(torch.int32)
    return logits, rows, positions, inputs, state


def extreme_case(
    num: int, vocab: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SimpleNamespace, SimpleNamespace]:
    """`full_case` with the ends of every range, broken logits, and padding, in mixtures."""
    logits, rows, positions, inputs, state = full_case(num, vocab, seed)
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    values: dict[str, tuple[float, ...]] = {
        "temperature": (0.0, 1e-45, 1e-30, 1e-6, 0.01, 0.7, 1.0, 5.0, 1e6, 3e38),
        "top_p": (1.0, 1.0, 1e-45, 1e-9, 0.3, 0.9, 0.999, 1 - 2.0**-24),
        "top_k": (0, 0, 1, 2, 40, vocab - 1, vocab, vocab + 7, 2**31 - 1),
        "min_p": (0.0, 0.0, 1e-45, 1e-9, 0.1, 0.999, 1.0),
        "presence_penalty": (0.0, 2.0, -2.0, 1e-20),
        "frequency_penalty": (0.0, 2.0, -2.0),
        "repetition_penalty": (1.0, 1.3, 0.01, 100.0, 1e-30, 1e30),
    }
    for name, choices in values.items():
        getattr(inputs, name).copy_(torch.tensor(rng.choices(choices, k=num)))
    for s in range(num):
        scale, digits = rng.choice((0.0, 1e-6, 0.1, 1.0, 4.0, 1e4)), rng.choice((0, 3, 9))
        logits[s] = (logits[s] * scale).round(decimals=digits)
        if rng.random() < 0.4:
            bad = rng.choice((torch.nan, -torch.inf, torch.inf, 3e38, -3e38, 1e-40, -0.0))
            logits[s, torch.rand(vocab, generator=g) < rng.choice((0.01, 0.5, 0.999, 1.0))] = bad
    inputs.mask[torch.rand(num, generator=g) < 0.1] = 0
    huge = torch.tensor(rng.choices((1.0, 1.0, 1.0, -1e37, 1e37), k=num))
    inputs.bias_values *= huge[:, None]
    positions[:] = torch.tensor(rng.choices((0, 1, 77, 149, 2**31 - 1), k=num))
    rows[rng.randrange(num)] = -1
    return logits, rows, positions, inputs, state


def run(
    logits: torch.Tensor,
    inputs: SimpleNamespace,
    *,
    rows: Any = None,
    positions: Any = None,
    state: SimpleNamespace | None = None,
    variant: SamplerVariant = SAMPLE,
) -> list[int]:
    """Sample once. By default every sequence uses device row 0 and its own position."""
    num, vocab = logits.shape
    rows = torch.zeros(num, dtype=torch.int32) if rows is None else torch.as_tensor(rows, dtype=torch.int32)
    positions = torch.arange(num) if positions is None else torch.as_tensor(positions)
    out = torch.full((num,), -9, dtype=torch.int32)
    state = state or make_state(len(inputs.seed), vocab)
    sample(
        logits.clone(),
        rows,
        positions.to(torch.int32),
        inputs,  # type: ignore[arg-type]
        state,  # type: ignore[arg-type]
        variant=variant,
        out=out,
    )
    return out.tolist()


def with_uniforms(monkeypatch: pytest.MonkeyPatch, uniforms: Any) -> None:
    fixed = torch.as_tensor(uniforms, dtype=torch.float64)
    monkeypatch.setattr(sampling, "philox_uniform", lambda seeds, positions: fixed.clone())


# --- the obvious versions ------------------------------------------------------------------


def reference_probabilities(
    logits: Any, temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> np.ndarray:
    """[V] f64, by sorting everything."""
    x = np.asarray(logits, dtype=np.float64)
    if temperature == 0:
        p = np.zeros(len(x))
        p[x.argmax()] = 1
        return p
    p = np.exp((x - x.max()) / temperature)
    p[p < min_p] = 0
    if 0 < top_k < len(x):
        p[x < np.sort(x)[::-1][top_k - 1]] = 0
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        last = int(np.argmax(np.cumsum(p[order]) >= np.float64(np.float32(top_p)) - 1e-12))
        p[x < x[order[last]]] = 0
    return p / p.sum()


def reference_adjusted(logits: torch.Tensor, r: int, position: int, inputs: Any, state: Any) -> np.ndarray:
    """Mask, bias and penalties, one token at a time: [V] f64."""
    x = logits.double().numpy().copy()
    flags = int(inputs.flags[r])

    def bit(words: torch.Tensor, v: int) -> bool:
        return bool((int(words[r, v // 32]) >> (v % 32)) & 1)

    stops = set(inputs.stop_ids[r, : int(inputs.num_stop_ids[r])].tolist())
    n = int(inputs.num_bias[r])
    bias = dict(zip(inputs.bias_ids[r, :n].tolist(), inputs.bias_values[r, :n].tolist(), strict=True))
    repetition = float(inputs.repetition_penalty[r])
    for v in range(len(x)):
        if flags & FLAG_MASK and not bit(inputs.mask, v):
            x[v] = -np.inf
        if position < int(inputs.min_position[r]) and v in stops:
            x[v] = -np.inf
        if flags & FLAG_BIAS:
            x[v] += bias.get(v, 0.0)
        if flags & FLAG_PENALTIES:
            count = int(state.output_counts[r, v])
            if count > 0 or bit(state.prompt_mask, v):
                x[v] = x[v] / repetition if x[v] > 0 else x[v] * repetition
            x[v] -= float(inputs.frequency_penalty[r]) * count
            x[v] -= float(inputs.presence_penalty[r]) * (count > 0)
    return x


def assert_is_draw(token: int, p: np.ndarray, u: float, tolerance: float = 1e-5) -> None:
    """`token` is the inverse of the distribution function of p at u, rounding aside."""
    above = np.cumsum(p)
    assert p[token] > 0, f"token {token} was filtered out"
    assert above[token] - p[token] - tolerance <= u <= above[token] + tolerance, (token, u, above[token])


def row_params(inputs: SimpleNamespace, r: int) -> dict[str, Any]:
    return {
        "temperature": float(inputs.temperature[r]),
        "min_p": float(inputs.min_p[r]),
        "top_k": int(inputs.top_k[r]),
        "top_p": float(inputs.top_p[r]),
    }


# --- the generator ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter: list[int], key: list[int], expected: str) -> None:
    words = philox(np.array([key], dtype=np.uint32), np.array([counter], dtype=np.uint32))[:, 0]
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_uniform_is_53_bits_of_words_0_and_1() -> None:
    # word 0 = 6627e8d5, word 1 = e169c58d
    expected = ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    got = philox_uniform(torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    assert got.dtype == torch.float64
    assert got.tolist() == [expected]


def test_seed_words_are_unsigned() -> None:
    positions = torch.tensor([5], dtype=torch.int32)
    signed = philox_uniform(torch.tensor([[-1, -2]], dtype=torch.int32), positions)
    unsigned = philox_uniform(np.array([[2**32 - 1, 2**32 - 2]], dtype=np.uint32), positions)
    assert signed.tolist() == unsigned.tolist()


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    n = 1 << 16
    positions = torch.arange(n, dtype=torch.int32)
    seeds = torch.zeros(n, 2, dtype=torch.int32)
    seeds[:, 0] = 42
    by_position = philox_uniform(seeds, positions).numpy()
    next_seed = philox_uniform(seeds + torch.tensor([1, 0], dtype=torch.int32), positions).numpy()
    next_high = philox_uniform(seeds + torch.tensor([0, 1], dtype=torch.int32), positions).numpy()
    seeds[:, 0] = positions
    by_seed = philox_uniform(seeds, torch.full_like(positions, 7)).numpy()
    for u in (by_position, by_seed):
        assert 0 <= u.min() < 1e-3
        assert 1 - 1e-3 < u.max() < 1
        assert stats.kstest(u, "uniform").pvalue > P_VALUE
        assert stats.chisquare(np.bincount((u * 256).astype(int), minlength=256)).pvalue > P_VALUE
        low_bits = (u * 2.0**53).astype(np.int64) & 255
        assert stats.chisquare(np.bincount(low_bits, minlength=256)).pvalue > P_VALUE
        for lag in (1, 2, 32):
            assert stats.pearsonr(u[lag:], u[:-lag]).pvalue > P_VALUE
    assert stats.pearsonr(by_position, next_seed).pvalue > P_VALUE
    assert stats.pearsonr(by_position, next_high).pvalue > P_VALUE


# --- greedy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 31, 257, 1000])
def test_greedy_takes_the_lowest_index_of_the_largest(vocab: int) -> None:
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-3, 4, (50, vocab), generator=g).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    inputs = make_inputs(1, vocab, temperature=0.0)
    assert run(logits, inputs, variant=GREEDY) == expected
    assert run(logits, inputs, variant=SAMPLE) == expected
    assert run(logits, inputs, variant=FULL) == expected


@pytest.mark.parametrize("variant", list(SamplerVariant))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_counts_as_minus_infinity(variant: SamplerVariant, temperature: float) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [
            [nan, 1.0, nan, 60.0, 0.0],
            [nan, nan, nan, nan, nan],
            [-inf, -inf, -inf, -inf, -inf],
            [0.0, inf, nan, inf, 1.0],
            [nan, -inf, -5.0, -inf, nan],
        ]
    )
    inputs = make_inputs(1, 5, temperature=temperature, top_p=0.9, top_k=3, min_p=0.01)
    assert run(logits, inputs, variant=variant) == [3, 0, 0, 1, 2]


# --- one row against the exact distribution ------------------------------------------------------

FILTERS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.3": {"temperature": 0.3},
    "temperature 2.5": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.8},
    "top_p small": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "hot top_p": {"temperature": 1.7, "top_p": 0.6},
    "top_k, top_p": {"top_k": 12, "top_p": 0.7},
    "min_p, top_p": {"min_p": 0.08, "top_p": 0.85, "temperature": 1.3},
    "all": {"temperature": 1.5, "min_p": 0.02, "top_k": 15, "top_p": 0.9},
}


@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_match_the_exact_probabilities(name: str) -> None:
    vocab, n = 37, 10000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5
    p = reference_probabilities(logits, **FILTERS[name])
    inputs = make_inputs(1, vocab, seed=[[11, 5]], **FILTERS[name])
    counts = np.bincount(run(logits.expand(n, vocab), inputs), minlength=vocab)
    assert counts[p == 0].sum() == 0
    kept = p > 0
    if kept.sum() > 1:
        # Cells that expect little are taken together, as the test's approximation asks.
        rare = kept & (p * n < 5)
        observed = np.append(counts[kept & ~rare], counts[rare].sum())
        expected = np.append(p[kept & ~rare] * n, p[rare].sum() * n)
        assert stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > P_VALUE


@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_across_seeds_at_one_position(name: str) -> None:
    vocab, n = 11, 4000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(4)) * 1.5
    p = reference_probabilities(logits, **FILTERS[name])
    inputs = make_inputs(n, vocab, **FILTERS[name])
    inputs.seed[:, 0] = torch.arange(n)
    tokens = run(logits.expand(n, vocab), inputs, rows=range(n), positions=[9] * n)
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[p == 0].sum() == 0
    if (p > 0).sum() > 1:
        assert stats.chisquare(counts[p > 0], p[p > 0] * n).pvalue > P_VALUE


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab", [1, 2, 33, 997])
def test_each_uniform_number_gives_the_token_of_the_exact_distribution(
    monkeypatch: pytest.MonkeyPatch, name: str, vocab: int
) -> None:
    n = 200
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    logits[::5] = -torch.inf if vocab > 2 else 0.0
    uniforms = (np.arange(n) + 0.5) / n
    with_uniforms(monkeypatch, uniforms)
    p = reference_probabilities(logits, **FILTERS[name])
    tokens = run(logits.expand(n, vocab), make_inputs(1, vocab, **FILTERS[name]))
    for token, u in zip(tokens, uniforms, strict=True):
        assert_is_draw(token, p, u)


@pytest.mark.parametrize("vocab", [5, 64, 1001, 7001])
@pytest.mark.parametrize("kind", ["normal", "flat", "ties", "holes", "equal", "wide"])
def test_thresholds_are_exact(monkeypatch: pytest.MonkeyPatch, vocab: int, kind: str) -> None:
    """In ascending order of logit the least likely token kept is what u = 0 draws."""
    g = torch.Generator().manual_seed(vocab)
    x = torch.randn(vocab, generator=g)
    if kind == "flat":
        x *= 0.05
    elif kind == "ties":
        x = (x * 2).round()
    elif kind == "holes":
        x[torch.rand(vocab, generator=g) < 0.5] = -torch.inf
        x[0] = 0.5
    elif kind == "equal":
        x[:] = -3.25
    elif kind == "wide":
        x = torch.sign(x) * 10 ** (x.abs() * 3 - 4)
    ascending = x.sort().values
    cases = [
        {"temperature": t, "min_p": m, "top_k": k, "top_p": p}
        for t in (0.4, 1.0, 3.0)
        for m in (0.0, 0.15)
        for k in (0, 1, 3, vocab // 2, vocab - 1, vocab, vocab + 9)
        for p in (1.0, 0.97, 0.5, 0.01)
    ]
    n = len(cases)
    inputs = make_inputs(n, vocab, **{k: [c[k] for c in cases] for k in cases[0]})
    with_uniforms(monkeypatch, [0.0] * n)
    lowest = run(ascending.expand(n, vocab), inputs, rows=range(n))
    with_uniforms(monkeypatch, [NEXT_TO_ONE] * n)
    highest = run(ascending.flip(0).expand(n, vocab), inputs, rows=range(n))
    for case, low, high in zip(cases, lowest, highest, strict=True):
        p = reference_probabilities(ascending, **case)
        p[p < 2.0**-44 * p.max()] = 0  # weighs nothing
        expected = int(np.flatnonzero(p)[0])
        # Sums of float32 and float64 exponentials may cross top_p one token apart, no more.
        slack = 0 if case["top_p"] == 1.0 else 1
        distinct = np.unique(ascending.numpy())
        place = np.searchsorted(distinct, ascending.numpy())
        assert abs(place[low] - place[expected]) <= slack, case
        assert ascending[low] == ascending[vocab - 1 - high], case
        assert low == 0 or ascending[low - 1] < ascending[low], f"{case}: a tie was split"


def test_top_p_keeps_the_smallest_set_that_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights 8, 4, 2, 1, 1 of 16, exact in binary.
    logits = torch.log2(torch.tensor([1.0, 1.0, 2.0, 4.0, 8.0])).expand(9, 5)
    top_p = [0.25, 0.5, 0.500001, 0.75, 0.7501, 0.875, 0.88, 0.99, 1.0]
    inputs = make_inputs(9, 5, temperature=float(1 / np.log(2)), top_p=top_p)
    # The share at 0.5 and so on depends on the last bit of exp: take a hair less.
    inputs.top_p[[1, 3, 5]] -= 1e-6
    with_uniforms(monkeypatch, [0.0] * 9)
    assert run(logits, inputs, rows=range(9)) == [4, 4, 3, 3, 2, 2, 0, 0, 0]


def test_min_p_comes_before_top_k_and_top_p(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.log(torch.tensor([[0.02, 0.02, 0.06, 0.3, 0.6]]))
    with_uniforms(monkeypatch, [0.0])
    # Of 0.6, 0.3 (the rest is below 0.2 * 0.6): 0.6 / 0.9 does not reach 0.67, but all of 1 would.
    assert run(logits, make_inputs(1, 5, min_p=0.2, top_p=0.66)) == [4]
    assert run(logits, make_inputs(1, 5, min_p=0.2, top_p=0.67)) == [3]
    assert run(logits, make_inputs(1, 5, top_p=0.61)) == [3]
    # Renormalised over the top two: 0.6 / 0.9 reaches 0.66.
    assert run(logits, make_inputs(1, 5, top_k=2, top_p=0.66)) == [4]


def test_a_token_of_probability_2_to_the_minus_40_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[-40 * float(np.log(2)), 0.0]])
    for u, expected in ((0.0, 0), (2.0**-41, 0), (2.0**-39, 1), (NEXT_TO_ONE, 1)):
        with_uniforms(monkeypatch, [u])
        assert run(logits, make_inputs(1, 2)) == [expected]


def test_the_largest_vocabulary_does_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = sampling.MAX_VOCAB
    logits = torch.zeros(3, vocab)
    with_uniforms(monkeypatch, [0.0, 0.5, NEXT_TO_ONE])
    assert run(logits, make_inputs(1, vocab)) == [0, vocab // 2, vocab - 1]
    assert run(logits, make_inputs(1, vocab, top_p=0.999)) == [0, vocab // 2, vocab - 1]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6, 1e6, 3e38])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([0.0, 3.0, -3e38, 2.999, 1e-30]).expand(64, 5)
    tokens = set(run(logits, make_inputs(1, 5, temperature=temperature, top_p=0.999)))
    assert tokens == ({1} if temperature < 1 else {0, 1, 3, 4} | ({2} if temperature > 1e38 else set()))


def test_the_token_depends_on_seed_and_position_not_on_row_or_batch() -> None:
    vocab, n = 101, 40
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(n, vocab, generator=g)
    inputs = make_inputs(n, vocab, temperature=1.2, top_p=0.97)
    inputs.seed[:] = torch.randint(-(2**31), 2**31, (n, 2), generator=g)
    positions = torch.randint(0, 4096, (n,), generator=g)
    together = run(logits, inputs, rows=range(n), positions=positions)
    order = torch.randperm(n, generator=g)
    moved = SimpleNamespace(**{k: v[order] for k, v in vars(inputs).items()})
    home = torch.argsort(order)  # where each old row now lives
    assert run(logits, moved, rows=home, positions=positions) == together
    for s in (0, 7, 39):
        assert run(logits[s : s + 1], inputs, rows=[s], positions=positions[s : s + 1]) == [together[s]]
    assert run(logits, inputs, rows=range(n), positions=positions + 1) != together
    inputs.seed[:, 1] += 1
    assert run(logits, inputs, rows=range(n), positions=positions) != together


# --- padding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list(SamplerVariant))
def test_padding_changes_nothing(variant: SamplerVariant) -> None:
    vocab, n = 65, 6
    logits, rows, positions, inputs, state = full_case(n, vocab, 1)
    inputs.flags |= FLAG_LOGPROBS
    alone = make_state(n, vocab)
    alone.output_counts, alone.prompt_mask = state.output_counts, state.prompt_mask
    expected = run(logits, inputs, rows=rows, positions=positions, state=alone, variant=variant)
    pad = torch.full((3, vocab), float("nan"))
    pad[1, 5] = 1.0
    pad[2] = torch.arange(float(vocab))
    padded = make_state(n + 3, vocab)
    padded.output_counts[:n], padded.prompt_mask[:n] = state.output_counts, state.prompt_mask
    before = {k: v.clone() for k, v in vars(padded).items()}
    tokens = run(
        torch.cat([logits, pad]),
        inputs,
        rows=[*rows.tolist(), -1, -1, -1],
        positions=[*positions.tolist(), 0, -1, 2**31 - 1],
        state=padded,
        variant=variant,
    )
    assert tokens == [*expected, 0, 0, 0]
    for name in ("logprob_values", "logprob_ids", "logprob_rank"):
        got, was = getattr(padded, name), before[name]
        assert torch.equal(got[:n], getattr(alone, name))
        assert torch.equal(got[n:], was[n:]), f"{name} of padding was written"
        assert (variant is FULL) != torch.equal(got, was)
    assert torch.equal(padded.output_counts, before["output_counts"])


def test_only_padding_and_nothing_at_all() -> None:
    inputs = make_inputs(1, 7)
    for variant in SamplerVariant:
        assert run(torch.full((2, 7), float("nan")), inputs, rows=[-1, -1], variant=variant) == [0, 0]
        assert run(torch.zeros(0, 7), inputs, variant=variant) == []


# --- everything else ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [20, 33, 257])
def test_full_matches_the_dense_reference(vocab: int) -> None:
    n = 120
    logits, rows, positions, inputs, state = full_case(n, vocab, vocab)
    tokens = run(logits, inputs, rows=rows, positions=positions, state=state, variant=FULL)
    uniforms = philox_uniform(inputs.seed[rows.long()], positions).tolist()
    for s, r in enumerate(rows.tolist()):
        x = reference_adjusted(logits[s], r, int(positions[s]), inputs, state)
        assert_is_draw(tokens[s], reference_probabilities(x, **row_params(inputs, r)), uniforms[s])


def test_each_feature_alone_changes_tokens() -> None:
    """Each flag is honoured, and what no flag announces is not read."""
    vocab, n = 257, 60
    logits, rows, positions, inputs, state = full_case(n, vocab, 5)
    inputs.min_position[:] = 0
    inputs.flags[:] = 0
    plain = run(logits, inputs, rows=rows, positions=positions, state=state, variant=SAMPLE)
    assert run(logits, inputs, rows=rows, positions=positions, state=state, variant=FULL) == plain
    for flag in (FLAG_MASK, FLAG_BIAS, FLAG_PENALTIES):
        inputs.flags[:] = flag
        changed = run(logits, inputs, rows=rows, positions=positions, state=state, variant=FULL)
        assert changed != plain
        assert run(logits, inputs, rows=rows, positions=positions, state=state, variant=SAMPLE) == plain


def test_stop_ids_wait_for_min_position() -> None:
    vocab = 9
    logits = torch.arange(float(vocab)).expand(4, vocab)
    inputs = make_inputs(1, vocab, temperature=0.0, min_position=12, num_stop_ids=2)
    inputs.stop_ids[0, :4] = torch.tensor([8, 7, 6, 5])
    assert run(logits, inputs, positions=[0, 11, 12, 13], variant=FULL) == [6, 6, 8, 8]


def test_penalties_by_hand() -> None:
    # Token 0: prompt only; 1: generated twice; 2: both, once; 3: neither.
    logits = torch.tensor([[3.0, 2.9, -1.0, 1.05]])
    state = make_state(1, 4)
    state.prompt_mask[0, 0] = 0b0101
    state.output_counts[0] = torch.tensor([0, 2, 1, 0])

    def best(repetition: float, frequency: float, presence: float) -> int:
        inputs = make_inputs(
            1,
            4,
            temperature=0.0,
            flags=FLAG_PENALTIES,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )
        return run(logits, inputs, state=state, variant=FULL)[0]

    assert best(1.0, 0.0, 0.0) == 0
    assert best(3.0, 0.0, 0.0) == 3  # 1.0, 0.97, -3, 1.05
    assert best(2.0, -1.0, 0.0) == 1  # 1.5, 1.45 + 2, -2 + 1, 1.05
    assert best(1.0, -0.06, 0.0) == 1  # 3, 2.9 + 0.12
    assert best(1.0, 0.0, -0.2) == 1  # 3, 2.9 + 0.2
    assert best(0.1, 0.0, -1.0) == 0  # 30, 29 + 1 = 30: lowest index


def test_all_masked_still_gives_a_token() -> None:
    inputs = make_inputs(1, 40, flags=FLAG_MASK | FLAG_LOGPROBS)  # mask words are 0
    assert run(torch.randn(3, 40), inputs, state=make_state(3, 40), variant=FULL) == [0, 0, 0]


# --- log probabilities -------------------------------------------------------------------------------


def assert_logprobs(
    logits: torch.Tensor, token: int, values: torch.Tensor, ids: torch.Tensor, rank: torch.Tensor
) -> None:
    x = logits.double().numpy()
    exact = x - (x.max() + np.log(np.exp(x - x.max()).sum()))
    width = min(MAX_LOGPROBS, len(x))
    order = sorted(range(len(x)), key=lambda v: (-x[v], v))[:width]
    assert ids.tolist() == [token, *order] + [-1] * (MAX_LOGPROBS - width)
    np.testing.assert_allclose(values[: 1 + width].numpy(), exact[[token, *order]], rtol=1e-5, atol=1e-5)
    assert (values[1 + width :] == -torch.inf).all()
    assert int(rank) == 1 + int((x > x[token]).sum())


@pytest.mark.parametrize("vocab", [1, 7, 20, 333, 2000])
@pytest.mark.parametrize("ties", [False, True])
def test_prompt_logprobs(vocab: int, ties: bool) -> None:
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(70, vocab, generator=g) * 3
    if ties:
        logits = (logits / 2).round() * 2
        logits[:, ::3] *= -0.0  # zeros of both signs tie
    targets = torch.randint(0, vocab, (70,), generator=g).to(torch.int32)
    values, ids, rank = prompt_logprobs(logits, targets)
    assert (values.dtype, ids.dtype, rank.dtype) == (torch.float32, torch.int32, torch.int32)
    for t in range(70):
        assert_logprobs(logits[t], int(targets[t]), values[t], ids[t], rank[t])


def test_prompt_logprobs_of_masked_and_broken_logits() -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[0.0, -inf, nan], [-inf, -inf, -inf], [nan, nan, nan]])
    values, ids, rank = prompt_logprobs(logits, torch.tensor([2, 0, 1], dtype=torch.int32))
    assert values[:, :4].tolist() == [[-inf, 0.0, -inf, -inf], [-inf] * 4, [-inf] * 4]
    assert ids[:, :4].tolist() == [[2, 0, 1, 2], [0, 0, 1, 2], [1, 0, 1, 2]]
    assert rank.tolist() == [2, 1, 1]
    assert [t.shape[0] for t in prompt_logprobs(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int32))] == [
        0
    ] * 3


def test_logprobs_are_of_the_raw_logits_by_column() -> None:
    vocab, n = 129, 40
    logits, rows, positions, inputs, state = full_case(n, vocab, 8)
    tokens = run(logits, inputs, rows=rows, positions=positions, state=state, variant=FULL)
    wanted = [bool(inputs.flags[r] & FLAG_LOGPROBS) for r in rows.tolist()]
    assert 5 < sum(wanted) < n - 5
    for s in range(n):
        got = (state.logprob_values[s], state.logprob_ids[s], state.logprob_rank[s])
        if wanted[s]:
            assert_logprobs(logits[s], tokens[s], *got)
        else:
            assert (got[0] == 77).all()
            assert (got[1] == -77).all()
            assert got[2] == -77


# --- the boundary --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, "logits must be contiguous f32"),
        ({"logits": torch.zeros(8, 2).t()}, "logits must be contiguous f32"),
        ({"rows": torch.zeros(3, dtype=torch.int32)}, r"rows must be i32 \[2\]"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, r"positions must be i32 \[2\]"),
        ({"out": torch.zeros(2)}, r"out must be i32 \[2\]"),
        ({"logits": torch.zeros(2, 2**19)}, "vocabulary"),
    ],
)
def test_wrong_tensors_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    zeros = torch.zeros(2, dtype=torch.int32)
    args = {"logits": torch.zeros(2, 8), "rows": zeros, "positions": zeros, "out": zeros.clone()} | change
    out = args.pop("out")
    with pytest.raises(ValueError, match=message):
        sample(**args, inputs=make_inputs(1, 8), state=make_state(2, 8), variant=SAMPLE, out=out)  # type: ignore[arg-type]
