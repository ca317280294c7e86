"""Tokens that come home: what is posted is what is read, through slots used again, and what is passed to the driver."""

from __future__ import annotations

import ctypes
import gc
import struct
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.errors import KernelError, StrictError
from ostinato.graphs import results
from ostinato.graphs.results import Pending, ResultRing
from ostinato.inputs import BufferShapes, StepBuffers
from ostinato.ops.cuda import post, program

SEQS = 5


class Stream:
    cuda_stream, device = 0x51, torch.device("cpu")

    def __init__(self) -> None:
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


class Post:
    """What `post.cu` does, when a test lets it."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, tokens: int, to: int, n: int) -> None:
        self.asked.append((tokens, to, n))

    def arrive(self) -> None:
        tokens, to, n = self.asked[-1]
        ctypes.memmove(to, tokens, 4 * n)


def ring_of(monkeypatch: pytest.MonkeyPatch, depth: int = 2) -> tuple[ResultRing, StepBuffers, Post, Stream]:
    post, stream = Post(), Stream()
    monkeypatch.setattr(results, "poster", lambda _stream: post)
    shapes = BufferShapes(SEQS, 8, 2, vocab_size=32, block_size=4)
    buffers = StepBuffers(shapes, torch.device("cpu"), depth)
    return ResultRing(buffers, depth, stream), buffers, post, stream  # type: ignore[arg-type]


def send(ring: ResultRing, buffers: StepBuffers, n: int, logprobs: bool = False) -> Pending:
    batch: Any = SimpleNamespace(state=buffers.state, num_seqs=n, logprobs=logprobs)
    return ring.send(batch, {})


def test_random_tokens_through_slots_used_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, buffers, post, _ = ring_of(monkeypatch)
    g = torch.Generator().manual_seed(int(time.time()))
    for _ in range(50):
        n = int(torch.randint(1, SEQS + 1, (), generator=g))
        tokens = torch.randint(-1, 2**31 - 1, (SEQS,), generator=g).int()
        buffers.state.emitted.copy_(tokens)
        pending = send(ring, buffers, n)
        post.arrive()
        assert pending.result().tokens == tokens[:n].tolist()


def test_a_result_that_was_overwritten_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, buffers, _, _ = ring_of(monkeypatch, depth=0)
    pending = send(ring, buffers, 1)
    send(ring, buffers, 1)
    with pytest.raises(StrictError, match="the pipeline is deeper than the ring"):
        pending.result()


def test_logprobs_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, buffers, post, _ = ring_of(monkeypatch)
    buffers.state.emitted.fill_(3)
    buffers.state.logprob_ids.fill_(3)
    pending = send(ring, buffers, 2, logprobs=True)
    post.arrive()
    result = pending.result()
    assert result.tokens == [3, 3]
    assert sorted(result.logprobs) == [0, 1]


def test_a_ring_that_is_dropped_waits_for_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host memory is given back then, and tokens may still be on their way there."""
    ring, _, _, stream = ring_of(monkeypatch)
    assert stream.waits == 0
    del ring
    gc.collect()
    assert stream.waits == 1


def test_where_the_kernel_cannot_be_built_tokens_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_args: Any, **_options: Any) -> None:
        raise KernelError("no compiler")

    monkeypatch.setattr(post, "build", build)
    assert post.poster(Stream()) is None  # type: ignore[arg-type]


def kernel_with(monkeypatch: pytest.MonkeyPatch, status: SimpleNamespace) -> tuple[Any, list[Any]]:
    """A `Kernel` over a stand-in for the driver, and what it was asked to launch, with the parameter's bytes."""
    asked: list[Any] = []

    def launch(*args: Any) -> tuple[Any]:
        slots = ctypes.c_void_p.from_address(args[-2]).value
        assert slots is not None
        asked.append((*args[:-2], ctypes.string_at(slots, 24)))
        return (status,)

    driver: Any = ModuleType("cuda.bindings.driver")
    driver.CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    driver.cuFuncSetAttribute = lambda *_args: (OK,)
    driver.CUlaunchConfig = SimpleNamespace
    driver.CUstream = lambda handle: ("stream", handle)
    driver.CUresult = SimpleNamespace(CUDA_SUCCESS=OK)
    driver.cuLaunchKernel = launch
    package: Any = ModuleType("cuda.bindings")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    return program.Kernel("f", grid=1, block=128, shared_bytes=0, pdl=False, cluster=1), asked


class Answer(SimpleNamespace):
    def __int__(self) -> int:
        return int(self.value)


OK, GONE = Answer(name="CUDA_SUCCESS", value=0), Answer(name="CUDA_ERROR_ILLEGAL_ADDRESS", value=700)


def test_a_launcher_packs_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, asked = kernel_with(monkeypatch, OK)
    launch = kernel.launcher(Stream(), "<QQi4x")
    del kernel
    gc.collect()
    launch(0x1000, 0x2000, 3)
    launch(0x1000, 0x2008, 1)
    shape = ("f", 1, 1, 1, 128, 1, 1, 0, ("stream", 0x51))
    assert asked == [
        (*shape, struct.pack("<QQi4x", 0x1000, 0x2000, 3)),
        (*shape, struct.pack("<QQi4x", 0x1000, 0x2008, 1)),
    ]


def test_a_launch_that_the_driver_refuses_is_raised_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, _ = kernel_with(monkeypatch, GONE)
    launch = kernel.launcher(Stream(), "<QQi4x")
    with pytest.raises(KernelError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        launch(0x1000, 0x2000, 3)
