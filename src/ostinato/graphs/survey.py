"""Everything that is known of an engine's graphs, gathered: report, audit, chains, baked values.

Nothing here runs between two steps by itself; it is asked for, and may wait for the device.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ..errors import GraphError
from ..ops import VersionLine
from ..types import GraphKey, Route
from .keys import KeyRecord, KeyState
from .report import BufferInfo, ChainNode, ConfigValue, GraphReport, KernelUse, KeyReport

if TYPE_CHECKING:
    from ..engine import Engine
    from .inspect import AuditReport, Difference, Node


def survey(engine: Engine, *, chains: bool = False) -> GraphReport:
    """The report of an engine at this moment.

    Args:
        engine: with graphs or without.
        chains: also read every captured graph and time its kernels one by one (slow; needs a GPU).
    """
    config, plan = engine.config, engine.plan
    padded = plan.pads
    keys = [_key_report(engine, record, chains) for record in plan.book.records()]
    return GraphReport(
        model=engine.name,
        device=torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else "cpu",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        mode=plan.mode.value,
        max_num_seqs=config.max_num_seqs,
        min_hits=config.cudagraph_min_hits,
        versions=_versions(),
        config=tuple(
            ConfigValue(f.name, _text(getattr(config, f.name)), config.source.get(f.name, "default"))
            for f in fields(config)
            if f.name != "source"
        ),
        ladder=plan.capture_sizes if padded else (),
        holes=tuple(plan.holes(config.max_num_seqs)) if padded else (),
        kernels=_uses_of(engine),
        memory=tuple((line.name, line.nbytes) for line in engine.memory),
        budget_bytes=config.cudagraph_memory_budget,
        graph_bytes=plan.book.used_bytes,
        predicted_graph_bytes=engine.predicted_graph_bytes,
        steps_by_key={str(key): count for key, count in plan.graph_steps.items()},
        eager_by_reason={reason.value: count for reason, count in plan.eager_steps.items()},
        delayed_by_reason={why.value: count for why, count in engine.scheduler.delayed_steps.items()},
        buffers=tuple(
            BufferInfo(
                name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.numel() * t.element_size()
            )
            for name, t in buffers(engine).items()
        ),
        keys=tuple(keys),
    )


_USES: WeakKeyDictionary[Engine, tuple[KernelUse, ...]] = WeakKeyDictionary()


def _uses_of(engine: Engine) -> tuple[KernelUse, ...]:
    """Asked once: an op set decides nothing after the engine is built, and the engine waits for the answer (70 ms with many sizes)."""
    if engine not in _USES:
        _USES[engine] = _kernel_uses(engine)
    return _USES[engine]


def _kernel_uses(engine: Engine) -> tuple[KernelUse, ...]:
    """What the op set says that steps of each size run, by op: what is the same for many sizes in one."""
    ops, model, config = engine.program.ops, engine.program.model, engine.config
    most = config.max_num_batched_tokens
    prompts = sorted({*range(1, min(most, 256) + 1), *(256 << n for n in range(32) if 256 << n < most), most})
    order: list[tuple[str, str]] = []
    found: dict[VersionLine, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
    for decode, sizes in ((False, prompts), (True, range(1, config.max_num_seqs + 1))):
        above = 0
        for size in reversed(sizes):  # small steps have the fewest ops: they find their place among the rest
            place = 0
            for line in ops.versions(model, size, decode=decode):
                of_op = line.op, line.shape
                if of_op not in order:
                    order.insert(place, of_op)
                place = order.index(of_op) + 1
                ranges = found.setdefault(line, ([], []))[not decode]
                if ranges and ranges[0][0] == above:
                    ranges[0] = (size, ranges[0][1])
                else:
                    ranges.insert(0, (size, size))
            above = size
    uses = [KernelUse(v.op, v.shape, v.version, v.why, tuple(d), tuple(p)) for v, (d, p) in found.items()]
    return tuple(
        sorted(uses, key=lambda u: (order.index((u.op, u.shape)), not u.decode, u.decode, u.prompts))
    )


def buffers(engine: Engine) -> dict[str, torch.Tensor]:
    """What a step may read and write besides weights, by name."""
    program = engine.program
    own = {"arena": program.arena.data, "kv_cache": program.cache.data}
    return {**engine.buffers.tensors(), **own, **program.ops.workspaces()}


def audit(engine: Engine) -> dict[GraphKey, AuditReport]:
    """Check every pointer of every captured graph against live memory (contract line 9)."""
    from . import inspect

    registered = {**buffers(engine), **engine.program.model.tensors()}
    found: dict[GraphKey, AuditReport] = {}
    runner = _graph_runner(engine)
    runner.addresses.observe()
    for record in engine.plan.book.captured:
        graph = runner.cache.graph(record.key)
        found[record.key] = inspect.audit(inspect.nodes(graph), registered, runner.addresses)
    return found


def baked_values(engine: Engine, key: GraphKey) -> list[Difference]:
    """Capture a key twice over other sequences and compare the two graphs (contract line 10)."""
    from . import inspect

    first, second = (_recapture(engine, key, rows) for rows in (1, key.num_seqs))
    return inspect.compare(first[0], second[0])


def dot(engine: Engine, key: GraphKey) -> str:
    """GraphViz text of a key's graph, its nodes labelled by op and layer."""
    from . import inspect

    nodes, labels = _recapture(engine, key, key.num_seqs)
    return inspect.dot(nodes, labels)


