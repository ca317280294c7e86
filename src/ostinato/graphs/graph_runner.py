"""The runner that replays: the engine's `GraphCache`, and checks of live replays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..config import EngineConfig
from ..errors import GraphError
from ..inputs import Batch, StepBuffers
from ..types import GraphKey, Route, SamplerVariant
from .backend import GraphBackend
from .cache import GraphCache
from .inspect import AddressBook
from .keys import KeyBook, KeyState
from .results import Pending, ResultRing
from .runner import Again, EagerRunner, StepProgram
from .scratch import ScratchChecker, observe_step
from .verify import Observation, Trial, run_both

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _LiveCheck:
    """A live replay that was also run eagerly; the verdict is on its way."""

    key: GraphKey
    trial: Trial


class GraphRunner:
    """Replays a graph where the route says so, runs the rest eagerly, captures in between."""

    def __init__(
        self,
        program: StepProgram,
        ring: ResultRing,
        buffers: StepBuffers,
        book: KeyBook[GraphKey],
        scratch: Sequence[int],
        addresses: AddressBook,
        backend: GraphBackend,
        save_area: torch.Tensor | None,
        config: EngineConfig,
    ) -> None:
        """Nothing is captured yet.

        Args:
            program: the step.
            ring: brings results home.
            buffers: what the step reads.
            book: what is known of each key; the plan reads it.
            scratch: KV blocks for trials, which no request gets.
            addresses: what the allocator owns and owned, for pointer audits.
            backend: the device.
            save_area: for trials (`ScratchChecker`); None: new graphs are not checked.
            config: policies.
        """
        self.eager = EagerRunner(program, ring)
        self.backend = backend
        self.checker = (
            None if save_area is None else ScratchChecker(program, buffers, scratch, backend, save_area)
        )
        self.cache: GraphCache[GraphKey] = GraphCache(
            lambda key: program(buffers.batch(Route(key, None))),
            {"words": buffers.words, "arena": program.arena.data, "KV cache": program.cache.data},
            verify=self.checker is not None,
            on_capture_error=config.on_capture_error,
            fail_on_mismatch=config.fail_on_mismatch,
            backend=backend,
            checker=self.checker,
            book=book,
        )
        self.addresses = addresses
        self.num_live_checks = 0
        self._program, self._buffers, self._verify_every = program, buffers, config.cudagraph_verify_every
        self._live: _LiveCheck | None = None
        self._since_check = 0
        """Replays since the last live check; a check that is due waits for the verdict of the one before."""

    @property
    def program(self) -> StepProgram:
        return self._program

    @property
    def num_replays(self) -> int:
        """Replays of live steps."""
        return sum(record.replays for record in self.cache.book.records())

    def run(self, batch: Batch) -> Pending:
        route, cache = batch.route, self.cache
        if route.reason is None:
            ring = self.eager.ring
            ring.begin()
            if self._verify_every and self._check_is_due():
                self._replay_both_ways(batch)
            else:
                cache.replay(route.key)
            pending = ring.send(batch)  # prompts' logprobs have no graph
        else:
            pending = self.eager.run(batch)
            if route.capture:
                cache.capture(route.key, rows=self._real_rows(batch))
        cache.idle()
        return pending

    def again(self, batch: Batch) -> Again | None:
        if batch.route.reason is not None or batch.logprobs or self._verify_every:
            return None
        graph = self.cache.quiet(batch.route.key)
        if graph is None:
            return None
        launch = self.backend.launcher(graph.handle)
        ring = self.eager.ring
        return Again(graph.record, ring, partial(ring.again, launch, batch, graph.record))

    def _check_is_due(self) -> bool:
        self._since_check += 1
        due = self._since_check >= self._verify_every and self._live is None
        if due:
            self._since_check = 0
        return due

    def poll(self) -> None:
        """Read verdicts that have arrived; called before routing, so that a bad key serves no more."""
        self.cache.poll()
        if self._live is not None and self.backend.passed(self._live.trial.end):
            live, self._live = self._live, None
            self.cache.judge(self.cache.book[live.key], live.trial, scratch=False)

    def rehearse(self, keys: Sequence[GraphKey]) -> None:
        """Try keys without graphs, so that no trial between two steps is the first of its kind.

        Where the memory does not suffice for it, trials will fail one by one, and say so.
        """
        if self.checker is not None:
            try:
                self.checker.rehearse(keys)
            except torch.OutOfMemoryError as error:
                logger.warning("there is no memory to check graphs of the largest size: %s", error)

    def prepare(self, keys: Sequence[GraphKey], progress: bool = True) -> None:
        """Capture keys before there is traffic: load their kernels, capture, check, time.

        Args:
            keys: in the order of capture; largest first is best for memory.
            progress: show a progress bar.
        """
        from tqdm.auto import tqdm

        cache = self.cache
        for key in tqdm(keys, desc="capturing graphs", disable=not progress, dynamic_ncols=True):
            record = cache.book[key]
            if record.state is not KeyState.WAITING:
                continue
            if cache.book.make_room(record) != []:
                record.note = "the budget was full at the start"
                continue
            if self.checker is not None:
                self.checker.warm_up(key)
            else:
                self.eager.ring.pause()
                self._program(self._buffers.batch(Route(key, None)))  # on rows that are all idle
            cache.capture(key, rows=key.num_seqs)
        cache.settle()

    def forget(self) -> None:
        self.eager.forget()

    def release(self) -> int:
        self._live = None
        return self.cache.release()

    def close(self) -> None:
        self.backend.wait()
        self.release()

    def on_scratch_rows(self, key: GraphKey, rows: int, body: Callable[[], object]) -> None:
        """Do something to a key while made-up sequences stand in its rows; they are put back.

        Raises:
            GraphError: `cudagraph_verify=False` was set, so no KV blocks are reserved.
        """
        if self.checker is None:
            raise GraphError(
                "graphs cannot be looked into with cudagraph_verify=False: no scratch rows are reserved"
            )
        self.checker.run(key, rows, body)

    def _real_rows(self, batch: Batch) -> int:
        return min(batch.num_seqs, max(len(self._buffers.mirrors()[1]), 1))

    def _replay_both_ways(self, batch: Batch) -> None:
        """A live step, eagerly and then on its graph, without leaving stream order.

        The eager run's effects on the state are undone before the replay; its KV writes are made
        again by the replay. What the caller sees is what the graph did.
        """
        state, program, n = self._buffers.state, self._program, batch.num_seqs
        kept = [state.active, state.last_token, state.position, state.number]
        if batch.key.sampler is SamplerVariant.FULL:
            kept.append(state.output_counts)  # by device row, and a mixed step's rows may be any
        before = [t.clone() for t in kept]

        def put_back() -> None:
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(old)
            program.arena.data.fill_(0xFF)  # scratch means nothing between steps: spoil it

        def observe() -> Observation:
            scratch = program.arena.view(batch.num_tokens, n)
            slots = scratch.slots.clamp(min=0).long()
            data = program.cache.data
            return observe_step(program, batch, data.flatten(2, 3)[:, :, slots])

        trial = run_both(
            self.backend,
            lambda: program(batch),
            lambda: self.cache.replay(batch.key),
            observe,
            put_back,
        )
        self.num_live_checks += 1
        self._live = _LiveCheck(batch.key, trial)
