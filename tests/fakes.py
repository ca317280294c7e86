"""A graph backend without a GPU: replays run the captured function, and every stage can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

STAGES = ("begin", "middle", "end", "instantiate", "replay")


@dataclass
class FakeGraph:
    body: Callable[[], object]
    nbytes: int = 0
    instantiated: bool = False
    destroyed: bool = False
    replays: int = 0


@dataclass
class FakeBackend:
    """Counts memory as a device would; time stands still but for what the test says."""

    cost: int = 1000
    """Bytes of an executable."""
    memory: int = 1 << 30
    nodes: int = 10
    eager_us: float = 100.0
    replay_us: float = 10.0
    fail: dict[str, Exception] = field(default_factory=dict)
    """Stage -> error, until it is removed."""
    corrupt: Callable[[FakeGraph], None] | None = None
    """Called after each replay: what a broken graph would do."""
    during_capture: Callable[[], None] | None = None
    """Called in the middle of each capture."""
    late: bool = False
    """The device lags: no mark has passed yet."""
    graphs: list[FakeGraph] = field(default_factory=list)
    replays: int = 0
    capturing: bool = False

    def _stage(self, name: str) -> None:
        if name in self.fail:
            raise self.fail[name]

    def capture(self, body: Callable[[], object]) -> FakeGraph:
        self._stage("begin")
        if self.capturing:
            raise RuntimeError("already capturing")  # as the driver does
        self.capturing = True
        try:
            self._stage("middle")
            if self.during_capture is not None:
                self.during_capture()
            self._stage("end")
        finally:
            self.capturing = False
        graph = FakeGraph(body)
        self.graphs.append(graph)
        return graph

    def num_nodes(self, graph: FakeGraph) -> int:
        return self.nodes

    def instantiate(self, graph: FakeGraph) -> None:
        self._stage("instantiate")
        graph.instantiated, graph.nbytes = True, self.cost
        self.memory -= self.cost

    def replay(self, graph: FakeGraph) -> None:
        assert graph.instantiated, "replayed before it was instantiated"
        assert not graph.destroyed, "replayed after it was destroyed"
        self._stage("replay")
        graph.body()
        graph.replays += 1
        self.replays += 1
        if self.corrupt is not None:
            self.corrupt(graph)

    def launcher(self, graph: FakeGraph) -> Callable[[], object]:
        return torch.inference_mode()(partial(self.replay, graph))  # as the engine's context does

    def destroy(self, graph: FakeGraph) -> None:
        assert not graph.destroyed, "destroyed twice"
        assert not self.late, "destroyed before its last replay had passed"
        graph.destroyed = True
        self.memory += graph.nbytes

    def free_bytes(self) -> int:
        return self.memory

    def mark(self) -> int:
        return self.replays

    def passed(self, mark: int) -> bool:
        return not self.late

    def microseconds(self, begin: int, end: int) -> float:
        return self.replay_us if end > begin else self.eager_us

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def wait(self) -> None:
        self.late = False

    @property
    def live(self) -> list[FakeGraph]:
        return [g for g in self.graphs if g.instantiated and not g.destroyed]


def fake_engine(folder: Any, backend: FakeBackend, **options: Any) -> Any:
    """An LLM on the CPU whose graphs are fake."""
    from ostinato import LLM
    from ostinato.config import EngineOptions
    from ostinato.engine import build

    defaults = {
        "skip_tokenizer_init": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
    }
    return LLM.over(
        build(
            EngineOptions.from_kwargs({"model": str(folder), "device": "cpu"} | defaults | options), backend
        )
    )
