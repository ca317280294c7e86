"""Who runs in the next step, and what a finished step means. Pure Python, no tensors.

Knows: the queue, the device rows, the blocks, and which steps were launched but not committed.
Does not know whether a step ran on a graph, and does not need the tokens of launched steps:
the device holds each decoding row's last token, so a row whose last token is unknown here can
be scheduled again. Not promised: that a launched row still runs. After a stop token the device
deactivates it and emits -1; its columns in flight are dropped when the request has finished.

Order: first come, first served. A step takes one token of every decoding request, then chunks
of prompts that run already, then new ones, up to the token budget. One exception: a request
that shares uncomputed prompt blocks with a running one is passed over until they are
committed, so that a shared prompt is computed once; it keeps its place.

Decode steps that only repeat the one before take a short way: see `_Steady`. Where there is nothing to look at
at all, `repeat` gives out the same schedule again.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, getitem, itemgetter

from .errors import ConfigError, KVCacheError, RequestError
from .kv_blocks import BlockAllocator, extend_hashes
from .types import (
    Delay,
    FinishReason,
    Logprob,
    Members,
    Request,
    RequestStatus,
    SamplerVariant,
    Schedule,
    ScheduledRow,
    SteadyRows,
    StepKind,
    StepResult,
    TextSink,
    TokenLogprobs,
)

_NEVER = 1 << 62
_NOTHING: Mapping[int, tuple[int, ...]] = {}


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of the queue.

    Raises:
        ConfigError: a limit cannot work; the message says what to change.
    """

    max_num_seqs: int
    """Device rows: most requests running at once."""
    max_num_batched_tokens: int
    """Most tokens in one step."""
    max_model_len: int
    block_size: int
    blocks_ahead: int = 4
    """Blocks handed to a decoding row at once while many are free: fewer host writes."""
    enable_prefix_caching: bool = True
    max_lag: int = 3
    """Most launched steps without a commit when another is made; `schedule` returns None beyond."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "blocks_ahead"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_lag < 0:
            raise ConfigError(f"max_lag must be at least 0, got {self.max_lag}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): a decode step takes one token of every sequence"
            )


class _Entry:
    """What the scheduler keeps about a request beside the request itself."""

    __slots__ = (
        "arrival",
        "capacity",
        "host_dependent",
        "last_start",
        "marked",
        "max_blocks",
        "next_full",
        "registered",
        "request",
        "variant",
    )

    def __init__(self, request: Request, arrival: int, block_size: int) -> None:
        self.request = request
        self.arrival = arrival
        self.variant = int(request.sampler_variant)
        self.host_dependent = request.host_dependent
        self.last_start = request.max_total_tokens - 1
        """No step starts here: the last token's KV is never needed."""
        self.max_blocks = _ceil_div(self.last_start, block_size)
        self.capacity = 0
        """Tokens that its blocks can hold."""
        self.registered = 0
        """Leading blocks that are in the prefix cache."""
        self.next_full = _NEVER
        """Tokens computed and committed that fill its next block."""
        self.marked = 0
        """Blocks [registered, marked) stand in `Scheduler._computing` on its behalf."""


