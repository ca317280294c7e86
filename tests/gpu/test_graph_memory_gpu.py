"""What graphs and staging do with memory on a GPU: bytes are used again, and nothing is rewritten too early."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from ostinato.graphs.cache import GraphCache
from ostinato.graphs.keys import KeyState
from ostinato.inputs import BufferShapes, StepBuffers
from ostinato.types import (
    GraphKey,
    Request,
    Route,
    SamplerVariant,
    SamplingParams,
    Schedule,
    ScheduledRow,
    StepKind,
)

pytestmark = pytest.mark.gpu

GRANULE = 2 << 20
"""The driver takes memory for executables in steps of this size."""


def used() -> int:
    """Bytes of device memory in use, by whomever."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_memory_of_released_graphs_serves_the_next_ones() -> None:
    """The driver shows no byte of a destroyed executable as free: that it is used again shows that it came back."""
    x, y = (torch.zeros(256, device="cuda") for _ in range(2))

    def step(size: int) -> None:
        for _ in range(200):
            torch.add(x[:size], 1.0, out=y[:size])

    first, second = range(1, 41), range(41, 81)
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for size in (*first, *second):
            step(size)  # whatever kernels these sizes need are loaded
        cache = GraphCache(step, {"x": x, "y": y}, verify=False)

        def capture(sizes: Iterable[int]) -> None:
            for size in sizes:
                cache(size)
                cache(size)
                assert cache.book[size].state is KeyState.CAPTURED, cache.book[size].note

        empty = used()
        capture(first)
        full = used()
        assert full - empty >= GRANULE, "40 graphs of 200 nodes take some"
        for _ in range(3):
            cache.release()
            capture(second)
            assert used() - full <= GRANULE
            cache.release()
            capture(first)
            assert used() - full <= GRANULE
        cache.release()


def test_a_staging_buffer_is_not_rewritten_while_its_copy_is_under_way() -> None:
    """The device is kept busy while more steps are staged than the ring has slots."""
    shapes = BufferShapes(4, 32, 8, 16, 100)
    on_gpu = StepBuffers(shapes, torch.device("cuda"), depth=1)
    plain = StepBuffers(shapes, torch.device("cpu"), depth=1)
    route = Route(GraphKey(StepKind.MIXED, 32, 4, SamplerVariant.FULL), None)
    torch.cuda.synchronize()
    for step in range(12):
        params = SamplingParams(temperature=0.5, top_k=step + 1, seed=step, presence_penalty=1.0)
        one = Request(str(step), str(step), (5 + step, 6, 7), params, frozenset({3}), 40, 1000 + step)
        row = ScheduledRow(one, step % 4, 0, 3, False, True, True, 0, (1 + step,), 0)
        schedule = Schedule(step, StepKind.PREFILL, (row,), (), (), SamplerVariant.FULL)
        torch.cuda._sleep(50_000_000)
        for buffers in (on_gpu, plain):
            buffers.write(schedule, route)
    torch.cuda.synchronize()
    assert torch.equal(on_gpu.words.cpu(), plain.words)
    assert torch.equal(on_gpu.state.prompt_mask.cpu(), plain.state.prompt_mask)
