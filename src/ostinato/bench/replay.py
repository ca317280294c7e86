"""A captured decode step alone: replayed back to back, and kernel by kernel.

The graph runs on made-up sequences in the first device rows, over KV blocks that are filled for
the purpose; the static buffers are put back afterwards. No request may be under way.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, GraphError
from ..types import GraphKey, SamplingParams, StepKind
from .traffic import Call, by_call, required_bytes

if TYPE_CHECKING:
    from ..engine import Engine

WARM_REPLAYS = 3
PROFILED_REPLAYS = 10


@dataclass(frozen=True)
class Rows:
    """The sequences that a replay decodes."""

    count: int
    prompt: int
    """Tokens in the cache before the first replay."""
    steps: int
    """Replays until the last position."""
    params: SamplingParams


def capture(engine: Engine, params: SamplingParams, batch: int) -> GraphKey | None:
    """The key of a decode step of `batch` rows, captured and checked; None where it has no graph."""
    if engine.why_no_graphs is not None:
        return None
    size = engine.plan.pad_seqs(batch)
    key = GraphKey(StepKind.DECODE, size, size, params.sampler_variant)
    runner: Any = engine.runner
    with engine.device_context():
        runner.prepare([key], progress=False)
    return key if any(record.key == key for record in engine.plan.book.captured) else None


@contextlib.contextmanager
def _live(engine: Engine, rows: Rows) -> Iterator[None]:
    """Lay the sequences out; what was in the static buffers returns at the end."""
    if engine.config.enable_prefix_caching:
        raise ConfigError(
            "a replay alone fills KV blocks that the prefix cache may have given a meaning: "
            "make the LLM with enable_prefix_caching=False"
        )
    static, words, n = engine.buffers.static, engine.buffers.words, rows.count
    cache, params = engine.program.cache.data, rows.params
    each = -(-(rows.prompt + rows.steps + 1) // engine.config.block_size)
    # More sequences than the cache holds share blocks, so that the figure can be had at all.
    room = max((cache.shape[2] - 1) // each, 1)
    saved = words.clone()
    try:
        owner = torch.arange(n, device=words.device) % room
        blocks = 1 + owner[:, None] * each + torch.arange(each, device=words.device)
        static.block_table[:n, :each] = blocks.to(torch.int32)
        static.enabled[:n], static.last_position[:n], static.num_stop_ids[:n] = 1, 10**8, 0
        static.temperature[:n], static.top_p[:n] = params.temperature, params.top_p
        static.top_k[:n], static.min_p[:n], static.flags[:n] = max(params.top_k, 0), params.min_p, 0
        cache[:, :, 1 : 1 + min(n, room) * each].normal_()  # zeros are read with less power
        _rewind(engine, rows)
        yield
    finally:
        words.copy_(saved)
        _wait(engine)


def _rewind(engine: Engine, rows: Rows) -> None:
    """Every sequence at its first position."""
    state, n = engine.buffers.state, rows.count
    state.active[:n], state.last_token[:n], state.position[:n] = 1, 1, rows.prompt


def _wait(engine: Engine) -> None:
    runner: Any = engine.runner
    runner.backend.wait()


def replay(engine: Engine, key: GraphKey, rows: Rows) -> tuple[float, float]:
    """Replay a key `rows.steps` times back to back.

    Returns:
        Seconds of one replay on the device, and seconds of the host to launch it.

    Raises:
        GraphError: a sequence stopped on the way, which would make the figure too good.
        ConfigError: the engine has a prefix cache.
    """
    runner: Any = engine.runner
    backend, graph = runner.backend, runner.cache.graph(key)
    with engine.device_context(), _live(engine, rows):
        for _ in range(WARM_REPLAYS):
            backend.replay(graph)
        _rewind(engine, rows)
        backend.wait()
        begin = backend.mark()
        started = time.perf_counter()
        for _ in range(rows.steps):
            backend.replay(graph)
        host = time.perf_counter() - started
        end = backend.mark()
        backend.wait()
        reached = int(engine.buffers.state.position[: rows.count].min())
        if reached != rows.prompt + rows.steps:
            raise GraphError(
                f"{key}: a row stopped at position {reached}, expected {rows.prompt + rows.steps}: "
                "the time of its replay would be too good"
            )
        return backend.microseconds(begin, end) / 1e6 / rows.steps, host / rows.steps


def profile_kernels(
    engine: Engine, key: GraphKey, rows: Rows, ceiling: float | None = None
) -> dict[str, Any]:
    """Each kernel's time within a replay, by the profiler, and what it must read.

    A kernel counts from where all before it had ended. A profiler that traces nodes may hold back
    dependent launches: the undisturbed replay is reported beside the sum.

    Args:
        engine: idle.
        key: captured.
        rows: the sequences.
        ceiling: bytes a second that the device can read; None: not known.
    """
    from torch.profiler import ProfilerActivity, profile

    from ..graphs.survey import kernels, replayed_kernels

    runner: Any = engine.runner
    backend, graph = runner.backend, runner.cache.graph(key)
    nodes = kernels(engine, key)
    undisturbed, _ = replay(engine, key, rows)
    # Where the undisturbed replays are on average.
    start = rows.prompt + max(rows.steps - PROFILED_REPLAYS, 0) // 2
    middle = replace(rows, prompt=start, steps=PROFILED_REPLAYS)
    with (
        engine.device_context(),
        _live(engine, middle),
        profile(activities=[ProfilerActivity.CUDA]) as profiler,
    ):
        for _ in range(PROFILED_REPLAYS):
            backend.replay(graph)
        backend.wait()
    context = start + (PROFILED_REPLAYS + 1) / 2  # tokens that attention reads, its own among them
    needed = required_bytes(engine, rows.count, context)
    calls = by_call(engine.program.model, needed["kv_bytes"], nodes)
    found = summed(replayed_kernels(profiler), nodes, PROFILED_REPLAYS, calls, ceiling)

    def share(us: float) -> float | None:
        return needed["bytes"] / us * 1e6 / ceiling if ceiling and us else None

    return found | {
        "batch_size": rows.count,
        "context_len": context,
        "bytes_a_step": needed["bytes"],
        "replay_undisturbed_us": undisturbed * 1e6,
        "share_of_ceiling_sum": share(found["sum_us"]),
        "share_of_ceiling_undisturbed": share(undisturbed * 1e6),
    }


def summed(
    ran: list[dict[str, Any]],
    nodes: list[tuple[str, str, int | None]],
    replays: int,
    calls: Sequence[Call] = (),
    ceiling: float | None = None,
) -> dict[str, Any]:
    """Kernel events of several replays by op and kernel, the costliest first; microseconds.

    Args:
        ran: what `graph_kernels` makes of a trace.
        nodes: name, op and layer of each kernel of the graph, in order.
        replays: how often the graph ran.
        calls: the ops; each one's bytes count for its costliest kernel.
        ceiling: bytes a second that the device can read; None: not known.
    """
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    read: dict[tuple[str, str, str], float] = defaultdict(float)
    count = len(nodes)
    if len(ran) == count * replays:
        parts = [call.part for call in calls for _ in call.nodes] or [""] * count
        rows_of = [(op, part, name) for (name, op, _), part in zip(nodes, parts, strict=True)]
        for event, row in zip(ran, rows_of * replays, strict=True):
            times[row].append(event["added"])
        alone = [statistics.median(event["added"] for event in ran[i::count]) for i in range(count)]
        for call in calls:
            if call.nbytes is not None:
                read[rows_of[max(call.nodes, key=alone.__getitem__)]] += call.nbytes
    else:  # the profiler lost some, or saw others: the events' own names are all that is sure
        for event in ran:
            times["", "", str(event["name"])[:60]].append(event["added"])
    rows: list[dict[str, Any]] = []
    for (op, part, name), found in times.items():
        us, nbytes = sum(found) / replays, read.get((op, part, name))
        rows.append(
            {
                "op": op,
                "part": part,
                "kernel": name,
                "launches": len(found) / replays,
                "us_each": statistics.median(found),
                "us_a_step": us,
                "bytes_a_step": nbytes,
                "share_of_ceiling": nbytes / us * 1e6 / ceiling if nbytes and us and ceiling else None,
            }
        )
    span = ran[-1]["ts"] + ran[-1]["dur"] - ran[0]["ts"] if ran else 0.0
    return {
        "kernels": sorted(rows, key=lambda row: -row["us_a_step"]),
        "sum_us": sum(row["us_a_step"] for row in rows),
        "replay_under_profiler_us": span / replays,
    }