class _Steady:
    """Entries that decode together until one of them ends, moves or is preempted, or another joins.

    What all their steps do alike is counted here once for all of them and written into the
    requests by `settle`; only what one row needs (a block, a place in the prefix cache, its end)
    is done row by row, when its turn comes. Offsets are tokens since the beginning.
    """

    __slots__ = (
        "_settled",
        "alone",
        "append",
        "column",
        "committed",
        "entries",
        "first_step",
        "launch_events",
        "launch_until",
        "look_from",
        "members",
        "num_blocks",
        "open",
        "outputs",
        "passes",
        "pick",
        "pick_watching",
        "requests",
        "result_events",
        "schedule",
        "stop_ids",
        "variant",
        "watching",
        "with_logprobs",
    )

    def __init__(self, entries: Sequence[_Entry], first_step: int) -> None:
        """Of entries by device row; the first step's number."""
        self.first_step = first_step
        requests = tuple(entry.request for entry in entries)
        rows = tuple(request.row for request in requests)
        self.entries, self.requests = entries, requests
        self.with_logprobs = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
        self.watching = {i: sink for i, r in enumerate(requests) if (sink := _watching(r)) is not None}
        """What looks for stop strings, by place of the member."""
        self.passes = [sink.passes for sink in self.watching.values()]
        self.open = set(self.watching)
        """Those of whom any token may complete one: all, as earlier steps may still be in flight, until looked at."""
        self.members = Members(
            requests,
            rows,
            tuple(r.epoch for r in requests),
            tuple(r.num_computed for r in requests),
            bool(self.with_logprobs),
        )
        self.outputs = [r.output_token_ids for r in requests]
        self.append, self.column = self.outputs[0].append, rows[0]
        """Where the first member's token goes, and where it comes from."""
        self.stop_ids = frozenset().union(*(r.stop_token_ids for r in requests))
        self.variant = SamplerVariant(max(entry.variant for entry in entries))
        self.num_blocks: Sequence[int] = [len(r.blocks) for r in requests]
        self.pick = _picker(rows)
        """Tokens of the members from those of all columns."""
        self.pick_watching = _picker(tuple(self.watching))
        """Tokens of those that watch from the members'."""
        self.schedule: Schedule | None = None
        """Of the steps that only repeat the last one."""
        self.alone: Schedule | None = None
        """The same if there is one member."""
        self.committed = 0
        """Steps whose tokens were taken; `settle` tells the members."""
        self.launch_until = 0
        """Steps that may be launched, since the beginning, before anything has to be looked at."""
        self._settled = (0, 0)
        starts = self.members.starts
        self.launch_events = [
            (min(e.capacity, e.last_start) - start, i)
            for i, (e, start) in enumerate(zip(entries, starts, strict=True))
        ]
        """A heap: (offset at which a row needs a block or must not run, its place)."""
        self.result_events = [
            (min(e.next_full, e.last_start) - start, i)
            for i, (e, start) in enumerate(zip(entries, starts, strict=True))
        ]
        """A heap: (tokens after which a row has filled a block or reached its length, its place)."""
        heapq.heapify(self.launch_events)
        heapq.heapify(self.result_events)
        self.look_from = 0
        """Tokens after which rows have to be looked at one by one, whatever the tokens are."""
        self.wait_for_event()

    def wait_for_event(self) -> None:
        """Look at rows when the next one fills a block or reaches its length; at every token where logprobs are kept."""
        self.look_from = (
            0 if self.with_logprobs else self.result_events[0][0] if self.result_events else _NEVER
        )

    def passed(self, tokens: Sequence[int]) -> bool:
        """Whether none of the members' tokens can have to do with a stop string."""
        return not self.open and all(map(getitem, self.passes, self.pick_watching(tokens)))

    def settle(self) -> int:
        """Write what was counted into the requests; the steps that were launched since the last time."""
        counted = (self.members.launched, self.committed)
        self.members.committed = self.committed
        launched, committed = counted[0] - self._settled[0], counted[1] - self._settled[1]
        if launched or committed:
            for request in self.requests:
                request.num_computed += launched
                request.num_launched += launched - committed
            self._settled = counted
        return launched


