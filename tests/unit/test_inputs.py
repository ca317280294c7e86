"""`StepBuffers.write`: what reaches the device, and nothing stale with it."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.inputs import BufferShapes, StepBuffers, _Staging, scatter
from ostinato.types import (
    GraphKey,
    Members,
    Request,
    Route,
    SamplerVariant,
    SamplingParams,
    Schedule,
    ScheduledRow,
    SteadyRows,
    StepKind,
)


def buffers(rows: int = 4) -> StepBuffers:
    return StepBuffers(BufferShapes(rows, 32, 8, 16, 100), torch.device("cpu"), depth=2)


def request(name: str = "r", **params: Any) -> Request:
    return Request(
        name, name, tuple(range(5, 15)), SamplingParams(**params), frozenset({7, 3}), 40, 2**40 + 9
    )


def item(one: Request, row: int, **changes: Any) -> ScheduledRow:
    values: dict[str, Any] = {
        "request": one, "row": row, "start": 10, "length": 1, "decode": True, "samples": True,
        "joins": False, "num_blocks_before": 1, "new_blocks": (), "epoch": 0,
    }  # fmt: skip
    return ScheduledRow(**values | changes)


def write(b: StepBuffers, *rows: ScheduledRow, kind: StepKind = StepKind.DECODE, **changes: Any) -> Any:
    schedule = Schedule(
        0, kind, rows, changes.get("leaves", ()), changes.get("moves", ()), SamplerVariant.GREEDY
    )
    tokens = 4 if kind is StepKind.DECODE else 32
    return b.write(schedule, Route(GraphKey(kind, tokens, 4, SamplerVariant.GREEDY), None))


def join(b: StepBuffers, one: Request, row: int) -> None:
    write(
        b,
        item(one, row, start=0, length=10, decode=False, joins=True, num_blocks_before=0, new_blocks=(3,)),
        kind=StepKind.PREFILL,
    )


def test_a_join_writes_every_field_of_its_row() -> None:
    b = buffers()
    b.words.fill_(-99)
    one = request(temperature=0.5, top_p=0.25, min_p=0.125, top_k=4, presence_penalty=0.5, repetition_penalty=2.0,
                  min_tokens=3, logit_bias={9: 1.5}, allowed_token_ids=[1, 40])  # fmt: skip
    join(b, one, 2)
    s, state = b.static, b.state
    assert (s.temperature[2], s.top_p[2], s.min_p[2], s.top_k[2]) == (0.5, 0.25, 0.125, 4)
    assert (s.presence_penalty[2], s.repetition_penalty[2]) == (0.5, 2.0)
    assert s.seed[2].tolist() == [9, 256]
    assert (s.min_position[2], s.last_position[2]) == (13, 39)
    assert s.stop_ids[2, : int(s.num_stop_ids[2])].tolist() == [3, 7]
    assert (s.bias_ids[2, 0], s.bias_values[2, 0], s.num_bias[2]) == (9, 1.5, 1)
    assert s.mask[2].tolist() == [2, 256, 0, 0]
    assert s.block_table[2, 0] == 3
    assert (state.active[2], s.enabled[2]) == (0, 0)
    assert s.temperature[1].item() != s.temperature[1].item() or s.flags[1] == -99  # other rows untouched
    assert state.prompt_mask[2].tolist() == [sum(1 << t for t in range(5, 15)), 0, 0, 0]
    assert s.tokens[:11].tolist() == [*range(5, 15), 0]
    assert s.token_rows[:11].tolist() == [2] * 10 + [-1]
    assert s.seq_rows[:2].tolist() == [2, -1]
    assert s.query_start[:3].tolist() == [0, 10, 10]


def test_rows_that_are_not_scheduled_are_disabled_for_the_step() -> None:
    b, one, two = buffers(), request("a"), request("b")
    join(b, one, 0)
    join(b, two, 1)
    write(b, item(one, 0), item(two, 1))
    assert b.static.enabled.tolist() == [1, 1, 0, 0]
    write(b, item(two, 1))
    assert b.static.enabled.tolist() == [0, 1, 0, 0]
    write(b, item(one, 0), item(two, 1))
    assert b.static.enabled.tolist() == [1, 1, 0, 0]
    write(b, item(one, 0), leaves=(1,))
    assert b.static.enabled.tolist() == [1, 0, 0, 0]
    assert b.free_rows() == [1, 2, 3]


def test_a_row_that_moves_before_its_first_decode_is_enabled_in_its_new_place() -> None:
    """The target's last tenant was enabled and never told to leave, the source never was enabled."""
    b, old, new = buffers(), request("old"), request("new")
    join(b, old, 0)
    write(b, item(old, 0))
    join(b, new, 3)  # prefilled, and has not decoded yet; meanwhile `old` finishes
    b.state.active[3] = 1
    write(b, item(new, 0), moves=((3, 0),))
    assert b.static.enabled.tolist() == [1, 0, 0, 0]
    assert b.state.active.tolist() == [1, 0, 0, 0]


