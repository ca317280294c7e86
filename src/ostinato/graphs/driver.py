"""What every step asks of CUDA's driver, with handles made once: a call costs the host little but the driver's work.

Through torch the same calls take about twice as long. Where the driver refuses, torch is asked again: a thread whose
first call this is has no context yet, which torch makes; whatever else is wrong it raises as it does anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class Event:
    """A point in one stream that the host waits for."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._torch, self._stream = torch.cuda.Event(), stream
        self._torch.record(stream)  # makes it
        self.mark: Callable[[], tuple[Any]] = _refuse
        """`record` by the driver; other than (0,): it refused, and `record` has to be asked."""
        with contextlib.suppress(ImportError):
            from cuda.bindings import driver

            event, raw = driver.CUevent(self._torch.cuda_event), driver.CUstream(stream.cuda_stream)
            self.mark = partial(driver.cuEventRecord, event, raw)
        self.wait: Callable[[], object] = self._torch.synchronize
        """Until the device has got there; without the interpreter's lock."""
        self.synchronize = self.wait  # as torch calls it

    def record(self) -> None:
        """Mark what the stream was given so far."""
        if self.mark()[0]:
            self._torch.record(self._stream)

    def on(self, raw_stream: int) -> bool:
        """Whether it is a point in this stream."""
        return bool(self._stream.cuda_stream == raw_stream)


def _refuse() -> tuple[int]:
    """There are no bindings."""
    return (1,)


class GraphLauncher:
    """Launches executable graphs on torch's current stream."""

    def __init__(self, device: int) -> None:
        from cuda.bindings import driver

        self._driver, self._device = driver, device
        self._launch = driver.cuGraphLaunch
        self._raw, self._stream = 0, driver.CUstream(0)
        """The stream of the last launch."""

    def handle(self, graph: Any) -> Any:
        """The driver's, of one of torch's instantiated graphs."""
        return self._driver.CUgraphExec(int(graph.raw_cuda_graph_exec()))

    def bound(self, handle: Any, raw: int) -> Callable[[], tuple[Any]]:
        """The launch of one graph on one stream; other than (0,): the driver refused."""
        return partial(self._launch, handle, self._driver.CUstream(raw))

    def __call__(self, handle: Any) -> bool:
        """Whether the driver took it."""
        raw = torch._C._cuda_getCurrentRawStream(self._device)
        if raw != self._raw:
            self._raw, self._stream = raw, self._driver.CUstream(raw)
        return not self._launch(handle, self._stream)[0]