class Scheduler:
    """Turns requests into schedules, and results into tokens.

    `schedule` may be called up to `max_lag + 1` times before the first `commit`; commits come
    in the order of the schedules.

    Args:
        pad_seqs: padded size of a decode step with that many rows (the graph ladder); never
            falling. Rows are compacted only where this makes the step smaller.

    Raises:
        ConfigError: config and allocator disagree.
    """

    def __init__(
        self, config: SchedulerConfig, allocator: BlockAllocator, pad_seqs: Callable[[int], int]
    ) -> None:
        for name in ("block_size", "enable_prefix_caching"):
            if getattr(config, name) != getattr(allocator, name):
                raise ConfigError(
                    f"{name} is {getattr(config, name)} for the scheduler "
                    f"but {getattr(allocator, name)} for the allocator"
                )
        self.config = config
        self.allocator = allocator
        self.pad_seqs = pad_seqs
        self.num_preemptions = 0
        self.num_compactions = 0
        self.num_host_dependency = 0
        """Times a row was held back because its next mask depends on an unknown token."""
        self.num_block_stalls = 0
        """Times a running row was held back because no block was free for it."""
        self.delayed_steps: Counter[Delay] = Counter()
        """Steps that running requests had to sit out, by reason, whether others ran in them or nobody."""
        self.num_passed_over = 0
        """Times a waiting request was passed over because its prefix was being computed."""
        self.prefix_cache_queries = 0
        """Tokens of admitted requests that were looked up."""
        self.prefix_cache_hits = 0
        """Tokens of admitted requests that were found."""
        self._num_arrived = 0
        self._num_steps = 0
        self._step_tokens: Counter[int] = Counter()
        self._max_lag = config.max_lag
        self._entries: dict[str, _Entry] = {}  # every unfinished request
        self._running: list[_Entry] = []  # by arrival
        # A heap by arrival. Finished entries are skipped when they come up; no entry stands twice.
        self._waiting: list[tuple[int, _Entry]] = []
        self._free_rows = list(range(config.max_num_seqs))  # a heap
        self._stale_rows: set[int] = set()  # vacated, and the device was not told yet
        self._inflight: deque[Schedule] = deque()
        self._computing: Counter[int] = Counter()  # block hash: running requests that will compute it
        self._passed_over: dict[int, list[_Entry]] = {}  # by the last block hash they wait for
        # The head of the queue that did not fit, and `num_releases` then: until a release it still does not.
        self._blocked: tuple[_Entry, int] | None = None
        self._delayed: set[Delay] = set()  # of the step that is being made
        self._steady: _Steady | None = None
        # The last step, if it was a decode of every running request and nobody came or went since.
        self._repeatable: Sequence[ScheduledRow] = ()

    # --- the queue ---------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self._entries)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Not running and not finished; preempted and passed-over requests are among them."""
        return len(self._entries) - len(self._running)

    @property
    def num_steps(self) -> int:
        """Steps launched."""
        self._settle()
        return self._num_steps

    @property
    def step_tokens(self) -> Counter[int]:
        """How many steps had how many tokens."""
        self._settle()
        return self._step_tokens

    @property
    def num_in_flight(self) -> int:
        """Steps launched but not committed."""
        return len(self._inflight)

    @property
    def running(self) -> list[Request]:
        """Requests that hold a device row, by arrival."""
        self._settle()
        return [entry.request for entry in self._running]

    @property
    def unfinished(self) -> list[Request]:
        """Every request that has not finished, by arrival."""
        self._settle()
        return [entry.request for entry in self._entries.values()]

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            RequestError: the id is taken, or the lengths are impossible.
            KVCacheError: the whole KV cache is too small for it.
        """
        if request.request_id in self._entries:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another")
        if request.status is not RequestStatus.WAITING or request.blocks or request.row != -1:
            raise RequestError(f"request {request.request_id!r} has been scheduled before; make a new one")
        prompt = len(request.prompt_token_ids)
        if not 0 < prompt < request.max_total_tokens <= self.config.max_model_len:
            raise RequestError(
                f"request {request.request_id!r}: expected 0 < prompt length < max_total_tokens <= max_model_len, "
                f"got {prompt}, {request.max_total_tokens} and {self.config.max_model_len}"
            )
        entry = _Entry(request, self._num_arrived, self.config.block_size)
        if entry.max_blocks > self.allocator.num_usable:
            raise KVCacheError(
                f"request {request.request_id!r} needs {entry.max_blocks} KV blocks for {request.max_total_tokens} "
                f"tokens, the cache has {self.allocator.num_usable}; raise gpu_memory_utilization or lower max_model_len"
            )
        self._num_arrived += 1
        self._entries[request.request_id] = entry
        self._queue(entry)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """End a request in whatever state it is; None if it is not known or has ended."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        self._finish(entry, reason)
        return entry.request

    def reset(self, reason: FinishReason = FinishReason.ABORT) -> list[Request]:
        """End every request and forget what is in flight and what is cached: a step failed.

        Holds from whatever state an exception left behind, so nothing is taken back one by one.
        Every device row leaves with the next schedule, as nobody knows which were written.

        Returns:
            The requests that this ended, by arrival.
        """
        ended = self.unfinished
        for request in ended:
            request.status = RequestStatus.FINISHED
            request.finish_reason = request.finish_reason or reason
            request.row = -1
            request.blocks = []
            request.num_launched = request.num_computed = 0
            request.on_device = False
        for container in (self._entries, self._running, self._waiting, self._inflight):
            container.clear()
        self._computing.clear()
        self._passed_over.clear()
        self._blocked = self._steady = None
        self._repeatable = ()
        self._free_rows = list(range(self.config.max_num_seqs))
        self._stale_rows = set(self._free_rows)
        self.allocator.reset()
        return ended

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False, and nothing happens, while a request is running."""
        if self._running:
            return False
        self.allocator.reset_cache()
        return True

    def check(self) -> None:
        """Compare blocks, rows and marks with the running requests; AssertionError if they differ."""
        self.allocator.check(request.blocks for request in self.running)
        rows = [request.row for request in self.running]
        marks = Counter(h for e in self._running for h in e.request.block_hashes[e.registered : e.marked])
        if sorted(rows + self._free_rows) != list(range(self.config.max_num_seqs)):
            raise AssertionError(f"rows in use are {rows}, free ones {sorted(self._free_rows)}")
        if not self._stale_rows <= set(self._free_rows):
            raise AssertionError(
                f"rows {sorted(self._stale_rows - set(self._free_rows))} would leave while in use"
            )
        if marks != self._computing or not self._passed_over.keys() <= marks.keys():
            raise AssertionError("requests wait for blocks that nobody computes")

    # --- making a step -----------------------------------------------------------------

    def repeat(self) -> Schedule | None:
        """The last schedule again, counted as launched, if the next step has the same rows and no news for the device.

        Of the same object: its number and its offset are those of the step that it was made for.
        """
        steady = self._steady
        if steady is None:
            return None
        members = steady.members
        launched = members.launched
        if launched >= steady.launch_until or len(self._inflight) > self._max_lag:
            return None
        members.launched = launched + 1
        schedule = steady.schedule
        assert schedule is not None
        self._inflight.append(schedule)
        return schedule

    def schedule(self) -> Schedule | None:
        """The next step, counted as launched; None if nothing can be launched before a commit."""
        if len(self._inflight) > self._max_lag:
            return None
        steady = self._schedule_steady() if self._steady is not None or self._repeatable else None
        if steady is not None:
            return steady
        self._disturb()
        self._delayed.clear()
        rows: list[ScheduledRow] = []
        preemptions = self.num_preemptions
        prefilling, variant = self._schedule_decodes(rows)
        kind = StepKind.DECODE
        if prefilling or self._waiting:
            num_decodes = len(rows)
            budget = self.config.max_num_batched_tokens - num_decodes
            budget = self._schedule_chunks(prefilling, rows, budget)
            chunks = rows[num_decodes:]
            if self.num_preemptions == preemptions:
                # Not after a preemption: it would take the blocks that were just made free.
                self._admit(rows, budget)
                chunks = rows[num_decodes:]
            elif any(row.epoch != row.request.epoch for row in rows):
                # A chunk took the blocks of rows that were in this step already.
                rows = [row for row in rows if row.epoch == row.request.epoch]
                chunks = [row for row in rows if not row.decode]
                num_decodes, variant = len(rows) - len(chunks), self._variant(rows)
            if chunks:
                kind = StepKind.MIXED if num_decodes else StepKind.PREFILL
                variant = max(variant, self._variant(chunks))
        self.delayed_steps.update(self._delayed)
        if not rows:
            return None
        moves: tuple[tuple[int, int], ...] = ()
        if kind is StepKind.DECODE:
            rows.sort(key=_BY_ROW)
            if rows[-1].row >= len(self._running) and not any(e.request.row >= 0 for e in prefilling):
                moves = self._compact(rows)
            if len(rows) == len(self._running):
                self._repeatable = rows
        leaves = tuple(sorted(self._stale_rows))
        self._stale_rows.clear()
        schedule = Schedule(self._num_steps, kind, tuple(rows), leaves, moves, SamplerVariant(variant))
        self._num_steps += 1
        self._step_tokens[schedule.num_tokens] += 1
        self._inflight.append(schedule)
        return schedule

    def _schedule_steady(self) -> Schedule | None:
        """The step after a decode step if it has the same rows, in a time that does not depend on how many."""
        group = self._steady
        if group is None:
            entries = [self._entries[row.request.request_id] for row in self._repeatable]
            self._repeatable = ()
            if any(entry.host_dependent for entry in entries):
                return None
            group = self._steady = _Steady(entries, self._num_steps)
        if self._waiting and self._may_admit():
            return None
        members, num_blocks = group.members, group.num_blocks
        offset = members.launched
        grown: Mapping[int, tuple[int, ...]] = _NOTHING
        if group.launch_events[0][0] <= offset:
            found = self._grow_steady(group, offset)
            if found is None:
                return None
            grown = found
        members.launched = offset + 1
        rows = SteadyRows(members, offset, num_blocks, grown)
        schedule = Schedule(group.first_step + offset, StepKind.DECODE, rows, (), (), group.variant)
        self._inflight.append(schedule)
        group.launch_until = group.launch_events[0][0]
        group.schedule = schedule
        if grown:  # that is not said again
            group.schedule = schedule._replace(rows=SteadyRows(members, offset, group.num_blocks, _NOTHING))
        if len(group.requests) == 1:
            group.alone = group.schedule
        return schedule

    def _may_admit(self) -> bool:
        """Whether somebody waits who might start now."""
        if not self._waiting or not self._free_rows:
            return False
        head = self._waiting[0][1]
        return head.request.finished or self._blocked != (head, self.allocator.num_releases)

    def _grow_steady(self, group: _Steady, offset: int) -> dict[int, tuple[int, ...]] | None:
        """Blocks for the rows that need one now; None, and nobody got any, if the step is not so simple."""
        events, due = group.launch_events, []
        while events and events[0][0] <= offset:
            due.append(heapq.heappop(events)[1])
        ahead, starts = self.config.blocks_ahead, group.members.starts
        ends = any(starts[i] + offset >= group.entries[i].last_start for i in due)
        if ends or self.allocator.num_free < ahead * len(due):
            return None  # a row's last token is in flight, or memory is tight
        grown, num_blocks = {}, list(group.num_blocks)
        for i in sorted(due, key=lambda i: group.entries[i].arrival):
            entry = group.entries[i]
            new = self._grow(entry, starts[i] + offset + 1, ahead)
            assert new is not None, "there were enough free blocks"
            grown[i] = new
            num_blocks[i] += len(new)
            heapq.heappush(events, (min(entry.capacity, entry.last_start) - starts[i], i))
        group.num_blocks = num_blocks
        return grown

    def _delay(self, request: Request, why: Delay) -> None:
        """A running request sits this step out."""
        request.delays[why] = request.delays.get(why, 0) + 1
        self._delayed.add(why)

    def _settle(self) -> None:
        """Bring all counters up to date."""
        steady = self._steady
        if steady is not None and (launched := steady.settle()):
            self._num_steps += launched
            self._step_tokens[len(steady.requests)] += launched

    def _queue(self, entry: _Entry) -> None:
        """Have a request wait, at its place."""
        heapq.heappush(self._waiting, (entry.arrival, entry))
        self._look_again()

    def _look_again(self) -> None:
        """Somebody may start now: the next step is no repetition until that was looked at."""
        if self._steady is not None:
            self._steady.launch_until = 0

    def _disturb(self) -> None:
        """The next step is not a repetition."""
        self._settle()
        self._steady = None
        self._repeatable = ()

    def _schedule_decodes(self, rows: list[ScheduledRow]) -> tuple[list[_Entry], int]:
        """One token of every row the device can continue alone; the others, and the sampler variant."""
        prefilling = []
        variant = 0
        for entry in tuple(self._running):  # a copy, as entries at its end may be preempted
            request = entry.request
            if not request.on_device:
                prefilling.append(entry)
                continue
            start = request.num_computed
            if start >= entry.last_start:
                continue  # its last token is in flight
            if entry.host_dependent and request.num_launched:
                self.num_host_dependency += 1
                self._delay(request, Delay.HOST_DEPENDENCY)
                continue
            num_blocks = len(request.blocks)
            new_blocks: tuple[int, ...] = ()
            if start >= entry.capacity:
                grown = self._grow(entry, start + 1, ahead=self.config.blocks_ahead)
                if grown is None:
                    continue
                new_blocks = grown
            rows.append(
                ScheduledRow(
                    request, request.row, start, 1, True, True, False, num_blocks, new_blocks, request.epoch
                )
            )
            request.num_computed = start + 1
            request.num_launched += 1
            if entry.variant > variant:
                variant = entry.variant
        return prefilling, variant

    def _schedule_chunks(self, prefilling: list[_Entry], rows: list[ScheduledRow], budget: int) -> int:
        """The next chunk of every running prompt; the budget that is left for new ones.

        That is none while a running prompt waits for blocks, or a new one would take them.
        """
        stalled = False
        for entry in prefilling:
            request = entry.request
            if budget == 0:
                break
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted meanwhile
            num_blocks = len(request.blocks)
            start = request.num_computed
            length = min(budget, request.num_known - start)
            new_blocks = self._grow(entry, start + length)
            if new_blocks is None:
                stalled = True
                continue
            rows.append(self._chunk(request, length, False, num_blocks, new_blocks))
            budget -= length
        return 0 if stalled else budget

    def _admit(self, rows: list[ScheduledRow], budget: int) -> None:
        """Start waiting requests, in order, while tokens, rows and blocks last."""
        size, allocator = self.config.block_size, self.allocator
        while self._waiting and self._free_rows and budget > 0:
            entry = self._waiting[0][1]
            request = entry.request
            if request.finished:
                heapq.heappop(self._waiting)
                continue
            if self._blocked == (entry, allocator.num_releases):
                return
            cached = self._cached_prefix(entry)
            if cached is None:
                heapq.heappop(self._waiting)
                self.num_passed_over += 1
                continue
            # Room for all its known tokens, so that it is not preempted before its first token.
            needed = _ceil_div(request.num_known, size) - len(cached)
            spare = allocator.num_free - needed - allocator.num_idle(cached)
            if self._running and spare < allocator.num_usable // 100:
                self._blocked = (entry, allocator.num_releases)
                return
            heapq.heappop(self._waiting)
            start = len(cached) * size
            length = min(budget, request.num_known - start)
            allocator.acquire(cached)
            new = allocator.allocate(_ceil_div(start + length, size) - len(cached))
            if new is None:
                raise RuntimeError(f"request {request.request_id!r} does not fit an idle KV cache")
            request.blocks = cached + new
            request.status = RequestStatus.RUNNING
            request.row = heapq.heappop(self._free_rows)
            request.num_computed = start
            self._stale_rows.discard(request.row)  # joining rewrites the row
            if request.num_preemptions == 0:
                request.num_cached_tokens = start
                request.admitted = time.monotonic()
            entry.capacity = len(request.blocks) * size
            insort(self._running, entry, key=_BY_ARRIVAL)
            if self.config.enable_prefix_caching:
                self.prefix_cache_queries += request.num_known
                self.prefix_cache_hits += start
                entry.registered = len(cached)
                entry.next_full = start + size
                entry.marked = request.num_known // size
                self._computing.update(request.block_hashes[len(cached) : entry.marked])
            rows.append(self._chunk(request, length, True, 0, tuple(request.blocks)))
            budget -= length

    def _cached_prefix(self, entry: _Entry) -> list[int] | None:
        """Cached blocks that a waiting request starts from, or None if it was passed over instead."""
        request = entry.request
        if not self.config.enable_prefix_caching:
            return []
        size, hashes = self.config.block_size, request.block_hashes
        extend_hashes(request, size, request.num_known // size)
        wants_logits = request.params.prompt_logprobs is not None
        if wants_logits and len(request.prompt_logprobs) < len(request.prompt_token_ids):
            return []  # those of every prompt token
        limit = (request.num_known - 1) // size  # one token at least is computed, to sample the next
        cached = self.allocator.lookup(hashes, limit)
        end = len(cached)
        while end < limit and hashes[end] in self._computing:
            end += 1
        if end > len(cached):
            # Waiting for the last of them is enough: blocks are committed in order, and all
            # marks go when their owner stops running.
            self._passed_over.setdefault(hashes[end - 1], []).append(entry)
            return None
        return cached

    def _chunk(
        self, request: Request, length: int, joins: bool, num_blocks: int, new_blocks: tuple[int, ...]
    ) -> ScheduledRow:
        """Launch `length` known tokens; the last ones also sample."""
        start = request.num_computed
        samples = start + length == request.num_known
        request.num_computed = start + length
        if samples:
            request.num_launched = 1
            request.on_device = True
        return ScheduledRow(
            request, request.row, start, length, False, samples, joins, num_blocks, new_blocks, request.epoch
        )

    def _variant(self, rows: list[ScheduledRow]) -> int:
        return max((self._entries[row.request.request_id].variant for row in rows if row.samples), default=0)

    def _compact(self, rows: list[ScheduledRow]) -> tuple[tuple[int, int], ...]:
        """Move the highest rows of a decode step into holes, where that makes the step smaller.

        Only as many as that takes: every row at or above the padded number of running requests.
        A move leaves its source inactive on the device, so the source need not leave as well.
        """
        target = self.pad_seqs(len(self._running))
        moves = []
        while rows[-1].row >= target:
            last = rows.pop()
            hole = heapq.heappop(self._free_rows)
            self._stale_rows.discard(hole)
            heapq.heappush(self._free_rows, last.row)
            moves.append((last.row, hole))
            last.request.row = hole
            insort(rows, last._replace(row=hole), key=_BY_ROW)
        self.num_compactions += bool(moves)
        return tuple(moves)

    # --- blocks ------------------------------------------------------------------------

    def _grow(self, entry: _Entry, num_tokens: int, ahead: int = 0) -> tuple[int, ...] | None:
        """Blocks appended so that `num_tokens` fit; None: none are free, and the row waits.

        Takes up to `ahead` blocks at once while many are free. Where too few are free, requests
        that arrived later are preempted; the latest waits for blocks and keeps its own.
        """
        request, allocator = entry.request, self.allocator
        needed = _ceil_div(num_tokens, self.config.block_size) - len(request.blocks)
        if needed <= 0:
            return ()
        count = needed
        if ahead > needed and allocator.num_free > 2 * len(self._running) * ahead:
            count = max(needed, min(ahead, entry.max_blocks - len(request.blocks)))
        new = allocator.allocate(count)
        if new is None:
            for victim in self._victims(entry, needed):
                self._preempt(victim)
            new = allocator.allocate(needed)
            if new is None:
                self.num_block_stalls += 1
                self._delay(request, Delay.NO_FREE_BLOCK)
                return None
        request.blocks += new
        entry.capacity = len(request.blocks) * self.config.block_size
        return tuple(new)

    def _victims(self, entry: _Entry, needed: int) -> list[_Entry]:
        """The latest requests whose end makes `needed` blocks free; none if all after `entry` do not suffice."""
        victims: list[_Entry] = []
        dropped: Counter[int] = Counter()
        missing = needed - self.allocator.num_free
        for victim in reversed(self._running):
            if victim is entry:
                return []
            victims.append(victim)
            for block in victim.request.blocks:
                dropped[block] += 1
                missing -= dropped[block] == self.allocator.ref_count(block)
            if missing <= 0:
                return victims
        return []

    def _preempt(self, entry: _Entry) -> None:
        """Back to the queue, at its old place; what it has in flight is dropped, and computed again."""
        request = entry.request
        self._vacate(entry)
        request.status = RequestStatus.WAITING
        request.epoch += 1
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._queue(entry)

    def _vacate(self, entry: _Entry) -> None:
        """Give back the row, the blocks and the marks of a running request."""
        self._disturb()
        request = entry.request
        self._running.remove(entry)
        heapq.heappush(self._free_rows, request.row)
        self._stale_rows.add(request.row)
        self.allocator.release(request.blocks)
        self._unmark(request.block_hashes[entry.registered : entry.marked])
        entry.registered = entry.marked = entry.capacity = 0
        entry.next_full = _NEVER
        request.row = -1
        request.blocks = []
        request.num_launched = request.num_computed = 0
        request.on_device = False

    def _unmark(self, hashes: Iterable[int]) -> None:
        """These blocks are cached now, or their owner gave up: whoever waits for them looks again."""
        for block_hash in hashes:
            self._computing[block_hash] -= 1
            if self._computing[block_hash] == 0:
                del self._computing[block_hash]
            for entry in self._passed_over.pop(block_hash, ()):
                self._queue(entry)

    # --- taking a result ---------------------------------------------------------------

    def commit(self, schedule: Schedule, result: StepResult) -> Sequence[Request]:
        """Take the tokens of the oldest launched step; the requests that got one, finished or not.

        Raises:
            RuntimeError: the result contradicts the schedule: a bug, after which the scheduler
                must not be used.
        """
        inflight, group = self._inflight, self._steady
        oldest = inflight.popleft() if inflight else None
        if oldest is not schedule:
            if oldest is not None:
                inflight.appendleft(oldest)
            raise RuntimeError(
                f"step {schedule.step} is not the oldest one in flight; commit in order of launch"
            )
        if group is not None and schedule is group.alone:
            token, done = result.tokens[group.column], group.committed + 1
            if (
                token >= 0
                and done < group.look_from
                and token not in group.stop_ids
                and (not group.watching or group.passed((token,)))
            ):
                group.committed = done  # one row, and nothing but a token
                group.append(token)
                return group.requests
        rows = schedule.rows
        if isinstance(rows, SteadyRows):
            members = rows.members
            if group is not None and members is group.members:
                group.committed = done = group.committed + 1
                return self._commit_steady(group, done, result)
            rows = rows.at(members.committed)
            members.committed += 1
        self._settle()
        by_row = schedule.kind is StepKind.DECODE
        entries, tokens = self._entries, result.tokens
        changed = []
        for column, row in enumerate(rows):
            request = row.request
            if request.epoch != row.epoch or request.status is RequestStatus.FINISHED:
                continue  # launched before it was preempted or ended
            if by_row:
                column = row.row
            entry = entries[request.request_id]
            end = row.start + row.length
            if end >= entry.next_full:
                self._register(entry, end)
            params = request.params
            if not row.decode and params.prompt_logprobs is not None:
                _keep_prompt_logprobs(row, result.prompt_logprobs.get(column, ()))
            if not row.samples:
                continue
            token = tokens[column]
            if token < 0:
                raise self._no_token(schedule.step, column, request)
            request.output_token_ids.append(token)
            request.num_launched -= 1
            changed.append(request)
            if params.logprobs is not None:
                _keep_logprobs(request, token, result.logprobs.get(column))
            self._take(entry, token, end)
        return changed

    def _commit_steady(self, group: _Steady, done: int, result: StepResult) -> Sequence[Request]:
        """The same for a step of rows that all still run: row by row only where a row needs something.

        Returns:
            The same tuple after every step of the group in which no request ended.
        """
        tokens = group.pick(result.tokens)
        if min(tokens) < 0:
            place = next(i for i, token in enumerate(tokens) if token < 0)
            step = group.first_step + done - 1
            raise self._no_token(step, group.members.rows[place], group.requests[place])
        deque(map(list.append, group.outputs, tokens), maxlen=0)  # the fastest loop there is over two lists
        stops = not group.stop_ids.isdisjoint(tokens)
        if stops or done >= group.look_from or (group.watching and not group.passed(tokens)):
            self._look_at(group, tokens, result, done, stops)
            if self._steady is not group:
                return list(group.requests)
        return group.requests

    def _look_at(
        self, group: _Steady, tokens: Sequence[int], result: StepResult, done: int, stops: bool
    ) -> None:
        """Rows whose `done`-th token is more than a token: a stop, a full block, the last one, part of a stop string, logprobs."""
        requests, entries, starts = group.requests, group.entries, group.members.starts
        for i in group.with_logprobs:
            _keep_logprobs(requests[i], tokens[i], result.logprobs.get(group.members.rows[i]))
        look: set[int] = set()
        if stops:
            look.update(i for i, token in enumerate(tokens) if token in requests[i].stop_token_ids)
        events = group.result_events
        while events and events[0][0] <= done:
            i = heapq.heappop(events)[1]
            entry, end = entries[i], starts[i] + done
            if end >= entry.next_full:
                self._register(entry, end)
            if end >= entry.last_start:
                look.add(i)
            else:
                heapq.heappush(events, (min(entry.next_full, entry.last_start) - starts[i], i))
        group.wait_for_event()
        watching, was_open = group.watching, group.open
        touched = {i for i, sink in watching.items() if i in was_open or not sink.passes[tokens[i]]}
        for i in sorted(look | touched):
            self._take(entries[i], tokens[i], starts[i] + done)
        group.open = {i for i in touched if watching[i].open}

    def _take(self, entry: _Entry, token: int, end: int) -> None:
        """A token was appended, `end` tokens are computed: end the request if it says so."""
        request = entry.request
        params = request.params
        if request.grammar is not None and not request.grammar.accept(token):
            request.silent_end = True
            self._finish(entry, FinishReason.ERROR)
            return
        # The device masks stop ids before `min_tokens`. Stop strings it does not know: a match
        # before that is ignored, as in vLLM. A stop token is kept in the output, but not its text.
        may_stop = len(request.output_token_ids) >= params.min_tokens
        if may_stop and token in request.stop_token_ids:
            request.stop_reason = token if token in (params.stop_token_ids or ()) else None
            request.silent_end = True
            self._finish(entry, FinishReason.STOP)
            return
        sink = _watching(request)
        if sink is not None:
            match = sink.catch_up(request.output_token_ids)
            if match is not None and may_stop:
                request.stop_reason = match
                self._finish(entry, FinishReason.STOP)
                return
        if end >= entry.last_start:
            self._finish(entry, FinishReason.LENGTH)

    @staticmethod
    def _no_token(step: int, column: int, request: Request) -> RuntimeError:
        return RuntimeError(
            f"step {step}, column {column}: no token for live request {request.request_id!r}; "
            f"the device stopped it and the host did not"
        )

    def _register(self, entry: _Entry, end: int) -> None:
        """Make the blocks that `end` committed tokens fill findable."""
        request, size = entry.request, self.config.block_size
        full = end // size
        extend_hashes(request, size, full)
        for i in range(entry.registered, full):
            self.allocator.register(request.blocks[i], request.block_hashes[i])
        self._unmark(request.block_hashes[entry.registered : min(full, entry.marked)])
        entry.registered = full
        entry.next_full = (full + 1) * size

    def _finish(self, entry: _Entry, reason: FinishReason) -> None:
        request = entry.request
        if request.status is RequestStatus.RUNNING:
            self._vacate(entry)
        else:  # it may have kept others waiting
            self._look_again()
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self._entries[request.request_id]  # last: an interrupt in between loses no request


def _picker(places: Sequence[int]) -> Callable[[Sequence[int]], Sequence[int]]:
    """`itemgetter` that returns several items, be it one or none."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _watching(request: Request) -> TextSink | None:
    """What looks for stop strings in its tokens."""
    sink = request.sink
    return sink if sink is not None and sink.watches else None