def test_a_move_takes_everything_along() -> None:
    b, one = buffers(), request(frequency_penalty=1.0)
    join(b, one, 3)
    b.state.active[3], b.state.last_token[3], b.state.position[3] = 1, 42, 10
    b.state.output_counts[3, 42] = 5
    before = [t[3].clone() for t in b._row_tensors]
    write(b, item(one, 3))
    before = [t[3].clone() for t in b._row_tensors]
    write(b, item(one, 1), moves=((3, 1),))
    for tensor, old in zip(b._row_tensors, before, strict=True):
        assert torch.equal(tensor[1], old)
    assert (b.state.active[3], b.static.enabled[3]) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_enabled_follows_the_schedule_through_random_joins_moves_and_leaves(seed: int) -> None:
    rng = random.Random(seed)
    b, rows = buffers(8), {}
    leaves: set[int] = set()
    for step in range(60):
        free = [r for r in range(8) if r not in rows]
        if free and rng.random() < 0.4:
            row = rng.choice(free)
            rows[row] = request(str(step))
            leaves.discard(row)
            join(b, rows[row], row)
            b.state.active[row] = 1
        for row in [r for r in rows if rng.random() < 0.1]:
            del rows[row]
            leaves.add(row)
        if not rows:
            continue
        moves: tuple[tuple[int, int], ...] = ()
        highest, free = max(rows), [r for r in range(8) if r not in rows]
        if free and min(free) < highest and rng.random() < 0.3:
            moves = ((highest, min(free)),)
            rows[min(free)] = rows.pop(highest)
            leaves.discard(min(free))
        chosen = [r for r in sorted(rows) if rng.random() < 0.9] or [min(rows)]
        schedule = Schedule(step, StepKind.DECODE, tuple(item(rows[r], r) for r in chosen), tuple(sorted(leaves)), moves, SamplerVariant.GREEDY)  # fmt: skip
        leaves.clear()
        b.write(schedule, Route(GraphKey(StepKind.DECODE, 8, 8, SamplerVariant.GREEDY), None))
        live = (b.static.enabled != 0) & (b.state.active != 0)
        assert live.nonzero().squeeze(1).tolist() == chosen
        assert b.free_rows() == [r for r in range(8) if r not in rows]


def test_an_unchanged_decode_step_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    b, one = buffers(), request()
    join(b, one, 0)
    write(b, item(one, 0))
    before = b.words.clone()
    monkeypatch.setattr("ostinato.inputs._Staging.apply", lambda *args: pytest.fail("something was written"))
    write(b, item(one, 0))
    assert torch.equal(b.words, before)


def steady(members: Members, offset: int, grown: dict[int, tuple[int, ...]] | None = None) -> Schedule:
    rows = SteadyRows(members, offset, [1 + offset] * len(members.rows), grown or {})
    return Schedule(offset, StepKind.DECODE, rows, (), (), SamplerVariant.FULL)


