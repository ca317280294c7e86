"""The key book: what is captured, what serves, what is evicted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ostinato.graphs.keys import BYTES_PER_NODE, KeyBook, KeyState
from ostinato.types import Reason


def captured(book: KeyBook[str], key: str, *, hits: int, saved: float = 100.0, nbytes: int = 100) -> None:
    record = book[key]
    record.hits, record.state, record.trusted = hits, KeyState.CAPTURED, True
    record.nbytes, record.nodes = nbytes, 10
    record.eager_us, record.replay_us = [saved + 10], [10.0]


def test_a_key_is_captured_at_its_hit_and_serves_once_trusted() -> None:
    book: KeyBook[str] = KeyBook(min_hits=3)
    assert [book.hit("a") for _ in range(3)] == [
        (Reason.NO_KEY_YET, False),
        (Reason.NO_KEY_YET, False),
        (Reason.NO_KEY_YET, True),
    ]
    book["a"].state = KeyState.CAPTURED
    assert book.hit("a") == (Reason.BEING_CHECKED, False)
    book["a"].trusted = True
    assert book.hit("a") == (None, False)


def test_every_state_has_its_reason() -> None:
    book: KeyBook[str] = KeyBook()
    for state, reason in (
        (KeyState.FAILED, Reason.CAPTURE_FAILED),
        (KeyState.QUARANTINED, Reason.QUARANTINED),
        (KeyState.DROPPED, Reason.SLOWER_THAN_EAGER),
    ):
        book["a"].state = state
        assert [book.hit("a") for _ in range(5)] == [(reason, False)] * 5


def test_a_full_budget_gives_way_to_more_useful_keys_only() -> None:
    book: KeyBook[str] = KeyBook(budget=250)
    captured(book, "much", hits=1000)
    captured(book, "little", hits=10)
    book["new"].hits = 5
    assert book.make_room(book["new"]) is None
    assert book.hit("new") == (Reason.OVER_BUDGET, False)
    assert "budget" in book["new"].note
    book["new"].hits = 50
    assert book.make_room(book["new"]) == [book["little"]]
    assert book.hit("new") == (Reason.OVER_BUDGET, True)  # eager this time, and captured after it
    book["new"].hits = 5000
    assert book.make_room(book["new"]) == [book["little"]]
    captured(book, "little", hits=10, nbytes=20)
    captured(book, "much", hits=1000, nbytes=220)
    assert book.make_room(book["new"]) == [book["much"]] or book.make_room(book["new"]) == [
        book["little"],
        book["much"],
    ]


def test_the_time_saved_counts_as_well_as_the_hits() -> None:
    book: KeyBook[str] = KeyBook(budget=200)
    captured(book, "often, saves little", hits=100, saved=1.0)
    captured(book, "seldom, saves much", hits=10, saved=1000.0)
    book["new"].hits = 50
    assert [r.key for r in book.make_room(book["new"]) or []] == ["often, saves little"]


def test_bytes_are_predicted_from_those_measured() -> None:
    book: KeyBook[str] = KeyBook()
    assert book.predict(100) == 100 * BYTES_PER_NODE
    captured(book, "a", hits=1, nbytes=5000)
    assert book.predict(100) == 50_000
    book["c"].nodes = 10  # took nothing: it fitted into what the driver had taken for the others
    assert book.predict(100) == 25_000


def test_two_equal_keys_do_not_evict_each_other_forever() -> None:
    book: KeyBook[str] = KeyBook(budget=150)
    captured(book, "a", hits=100)
    book["b"].hits = 100
    evictions = 0
    for _ in range(200):
        for key, other in (("a", "b"), ("b", "a")):
            _, capture = book.hit(key)
            if capture:
                evictions += 1
                book[other].state = KeyState.EVICTED
                captured(book, key, hits=book[key].hits)
    assert evictions <= 1


@given(
    budget=st.integers(100, 1000),
    keys=st.lists(
        st.tuples(st.integers(1, 1000), st.floats(0, 1e4), st.integers(1, 400)), min_size=1, max_size=12
    ),
    hits=st.integers(2, 10_000),
)
def test_what_is_evicted_always_makes_enough_room(
    budget: int, keys: list[tuple[int, float, int]], hits: int
) -> None:
    book: KeyBook[int] = KeyBook(budget=budget)
    for index, (count, saved, nbytes) in enumerate(keys):
        record = book[index]
        record.hits, record.state, record.nodes, record.nbytes = count, KeyState.CAPTURED, 10, nbytes
        record.eager_us, record.replay_us = [saved], [0.0]
    new = book[-1]
    new.hits = hits
    victims = book.make_room(new)
    if victims is not None:
        left = book.used_bytes - sum(v.nbytes for v in victims)
        assert left + new.predicted_bytes <= budget or not victims
        assert new not in victims
        assert len({v.key for v in victims}) == len(victims)


def test_padding_waste_is_the_mean_over_hits() -> None:
    book: KeyBook[str] = KeyBook()
    assert book["a"].padding_waste == 0.0
    book.hit("a", rows=5, padded_rows=8)
    book.hit("a", rows=7, padded_rows=8)
    assert book["a"].padding_waste == 0.25
