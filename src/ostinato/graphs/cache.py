"""`GraphCache`: graphs of any function over static tensors, each checked, bounded, explained.

The engine's runner is built on it, and it works without the engine:

    x = torch.zeros(64, 512, device="cuda")
    y = torch.zeros(64, 10, device="cuda")

    def classify(batch: int) -> None:            # reads and writes static tensors only
        torch.mm(x[:batch], weight, out=y[:batch])

    with torch.cuda.stream(torch.cuda.Stream()):
        cache = GraphCache(classify, {"x": x, "y": y}, budget=64 << 20, verify=True)
        x[:3].copy_(rows)
        cache(4)                                 # eager, then captured and checked, then replayed

The rules for the function are the graph contract (docs/graph-contract.md): it reads the tensors
that were given and constants, nothing else; its work depends on the key alone; it does not
allocate device memory, synchronise, or look at device values.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch

from ..errors import CaptureError, ConfigError, GraphError, MismatchError
from .backend import GraphBackend
from .keys import KeyBook, KeyRecord, KeyState
from .verify import SnapshotChecker, Trial

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
L = TypeVar("L", bound=Hashable, contravariant=True)

TIMED_TRIALS = 3
"""Trials of a key before its times are believed."""
SLOWER = 0.02
"""Share of the eager time that a replay has to lose by: less is noise, and eager costs the host more."""


class Checker(Protocol[L]):
    """Runs a key both ways on inputs that nobody needs, and compares."""

    def trial(
        self, key: L, rows: int, eager: Callable[[], object], replay: Callable[[], object]
    ) -> Trial | None:
        """Launch both and start comparing; does not wait. None if it is not possible just now."""
        ...

    def sizes(self, key: L, rows: int) -> list[int]:
        """Numbers of real rows to try, the one that was hit first."""
        ...


@dataclass
class _Graph:
    """A captured key's executable and when it was last used."""

    handle: Any
    record: KeyRecord[Any]
    last_use: Any = None
    """Mark after its last replay."""