def _keep_logprobs(request: Request, token: int, result: tuple[Logprob, TokenLogprobs] | None) -> None:
    """Append the chosen token's logprob and the `params.logprobs` most likely ones."""
    if result is None:
        raise RuntimeError(f"request {request.request_id!r} asked for logprobs, the result has none")
    chosen, likely = result
    kept = {token: chosen}
    for other, _ in zip(likely, range(request.params.logprobs or 0), strict=False):
        kept.setdefault(other, likely[other])
    request.logprobs.append(kept)
    request.cumulative_logprob += chosen.logprob


def _keep_prompt_logprobs(row: ScheduledRow, entries: Sequence[TokenLogprobs]) -> None:
    """Append those of a chunk; positions known from before a preemption are left alone."""
    request = row.request
    kept, most = request.prompt_logprobs, request.params.prompt_logprobs or 0
    if not kept:
        kept.append(None)  # the first token has no predecessor
    end = min(row.start + row.length + 1, len(request.prompt_token_ids))
    if len(kept) < end and len(entries) < end - row.start - 1:
        raise RuntimeError(
            f"request {request.request_id!r}: expected prompt logprobs of positions "
            f"{row.start + 1} to {end - 1}, got {len(entries)} entries"
        )
    for position in range(len(kept), end):
        token = request.prompt_token_ids[position]
        entry = entries[position - row.start - 1]
        kept.append({t: p for t, p in entry.items() if t == token or p.rank is None or p.rank <= most})


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


_BY_ROW = attrgetter("row")
_BY_ARRIVAL = attrgetter("arrival")
