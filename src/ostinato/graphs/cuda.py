"""Graphs on an NVIDIA GPU.

torch's `CUDAGraph` does the work; `capture_begin` and `capture_end` are called directly, because
`torch.cuda.graph()` synchronises and empties caches on entry, which live traffic would feel.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler

from ..errors import CaptureError
from .driver import GraphLauncher

logger = logging.getLogger(__name__)


class TorchBackend:
    """`GraphBackend` on the current CUDA device and stream."""

    def __init__(self) -> None:
        from cuda.bindings import runtime  # now, since the first capture should not wait for it

        self._runtime = runtime
        self._pool = torch.cuda.graph_pool_handle()
        self._device = torch.cuda.current_device()
        self._launch = GraphLauncher(self._device)
        self._live = 0
        """Graphs that hold the pool."""

    def capture(self, body: Callable[[], object]) -> Any:
        if not self._live:
            self._pool = torch.cuda.graph_pool_handle()  # torch forgets a pool with its last graph
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            before = _allocations()  # from here on: beginning itself registers torch's random state
            body()
            taken = _allocations() - before
        except BaseException:
            self._abandon(graph)
            raise
        graph.capture_end()
        if taken:
            graph.reset()
            raise CaptureError(
                f"capture made {taken} allocations, expected none: write intermediates to static tensors"
            )
        self._live += 1
        return graph

    def _abandon(self, graph: Any) -> None:
        """End a capture whose body failed, so that the stream is usable again."""
        try:
            graph.capture_end()
        except Exception:  # the driver gave the capture up already: the first error is the one to report
            logger.debug("ending the failed capture also failed", exc_info=True)
            # torch does not notice: it would go on allocating from the pool, and its random generator
            # would refuse to work outside a capture. An empty capture that ends well puts both right.
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                empty = torch.cuda.CUDAGraph(keep_graph=True)
                empty.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
                empty.capture_end()
                empty.reset()
        graph.reset()

    def num_nodes(self, graph: Any) -> int:
        runtime = self._runtime
        error, _, count = runtime.cudaGraphGetNodes(graph.raw_cuda_graph(), 0)
        if error != runtime.cudaError_t.cudaSuccess:
            raise CaptureError(f"cudaGraphGetNodes: {error}")
        return int(count)

    def instantiate(self, graph: Any) -> None:
        runtime = self._runtime
        graph.instantiate()
        graph.direct = None
        # Without this the first replay uploads it, and its memory would not be seen yet.
        stream = torch.cuda.current_stream().cuda_stream
        (error,) = runtime.cudaGraphUpload(graph.raw_cuda_graph_exec(), stream)
        if error != runtime.cudaError_t.cudaSuccess:
            raise CaptureError(f"cudaGraphUpload: {error}")

    def replay(self, graph: Any) -> None:
        direct = graph.direct
        if direct is None:
            self._first_replay(graph)
        # Through torch while its profiler runs, whose trace says of torch's launches alone what they brought.
        elif profiler._is_profiler_enabled or not self._launch(direct):
            graph.replay()

    def launcher(self, graph: Any) -> Callable[[], object]:
        stream = torch.cuda.current_stream()

        def through_torch() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        if graph.direct is None:
            return through_torch
        launch = self._launch.bound(graph.direct, stream.cuda_stream)

        def directly() -> None:
            if profiler._is_profiler_enabled or launch()[0]:
                through_torch()

        return directly

    def _first_replay(self, graph: Any) -> None:
        """Replay, and find out whether the driver may be asked directly from now on."""
        generator = torch.cuda.default_generators[self._device]
        before = generator.get_offset()
        graph.replay()
        if generator.get_offset() == before:  # torch counts what a graph draws from its generator: nothing
            graph.direct = self._launch.handle(graph)

    def destroy(self, graph: Any) -> None:
        graph.direct = None
        graph.reset()
        self._live -= 1

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        return bool(mark.query())

    def microseconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) * 1e3

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        torch.cuda.synchronize()


def _allocations() -> int:
    """Allocations that torch's caching allocator has served so far."""
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))