class GraphCache(Generic[K]):
    """Runs `fn(key)`: eagerly at first, on a graph once that was captured and proved equal."""

    def __init__(
        self,
        fn: Callable[[K], object],
        static_inputs: Mapping[str, torch.Tensor],
        *,
        budget: int = 256 << 20,
        verify: bool = True,
        min_hits: int = 2,
        on_capture_error: Literal["eager", "raise"] = "eager",
        fail_on_mismatch: bool = False,
        drop_slower: bool = True,
        backend: GraphBackend | None = None,
        checker: Checker[K] | None = None,
        book: KeyBook[K] | None = None,
    ) -> None:
        """Nothing is captured yet.

        Args:
            fn: launches the work of a key on the current stream.
            static_inputs: every tensor that `fn` reads or writes and that may change. They are
                checked at each call: a tensor that moved would leave graphs reading its old place.
            budget: bytes that all executables together may take.
            verify: compare each graph with eager before it serves, and time both.
            min_hits: capture at this call with a key, 2 or more: the first loads its kernels.
            on_capture_error: "eager" reports once and runs the key eagerly from then on.
            fail_on_mismatch: raise instead of quarantining a key that differs from eager.
            drop_slower: give up a graph that is slower than eager.
            backend: None: CUDA.
            checker: None: save all static tensors, run both ways on what they hold, restore.
            book: None: a new one.
        """
        if min_hits < 2:
            raise ConfigError("min_hits must be at least 2: a key's first run loads its kernels")
        if backend is None:
            from .cuda import TorchBackend

            backend = TorchBackend()
        self.book: KeyBook[K] = book if book is not None else KeyBook(min_hits=min_hits, budget=budget)
        self.backend = backend
        self.capture_failures: list[str] = []
        """One line for each failed capture."""
        self._fn, self._static = fn, dict(static_inputs)
        self._addresses = {name: t.data_ptr() for name, t in self._static.items()}
        self._checker: Checker[K] | None = checker
        if verify and checker is None:
            self._checker = SnapshotChecker(self._static, backend)
        if not verify:
            self._checker = None
        self._on_error, self._fail_on_mismatch, self._drop_slower = (
            on_capture_error,
            fail_on_mismatch,
            drop_slower,
        )
        self._graphs: dict[K, _Graph] = {}
        self._latest: _Graph | None = None
        """What was replayed last: in most cases it is the next one too."""
        self._to_try: deque[tuple[K, int]] = deque()
        self._trial: tuple[KeyRecord[K], Trial] | None = None
        self._dying: list[_Graph] = []
        self._just_captured = False

    # --- running -----------------------------------------------------------------------

    def __call__(self, key: K) -> bool:
        """Run a key once; True if it ran on its graph.

        Raises:
            MismatchError, CaptureError: as asked for at construction.
            StrictError: a static tensor moved.
        """
        self._check_addresses()
        self.poll()
        reason, capture = self.book.hit(key)
        on_graph = reason is None
        if on_graph:
            self.replay(key)
        else:
            self._fn(key)
        if capture:
            self.capture(key, rows=1)
        self.idle()
        return on_graph

    def replay(self, key: K) -> None:
        """Launch a captured key's graph.

        Raises:
            GraphError: it has none, or none any more.
        """
        graph = self._latest
        if graph is None or graph.record.key is not key:
            graph = self._latest = self._graphs.get(key)
            if graph is None:
                raise GraphError(f"{key} has no graph: it is {self.book[key].state.value}")
        self.backend.replay(graph.handle)
        graph.record.replays += 1

    def quiet(self, key: K) -> _Graph | None:
        """A key's graph if steps can replay it again and again, with nothing to be done in between."""
        graph = self._graphs.get(key)
        if (
            graph is None
            or not graph.record.trusted
            or self._trial is not None
            or self._to_try
            or self._dying
        ):
            return None
        return None if self._just_captured else graph

    def graph(self, key: K) -> Any:
        """The backend's handle of a captured key, for inspection; None if there is none."""
        found = self._graphs.get(key)
        return found.handle if found else None

    # --- capturing ---------------------------------------------------------------------

    def capture(self, key: K, rows: int) -> bool:
        """Capture a key between two steps; it serves once it proved equal. False if it failed.

        Raises:
            CaptureError: it failed and `on_capture_error` is "raise".
        """
        record = self.book[key]
        for victim in self.book.make_room(record) or ():
            self._retire(victim, KeyState.EVICTED, f"made room for {key}")
        self._reap()
        try:
            handle = self._record(key, record)
        except Exception as error:  # whatever went wrong, the caller must go on as it was
            self._fail(record, error, "capture failed")
            return False
        self._graphs[key] = _Graph(handle, record)
        self._just_captured = True
        record.state, record.note, record.trusted = KeyState.CAPTURED, "", self._checker is None
        if self._checker is not None:
            sizes = self._checker.sizes(key, rows)
            self._to_try.extend(
                (key, size) for size in (sizes * TIMED_TRIALS)[: max(TIMED_TRIALS, len(sizes))]
            )
        logger.info("%s: %d nodes, captured in %.2f ms", key, record.nodes, record.capture_ms)
        return True

    def _record(self, key: K, record: KeyRecord[K]) -> Any:
        backend = self.backend
        collecting = gc.isenabled()
        gc.disable()  # a collection may free device memory, which capture forbids
        begin = time.perf_counter()
        try:
            handle = backend.capture(partial(self._fn, key))
        finally:
            if collecting:
                gc.enable()
        captured = time.perf_counter()
        try:
            free = backend.free_bytes()
            begin_instantiate = time.perf_counter()
            backend.instantiate(handle)
            instantiated = time.perf_counter()
            record.nodes = backend.num_nodes(handle)
            record.nbytes = max(free - backend.free_bytes(), 0)
        except BaseException:
            backend.destroy(handle)
            raise
        record.capture_ms = (captured - begin) * 1e3
        record.instantiate_ms = (instantiated - begin_instantiate) * 1e3
        return handle

    # --- checking ----------------------------------------------------------------------

    def poll(self) -> None:
        """Take the verdict of the trial under way, if it has arrived. Never waits."""
        if self._trial is None:
            return
        record, trial = self._trial
        if not self.backend.passed(trial.end):
            return
        self._trial = None
        self.judge(record, trial, scratch=True)

    def judge(self, record: KeyRecord[K], trial: Trial, *, scratch: bool) -> None:
        """Draw the consequences of a finished trial: trust, quarantine, drop.

        Args:
            record: the key's.
            trial: one whose end has passed.
            scratch: it ran on scratch inputs, so that its times are typical of the key.

        Raises:
            MismatchError: graph and eager differ and `fail_on_mismatch` is set.
        """
        record.checks += 1
        record.verify_ms += trial.milliseconds(self.backend)
        found = trial.mismatches()
        if found:
            record.mismatches += 1
            text = f"{record.key}: graph and eager differ: {'; '.join(found)}"
            logger.error("%s. The key is quarantined and runs eagerly from now on", text)
            self._retire(record, KeyState.QUARANTINED, "; ".join(found))
            if self._fail_on_mismatch:
                raise MismatchError(text)
            return
        if record.state is not KeyState.CAPTURED:
            return
        record.trusted = True
        if not scratch:
            return
        record.eager_us.append(trial.eager_us(self.backend))
        record.replay_us.append(trial.replay_us(self.backend))
        saved = record.saved_us
        assert saved is not None
        lost = -saved > SLOWER * statistics.median(record.eager_us)
        if self._drop_slower and len(record.replay_us) >= TIMED_TRIALS and lost:
            logger.warning(
                "%s: replay is %.0f us slower than eager; the graph is dropped", record.key, -saved
            )
            self._retire(record, KeyState.DROPPED, f"replay is {-saved:.0f} us slower than eager")

    def idle(self) -> None:
        """Between two steps: start at most one trial, and free what has played its last."""
        if self._dying:
            self._reap()
        if self._just_captured:  # that was this gap's extra run
            self._just_captured = False
            return
        if self._trial is not None or self._checker is None:
            return
        while self._to_try:
            key, rows = self._to_try.popleft()
            graph, record = self._graphs.get(key), self.book[key]
            if graph is None or record.state is not KeyState.CAPTURED:
                continue
            handle = graph.handle
            try:
                trial = self._checker.trial(
                    key, rows, partial(self._fn, key), partial(self.backend.replay, handle)
                )
            except Exception as error:  # a first replay that fails, or no memory to compare in
                self._fail(record, error, "could not be checked")
                return
            if trial is None:
                self._to_try.append((key, rows))  # no room for it now; later
            else:
                self._trial = (record, trial)
            return

    def settle(self) -> None:
        """Wait until every captured key was tried: for a start-up that wants its graphs at once."""
        for _ in range(10_000):
            self.idle()
            self.backend.wait()
            self.poll()
            if self._trial is None and not self._to_try:
                return

    # --- letting go --------------------------------------------------------------------

    def quarantine(self, key: K, why: str) -> None:
        """Take a key out of service for good."""
        self._retire(self.book[key], KeyState.QUARANTINED, why)

    def release(self) -> int:
        """Free every graph; returns the bytes they took. The next use captures again."""
        self.backend.wait()
        before = self.backend.free_bytes()
        for record in self.book.captured:
            self._retire(record, KeyState.WAITING, "released")
        self._trial = None
        self._to_try.clear()
        self.backend.wait()
        self._reap()
        return max(self.backend.free_bytes() - before, 0)

    def _fail(self, record: KeyRecord[K], error: Exception, what: str) -> None:
        """Give a key up, and say so once."""
        self._retire(record, KeyState.FAILED, f"{what}: {type(error).__name__}: {error}")
        self.capture_failures.append(f"{record.key}: {record.note}")
        if self._on_error == "raise":
            raise CaptureError(f"{record.key}: {what}: {error}") from error
        logger.warning("%s: %s, the key runs eagerly from now on: %s", record.key, what, error)

    def _retire(self, record: KeyRecord[K], state: KeyState, why: str) -> None:
        graph, self._latest = self._graphs.pop(record.key, None), None
        record.state, record.note, record.trusted = state, why, False
        if graph is not None:
            graph.last_use = self.backend.mark()  # nothing of it can be launched after this
            self._dying.append(graph)

    def _reap(self) -> None:
        """Destroy retired graphs whose last replay has passed."""
        for graph in [g for g in self._dying if self.backend.passed(g.last_use)]:
            self._dying.remove(graph)
            self.backend.destroy(graph.handle)

    def _check_addresses(self) -> None:
        for name, tensor in self._static.items():
            if tensor.data_ptr() != self._addresses[name]:
                from ..errors import StrictError

                raise StrictError(
                    f"static input {name!r} moved: expected {self._addresses[name]:#x}, found {tensor.data_ptr():#x}; "
                    "graphs would still read the old place"
                )
