"""How fast this GPU reads its memory: the ceiling that a memory-bound step is held against."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl

__all__ = ["BLOCK_SHAPES", "read_bandwidth"]

BLOCK_SHAPES = ((2048, 4, 4), (4096, 4, 8), (8192, 2, 8), (8192, 8, 8), (16384, 4, 16))
"""(values at a time, times, warps) of a program; which one is best differs by GPU."""


@triton.jit
def read_sum(x, out, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    """out[program] = sum of the program's own BLOCK * TIMES values: as good as no writes at all."""
    program = tl.program_id(0).to(tl.int64)
    start = x + program * (BLOCK * TIMES) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(TIMES):
        total += tl.load(start + step * BLOCK)
    tl.store(out + program, tl.sum(total, 0))


def read_bandwidth(nbytes: int = 4 << 30, repeats: int = 10) -> dict[tuple[int, int, int], float]:
    """Bytes a second by block shape, each the median of `repeats` passes over `nbytes` of device memory.

    Args:
        nbytes: many times the caches' size; taken for the time of the call.
        repeats: timed passes.
    """
    largest = max(block * times for block, times, _ in BLOCK_SHAPES)
    count = nbytes // 4 // largest * largest
    x = torch.rand(count, device="cuda")  # zeros are read with less power, and so at other clocks
    out = torch.empty(count // min(block * times for block, times, _ in BLOCK_SHAPES), device="cuda")
    found = {}
    for block, times, warps in BLOCK_SHAPES:

        def launch(block: int = block, times: int = times, warps: int = warps) -> None:
            read_sum[(count // (block * times),)](x, out, BLOCK=block, TIMES=times, num_warps=warps)

        launch()
        seconds = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        found[block, times, warps] = count * 4 / statistics.median(seconds)
    return found
