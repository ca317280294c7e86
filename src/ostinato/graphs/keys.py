"""What is known of each key, and what follows: capture it, replay it, leave it, evict it.

Pure Python. The book decides; `GraphCache` acts and writes down what it saw. A key goes

    waiting -> captured -> (proved equal) -> serving
                  |-> quarantined (differed from eager)   |-> dropped (slower than eager)
                  |-> evicted (budget), from where it may come back
    waiting -> failed (capture raised)

and every state but "serving" has a reason code for the steps that run eagerly meanwhile.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from ..types import Reason

K = TypeVar("K", bound=Hashable)

BYTES_PER_NODE = 3118
"""Device memory that a node of an executable is expected to take, until some was measured.

What 37 executables of 6,726 nodes took together (benchmarks/graph-cost-h200.json).
"""
_SAVED_US = 1000.0
"""Microseconds that a replay is expected to save, until one was timed."""
_MARGIN = 1.5
"""A key must be this much more useful than another to take its place: no two evict each other forever."""


class KeyState(str, Enum):
    WAITING = "waiting"
    """Seen, not captured."""
    CAPTURED = "captured"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    DROPPED = "dropped"
    EVICTED = "evicted"
    """It was captured, or should have been, but the budget had no room for it."""


_REASONS = {
    KeyState.WAITING: Reason.NO_KEY_YET,
    KeyState.FAILED: Reason.CAPTURE_FAILED,
    KeyState.QUARANTINED: Reason.QUARANTINED,
    KeyState.DROPPED: Reason.SLOWER_THAN_EAGER,
    KeyState.EVICTED: Reason.OVER_BUDGET,
}


@dataclass(slots=True)
class KeyRecord(Generic[K]):
    """One key's life. Times are microseconds unless the name says ms."""

    key: K
    state: KeyState = KeyState.WAITING
    note: str = ""
    """Why it is in this state, for people."""
    hits: int = 0
    """Steps that asked for the key."""
    served: int = 0
    """Those that were sent to its graph."""
    replays: int = 0
    rows: int = 0
    """Real rows over all hits."""
    padded_rows: int = 0
    """Rows, padding included, over all hits."""
    trusted: bool = False
    """Proved equal to eager at its real size: it may serve."""
    nodes: int = 0
    nbytes: int = 0
    """Device memory of its executable, measured."""
    predicted_bytes: int = 0
    capture_ms: float = 0.0
    instantiate_ms: float = 0.0
    verify_ms: float = 0.0
    """Device time of all its checks, both runs."""
    eager_us: list[float] = field(default_factory=list)
    replay_us: list[float] = field(default_factory=list)
    checks: int = 0
    mismatches: int = 0

    @property
    def padding_waste(self) -> float:
        """Mean share of rows that were padding."""
        return 1 - self.rows / self.padded_rows if self.padded_rows else 0.0

    @property
    def saved_us(self) -> float | None:
        """Median time that a replay saves; None if it was not timed."""
        if not self.replay_us:
            return None
        return statistics.median(self.eager_us) - statistics.median(self.replay_us)


class KeyBook(Generic[K]):
    """The records, and the decisions that need nothing but them."""

    def __init__(self, *, min_hits: int = 2, budget: int = 256 << 20) -> None:
        """An empty book.

        Args:
            min_hits: a key is captured at this hit; the ones before it load its kernels.
            budget: bytes that all executables together may take.
        """
        self.min_hits, self.budget = min_hits, budget
        self._records: dict[K, KeyRecord[K]] = {}

    def __getitem__(self, key: K) -> KeyRecord[K]:
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = KeyRecord(key)
        return record

    def records(self) -> list[KeyRecord[K]]:
        """Every key that was ever asked for."""
        return list(self._records.values())

    @property
    def captured(self) -> list[KeyRecord[K]]:
        return [r for r in self._records.values() if r.state is KeyState.CAPTURED]

    @property
    def used_bytes(self) -> int:
        return sum(r.nbytes for r in self.captured)

    def hit(self, key: K, rows: int = 1, padded_rows: int = 1) -> tuple[Reason | None, bool]:
        """A step asks for a key: (why it must run eagerly or None, whether to capture the key after it)."""
        return self.hit_record(self[key], rows, padded_rows)

    def hit_record(self, record: KeyRecord[K], rows: int, padded_rows: int) -> tuple[Reason | None, bool]:
        """`hit` for whoever holds the key's record already."""
        record.hits += 1
        record.rows += rows
        record.padded_rows += padded_rows
        if record.state is KeyState.CAPTURED:
            if record.trusted:
                record.served += 1
                return None, False
            return Reason.BEING_CHECKED, False
        wanted = record.state in (KeyState.WAITING, KeyState.EVICTED) and record.hits >= self.min_hits
        if wanted and self.make_room(record) is None:
            record.state, record.note = KeyState.EVICTED, "the budget has no room for it"
            wanted = False
        return _REASONS[record.state], wanted

    def served_again(self, record: KeyRecord[K], steps: int, rows: int, padded_rows: int) -> None:
        """That many more steps like its last one were sent to a key's graph."""
        record.hits += steps
        record.served += steps
        record.rows += steps * rows
        record.padded_rows += steps * padded_rows

    def predict(self, nodes: int) -> int:
        """Bytes that an executable of that many nodes will take, going by those measured."""
        # Also those that took nothing: the driver takes memory for many executables at once.
        known = [r for r in self._records.values() if r.nodes]
        taken = sum(r.nbytes for r in known)
        per_node = taken / sum(r.nodes for r in known) if taken else BYTES_PER_NODE
        return math.ceil(nodes * per_node)

    def make_room(self, record: KeyRecord[K]) -> list[KeyRecord[K]] | None:
        """Keys to evict so that a record fits the budget: the least useful ones; None if it is not worth it."""
        nodes = record.nodes or max((r.nodes for r in self._records.values()), default=0)
        record.predicted_bytes = self.predict(nodes)
        missing = self.used_bytes + record.predicted_bytes - self.budget
        if missing <= 0:
            return []
        mine = self._usefulness(record, record.predicted_bytes)
        victims = []
        for other in sorted(self.captured, key=lambda r: self._usefulness(r, r.nbytes)):
            if other is record or not other.nbytes:
                continue
            if self._usefulness(other, other.nbytes) * _MARGIN > mine:
                return None
            victims.append(other)
            missing -= other.nbytes
            if missing <= 0:
                return victims
        return None

    def _usefulness(self, record: KeyRecord[K], nbytes: int) -> float:
        """Microseconds saved so far for each byte."""
        saved = record.saved_us
        if saved is None:
            known = [r.saved_us for r in self._records.values() if r.saved_us is not None]
            saved = statistics.median(known) if known else _SAVED_US
        return record.hits * max(saved, 0.0) / max(nbytes, 1)
