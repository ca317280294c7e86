"""Copies home by address: what is passed to the driver, and what an error says."""

from __future__ import annotations

import gc
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.errors import GraphError
from ostinato.graphs.cuda import device_to_host
from ostinato.graphs.runner import ResultRing
from ostinato.inputs import BufferShapes, StepBuffers

STREAM: Any = SimpleNamespace(cuda_stream=0x51)
OK, GONE = SimpleNamespace(name="cudaSuccess"), SimpleNamespace(name="cudaErrorDeviceUnavailable")


def bindings(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[tuple[object, ...]]:
    """A stand-in for the driver's bindings; returns what will have been asked of it."""
    asked: list[tuple[object, ...]] = []

    def send(*args: object) -> tuple[object]:
        asked.append(args)
        return (answer,)

    runtime: Any = ModuleType("cuda.bindings.runtime")
    runtime.cudaMemcpyAsync = send
    runtime.cudaStream_t = lambda handle: ("stream", handle)
    runtime.cudaMemcpyKind = SimpleNamespace(cudaMemcpyDeviceToHost="to host")
    runtime.cudaError_t = SimpleNamespace(cudaSuccess=OK)
    package: Any = ModuleType("cuda.bindings")
    package.runtime = runtime
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    return asked


def test_copies_in_the_order_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = bindings(monkeypatch, OK)
    copy = device_to_host(STREAM)
    assert copy is not None
    copy(0x1000, 0x2000, 12)
    assert asked == [(0x1000, 0x2000, 12, "to host", ("stream", 0x51))]


def test_an_error_of_the_driver_is_raised_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings(monkeypatch, GONE)
    copy = device_to_host(STREAM)
    assert copy is not None
    with pytest.raises(GraphError, match="cudaErrorDeviceUnavailable"):
        copy(0x1000, 0x2000, 12)


def test_a_ring_that_is_dropped_waits_for_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host memory is given back then, and a copy may still be on its way there."""
    bindings(monkeypatch, OK)
    waits: list[bool] = []
    stream: Any = SimpleNamespace(cuda_stream=0x51, synchronize=lambda: waits.append(True))
    shapes = BufferShapes(max_num_seqs=2, max_num_tokens=8, max_blocks_per_seq=2, vocab_size=32, block_size=4)
    ring = ResultRing(StepBuffers(shapes, torch.device("cpu"), depth=2), 2, stream)
    assert waits == []
    del ring
    gc.collect()
    assert waits == [True]


def test_without_the_bindings_torch_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert device_to_host(STREAM) is None