def test_a_steady_step_writes_the_blocks_that_rows_got_and_looks_at_no_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b, requests = buffers(), (request("a", logprobs=1), request("b"))
    for row, one in enumerate(requests):
        join(b, one, row)
    members = Members(requests, (0, 1), (0, 0), (10, 10), logprobs=True)
    route = Route(GraphKey(StepKind.DECODE, 4, 4, SamplerVariant.GREEDY), None)
    first = b.write(steady(members, 0), route)
    assert first.logprobs
    assert b.static.enabled.tolist() == [1, 1, 0, 0]
    with monkeypatch.context() as patched:
        patched.setattr(SteadyRows, "__getitem__", lambda *args: pytest.fail("a row was looked at"))
        assert b.write(steady(members, 1), route) is first
    b.write(steady(members, 2, {1: (7, 8)}), route)
    assert b.static.block_table[:2, :5].tolist() == [[3, 0, 0, 0, 0], [3, 0, 0, 7, 8]]


def test_a_steady_step_after_another_one_is_written_in_full() -> None:
    """The members are known, but between two of their steps others changed what the device holds."""
    b, requests = buffers(), (request("a"), request("b"))
    for row, one in enumerate(requests):
        join(b, one, row)
    members = Members(requests, (0, 1), (0, 0), (10, 10), logprobs=False)
    route = Route(GraphKey(StepKind.DECODE, 4, 4, SamplerVariant.GREEDY), None)
    b.write(steady(members, 0), route)
    write(b, item(requests[0], 0))
    assert b.static.enabled.tolist() == [1, 0, 0, 0]
    b.write(steady(members, 1), route)
    assert b.static.enabled.tolist() == [1, 1, 0, 0]
    mirrors, words = b.mirrors(), b.words.clone()
    write(b, item(requests[1], 1))  # a trial borrows the rows
    b.words.copy_(words)
    b.set_mirrors(mirrors)
    b.write(steady(members, 2), route)
    assert b.static.enabled.tolist() == [1, 1, 0, 0]


def test_penalty_counts_come_back_from_the_history() -> None:
    b, one = buffers(), request(presence_penalty=1.0)
    b.state.prompt_mask.fill_(-1)
    b.state.output_counts.fill_(9)
    one.output_token_ids += [42, 99, 42, 0, 42]
    join(b, one, 1)
    counts = [0] * 100
    counts[42], counts[99], counts[0] = 3, 1, 1
    assert b.state.output_counts.tolist() == [[9] * 100, counts, [9] * 100, [9] * 100]
    bits = sum(1 << t for t in range(5, 15))
    assert b.state.prompt_mask.tolist() == [[-1] * 4, [bits, 0, 0, 0], [-1] * 4, [-1] * 4]


class SlowStaging(_Staging):
    """Staging towards a device whose copies are made only when somebody waits for them."""

    queue: list[tuple[SlowStaging, Any]]

    def _room(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def _send(self, targets: Any, total: int) -> Any:
        self.queue.append((self, lambda: scatter(self._host[: 12 * total], targets, total)))
        return SimpleNamespace(synchronize=partial(self.catch_up, len(self.queue)))

    def catch_up(self, count: int) -> None:
        """The device works through its queue up to here, in order."""
        done, self.queue[:count] = self.queue[:count], [(self, lambda: None)] * count
        for _, copy in done:
            copy()


@pytest.mark.parametrize("waits", [True, False])
def test_a_staging_buffer_is_not_rewritten_while_its_copy_is_under_way(waits: bool) -> None:
    """The device lags by more steps than the ring is deep; without the wait, values are lost."""
    slow, plain = buffers(), buffers()
    queue: list[Any] = []
    slow._ring = [SlowStaging(torch.device("meta")) for _ in slow._ring]
    for staging in slow._ring:
        staging.queue = queue  # type: ignore[attr-defined]
        if not waits:
            staging.catch_up = lambda count: None  # type: ignore[attr-defined]
    rng = random.Random(0)
    for step in range(12):
        one = request(str(step), top_k=rng.randrange(50), seed=rng.getrandbits(30), presence_penalty=1.0)
        join(slow, one, step % 4)
        join(plain, one, step % 4)
    SlowStaging.catch_up(slow._ring[0], len(queue))  # type: ignore[arg-type]
    assert torch.equal(slow.words, plain.words) is waits


def test_staging_slots_outnumber_the_steps_in_flight() -> None:
    assert len(buffers()._ring) == 3
