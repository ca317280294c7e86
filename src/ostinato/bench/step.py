"""`bench step`: one decode step alone, held against the time it takes to read what it must.

For each batch size and context: the step through `LLM.generate`, (time of N tokens - time of 1) /
(N - 1); the same captured graph replayed back to back over the same positions; the bytes that a
step must read; this GPU's read bandwidth, measured in the same run; and what the host spends. The
share of the ceiling is bytes / time / bandwidth. Between its first and its last decode step a
request leaves the GPU idle for 1 - steps x back-to-back replay / time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from . import baselines, options
from .latency import speedups
from .plot import Panel, Series
from .result import Result, Table, filled
from .traffic import required_bytes

if TYPE_CHECKING:
    from ..llm import LLM
    from .replay import Rows

_CONTEXTS = [256, 1024, 4096]
_EDGE = 8
"""Steps at the beginning and end of a request that are no steady steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    at_least = options.at_least
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="sequences (GPU: 1 8 32 64 128; CPU: 1 4)",
    )
    parser.add_argument(
        "--context-len",
        type=at_least(2),
        nargs="+",
        metavar="N",
        help="mean tokens in the cache (GPU: 256 1024 4096, as far as the model goes; CPU: 256); the batch sizes run "
        "at the first, the others at the first batch size",
    )
    parser.add_argument(
        "--output-len",
        type=at_least(2 * _EDGE + 8),
        default=256,
        help="tokens that a request makes; its positions lie around the context's length (256)",
    )
    parser.add_argument("--num-iters", type=at_least(1), default=3, help="repeats; medians count (3)")
    options.add_baseline_argument(parser)
    options.add_engine_arguments(parser)
    options.add_sampling_arguments(parser)
    options.add_output_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    import torch

    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if args.batch_size is None:
        args.batch_size = [1, 8, 32, 64, 128] if on_gpu else [1, 4]
    if args.context_len is None:
        args.context_len = _contexts(args) if on_gpu else _CONTEXTS[:1]
    args.input_len, args.num_iters_warmup = _prompt(args.context_len[0], args.output_len), 1
    needs = {
        "max_model_len": _prompt(max(args.context_len), args.output_len) + args.output_len,
        "max_num_seqs": max(args.batch_size),
    }
    chosen = options.engine_options(args, needs, enable_prefix_caching=False)
    theirs = baselines.latency(args)
    ceiling = measure_ceiling() if on_gpu else None
    llm = options.make_llm(chosen)
    try:
        pairs = [(size, args.context_len[0]) for size in args.batch_size]
        pairs += [(args.batch_size[0], length) for length in args.context_len[1:]]
        best = ceiling["bytes_per_second"] if ceiling else None
        points = [measure(llm, args, size, length, best) for size, length in pairs]
        found = [_kernels(llm, args, *pair, best) for pair in pairs[: len(args.batch_size)]]
        kernels = [table for table in found if table is not None]
        fields: dict[str, Any] = {
            "output_len": args.output_len,
            "ceiling": ceiling,
            "points": points,
            "kernels": kernels,
            "engine": options.described(llm),
        }
        notes = [*_ceiling_note(ceiling), *_notes(llm, kernels), *baselines.notes(args)]
    finally:
        llm.close()
    faster = speedups(points[: len(args.batch_size)], theirs)
    if theirs:
        fields |= {"baselines": theirs, "speedup": faster}
    tables = [_table(points), _host_table(points)]
    if theirs:
        tables.append(_baseline_table(points, theirs, faster))
    tables += map(_kernel_table, kernels)
    return Result(fields, tables, _panels(points, len(args.batch_size)), notes)


