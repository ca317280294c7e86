"""`GraphCache` on a GPU without the engine: the example, and buffers that move."""

from __future__ import annotations

import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ostinato.graphs.cache import GraphCache
from ostinato.graphs.keys import KeyState

pytestmark = pytest.mark.gpu


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[2] / "examples" / "graph_cache.py"
    runpy.run_path(str(example), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert all("mismatches 0" in line for line in lines)
    assert any("captured" in line and "replays   0" not in line for line in lines)


def test_a_function_that_breaks_the_contract_never_serves() -> None:
    """It counts on the host: a graph would repeat the number of its capture."""
    x, y = (torch.zeros(4, device="cuda") for _ in range(2))
    calls = []

    def counting(batch: int) -> None:
        calls.append(batch)
        torch.add(x[:batch], float(len(calls)), out=y[:batch])

    with torch.cuda.stream(torch.cuda.Stream()):
        cache = GraphCache(counting, {"x": x, "y": y})
        for _ in range(6):
            cache(4)
            torch.cuda.synchronize()
        assert cache.book[4].state is KeyState.QUARANTINED
        assert cache.book[4].replays == 0
        assert y.tolist() == [float(len(calls))] * 4


def test_a_graph_that_draws_random_numbers_draws_new_ones() -> None:
    """torch counts what a graph draws, replay by replay: such a graph is always replayed through it."""
    y = torch.zeros(64, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        cache = GraphCache(lambda batch: y[:batch].uniform_(), {"y": y}, verify=False)
        drawn = []
        for _ in range(8):
            cache(64)
            drawn.append(tuple(y.tolist()))
        assert cache.book[64].replays > 3
        assert len(set(drawn)) == len(drawn)


def test_a_thread_that_never_used_the_gpu_replays() -> None:
    """The driver refuses whoever has no context; torch makes one."""
    x, y = (torch.zeros(64, device="cuda") for _ in range(2))
    stream = torch.cuda.Stream()
    cache = GraphCache(lambda batch: torch.add(x[:batch], 1.0, out=y[:batch]), {"x": x, "y": y}, verify=False)

    def call() -> bool:
        with torch.cuda.stream(stream):
            return cache(64)

    assert [call() for _ in range(4)] == [False, False, True, True]
    x.fill_(5.0)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call).result(), "it ran on its graph"
    stream.synchronize()
    assert y.tolist() == [6.0] * 64


def test_a_trace_says_which_kernels_a_replay_brought() -> None:
    from torch.profiler import ProfilerActivity, profile

    from ostinato.graphs.survey import replayed_kernels

    x, y = (torch.zeros(64, device="cuda") for _ in range(2))
    with torch.cuda.stream(torch.cuda.Stream()):
        cache = GraphCache(
            lambda batch: torch.add(x[:batch], 1.0, out=y[:batch]), {"x": x, "y": y}, verify=False
        )
        for _ in range(5):
            cache(64)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                assert cache(64)
            torch.cuda.synchronize()
    assert len(replayed_kernels(profiler)) == 3
