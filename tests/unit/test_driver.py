"""What is asked of the driver directly, and when torch is asked instead."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import profiler

from ostinato.graphs import driver as calls
from ostinato.graphs.cuda import TorchBackend

STREAM: Any = SimpleNamespace(cuda_stream=0x51)


class Driver:
    """A stand-in for the bindings and for torch's event: notes what was asked of which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
        self.asked: list[Any] = []
        self.status = status
        driver: Any = ModuleType("cuda.bindings.driver")
        for kind in ("CUevent", "CUstream", "CUgraphExec"):
            setattr(driver, kind, lambda handle, kind=kind: (kind, handle))
        for call in ("cuEventRecord", "cuGraphLaunch"):
            setattr(driver, call, lambda *args, call=call: self.note(call, *args))
        package: Any = ModuleType("cuda.bindings")
        package.driver = driver
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", package)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
        event = SimpleNamespace(
            cuda_event=0xE, record=lambda stream: self.asked.append("torch"), synchronize=lambda: None
        )
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)

    def note(self, *what: Any) -> tuple[int]:
        self.asked.append(what)
        return (self.status,)


def test_an_event_is_recorded_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Driver(monkeypatch)
    event = calls.Event(STREAM)
    assert device.asked == ["torch"], "which made it"
    event.record()
    assert event.mark() == (0,)
    assert device.asked[1:] == [("cuEventRecord", ("CUevent", 0xE), ("CUstream", 0x51))] * 2


def test_an_event_that_the_driver_refuses_is_recorded_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which knows how to make a context, and how to say what is wrong."""
    device = Driver(monkeypatch, status=201)
    calls.Event(STREAM).record()
    assert device.asked[-1] == "torch"


def test_an_event_without_bindings_is_recorded_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Driver(monkeypatch)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    calls.Event(STREAM).record()
    assert device.asked == ["torch", "torch"]


def test_a_graph_is_launched_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Driver(monkeypatch)
    current = [0x51]
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda device: current[-1] + device, raising=False
    )
    launch = calls.GraphLauncher(0)
    graph = launch.handle(SimpleNamespace(raw_cuda_graph_exec=lambda: 0x9))
    assert launch(graph)
    assert launch(graph)
    current.append(0x52)
    assert launch(graph)
    streams = [("CUstream", 0x51), ("CUstream", 0x51), ("CUstream", 0x52)]
    assert device.asked == [("cuGraphLaunch", ("CUgraphExec", 0x9), stream) for stream in streams]
    device.status = 201
    assert not launch(graph), "torch has to be asked"


class Graph:
    """One of torch's; it may draw from the random generator."""

    def __init__(self, generator: Any, draws: int) -> None:
        self._generator, self._draws = generator, draws
        self.replays, self.direct = 0, None

    def raw_cuda_graph_exec(self) -> int:
        return 0x9

    def replay(self) -> None:
        self.replays += 1
        self._generator.offset += self._draws


def backend_over(monkeypatch: pytest.MonkeyPatch, draws: int = 0) -> tuple[TorchBackend, Graph, Driver]:
    device = Driver(monkeypatch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0x51, raising=False)
    generator = SimpleNamespace(offset=0)
    generator.get_offset = lambda: generator.offset
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    backend = TorchBackend.__new__(TorchBackend)
    backend._device, backend._launch = 0, calls.GraphLauncher(0)
    return backend, Graph(generator, draws), device


def test_a_graph_is_replayed_through_torch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, graph, device = backend_over(monkeypatch)
    for _ in range(4):
        backend.replay(graph)
    assert graph.replays == 1
    assert device.asked == [("cuGraphLaunch", ("CUgraphExec", 0x9), ("CUstream", 0x51))] * 3


def test_a_graph_that_draws_random_numbers_is_replayed_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, graph, device = backend_over(monkeypatch, draws=4)
    for _ in range(4):
        backend.replay(graph)
    assert graph.replays == 4
    assert not device.asked


def test_what_the_driver_refuses_torch_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, graph, device = backend_over(monkeypatch)
    backend.replay(graph)
    device.status = 201
    backend.replay(graph)
    assert (graph.replays, len(device.asked)) == (2, 1)
    device.status = 0
    backend.replay(graph)
    assert (graph.replays, len(device.asked)) == (2, 2)


def test_under_the_profiler_torch_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, graph, device = backend_over(monkeypatch)
    backend.replay(graph)
    with profiler.profile():
        backend.replay(graph)
    assert (graph.replays, len(device.asked)) == (2, 0)
    backend.replay(graph)
    assert (graph.replays, len(device.asked)) == (2, 1)


def test_a_launcher_keeps_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stream is current when it is used, and though torch is not asked."""
    backend, graph, device = backend_over(monkeypatch)
    streams: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: STREAM)
    monkeypatch.setattr(
        torch.cuda, "stream", lambda stream: streams.append(stream) or contextlib.nullcontext()
    )
    backend.launcher(graph)()
    assert (graph.replays, device.asked, streams) == (1, [], [STREAM]), "it was never replayed"
    backend.replay(graph)
    launch = backend.launcher(graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0x52))
    launch()
    launched = [("cuGraphLaunch", ("CUgraphExec", 0x9), ("CUstream", 0x51))]
    assert (graph.replays, device.asked, len(streams)) == (2, launched, 1)
    with profiler.profile():
        launch()
    assert (graph.replays, device.asked, len(streams)) == (3, launched, 2)
    device.status = 201
    launch()
    assert (graph.replays, device.asked, streams) == (4, launched * 2, [STREAM] * 3)
