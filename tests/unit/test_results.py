"""Tokens that come home: what is posted is what is read, through slots used again."""

from __future__ import annotations

import gc
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.errors import StrictError
from ostinato.graphs import results
from ostinato.graphs.results import Pending, ResultRing
from ostinato.inputs import BufferShapes, StepBuffers

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


def send(ring: ResultRing, buffers: StepBuffers, tokens: list[int], logprobs: bool = False) -> Pending:
    batch: Any = SimpleNamespace(state=buffers.state, num_seqs=len(tokens), logprobs=logprobs)
    ring.begin()
    step(buffers, tokens)
    return ring.send(batch)


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
    for _ in range(100):
        n = int(torch.randint(1, SEQS + 1, (), generator=g))
        tokens = torch.randint(-1, 2**31 - 1, (n,), generator=g).tolist()
        flying.append((send(ring, buffers, tokens), tokens))
        if int(torch.randint(0, 4, (), generator=g)) == 0:
            ring.pause()
            step(buffers, [7] * SEQS)
        if len(flying) > depth:
            pending, expected = flying.pop(0)
            assert pending.result().tokens == expected, f"seed {seed}"


def test_a_result_that_was_overwritten_is_refused() -> None:
    ring, buffers = ring_of(depth=0)
    pending = send(ring, buffers, [1])
    send(ring, buffers, [2])
    with pytest.raises(StrictError, match="the pipeline is deeper than the ring"):
        pending.result()


def test_a_step_that_does_not_post_is_noticed() -> None:
    ring, buffers = ring_of()
    assert [send(ring, buffers, [i]).result().tokens for i in range(5)] == [[i] for i in range(5)]
    batch: Any = SimpleNamespace(state=buffers.state, num_seqs=1, logprobs=False)
    ring.begin()
    with pytest.raises(StrictError, match="expected the tokens of step 6, found those of step 3"):
        ring.send(batch).result()
    ring.pause()  # what the engine does when a step has failed
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
