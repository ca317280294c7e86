"""The ladder and the routes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import FallbackError
from ostinato.graphs.plan import CudaGraphMode, Plan, default_capture_sizes
from ostinato.types import (
    GraphKey,
    Reason,
    Request,
    SamplerVariant,
    SamplingParams,
    Schedule,
    ScheduledRow,
    StepKind,
)


def request(**params: object) -> Request:
    return Request("r", "r", (1, 2, 3), SamplingParams(**params), frozenset(), 16, 0)  # type: ignore[arg-type]


def schedule(kind: StepKind, rows: int, length: int = 1, **params: object) -> Schedule:
    decode = kind is StepKind.DECODE
    one = request(**params)
    items = tuple(
        ScheduledRow(one, row, 3 if decode else 0, length, decode, True, not decode, 0, (), 0)
        for row in range(rows)
    )
    return Schedule(0, kind, items, (), (), SamplerVariant.GREEDY)


def plan(
    mode: CudaGraphMode = CudaGraphMode.FULL_DECODE_ONLY,
    sizes: tuple[int, ...] = (1, 2, 4, 8),
    **kwargs: object,
) -> Plan:
    defaults = {"min_hits": 2, "pad": True}
    return Plan(mode=mode, capture_sizes=sizes, **defaults | kwargs)  # type: ignore[arg-type]


def test_the_default_ladder_has_no_holes() -> None:
    for largest in range(1, 1025):
        sizes = default_capture_sizes(largest)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == largest
        ladder = plan(sizes=sizes)
        for count in range(1, largest + 1):
            padded = ladder.pad_seqs(count)
            assert count <= padded <= largest
            if count > 16:
                assert (padded - count) / count <= 0.125
        assert ladder.uncovered(largest) == []


def test_a_ladder_that_ends_early_says_what_it_leaves_uncovered() -> None:
    assert plan(sizes=(1, 2, 96)).uncovered(100) == [(97, 100)]


def test_first_hit_eager_second_captured_then_replayed() -> None:
    p = plan()
    step = schedule(StepKind.DECODE, 3)
    key = GraphKey(StepKind.DECODE, 4, 4, SamplerVariant.GREEDY)
    first = p.route(step)
    assert (first.key, first.reason, first.capture) == (key, Reason.NO_KEY_YET, False)
    second = p.route(step)
    assert (second.key, second.reason, second.capture) == (key, None, True)
    p.captured(key)
    third = p.route(step)
    assert (third.key, third.reason, third.capture) == (key, None, False)
    assert p.graph_steps[key] == 2
    assert p.eager_steps == {Reason.NO_KEY_YET: 1}


def test_a_failed_capture_is_not_tried_again() -> None:
    p = plan()
    step = schedule(StepKind.DECODE, 3)
    p.route(step)
    p.failed(p.route(step).key)
    assert p.route(step).reason is Reason.CAPTURE_FAILED
    assert p.eager_steps == {Reason.NO_KEY_YET: 1, Reason.CAPTURE_FAILED: 2}
    assert not p.graph_steps


@given(
    rows=st.integers(1, 20),
    kind=st.sampled_from(StepKind),
    mode=st.sampled_from(CudaGraphMode),
    length=st.integers(1, 9),
    prompt_logprobs=st.booleans(),
    multiple=st.sampled_from([1, 16]),
)
def test_every_schedule_has_exactly_one_route(
    rows: int, kind: StepKind, mode: CudaGraphMode, length: int, prompt_logprobs: bool, multiple: int
) -> None:
    p = plan(mode, token_multiple=multiple)
    length = 1 if kind is StepKind.DECODE else length
    step = schedule(kind, rows, length, prompt_logprobs=1 if prompt_logprobs else None)
    route = p.route(step)
    assert route.key.num_seqs >= step.num_seqs
    assert route.key.num_tokens >= step.num_tokens
    assert (route.reason is not None) or route.capture or route.key in p.graph_steps
    expected = (
        Reason.DISABLED
        if mode is CudaGraphMode.NONE
        else Reason.NEEDS_PROMPT_LOGPROBS
        if prompt_logprobs and kind is not StepKind.DECODE
        else Reason.NOT_CAPTURED
        if kind is not StepKind.DECODE
        else Reason.OVER_MAX
        if rows > 8
        else Reason.NO_KEY_YET
    )
    assert route.reason is expected
    assert p.eager_steps.total() == 1


@pytest.mark.parametrize(
    ("kind", "rows", "mode", "reason"),
    [
        (StepKind.DECODE, 3, CudaGraphMode.NONE, "disabled"),
        (StepKind.DECODE, 9, CudaGraphMode.FULL, "over_max"),
        (StepKind.PREFILL, 1, CudaGraphMode.FULL, "prefill_not_captured"),
    ],
)
def test_fail_on_fallback_raises_the_reason(
    kind: StepKind, rows: int, mode: CudaGraphMode, reason: str
) -> None:
    with pytest.raises(FallbackError, match=reason):
        plan(mode, fail_on_fallback=True).route(schedule(kind, rows))


def test_fail_on_fallback_waits_for_the_capture() -> None:
    assert plan(fail_on_fallback=True).route(schedule(StepKind.DECODE, 1)).reason is Reason.NO_KEY_YET
