"""`GraphCache` by itself, on a backend without a GPU: the user's own function, every failure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ostinato.errors import CaptureError, ConfigError, MismatchError, StrictError
from ostinato.graphs.cache import GraphCache
from ostinato.graphs.keys import KeyState
from tests.fakes import FakeBackend, FakeGraph


class Toy:
    """y[:n] = x[:n] @ w, over static tensors."""

    def __init__(self) -> None:
        self.x, self.y, self.w = torch.randn(8, 4), torch.zeros(8, 3), torch.randn(4, 3)
        self.calls = 0

    def __call__(self, n: int) -> None:
        self.calls += 1
        torch.mm(self.x[:n], self.w, out=self.y[:n])

    def cache(self, backend: FakeBackend, **options: Any) -> GraphCache[int]:
        return GraphCache(self, {"x": self.x, "y": self.y}, backend=backend, **options)


def run(cache: GraphCache[int], toy: Toy, n: int) -> bool:
    """Call with fresh rows, and check the answer."""
    toy.x[:n] = torch.randn(n, 4)
    on_graph = cache(n)
    assert torch.equal(toy.y[:n], toy.x[:n] @ toy.w)
    return on_graph


def test_eager_then_captured_then_checked_then_replayed() -> None:
    toy, backend = Toy(), FakeBackend()
    cache = toy.cache(backend)
    # eager; eager, then captured; eager, then tried; replayed
    assert [run(cache, toy, 4) for _ in range(5)] == [False, False, False, True, True]
    record = cache.book[4]
    assert (record.state, record.trusted, record.hits, record.replays) == (KeyState.CAPTURED, True, 5, 2)
    assert record.checks >= 1
    assert record.mismatches == 0
    assert (record.nodes, record.nbytes) == (10, 1000)
    assert record.saved_us == 90.0


def test_a_trial_leaves_the_static_tensors_as_they_were() -> None:
    toy, backend = Toy(), FakeBackend()
    cache = toy.cache(backend)
    toy.y.fill_(7.0)
    for _ in range(5):
        before = toy.y[4:].clone()
        run(cache, toy, 4)
        assert torch.equal(toy.y[4:], before)


def test_keys_are_independent() -> None:
    toy, backend = Toy(), FakeBackend()
    cache = toy.cache(backend)
    for _ in range(5):
        for n in (1, 3, 8):
            run(cache, toy, n)
    assert {r.key: r.state for r in cache.book.records()} == dict.fromkeys((1, 3, 8), KeyState.CAPTURED)


def test_a_graph_that_differs_never_serves(caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy()

    def corrupt(graph: FakeGraph) -> None:
        toy.y[2, 1] = 123.0

    backend = FakeBackend(corrupt=corrupt)
    cache = toy.cache(backend)
    assert not any(run(cache, toy, 4) for _ in range(6))
    record = cache.book[4]
    assert record.state is KeyState.QUARANTINED
    assert record.mismatches == 1
    assert "y[2, 1]: expected" in record.note
    assert "found 123.0 (1 of 24 values differ)" in record.note
    assert "quarantined" in caplog.text
    assert not backend.live


def test_fail_on_mismatch_raises_expected_and_actual() -> None:
    toy = Toy()
    backend = FakeBackend(corrupt=lambda graph: toy.y.fill_(torch.nan))
    cache = toy.cache(backend, fail_on_mismatch=True)
    with pytest.raises(MismatchError, match=r"y\[0, 0\]: expected .* found nan"):
        for _ in range(4):
            run(cache, toy, 4)


def test_without_verification_a_key_serves_at_once() -> None:
    toy, backend = Toy(), FakeBackend(corrupt=lambda graph: None)
    cache = toy.cache(backend, verify=False)
    assert [run(cache, toy, 4) for _ in range(3)] == [False, False, True]
    assert cache.book[4].checks == 0


def test_a_verdict_that_is_late_is_waited_for_without_blocking() -> None:
    toy, backend = Toy(), FakeBackend()
    cache = toy.cache(backend)
    run(cache, toy, 4)
    run(cache, toy, 4)
    backend.late = True
    assert not any(run(cache, toy, 4) for _ in range(5))
    backend.late = False
    assert run(cache, toy, 4)


@pytest.mark.parametrize("stage", ["begin", "middle", "end", "instantiate"])
@pytest.mark.parametrize("error", [RuntimeError("injected"), torch.OutOfMemoryError("injected")])
def test_a_capture_that_fails_leaves_everything_as_it_was(
    stage: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    toy, backend = Toy(), FakeBackend(fail={stage: error})
    cache = toy.cache(backend)
    memory = backend.memory
    assert not any(run(cache, toy, 4) for _ in range(5))
    assert backend.memory == memory
    assert not backend.live
    assert not backend.capturing
    assert all(g.destroyed for g in backend.graphs)
    assert cache.book[4].state is KeyState.FAILED
    assert "injected" in cache.book[4].note
    assert caplog.text.count("capture failed") == 1  # reported once, not at every step
    backend.fail.clear()
    assert [run(cache, toy, 2) for _ in range(4)] == [
        False,
        False,
        False,
        True,
    ]  # other keys are not affected


@pytest.mark.parametrize("stage", ["begin", "middle", "end", "instantiate"])
def test_on_capture_error_raise(stage: str) -> None:
    toy, backend = Toy(), FakeBackend(fail={stage: RuntimeError("injected")})
    cache = toy.cache(backend, on_capture_error="raise")
    run(cache, toy, 4)
    with pytest.raises(CaptureError, match="4: capture failed: injected"):
        run(cache, toy, 4)


def test_a_first_replay_that_fails_quarantines_the_key() -> None:
    toy, backend = Toy(), FakeBackend(fail={"replay": RuntimeError("injected")})
    cache = toy.cache(backend)
    before = toy.y.clone()
    assert not any(run(cache, toy, 4) for _ in range(4))
    assert torch.equal(toy.y[4:], before[4:])
    assert cache.book[4].state is KeyState.FAILED
    assert "injected" in cache.book[4].note
    assert not backend.live


def test_a_key_that_loses_to_eager_is_dropped() -> None:
    toy, backend = Toy(), FakeBackend(eager_us=50.0, replay_us=60.0)
    cache = toy.cache(backend)
    results = [run(cache, toy, 4) for _ in range(10)]
    assert not results[-1]
    assert cache.book[4].state is KeyState.DROPPED
    assert "10 us slower" in cache.book[4].note
    assert not backend.live


def test_the_budget_is_kept_and_bytes_return() -> None:
    toy, backend = Toy(), FakeBackend(cost=1000)
    cache = toy.cache(backend, budget=2500)
    start = backend.memory
    for n in (1, 2):
        for _ in range(5):
            run(cache, toy, n)
    for _ in range(3):
        run(cache, toy, 3)
    assert cache.book[3].state is KeyState.EVICTED
    assert len(backend.live) == 2
    for _ in range(20):
        run(cache, toy, 3)  # by now it saves more than the others
    assert cache.book[3].state is KeyState.CAPTURED
    assert [cache.book[n].state for n in (1, 2)].count(KeyState.EVICTED) == 1
    assert cache.book.used_bytes <= 2500
    assert start - backend.memory == cache.book.used_bytes


def test_an_evicted_graph_is_destroyed_only_after_its_last_replay() -> None:
    toy, backend = Toy(), FakeBackend()
    cache = toy.cache(backend)
    for _ in range(4):
        run(cache, toy, 4)
    backend.late = True
    cache.quarantine(4, "test")
    run(cache, toy, 4)
    assert len(backend.live) == 1  # still in flight
    backend.late = False
    run(cache, toy, 4)
    assert not backend.live


def test_release_returns_the_bytes_and_the_next_use_captures_again() -> None:
    toy, backend = Toy(), FakeBackend()
    cache = toy.cache(backend)
    for _ in range(4):
        run(cache, toy, 4)
        run(cache, toy, 2)
    start = backend.memory
    assert cache.release() == 2000
    assert backend.memory == start + 2000
    assert [run(cache, toy, 4) for _ in range(3)] == [False, False, True]


def test_a_static_tensor_that_moved() -> None:
    toy, backend = Toy(), FakeBackend()
    cache = toy.cache(backend)
    run(cache, toy, 4)
    grown = torch.zeros(16, 4)
    toy.x.data = grown
    with pytest.raises(StrictError, match="'x' moved"):
        cache(4)


def test_min_hits_below_two() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        GraphCache(lambda n: None, {}, min_hits=1, backend=FakeBackend())
