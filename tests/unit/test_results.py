"""Tokens that come home: what is posted is what is read, through slots used again."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import pytest
import torch

from ostinato.errors import StrictError
from ostinato.graphs import results
from ostinato.graphs.keys import KeyRecord
from ostinato.graphs.results import Pending, ResultRing
from ostinato.inputs import Batch, BufferShapes, PromptLogprobsJob, StepBuffers
from ostinato.types import GraphKey, Logprob, Route, SamplerVariant, StepKind, StepResult

SEQS = 5


class Stream:
    cuda_stream, device = 0x51, torch.device("cpu")

    def __init__(self) -> None:
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


def ring_of(depth: int = 2) -> tuple[ResultRing, StepBuffers]:
    shapes = BufferShapes(SEQS, 8, 2, vocab_size=32, block_size=4)
    buffers = StepBuffers(shapes, torch.device("cpu"), depth)
    return ResultRing(buffers), buffers


def step(buffers: StepBuffers, tokens: list[int]) -> None:
    """What a step does with its number and its tokens."""
    state, places = buffers.state, len(buffers.state.posted) - 1
    number = int(state.number)
    if number:
        number = number % (places * results.POST_CYCLE) + 1
        state.number.fill_(number)
    place = state.posted[1 + (number - 1) % places if number else 0]
    place[0], place[1 : 1 + len(tokens)] = number, torch.tensor(tokens, dtype=torch.int32)


def batch_of(buffers: StepBuffers, rows: int, logprobs: bool = False) -> Batch:
    route = Route(GraphKey(StepKind.DECODE, rows, rows, SamplerVariant.GREEDY), None)
    return buffers.batch(route, logprobs)


def send(ring: ResultRing, buffers: StepBuffers, tokens: list[int], logprobs: bool = False) -> Pending:
    ring.begin()
    step(buffers, tokens)
    return ring.send(batch_of(buffers, len(tokens), logprobs))


def again(ring: ResultRing, buffers: StepBuffers, tokens: list[int], record: KeyRecord[Any]) -> Pending:
    """The same in one go, where the ring allows it."""
    return ring.again(partial(step, buffers, tokens), batch_of(buffers, len(tokens)), record)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_random_tokens_through_slots_used_again_and_again(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers begin again from 1 on the way, and runs that nobody waits for come in between."""
    monkeypatch.setattr(results, "POST_CYCLE", 3)
    ring, buffers = ring_of(depth)
    seed = int(time.time())
    g = torch.Generator().manual_seed(seed)
    flying: list[tuple[Pending, list[int]]] = []
    record: KeyRecord[Any] = KeyRecord("one")
    for _ in range(100):
        n = int(torch.randint(1, SEQS + 1, (), generator=g))
        tokens = torch.randint(-1, 2**31 - 1, (n,), generator=g).tolist()
        if ring.counted and int(torch.randint(0, 2, (), generator=g)):
            flying.append((again(ring, buffers, tokens, record), tokens))
        else:
            flying.append((send(ring, buffers, tokens), tokens))
        if int(torch.randint(0, 4, (), generator=g)) == 0:
            ring.pause()
            step(buffers, [7] * SEQS)
        if len(flying) > depth:
            pending, expected = flying.pop(0)
            assert pending.result().tokens == expected, f"seed {seed}"
    assert record.replays > 10


def test_a_result_that_was_not_read_is_not_overwritten() -> None:
    ring, buffers = ring_of(depth=0)
    pending, record = send(ring, buffers, [1]), KeyRecord[Any]("one")
    with pytest.raises(StrictError, match="the pipeline is deeper than the ring"):
        again(ring, buffers, [2], record)
    with pytest.raises(StrictError, match="the pipeline is deeper than the ring"):
        send(ring, buffers, [2])
    assert record.replays == 0
    ring.forget()  # what the engine does when a step has failed
    assert send(ring, buffers, [3]).result().tokens == [3]
    assert pending.batch is None


def test_a_replay_that_fails_counts_for_nothing() -> None:
    ring, buffers = ring_of()
    record: KeyRecord[Any] = KeyRecord("one")
    assert send(ring, buffers, [1]).result().tokens == [1]

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        ring.again(fail, batch_of(buffers, 1), record)
    assert (ring.counted, record.replays) == (False, 0)
    assert send(ring, buffers, [2]).result().tokens == [2]


def test_prompts_candidates_are_of_one_step() -> None:
    """A slot that brought some home does not bring them again."""
    ring, buffers = ring_of(depth=0)
    route = Route(GraphKey(StepKind.MIXED, 2, 1, SamplerVariant.FULL), None)
    ring.begin()
    step(buffers, [1])
    found: Any = {0: [{1: Logprob(-1.0)}]}
    assert ring.send(buffers.batch(route, False, (PromptLogprobsJob(0, 0, (1,)),)), found).result() == (
        StepResult([1], {}, found)
    )
    assert again(ring, buffers, [2], KeyRecord("one")).result() == StepResult([2], {}, {})


def test_a_step_that_does_not_post_is_noticed() -> None:
    ring, buffers = ring_of()
    assert [send(ring, buffers, [i]).result().tokens for i in range(5)] == [[i] for i in range(5)]
    ring.begin()
    with pytest.raises(StrictError, match="expected the tokens of step 6, found those of step 3"):
        ring.send(batch_of(buffers, 1)).result()
    ring.forget()  # what the engine does when a step has failed
    assert [send(ring, buffers, [i]).result().tokens for i in range(5)] == [[i] for i in range(5)]


@pytest.mark.parametrize("launched", [False, True])
def test_a_step_that_failed_on_the_way_moves_nothing(launched: bool) -> None:
    ring, buffers = ring_of()
    for i in range(4):
        assert send(ring, buffers, [i]).result().tokens == [i]
        ring.begin()
        if launched:
            step(buffers, [9])
    assert int(buffers.state.number) == 4 + launched


def test_logprobs_are_copied() -> None:
    ring, buffers = ring_of()
    buffers.state.logprob_ids.fill_(3)
    result = send(ring, buffers, [3, 3], logprobs=True).result()
    assert result.tokens == [3, 3]
    assert sorted(result.logprobs) == [0, 1]


def test_a_ring_that_is_dropped_waits_for_what_is_under_way() -> None:
    """Its host memory is given back then, and tokens may still be on their way there."""
    _, buffers = ring_of()
    stream: Any = Stream()
    ring = ResultRing(buffers, stream)
    assert stream.waits == 0
    del ring
    gc.collect()
    assert stream.waits == 1
