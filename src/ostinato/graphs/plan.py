"""The plan: which shape a step is padded to, and whether a graph runs it. No torch.

The plan is total: every schedule has exactly one route, a key with a graph or a reason
without (docs/graph-contract.md, lines 5 and 6). What may serve is the key book's business; the
plan captures nothing itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ..errors import FallbackError
from ..types import (
    GraphKey,
    Members,
    Reason,
    Route,
    SamplerVariant,
    Schedule,
    ScheduledRow,
    SteadyRows,
    StepKind,
)
from .keys import KeyBook, KeyRecord


class CudaGraphMode(Enum):
    """Which steps may have graphs; names as in vLLM."""

    NONE = "NONE"
    FULL_DECODE_ONLY = "FULL_DECODE_ONLY"
    FULL = "FULL"


DEFAULT_MAX_TOKENS = 1024
"""Steps with more prompt tokens run eagerly: there the device is busy longer than the host."""

_PASSING = (Reason.NO_KEY_YET, Reason.BEING_CHECKED)
"""Reasons that end by themselves."""


def default_capture_sizes(largest: int) -> tuple[int, ...]:
    """Batch sizes to capture: padding wastes at most one eighth above 16, and `largest` is one.

    1, 2, 4, 8, 16, then eight equal steps to each doubling: a batch of n is padded to less
    than n + n / 8. Below 16 a step costs the same whatever its size.
    """
    sizes = [size for size in (1, 2, 4, 8, 16) if size < largest]
    base = 16
    while base < largest:
        sizes.extend(size for size in range(base + base // 8, 2 * base + 1, base // 8) if size < largest)
        base *= 2
    return (*sizes, largest)


def default_token_sizes(largest: int) -> tuple[int, ...]:
    """Token counts of steps with prompts: 16, 32, then four equal steps to each doubling."""
    sizes = [size for size in (16, 32) if size < largest]
    base = 32
    while base < largest:
        sizes.extend(size for size in range(base + base // 4, 2 * base + 1, base // 4) if size < largest)
        base *= 2
    return (*sizes, largest)


def default_prefill_seqs(max_seqs: int) -> tuple[int, ...]:
    """Sequence counts of steps with prompts: at most four, the largest legal one among them."""
    return tuple(sorted({min(size, max_seqs) for size in (1, 8, 64, max_seqs)}))


class Plan:
    """Routes schedules; counts what it routed."""

    def __init__(
        self,
        *,
        mode: CudaGraphMode,
        capture_sizes: Sequence[int],
        book: KeyBook[GraphKey],
        pad: bool,
        token_sizes: Sequence[int] = (),
        prefill_seqs: Sequence[int] = (),
        token_multiple: int = 1,
        fail_on_fallback: bool = False,
    ) -> None:
        """Nothing is captured yet.

        Args:
            mode: which steps may have graphs.
            capture_sizes: decode batch sizes that may have one, ascending.
            book: what is known of each key.
            pad: pad steps to the ladders even where graphs are off, so that eager and graph see
                the same shapes; False runs them at their own size (CPU).
            token_sizes: token counts of steps with prompts that may have a graph, ascending.
            prefill_seqs: their sequence counts, ascending; at most four.
            token_multiple: larger steps with prompts are padded to a multiple of this.
            fail_on_fallback: raise on a step that will never have a graph.
        """
        self.mode, self._book = mode, book
        self.capture_sizes = tuple(capture_sizes)
        self.token_sizes, self.prefill_seqs = tuple(token_sizes), tuple(prefill_seqs)
        self.fail_on_fallback = fail_on_fallback
        self._num_graph_steps = 0
        self.eager_steps: Counter[Reason] = Counter()
        """Steps that ran eagerly, by reason."""
        self._pad, self._token_multiple = pad, token_multiple
        self._routes: dict[GraphKey, Route] = {}  # on graphs: made once, as most steps take one of them
        self._way: _Way | None = None
        self._decode_keys: dict[tuple[int, int], tuple[GraphKey, Reason | None]] = {}

    @property
    def book(self) -> KeyBook[GraphKey]:
        """What is known of each key, up to date."""
        self._settle()
        return self._book

    @property
    def num_graph_steps(self) -> int:
        """Steps that ran on a graph."""
        self._settle()
        return self._num_graph_steps

    @property
    def graph_steps(self) -> Counter[GraphKey]:
        """Steps that ran on each key's graph."""
        return Counter({record.key: record.served for record in self.book.records() if record.served})

    @property
    def pads(self) -> bool:
        """Whether steps are padded to the ladders."""
        return self._pad

    def pad_seqs(self, count: int) -> int:
        """Rows that a decode step of `count` rows runs at; `count` itself above the ladder."""
        return (_at_least(self.capture_sizes, count) if self._pad else None) or count

    def uncovered(self, max_seqs: int) -> list[tuple[int, int]]:
        """Ranges of batch sizes that no captured size covers."""
        largest = self.capture_sizes[-1] if self.capture_sizes else 0
        return [(largest + 1, max_seqs)] if largest < max_seqs else []

    def holes(self, max_seqs: int) -> list[str]:
        """The same for people: "batches 97 to 100 have no graph"."""
        return [
            f"batches {low} to {high} have no graph" if low < high else f"batch {low} has no graph"
            for low, high in self.uncovered(max_seqs)
        ]

    def ladder(self, sampler: SamplerVariant) -> list[GraphKey]:
        """Every key of a sampler that can have a graph, largest first."""
        keys = [GraphKey(StepKind.DECODE, size, size, sampler) for size in self.capture_sizes]
        if self.mode is CudaGraphMode.FULL:
            keys += [
                GraphKey(StepKind.MIXED, tokens, seqs, sampler)
                for tokens in self.token_sizes
                for seqs in self.prefill_seqs
                # A sequence has a token at least.
                if seqs <= tokens
            ]
        return sorted(keys, key=lambda k: (k.num_tokens, k.num_seqs), reverse=True)

    def can_fire(self, key: GraphKey) -> bool:
        """Whether a key lies on the ladders."""
        return key in self.ladder(key.sampler)

    def route(self, schedule: Schedule) -> Route:
        """The one route of a schedule.

        Raises:
            FallbackError: there is no graph and `fail_on_fallback` is set. Steps that run
                eagerly only until their key is captured and checked do not raise.
        """
        way, rows = self._way, schedule.rows
        if way is not None and isinstance(rows, SteadyRows) and rows.members is way.members:
            self._settle(but=1)
            way.counted += 1
            reason, capture = self._book.hit_record(way.record, way.rows, way.padded_rows)
            if reason is None:
                self._num_graph_steps += 1
                return way.route
            key = way.record.key
        else:
            self._settle()
            key, reason = self._key(schedule)
            capture = False
            if reason is None:
                reason, capture = self._book.hit(key, len(rows), key.num_seqs)
            if reason is None:
                self._num_graph_steps += 1
                return self._on_graph(key, rows)
        if self.fail_on_fallback and reason not in _PASSING:
            raise FallbackError(
                f"step {schedule.step} ({key}) has no graph: {reason.value} ({reason.text}). "
                "Set fail_on_fallback=False to run it eagerly"
            )
        self.eager_steps[reason] += 1
        return Route(key, reason, capture)

    def _settle(self, but: int = 0) -> None:
        """Count the steps that only repeated the last one, which nobody asks a route for; not the last `but`."""
        way = self._way
        if way is not None and (steps := way.members.launched - way.counted - but):
            way.counted += steps
            self._num_graph_steps += steps
            self._book.served_again(way.record, steps, way.rows, way.padded_rows)

    def _on_graph(self, key: GraphKey, rows: Sequence[ScheduledRow]) -> Route:
        """The route of a key whose graph serves."""
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = Route(key, None)
        if isinstance(rows, SteadyRows):
            members = rows.members
            self._way = _Way(members, self._book[key], route, len(rows), key.num_seqs, members.launched)
        return route

    def _key(self, schedule: Schedule) -> tuple[GraphKey, Reason | None]:
        """The shape to run at, and why it can have no graph."""
        seqs, sampler = schedule.num_seqs, schedule.sampler
        if schedule.kind is StepKind.DECODE:
            found = self._decode_keys.get((seqs, sampler.value))
            if found is None:
                found = self._decode_keys[seqs, sampler.value] = self._decode_key(seqs, sampler)
            return found
        reason = Reason.DISABLED if self.mode is CudaGraphMode.NONE else None
        if reason is None and schedule.needs_prompt_logprobs:
            reason = Reason.NEEDS_PROMPT_LOGPROBS
        if reason is None and self.mode is CudaGraphMode.FULL_DECODE_ONLY:
            reason = Reason.PREFILL_NOT_CAPTURED
        tokens = _at_least(self.token_sizes, schedule.num_tokens) if self._pad else None
        slots = _at_least(self.prefill_seqs, seqs) if self._pad else None
        if tokens is not None and slots is not None:
            # The kernels of a prefill are those of a mixed step without decodes: one key for both.
            return GraphKey(StepKind.MIXED, tokens, slots, sampler), reason
        multiple = self._token_multiple
        tokens = -(-schedule.num_tokens // multiple) * multiple
        return GraphKey(StepKind.MIXED, tokens, seqs, sampler), reason or Reason.LARGE_PREFILL

    def _decode_key(self, seqs: int, sampler: SamplerVariant) -> tuple[GraphKey, Reason | None]:
        padded = self.pad_seqs(seqs)
        key = GraphKey(StepKind.DECODE, padded, padded, sampler)
        if self.mode is CudaGraphMode.NONE:
            return key, Reason.DISABLED
        over = not self.capture_sizes or padded > self.capture_sizes[-1]
        return key, Reason.OVER_MAX if over else None


@dataclass(slots=True)
class _Way:
    """Where a steady step went: the next one of the same members has the same key."""

    members: Members
    record: KeyRecord[GraphKey]
    route: Route
    rows: int
    padded_rows: int
    counted: int
    """Steps of the members, up to the last that the counters know of."""


def _at_least(sizes: Sequence[int], count: int) -> int | None:
    """The smallest of ascending sizes that is enough, or None."""
    index = bisect_left(sizes, count)
    return sizes[index] if index < len(sizes) else None
