"""Checking a graph against eager, bit for bit, without waiting for the device.

A trial runs a key both ways from the same starting point and compares what came out, all in
stream order: save, run eagerly, observe, put back, replay, observe, compare on the device,
restore. The verdict travels to the host and is read when it has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .backend import GraphBackend

K = TypeVar("K", bound=Hashable)

Observation = Mapping[str, torch.Tensor]
"""What a run left behind, by name: copies, so that a later run cannot change them."""


@dataclass(frozen=True)
class Trial:
    """Two runs of a key and the comparison of what they did."""

    marks: tuple[Any, Any, Any, Any]
    """Before and after the eager run, before and after the replay."""
    end: Any
    """Once this has passed, everything here can be read."""
    names: tuple[str, ...]
    differs: torch.Tensor
    """[names] int32 on the host: 1 where the two runs differ."""
    expected: Observation
    """Of the eager run."""
    actual: Observation
    """Of the replay."""

    def mismatches(self) -> list[str]:
        """What differs, with the first value that does, expected and actual."""
        return [
            describe(name, self.expected[name], self.actual[name])
            for name, flag in zip(self.names, self.differs.tolist(), strict=True)
            if flag
        ]

    def eager_us(self, backend: GraphBackend) -> float:
        return backend.microseconds(self.marks[0], self.marks[1])

    def replay_us(self, backend: GraphBackend) -> float:
        return backend.microseconds(self.marks[2], self.marks[3])

    def milliseconds(self, backend: GraphBackend) -> float:
        return (self.eager_us(backend) + self.replay_us(backend)) / 1e3


def run_both(
    backend: GraphBackend,
    eager: Callable[[], object],
    replay: Callable[[], object],
    observe: Callable[[], Observation],
    put_back: Callable[[], object],
) -> Trial:
    """Launch a trial.

    Args:
        backend: the device.
        eager: launches the key's work op by op.
        replay: launches its graph.
        observe: copies whatever a run may change.
        put_back: makes the starting point again, and spoils what must not be read.
    """
    marks = [backend.mark()]
    eager()
    marks.append(backend.mark())
    expected = observe()
    put_back()
    marks.append(backend.mark())
    replay()
    marks.append(backend.mark())
    actual = observe()
    flags = torch.stack([differ(expected[name], actual[name]) for name in expected])
    host = backend.to_host(flags)
    return Trial(
        (marks[0], marks[1], marks[2], marks[3]), backend.mark(), tuple(expected), host, expected, actual
    )


def differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """0-dim int32: 1 if any bit differs. Equal NaNs are equal."""
    return (bits(a) != bits(b)).any().int()


def bits(t: torch.Tensor) -> torch.Tensor:
    """The same memory as integers."""
    if not t.is_floating_point():
        return t
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def describe(name: str, expected: torch.Tensor, actual: torch.Tensor) -> str:
    """`logits[3, 17]: expected 1.0, found 2.0 (1 of 400 values differ)`. Reads the device."""
    wrong = bits(expected) != bits(actual)
    where = tuple(wrong.nonzero()[0].tolist())
    place = f"[{', '.join(map(str, where))}]" if where else ""
    count = int(wrong.sum())
    return (
        f"{name}{place}: expected {expected[where].item()}, found {actual[where].item()} "
        f"({count} of {wrong.numel()} values differ)"
    )


class SnapshotChecker(Generic[K]):
    """Tries a key on whatever its static tensors hold now, and restores them."""

    def __init__(self, static: Mapping[str, torch.Tensor], backend: GraphBackend) -> None:
        self._static, self._backend = dict(static), backend

    def sizes(self, key: K, rows: int) -> list[int]:
        return [rows]

    def trial(
        self, key: K, rows: int, eager: Callable[[], object], replay: Callable[[], object]
    ) -> Trial | None:
        start = self._observe()

        def put_back() -> None:
            for name, tensor in self._static.items():
                tensor.copy_(start[name])

        try:
            return run_both(self._backend, eager, replay, self._observe, put_back)
        finally:
            put_back()

    def _observe(self) -> Observation:
        return {name: tensor.clone() for name, tensor in self._static.items()}
