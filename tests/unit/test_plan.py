"""The ladder and the routes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import FallbackError
from ostinato.graphs.keys import KeyBook, KeyState
from ostinato.graphs.plan import (
    CudaGraphMode,
    Plan,
    default_capture_sizes,
    default_prefill_seqs,
    default_token_sizes,
)
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
    defaults = {"book": KeyBook(), "pad": True, "token_sizes": (16, 64), "prefill_seqs": (1, 4)}
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
    assert plan(sizes=(1, 2, 96)).holes(100) == ["batches 97 to 100 have no graph"]
    assert plan(sizes=(1, 2, 99)).holes(100) == ["batch 100 has no graph"]
    assert plan(sizes=(1, 100)).holes(100) == []


def test_the_ladders_of_steps_with_prompts() -> None:
    for largest in range(1, 2049):
        sizes = default_token_sizes(largest)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == largest
        for low, high in zip(sizes, sizes[1:], strict=False):
            assert low < 32 or high - low <= max(low // 4, 8)
        seqs = default_prefill_seqs(largest)
        assert len(seqs) <= 4
        assert seqs[-1] == largest


def test_first_hit_eager_second_captured_then_checked_then_replayed() -> None:
    p = plan()
    step = schedule(StepKind.DECODE, 3)
    key = GraphKey(StepKind.DECODE, 4, 4, SamplerVariant.GREEDY)
    first = p.route(step)
    assert (first.key, first.reason, first.capture) == (key, Reason.NO_KEY_YET, False)
    second = p.route(step)
    assert (second.key, second.reason, second.capture) == (key, Reason.NO_KEY_YET, True)
    p.book[key].state = KeyState.CAPTURED
    third = p.route(step)
    assert (third.key, third.reason, third.capture) == (key, Reason.BEING_CHECKED, False)
    p.book[key].trusted = True
    fourth = p.route(step)
    assert (fourth.key, fourth.reason, fourth.capture) == (key, None, False)
    assert p.graph_steps == {key: 1}
    assert p.eager_steps == {Reason.NO_KEY_YET: 2, Reason.BEING_CHECKED: 1}
    assert p.book[key].padding_waste == 0.25


def test_a_failed_capture_is_not_tried_again() -> None:
    p = plan()
    step = schedule(StepKind.DECODE, 3)
    p.route(step)
    p.book[p.route(step).key].state = KeyState.FAILED
    route = p.route(step)
    assert (route.reason, route.capture) == (Reason.CAPTURE_FAILED, False)
    assert not p.graph_steps


def test_steps_with_prompts_share_one_key_and_pad_both_ways() -> None:
    p = plan(CudaGraphMode.FULL)
    key = p.route(schedule(StepKind.PREFILL, 2, 9)).key
    assert key == GraphKey(StepKind.MIXED, 64, 4, SamplerVariant.GREEDY)
    assert p.route(schedule(StepKind.MIXED, 3, 15)).key == key
    assert p.route(schedule(StepKind.PREFILL, 1, 5)).key == GraphKey(
        StepKind.MIXED, 16, 1, SamplerVariant.GREEDY
    )


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
    large = kind is not StepKind.DECODE and (step.num_tokens > 64 or rows > 4)
    expected = (
        Reason.DISABLED
        if mode is CudaGraphMode.NONE
        else Reason.NEEDS_PROMPT_LOGPROBS
        if prompt_logprobs and kind is not StepKind.DECODE
        else Reason.PREFILL_NOT_CAPTURED
        if kind is not StepKind.DECODE and mode is CudaGraphMode.FULL_DECODE_ONLY
        else Reason.LARGE_PREFILL
        if large
        else Reason.OVER_MAX
        if kind is StepKind.DECODE and rows > 8
        else Reason.NO_KEY_YET
    )
    assert route.reason is expected
    assert p.eager_steps.total() == 1


@pytest.mark.parametrize(
    ("kind", "rows", "mode", "reason"),
    [
        (StepKind.DECODE, 3, CudaGraphMode.NONE, "disabled"),
        (StepKind.DECODE, 9, CudaGraphMode.FULL, "over_max"),
        (StepKind.PREFILL, 1, CudaGraphMode.FULL_DECODE_ONLY, "prefill_not_captured"),
        (StepKind.PREFILL, 5, CudaGraphMode.FULL, "large_prefill"),
    ],
)
def test_fail_on_fallback_raises_the_reason(
    kind: StepKind, rows: int, mode: CudaGraphMode, reason: str
) -> None:
    with pytest.raises(FallbackError, match=reason):
        plan(mode, fail_on_fallback=True).route(schedule(kind, rows))


def test_fail_on_fallback_waits_for_the_capture() -> None:
    assert plan(fail_on_fallback=True).route(schedule(StepKind.DECODE, 1)).reason is Reason.NO_KEY_YET
