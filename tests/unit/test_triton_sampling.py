"""The sampling kernels against the CPU implementation: in Triton's interpreter here, on a GPU where there is one."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
pytest.importorskip("triton")

from ostinato.inputs import FLAG_LOGPROBS
from ostinato.ops.triton import sampling as kernels
from ostinato.types import SamplerVariant

from .test_sampling import full_case, make_inputs, make_state, run

GREEDY, SAMPLE, FULL = SamplerVariant.GREEDY, SamplerVariant.SAMPLE, SamplerVariant.FULL
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_kernels(
    logits: torch.Tensor,
    inputs: SimpleNamespace,
    *,
    rows: Any = None,
    positions: Any = None,
    state: SimpleNamespace | None = None,
    variant: SamplerVariant = SAMPLE,
) -> list[int]:
    """`run` of test_sampling, through the kernels; scratch starts as garbage."""
    num, vocab = logits.shape
    rows = torch.zeros(num) if rows is None else torch.as_tensor(rows)
    positions = torch.arange(num) if positions is None else torch.as_tensor(positions)
    state = state or make_state(max(num, len(inputs.seed)), vocab)
    on_device = SimpleNamespace(**{k: v.to(DEVICE) for k, v in vars(state).items()})
    out = torch.full((num,), -9, dtype=torch.int32, device=DEVICE)
    words = kernels.scratch_words(num, vocab, variant)
    scratch = torch.full((words + 8,), -1431655766, dtype=torch.int32, device=DEVICE)
    kernels.sample(
        logits.clone().to(DEVICE),
        rows.to(DEVICE, torch.int32),
        positions.to(DEVICE, torch.int32),
        SimpleNamespace(**{k: v.to(DEVICE) for k, v in vars(inputs).items()}),  # type: ignore[arg-type]
        on_device,  # type: ignore[arg-type]
        variant=variant,
        out=out,
        scratch=scratch[:words],
    )
    assert (scratch[words:] == -1431655766).all(), "wrote beyond scratch_words"
    for name, value in vars(on_device).items():
        getattr(state, name).copy_(value)
    return out.tolist()


def assert_same(
    logits: torch.Tensor, inputs: SimpleNamespace, state: SimpleNamespace | None = None, **how: Any
) -> list[int]:
    """Tokens and everything written to the state are those of the CPU."""
    num, vocab = logits.shape
    ours = state or make_state(max(num, len(inputs.seed)), vocab)
    theirs = SimpleNamespace(**{k: v.clone() for k, v in vars(ours).items()})
    expected = run(logits, inputs, state=theirs, **how)
    assert run_kernels(logits, inputs, state=ours, **how) == expected
    assert torch.equal(ours.logprob_ids, theirs.logprob_ids)
    assert torch.equal(ours.logprob_rank, theirs.logprob_rank)
    torch.testing.assert_close(ours.logprob_values, theirs.logprob_values, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.output_counts, theirs.output_counts)
    assert torch.equal(ours.prompt_mask, theirs.prompt_mask)
    return expected


@pytest.mark.parametrize("vocab", [1, 33, 1000, 1024, 2501])
def test_greedy(vocab: int) -> None:
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-9, 10, (5, vocab), generator=g).float()
    logits[1, : vocab // 2] = float("nan")
    logits[2] = -torch.inf
    logits[3] = float("nan")
    assert_same(logits, make_inputs(1, vocab), rows=[0, 0, 0, 0, -1], variant=GREEDY)


@pytest.mark.parametrize(("vocab", "scale"), [(1, 1.0), (33, 0.0), (33, 3.0), (2501, 0.1), (1025, 3.0)])
def test_sample(vocab: int, scale: float) -> None:
    cases = [
        {"temperature": 0.8},
        {"temperature": 0.0, "top_p": 0.5},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 3},
        {"temperature": 1.0, "top_k": max(vocab // 2, 1), "top_p": 0.95},
        {"temperature": 2.0, "top_k": max(vocab // 3, 1), "top_p": 0.5, "min_p": 0.02},
        {"temperature": 1e-30, "top_k": vocab + 1, "min_p": 0.3},
    ]
    n = len(cases)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    inputs = make_inputs(n, vocab, **{k: [(defaults | c)[k] for c in cases] for k in defaults})
    g = torch.Generator().manual_seed(vocab)
    inputs.seed[:] = torch.randint(-(2**31), 2**31, (n, 2), generator=g)
    logits = torch.randn(n, vocab, generator=g) * scale
    logits[:, ::7] = logits[:, :1].clone()  # ties
    logits[3, 1::2] = -torch.inf
    assert_same(logits, inputs, rows=range(n), positions=torch.arange(n) * 1000)


def test_one_token_more_or_less_would_show() -> None:
    """Few nearly equal tokens are kept, so that a threshold one off changes most draws."""
    vocab, n = 40, 16
    g = torch.Generator().manual_seed(1)
    i = torch.arange(n)
    inputs = make_inputs(
        n,
        vocab,
        top_k=torch.where(i % 2 == 0, 1 + i // 2, 0),
        top_p=torch.where(i % 2 == 1, 0.01 + 0.025 * (i // 2), 1.0),
        seed=torch.randint(-(2**31), 2**31, (n, 2), generator=g),
    )
    assert_same(torch.randn(n, vocab, generator=g) * 0.01, inputs, rows=range(n))


def test_sample_ties_at_every_threshold() -> None:
    vocab, n = 1500, 4
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, vocab, generator=g) * 2).round()
    logits[:, ::5] *= -0.0
    inputs = make_inputs(n, vocab, top_k=torch.arange(n) * 200, top_p=torch.linspace(0.3, 1, n))
    inputs.min_p[n - 1] = 1.0  # only the largest, at exactly this share
    assert_same(logits, inputs, rows=range(n))


def test_broken_logits() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(6, 1100)
    logits[0, :] = nan
    logits[1, :] = -inf
    logits[2, 1050:1060] = inf
    logits[3, ::2] = nan
    logits[4, :1099] = -inf
    logits[5, :] = nan
    inputs = make_inputs(1, 1100, top_k=30, top_p=0.9, flags=FLAG_LOGPROBS)
    for variant in (GREEDY, FULL):
        state = make_state(6, 1100)
        ours = run_kernels(logits, inputs, rows=[0] * 5 + [-1], state=state, variant=variant)
        assert ours == run(logits, inputs, rows=[0] * 5 + [-1], state=make_state(6, 1100), variant=variant)
        assert (state.logprob_rank[5] == -77).all()


@pytest.mark.parametrize(("vocab", "n"), [(15, 8), (1000, 12), (1025, 6)])
def test_full(vocab: int, n: int) -> None:
    logits, rows, positions, inputs, state = full_case(n, vocab, vocab)
    assert_same(logits, inputs, state, rows=rows, positions=positions, variant=FULL)


def test_padding_changes_nothing() -> None:
    vocab, n = 1030, 6
    logits, rows, positions, inputs, state = full_case(n, vocab, 3)
    inputs.flags |= FLAG_LOGPROBS
    rows[1::2] = -1
    logits[1::2] = float("nan")
    before = state.logprob_values.clone()
    tokens = assert_same(logits, inputs, state, rows=rows, positions=positions, variant=FULL)
    assert tokens[1::2] == [0, 0, 0]
    assert torch.equal(state.logprob_values[1::2], before[1::2])
    assert (state.logprob_values[::2, 0] != 77).all()
    assert run_kernels(logits, inputs, rows=[-1] * n, variant=SAMPLE) == [0] * n


def test_scratch_too_small_is_refused() -> None:
    logits = torch.zeros(2, 50, device=DEVICE)
    zeros = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    words = kernels.scratch_words(2, 50, SAMPLE)
    assert words < kernels.scratch_words(2, 50) == kernels.scratch_words(2, 50, FULL)
    with pytest.raises(ValueError, match=f"scratch must have {words} 32-bit words, got {words - 1}"):
        kernels.sample(
            logits,
            zeros,
            zeros,
            make_inputs(1, 50, DEVICE),  # type: ignore[arg-type]
            make_state(2, 50, DEVICE),  # type: ignore[arg-type]
            variant=SAMPLE,
            out=zeros.clone(),
            scratch=torch.zeros(words - 1, dtype=torch.int32, device=DEVICE),
        )
