"""What travels between host and GPU: tokens that a step posts where its number says, eagerly and on a graph; what the host changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ostinato.graphs.results import ResultRing
from ostinato.inputs import BufferShapes, StepBuffers, _Staging
from ostinato.types import GraphKey, Route, SamplerVariant, StepKind

pytestmark = pytest.mark.gpu

ROWS, DEPTH = 300, 2


@pytest.fixture
def stream() -> Any:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize()


def step_of(buffers: StepBuffers, n: int) -> tuple[Any, torch.Tensor, Callable[[], None]]:
    """The beginning and the end of a decode step of n rows, all live; the tokens that it samples."""
    from ostinato.ops import StepView
    from ostinato.ops.triton import TritonOps

    def ints(value: int = 0) -> torch.Tensor:
        return torch.full((ROWS,), value, dtype=torch.int32, device="cuda")

    batch = buffers.batch(Route(GraphKey(StepKind.DECODE, n, n, SamplerVariant.GREEDY), None))
    buffers.static.last_position.fill_(1 << 30)
    for tensor in (buffers.static.enabled, buffers.state.active):
        tensor.fill_(1)
    ops, tokens = TritonOps(), ints()
    scratch: Any = type("Scratch", (), {f: ints() for f in StepView.__annotations__})()

    def run() -> None:
        view = ops.prepare(batch, scratch)
        ops.advance(batch, view, tokens[:n])

    return batch, tokens, run


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 129, 300])
def test_what_is_posted_is_what_was_emitted(stream: Any, n: int) -> None:
    """Eagerly and replayed in turn, two in flight, through slots that are used again and again."""
    buffers = StepBuffers(BufferShapes(ROWS, 512, 8, 16, 1000), torch.device("cuda"), DEPTH)
    ring = ResultRing(buffers, stream)
    batch, tokens, run = step_of(buffers, n)
    run()  # loads the kernels; nobody waits for it
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin(capture_error_mode="thread_local")
    run()
    graph.capture_end()
    pending, wanted = [], []
    for i in range(20):
        tokens.random_(0, 1000)
        wanted.append(tokens[:n].tolist())
        ring.begin()
        run() if i % 3 == 0 else graph.replay()
        pending.append(ring.send(batch))
        if len(pending) == DEPTH:
            assert pending.pop(0).result().tokens == wanted.pop(0)
    assert pending[0].result().tokens == wanted[0]
    assert int(buffers.state.number) == 20
    assert buffers.state.posted[0, 1 : 1 + n].tolist() == [0] * n, "what was posted before the first step"


def test_what_nobody_waits_for_leaves_results_alone(stream: Any) -> None:
    buffers = StepBuffers(BufferShapes(ROWS, 512, 8, 16, 1000), torch.device("cuda"), DEPTH)
    ring = ResultRing(buffers, stream)
    batch, tokens, run = step_of(buffers, 5)
    tokens.fill_(3)
    ring.begin()
    run()
    first = ring.send(batch)
    ring.pause()
    tokens.fill_(4)
    for _ in range(5):
        run()
    tokens.fill_(5)
    ring.begin()
    run()
    second = ring.send(batch)
    assert first.result().tokens == [3] * 5
    assert second.result().tokens == [5] * 5


def test_what_the_host_changes_lands_in_its_place(stream: Any) -> None:
    """Words and penalty counts at random places: one launch against tensors indexed on the CPU, again and again."""
    from ostinato.ops.cuda.edit import Editor

    g = np.random.default_rng(torch.seed() % 2**32)
    words, counts = torch.zeros(5000, dtype=torch.int32), torch.zeros(3001, dtype=torch.int16)
    on_gpu = words.cuda(), counts.cuda()
    device = torch.device("cuda", torch.cuda.current_device())
    editor = Editor.on(device)
    assert editor is not None
    slot, plain = _Staging(device, editor), _Staging(torch.device("cpu"))
    for size in (1, 255, 256, 257, 2500):
        changes = []
        for tensor, most in ((words, 2**31), (counts, 2**15)):
            index = g.permutation(len(tensor))[:size]
            changes.append((index, g.integers(-most, most, len(index)).astype(np.int32)))
        for staging, targets in ((slot, on_gpu), (plain, (words, counts))):
            staging.apply([(t, *change) for t, change in zip(targets, changes, strict=True)])
    for found, expected in zip(on_gpu, (words, counts), strict=True):
        assert torch.equal(found.cpu(), expected)