def kernels(engine: Engine, key: GraphKey) -> list[tuple[str, str, int | None]]:
    """Name, op and layer of each kernel of a key's graph, in the order of the chain."""
    nodes, labels = _recapture(engine, key, key.num_seqs)
    return [(n.short_name, *label) for n, label in zip(nodes, labels, strict=True) if n.kind == "kernel"]


def _graph_runner(engine: Engine) -> Any:
    from .graph_runner import GraphRunner

    if not isinstance(engine.runner, GraphRunner):
        raise GraphError(f"this engine has no graphs: {engine.why_no_graphs}")
    return engine.runner


def _recapture(engine: Engine, key: GraphKey, rows: int) -> tuple[list[Node], list[tuple[str, int | None]]]:
    """The nodes of a key captured once more, over `rows` scratch sequences, with the op and layer of each."""
    from . import inspect
    from .labels import LabelledOps

    runner = _graph_runner(engine)
    result: list[Any] = []

    def capture() -> None:
        labelled = LabelledOps(engine.program.ops)
        program = replace(engine.program, ops=labelled.ops)
        batch = engine.buffers.batch(Route(key, None))
        graph = runner.backend.capture(lambda: program(batch))
        nodes = inspect.nodes(graph)
        result.extend((nodes, labelled.labels(len(nodes))))
        runner.backend.destroy(graph)

    with engine.device_context():
        runner.on_scratch_rows(key, rows, capture)
    return result[0], result[1]


def _key_report(engine: Engine, record: KeyRecord[GraphKey], chains: bool) -> KeyReport:
    from . import inspect

    key, state = record.key, record.state
    live = state is KeyState.CAPTURED
    report = KeyReport(
        key=str(key),
        kind=key.kind.value,
        num_tokens=key.num_tokens,
        num_seqs=key.num_seqs,
        sampler=key.sampler.name.lower(),
        state="checking" if live and not record.trusted else state.value,
        note=record.note,
        nodes=record.nodes,
        bytes=record.nbytes if live else 0,
        predicted_bytes=record.predicted_bytes,
        capture_ms=record.capture_ms,
        instantiate_ms=record.instantiate_ms,
        verify_ms=record.verify_ms,
        hits=record.hits,
        replays=record.replays,
        padding_waste=record.padding_waste,
        eager_us=statistics.median(record.eager_us) if record.eager_us else None,
        replay_us=statistics.median(record.replay_us) if record.replay_us else None,
        checks=record.checks,
        mismatches=record.mismatches,
    )
    if not (chains and live):
        return report
    nodes, labels = _recapture(engine, key, key.num_seqs)
    times = _node_times(engine, key, sum(node.kind == "kernel" for node in nodes))
    chain = []
    for node, (op, layer) in zip(nodes, labels, strict=True):
        us = next(times, None) if node.kind == "kernel" else None
        chain.append(ChainNode(node.index, node.short_name, op, layer, node.grid, node.block, us))
    found = inspect.summary(nodes)
    return replace(
        report,
        kernels=found.kernels,
        edges=found.edges,
        programmatic_edges=found.programmatic_edges,
        chain=tuple(chain),
    )


def _node_times(engine: Engine, key: GraphKey, kernels: int) -> Any:
    """Microseconds that each kernel of a replay adds, in order; nothing if the profiler saw another number."""
    from torch.profiler import ProfilerActivity, profile

    runner = _graph_runner(engine)
    replay = partial(runner.backend.replay, runner.cache.graph(key))
    with engine.device_context(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        runner.on_scratch_rows(key, key.num_seqs, replay)
        runner.backend.wait()
    ran = replayed_kernels(profiler)
    return iter([float(e["added"]) for e in ran[-kernels:]] if len(ran) >= kernels else [])


def replayed_kernels(profiler: Any) -> list[dict[str, Any]]:
    """Kernel events of the graphs that were replayed under torch's profiler, in the order in which they began.

    Not every version of it writes a node's number beside a kernel; all of them say which launch a kernel is of.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return graph_kernels(events)


def graph_kernels(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of a trace's events, the kernels that graph launches brought, in the order in which they began.

    `added` is the microseconds from where all before it had ended to its own end: under dependent launch a
    kernel begins early and waits, so the times between begin and end would count the same time twice.
    """
    events = list(events)
    launches = {
        event["args"]["correlation"]
        for event in events
        if "GraphLaunch" in str(event.get("name")) and "correlation" in event.get("args", {})
    }
    ran = [
        dict(event)
        for event in events
        if event.get("cat") == "kernel" and event.get("args", {}).get("correlation") in launches
    ]
    ran.sort(key=lambda event: float(event["ts"]))
    latest = float("-inf")
    for event in ran:
        end = event["ts"] + event["dur"]
        event["added"] = max(end - max(event["ts"], latest), 0.0)
        latest = max(latest, end)
    return ran


def _versions() -> dict[str, str]:
    found = {}
    for package in ("ostinato", "torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _text(value: object) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(getattr(value, "value", value)).removeprefix("torch.")
