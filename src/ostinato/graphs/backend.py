"""What a graph cache needs of a device: capture, replay, destroy, count, time. No CUDA here.

`graphs/cuda.py` implements it; tests implement it on the CPU, where every failure can be
injected at every stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class GraphBackend(Protocol):
    """One device's graphs. All work is on the current stream; handles are opaque."""

    def capture(self, body: Callable[[], object]) -> Any:
        """Record what `body` launches, without running it; returns a graph.

        Leaves the stream usable whatever happens. Raises what `body` raised, or the driver's
        error, or `CaptureError` if `body` allocated device memory.
        """
        ...

    def num_nodes(self, graph: Any) -> int: ...

    def instantiate(self, graph: Any) -> None:
        """Make the graph executable."""
        ...

    def replay(self, graph: Any) -> None: ...

    def launcher(self, graph: Any) -> Callable[[], object]:
        """What replays a graph on the stream that is current now, whichever is current then."""
        ...

    def destroy(self, graph: Any) -> None:
        """Free the executable. Only after its last replay has passed."""
        ...

    def free_bytes(self) -> int:
        """Free device memory."""
        ...

    def mark(self) -> Any:
        """A point in the stream."""
        ...

    def passed(self, mark: Any) -> bool:
        """Whether the device has got there."""
        ...

    def microseconds(self, begin: Any, end: Any) -> float:
        """Device time between two marks that have passed."""
        ...

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Start copying to host memory; valid once a mark made after it has passed."""
        ...

    def wait(self) -> None:
        """Until everything launched has run."""
        ...
