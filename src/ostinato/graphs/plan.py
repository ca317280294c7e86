"""The plan: which shape a step is padded to, and whether a graph runs it. No torch.

The plan is total: every schedule has exactly one route, a key with a graph or a reason
without (docs/graph-contract.md, lines 5 and 6). It knows which keys were captured because the
runner tells it; it captures nothing itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from enum import Enum

from ..errors import FallbackError
from ..types import GraphKey, Reason, Route, Schedule, StepKind


class CudaGraphMode(Enum):
    """Which steps may have graphs; names as in vLLM."""

    NONE = "NONE"
    FULL_DECODE_ONLY = "FULL_DECODE_ONLY"
    FULL = "FULL"


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


class Plan:
    """Routes schedules; counts what it routed."""

    def __init__(
        self,
        *,
        mode: CudaGraphMode,
        capture_sizes: Sequence[int],
        min_hits: int,
        pad: bool,
        fail_on_fallback: bool = False,
        token_multiple: int = 1,
    ) -> None:
        """Nothing is captured yet.

        Args:
            mode: which steps may have graphs.
            capture_sizes: decode batch sizes that may have one, ascending.
            min_hits: a key is captured at this hit.
            pad: pad decode steps to the ladder even where graphs are off, so that eager and
                graph see the same shapes; False runs them at their own size (CPU).
            fail_on_fallback: raise on a step that will never have a graph.
            token_multiple: steps with prompts are padded to a multiple of this.
        """
        self.mode = mode
        self.capture_sizes = tuple(capture_sizes)
        self.min_hits = min_hits
        self.fail_on_fallback = fail_on_fallback
        self.graph_steps: Counter[GraphKey] = Counter()
        """Steps that ran on each key's graph."""
        self.eager_steps: Counter[Reason] = Counter()
        """Steps that ran eagerly, by reason."""
        self._pad = pad
        self._token_multiple = token_multiple
        self._hits: Counter[GraphKey] = Counter()
        self._captured: set[GraphKey] = set()
        self._failed: set[GraphKey] = set()

    def pad_seqs(self, count: int) -> int:
        """Rows that a decode step of `count` rows runs at; `count` itself above the ladder."""
        index = bisect_left(self.capture_sizes, count)
        return self.capture_sizes[index] if self._pad and index < len(self.capture_sizes) else count

    def uncovered(self, max_seqs: int) -> list[tuple[int, int]]:
        """Ranges of batch sizes that no captured size covers."""
        largest = self.capture_sizes[-1] if self.capture_sizes else 0
        return [(largest + 1, max_seqs)] if largest < max_seqs else []

    def route(self, schedule: Schedule) -> Route:
        """The one route of a schedule.

        Raises:
            FallbackError: there is no graph and `fail_on_fallback` is set. Steps that run
                eagerly only until their key is captured do not raise.
        """
        key = self._key(schedule)
        reason = self._reason(schedule, key)
        if reason is None:
            self._hits[key] += 1
            if key in self._captured:
                self.graph_steps[key] += 1
                return Route(key, None)
            if self._hits[key] >= self.min_hits:
                return Route(key, None, capture=True)  # counted by captured() or failed()
            reason = Reason.NO_KEY_YET
        elif self.fail_on_fallback:
            raise FallbackError(
                f"step {schedule.step} ({key}) has no graph: {reason.value}. "
                "Set fail_on_fallback=False to run it eagerly"
            )
        self.eager_steps[reason] += 1
        return Route(key, reason)

    def captured(self, key: GraphKey) -> None:
        """The runner captured a key, and the step that asked for it runs on the graph."""
        self._captured.add(key)
        self.graph_steps[key] += 1

    def failed(self, key: GraphKey) -> None:
        """A capture failed: the key runs eagerly from now on, this step included."""
        self._failed.add(key)
        self.eager_steps[Reason.CAPTURE_FAILED] += 1

    def _key(self, schedule: Schedule) -> GraphKey:
        if schedule.kind is StepKind.DECODE:
            seqs = self.pad_seqs(schedule.num_seqs)
            return GraphKey(StepKind.DECODE, seqs, seqs, schedule.sampler)
        multiple = self._token_multiple
        tokens = -(-schedule.num_tokens // multiple) * multiple
        return GraphKey(schedule.kind, tokens, schedule.num_seqs, schedule.sampler)

    def _reason(self, schedule: Schedule, key: GraphKey) -> Reason | None:
        if self.mode is CudaGraphMode.NONE:
            return Reason.DISABLED
        if schedule.needs_prompt_logprobs:
            return Reason.NEEDS_PROMPT_LOGPROBS
        if schedule.kind is not StepKind.DECODE:
            return Reason.NOT_CAPTURED
        if not self.capture_sizes or key.num_seqs > self.capture_sizes[-1]:
            return Reason.OVER_MAX
        return Reason.CAPTURE_FAILED if key in self._failed else None