def measure_ceiling(nbytes: int = 4 << 30) -> dict[str, Any]:
    """This GPU's read bandwidth: the best block shape counts."""
    import torch

    from ..ops.triton.bandwidth import read_bandwidth

    free, _ = torch.cuda.mem_get_info()
    shapes = read_bandwidth(min(nbytes, free // 4))
    torch.cuda.empty_cache()
    return {
        "bytes_per_second": max(shapes.values()),
        "by_block_shape": {str(shape): speed for shape, speed in shapes.items()},
    }


def measure(
    llm: LLM, args: argparse.Namespace, batch: int, context: int, ceiling: float | None
) -> dict[str, Any]:
    """One point: `batch` sequences whose context is `context` tokens on average.

    Args:
        llm: made with room for it.
        args: output length, repeats and sampling.
        batch: sequences.
        context: tokens.
        ceiling: bytes a second that the device can read; None: not known.
    """
    from .replay import capture, replay

    engine, tokens = llm.engine, args.output_len
    rows = _rows(args, batch, context)
    prompt, key = rows.prompt, capture(engine, rows.params, batch)
    generate = options.timed_generate(llm, args, prompt)
    for count in (1, 1, tokens, 1):
        generate(batch, count)  # captures and checks the prompts' graphs too
    first = [generate(batch, 1) for _ in range(args.num_iters)]
    whole = [generate(batch, tokens) for _ in range(args.num_iters)]
    steps = rows.steps
    step = (statistics.median(whole) - statistics.median(first)) / steps
    # The tokens that attention reads in the steps between: the step's own token is one of them.
    seen = prompt + 1 + (steps - 1) / 2
    needed = required_bytes(engine, batch, seen)
    point: dict[str, Any] = {
        "batch_size": batch,
        "context_len": seen,
        "prompt_len": prompt,
        "time_to_first_token_ms": statistics.median(first) * 1e3,
        "time_per_output_token_us": step * 1e6,
        "output_tokens_per_second": batch / step,
        **needed,
        "floor_us": needed["bytes"] / ceiling * 1e6 if ceiling else None,
        "share_of_ceiling": needed["bytes"] / step / ceiling if ceiling else None,
        "graph": str(key) if key else None,
        "back_to_back_us": None,
        "share_of_ceiling_back_to_back": None,
        "gpu_idle_share": None,
        "gpu_idle_share_by_events": None,
        "replay_host_us": None,
    }
    host = _host_times(llm, lambda: generate(batch, tokens), steps)
    if key is not None:
        bare = [replay(engine, key, rows) for _ in range(args.num_iters)]
        alone = statistics.median(seconds for seconds, _ in bare)
        point["back_to_back_us"] = alone * 1e6
        point["replay_host_us"] = statistics.median(host_seconds for _, host_seconds in bare) * 1e6
        point["gpu_idle_share"] = 1 - alone / step
        if ceiling:
            point["share_of_ceiling_back_to_back"] = needed["bytes"] / alone / ceiling
        if host["device_step_us"] is not None:
            point["gpu_idle_share_by_events"] = 1 - alone * 1e6 / host["device_step_us"]
    return point | host | {"commit_us_per_row": host["commit_us"] / batch}


def _rows(args: argparse.Namespace, batch: int, context: int) -> Rows:
    """The sequences of a point, for its graph alone."""
    from .replay import Rows

    tokens = args.output_len
    return Rows(batch, _prompt(context, tokens), tokens - 1, options.sampling(args, tokens))


def _kernels(
    llm: LLM, args: argparse.Namespace, batch: int, context: int, ceiling: float | None
) -> dict[str, Any] | None:
    """Where the time of a replay goes; None where there is no graph."""
    from .replay import capture, profile_kernels

    rows = _rows(args, batch, context)
    key = capture(llm.engine, rows.params, batch)
    return profile_kernels(llm.engine, key, rows, ceiling) if key is not None else None


def _contexts(args: argparse.Namespace) -> list[int]:
    """The default ones that the model has positions for; the first in any case."""
    from ..models.registry import spec_from_config

    most = args.max_model_len or spec_from_config(options.model_config(args)).max_positions
    fit = [n for n in _CONTEXTS[1:] if _prompt(n, args.output_len) + args.output_len <= most]
    return [_CONTEXTS[0], *fit]


# --- through the engine ---------------------------------------------------------------------


def _prompt(context: int, output: int) -> int:
    """Tokens of a prompt whose outputs lie around `context`."""
    return max(context - output // 2, 1)


def _host_times(llm: LLM, body: Callable[[], object], steps: int) -> dict[str, Any]:
    """What the host does in a steady decode step, in microseconds; medians.

    Wraps the engine's parts for the time of one request: launching is a round of the main loop
    less waiting and committing.
    """
    from ..graphs.results import Pending
    from ..types import StepKind

    engine = llm.engine
    runner: Any = engine.runner
    backend = getattr(runner, "backend", None)  # where there are graphs
    spent: dict[str, float] = defaultdict(float)
    rounds: list[tuple[float, float, float]] = []
    marks: list[Any] = []
    first: int | None = None
    launched = 0  # decode steps

    def mark() -> None:
        if backend is not None:
            marks.append(backend.mark())

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[name] += time.perf_counter() - begin

        return call

    launch, round_, scheduler = runner.run, engine.step, engine.scheduler

    def run(batch: Any) -> Any:
        """Of the first decode step: all that come later are some, and may only repeat the one before."""
        nonlocal first
        if first is None and batch.key.kind is StepKind.DECODE:
            first = scheduler.num_steps
            mark()
        return launch(batch)

    def step() -> Any:
        nonlocal launched
        spent["wait"] = spent["commit"] = 0.0
        begin = time.perf_counter()
        outputs = round_()
        whole = time.perf_counter() - begin
        before, launched = launched, 0 if first is None else scheduler.num_steps - first + 1
        if launched > before:
            rounds.append((whole - spent["wait"] - spent["commit"], spent["commit"], spent["wait"]))
            if launched == steps:
                mark()
        return outputs

    with (
        _replaced(runner, "run", run),
        _replaced(engine, "step", step),
        _replaced(Pending, "result", timed("wait", Pending.result)),
        _replaced(scheduler, "commit", timed("commit", scheduler.commit)),
        _replaced(engine.outputs, "make", timed("commit", engine.outputs.make)),
    ):
        body()
    steady = rounds[_EDGE:-_EDGE]
    launch_us, commit_us, wait_us = (statistics.median(column) * 1e6 for column in zip(*steady, strict=True))
    device = None
    if len(marks) == 2:
        assert backend is not None
        backend.wait()
        device = backend.microseconds(*marks) / steps
    # On a CPU a launch is the computation itself.
    return {
        "launch_us": launch_us if engine.config.device.type == "cuda" else None,
        "commit_us": commit_us,
        "wait_us": wait_us,
        "device_step_us": device,
    }


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method of one object or class, replaced for a while."""
    # Not of an instance, whose attributes would be slower once somebody has looked into its dictionary.
    own = vars(owner).get(name) if isinstance(owner, type) else None
    setattr(owner, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


# --- for people -------------------------------------------------------------------------------


def _cell(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def _table(points: list[dict[str, Any]]) -> Table:
    rows = [
        (
            str(p["batch_size"]),
            f"{p['context_len']:.0f}",
            f"{p['bytes'] / 1e9:.3f}",
            _cell(p["floor_us"]),
            _cell(p["back_to_back_us"]),
            _cell(p["time_per_output_token_us"]),
            _cell(p["share_of_ceiling_back_to_back"], 1, 100),
            _cell(p["share_of_ceiling"], 1, 100),
            _cell(p["gpu_idle_share"], 1, 100),
            _cell(p["output_tokens_per_second"], 0),
            _cell(p["time_to_first_token_ms"], 2),
        )
        for p in points
    ]
    columns = (
        *("batch", "context", "GB a step", "floor us", "replay us", "generate us", "% of ceiling, replay"),
        *("% of ceiling, generate", "% GPU idle", "tokens/s", "first token ms"),
    )
    return filled(columns, rows, "The step, alone and through LLM.generate")


def _host_table(points: list[dict[str, Any]]) -> Table:
    rows = [
        (
            str(p["batch_size"]),
            f"{p['context_len']:.0f}",
            _cell(p["launch_us"]),
            _cell(p["replay_host_us"]),
            _cell(p["commit_us"]),
            _cell(p["commit_us_per_row"], 2),
            _cell(p["wait_us"]),
            _cell(p["gpu_idle_share_by_events"], 1, 100),
        )
        for p in points
    ]
    columns = (
        *("batch", "context", "launch us", "of it replay us", "commit us", "commit us a row"),
        *("waiting us", "% GPU idle, by events"),
    )
    return filled(columns, rows, "The host in a steady step")


def _baseline_table(
    points: list[dict[str, Any]],
    theirs: dict[str, list[dict[str, Any]]],
    faster: dict[str, list[float | None]],
) -> Table:
    field = "time_per_output_token_us"
    rows = [
        (
            name,
            str(run["batch_size"]),
            f"{ours['context_len']:.0f}",
            _cell(ours[field]),
            _cell(run[field]),
            _cell(ratio, 2),
        )
        for name, found in theirs.items()
        # The batch sizes come first: they run at the first context.
        for ours, run, ratio in zip(points, found, faster[name], strict=False)
    ]
    columns = ("baseline", "batch", "context", "our us/token", "its us/token", "ours is faster by")
    return Table(columns, rows, "The same through others, at the first context length alone")


def _kernel_table(found: dict[str, Any]) -> Table:
    rows = [
        (
            ", ".join(filter(None, (row["op"], row["part"]))) or "-",
            row["kernel"],
            f"{row['launches']:g}",
            f"{row['us_each']:.2f}",
            f"{row['us_a_step']:.1f}",
            _cell(row["bytes_a_step"], 2, 1e-6),
            _cell(row["share_of_ceiling"], 1, 100),
        )
        for row in found["kernels"]
    ]
    for name, time_field, share_field in (
        ("sum", "sum_us", "share_of_ceiling_sum"),
        ("replay under the profiler", "replay_under_profiler_us", None),
        ("replay undisturbed", "replay_undisturbed_us", "share_of_ceiling_undisturbed"),
    ):
        share = _cell(found[share_field], 1, 100) if share_field else "-"
        read = _cell(found["bytes_a_step"], 2, 1e-6) if share_field else "-"
        rows.append((name, "", "", "", f"{found[time_field]:.1f}", read, share))
    title = f"Kernels of a replay, batch {found['batch_size']}, context {found['context_len']:.0f}, by the profiler"
    columns = ("op", "kernel", "launches", "us each", "us a step", "MB a step", "% of ceiling")
    return filled(columns, rows, title)


def _ceiling_note(ceiling: dict[str, Any] | None) -> list[str]:
    if ceiling is None:
        return []
    speeds = ceiling["by_block_shape"].values()
    return [
        f"The ceiling: {ceiling['bytes_per_second'] / 1e12:.3f} TB/s, the best of {len(speeds)} block shapes that only "
        f"read (the worst: {min(speeds) / 1e12:.3f})."
    ]


def _notes(llm: LLM, kernels: list[dict[str, Any]]) -> list[str]:
    why = llm.engine.why_no_graphs
    if why is not None:
        return [
            f"Without graphs ({why}) there is no replay, no kernel table and no idle share."
            if llm.engine.config.device.type == "cuda"
            else "On a CPU there is no replay, no kernel table, no measured ceiling and no idle share, and launching "
            "is computing. The step through LLM.generate, the bytes and commit are as on a GPU."
        ]
    if not kernels:
        return []
    return [
        "A kernel counts from where those before it had ended, though it may have begun to read before: its share of "
        "the ceiling is then too high (above 100 %, even), and theirs too low. The profiler may hold back dependent "
        "launches. MB are weights, keys and values, each counted once; an op's stand beside its costliest kernel."
    ]


def _panels(points: list[dict[str, Any]], sizes: int) -> list[Panel]:
    by_batch = points[:sizes]
    by_context = sorted([points[0], *points[sizes:]], key=lambda p: p["context_len"])
    panels: list[Panel] = []
    for found, field, label in (
        (by_batch, "batch_size", "batch size"),
        (by_context, "context_len", "context, tokens"),
    ):
        if len(found) == 1 and panels:
            continue  # one context: nothing to plot against
        x = [p[field] for p in found]
        times = [
            Series(name, x, [p[source] for p in found])
            for name, source in (
                ("through generate", "time_per_output_token_us"),
                ("replay, back to back", "back_to_back_us"),
                ("floor", "floor_us"),
            )
            if all(p[source] is not None for p in found)
        ]
        panels.append(Panel(f"Step time by {label}", label, "us", times, log_x=True))
        shares = [
            Series(name, x, [p[source] * 100 for p in found])
            for name, source in (
                ("through generate", "share_of_ceiling"),
                ("replay, back to back", "share_of_ceiling_back_to_back"),
            )
            if all(p[source] is not None for p in found)
        ]
        if shares:
            panels.append(
                Panel(
                    f"Share of ceiling by {label}", label, "% of read bandwidth", shares, log_x=True, top=100
                )
            )
    return panels
