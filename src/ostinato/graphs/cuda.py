"""Graphs on an NVIDIA GPU.

torch's `CUDAGraph` does the work; `capture_begin` and `capture_end` are called directly, because
`torch.cuda.graph()` synchronises and empties caches on entry, which live traffic would feel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..errors import CaptureError

logger = logging.getLogger(__name__)


class TorchBackend:
    """`GraphBackend` on the current CUDA device and stream."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], object]) -> Any:
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
        return graph

    @staticmethod
    def _abandon(graph: Any) -> None:
        """End a capture whose body failed, so that the stream is usable again."""
        try:
            graph.capture_end()
        except Exception:  # the capture was already invalid: the first error is the one to report
            logger.debug("ending the failed capture also failed", exc_info=True)
        graph.reset()

    def num_nodes(self, graph: Any) -> int:
        from cuda.bindings import runtime

        error, _, count = runtime.cudaGraphGetNodes(graph.raw_cuda_graph(), 0)
        if error != runtime.cudaError_t.cudaSuccess:
            raise CaptureError(f"cudaGraphGetNodes: {error}")
        return int(count)

    def instantiate(self, graph: Any) -> None:
        from cuda.bindings import runtime

        graph.instantiate()
        # Without this the first replay uploads it, and its memory would not be seen yet.
        stream = torch.cuda.current_stream().cuda_stream
        (error,) = runtime.cudaGraphUpload(graph.raw_cuda_graph_exec(), stream)
        if error != runtime.cudaError_t.cudaSuccess:
            raise CaptureError(f"cudaGraphUpload: {error}")

    def replay(self, graph: Any) -> None:
        graph.replay()

    def destroy(self, graph: Any) -> None:
        graph.reset()

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
