"""The runner that captures each key once and replays it.

A key is captured between two steps when the plan asks for it. Everything that a capture needs
is there by then: the key's first hit ran eagerly at its padded size on the same stream, so
every kernel is loaded and every library workspace exists.
"""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import CaptureError
from ..inputs import Batch
from ..types import GraphKey
from .plan import Plan
from .runner import EagerRunner, Pending, ResultRing, StepProgram

logger = logging.getLogger(__name__)


@dataclass
class CapturedGraph:
    """One key's graph and what its capture cost."""

    graph: Any
    """torch.cuda.CUDAGraph"""
    capture_ms: float
    pool_bytes: int
    """Device memory that the capture allocated: 0 for a step whose scratch is the arena."""
    replays: int = 0


class CudaGraphRunner:
    """Replays a graph where the route says so, runs the rest eagerly."""

    def __init__(
        self,
        program: StepProgram,
        ring: ResultRing,
        plan: Plan,
        *,
        on_capture_error: Literal["eager", "raise"] = "eager",
    ) -> None:
        self.eager = EagerRunner(program, ring)
        self.graphs: dict[GraphKey, CapturedGraph] = {}
        self._program, self._plan, self._on_error = program, plan, on_capture_error
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch) -> Pending:
        route = batch.route
        if route.capture:
            self._capture(batch)
        captured = self.graphs.get(route.key) if route.reason is None else None
        if captured is None:
            return self.eager.run(batch)
        captured.graph.replay()
        captured.replays += 1
        return self.eager.deliver(batch)

    def close(self) -> None:
        torch.cuda.synchronize()
        for captured in self.graphs.values():
            captured.graph.reset()
        self.graphs.clear()

    def _capture(self, batch: Batch) -> None:
        """Record the step at the batch's key; nothing executes, so live rows are untouched."""
        key = batch.key
        try:
            captured = self._record(batch)
        except Exception as error:  # whatever went wrong, the engine must go on as it was
            self._plan.failed(key)
            if self._on_error == "raise":
                raise CaptureError(f"{key}: capture failed: {error}") from error
            logger.warning("%s: capture failed, the key runs eagerly from now on: %s", key, error)
            return
        self.graphs[key] = captured
        self._plan.captured(key)
        logger.info("%s: captured in %.2f ms", key, captured.capture_ms)

    def _record(self, batch: Batch) -> CapturedGraph:
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # a collection during capture may free CUDA memory, which capture forbids
        begin = time.perf_counter()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            allocated = _allocations()  # from here on: beginning itself registers torch's random state
            try:
                self._program(batch)
            except BaseException:
                self._abandon(graph)
                raise
            graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        taken = _allocations() - allocated
        if taken:
            graph.reset()
            raise CaptureError(
                f"{batch.key}: capture made {taken} allocations, expected none: an op keeps an intermediate "
                "outside the arena"
            )
        return CapturedGraph(graph, (time.perf_counter() - begin) * 1e3, pool_bytes=0)

    @staticmethod
    def _abandon(graph: Any) -> None:
        """End a capture whose body failed, so that the stream is usable again."""
        try:
            graph.capture_end()
        except Exception:  # the capture was already invalid: the first error is the one to report
            logger.debug("ending the failed capture also failed", exc_info=True)


def _allocations() -> int:
    """Allocations that torch's caching allocator has served so far."""
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))
