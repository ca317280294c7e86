"""`bench latency`: one batch at a time, from the call to the last token.

Time per output token is (time of N tokens - time of 1) / (N - 1), time to first token the time
of 1, both through `LLM.generate` with fresh random prompts; medians over the iterations. With
`--interfere` it is the time between tokens of decodes while prompts arrive (`interference.py`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from . import baselines, interference, options
from .plot import Panel, Series
from .result import Result, Table, percentile

PERCENTILES = (10, 25, 50, 75, 90, 99)
"""The ones that vLLM writes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    at_least = options.at_least
    parser.add_argument(
        "--batch-size", type=at_least(1), nargs="+", default=[1], metavar="N", help="one or several"
    )
    parser.add_argument("--input-len", type=at_least(1), default=128, help="tokens of a prompt (128)")
    parser.add_argument("--output-len", type=at_least(1), default=256, help="tokens of an output (256)")
    parser.add_argument("--num-iters", type=at_least(1), default=10, help="measured runs (10)")
    parser.add_argument("--num-iters-warmup", type=at_least(0), default=3, help="runs before them (3)")
    interference.add_arguments(parser)
    options.add_baseline_argument(parser)
    options.add_engine_arguments(parser)
    options.add_sampling_arguments(parser)
    options.add_output_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    if args.interfere:
        return interference.run(args)
    needs = {"max_model_len": args.input_len + args.output_len, "max_num_seqs": max(args.batch_size)}
    chosen = options.engine_options(args, needs)
    theirs = baselines.latency(args)
    llm = options.make_llm(chosen)
    try:
        generate = options.timed_generate(llm, args, args.input_len)
        runs = [
            measure(generate, size, args.output_len, args.num_iters, args.num_iters_warmup)
            for size in args.batch_size
        ]
        fields: dict[str, Any] = {
            "input_len": args.input_len,
            "output_len": args.output_len,
            "runs": runs,
            "engine": options.described(llm),
        }
    finally:
        llm.close()
    if len(runs) == 1:  # where vLLM's file has them
        fields |= runs[0]
    if theirs:
        fields |= {"baselines": theirs, "speedup": speedups(runs, theirs)}
    return Result(fields, [_table(runs, theirs)], _panels(runs, theirs), baselines.notes(args))


def speedups(
    ours: list[dict[str, Any]], theirs: dict[str, list[dict[str, Any]]]
) -> dict[str, list[float | None]]:
    """Their time per output token over ours, by baseline and batch size: above 1 we are faster."""
    field = "time_per_output_token_us"
    return {
        name: [baselines.speedup(a[field], b[field]) for a, b in zip(ours, found, strict=True)]
        for name, found in theirs.items()
    }


def measure(
    generate: Callable[[int, int], float], batch: int, tokens: int, iters: int, warmup: int
) -> dict[str, Any]:
    """Time a batch: whole outputs and first tokens, in turn.

    Args:
        generate: seconds of a run of (batch size, tokens of output), until the last token is there.
        batch: prompts at a time.
        tokens: of output each.
        iters: measured pairs of runs.
        warmup: pairs before them: capturing, checking, clocks.

    Returns:
        vLLM's fields (seconds), and the two parts that a user feels.
    """
    for _ in range(warmup):
        generate(batch, tokens)
        generate(batch, 1)
    whole, first = [], []
    for _ in range(iters):
        whole.append(generate(batch, tokens))
        first.append(generate(batch, 1))
    steady = statistics.median(whole) - statistics.median(first)
    return {
        "batch_size": batch,
        "avg_latency": statistics.fmean(whole),
        "latencies": whole,
        "percentiles": {str(p): percentile(whole, p) for p in PERCENTILES},
        "time_to_first_token_ms": statistics.median(first) * 1e3,
        "first_token_latencies": first,
        "time_per_output_token_us": steady / (tokens - 1) * 1e6 if tokens > 1 else None,
        "output_tokens_per_second": batch * (tokens - 1) / steady if tokens > 1 and steady > 0 else None,
    }


def _table(runs: list[dict[str, Any]], theirs: dict[str, list[dict[str, Any]]]) -> Table:
    rows, faster = [], speedups(runs, theirs)
    for i, ours in enumerate(runs):
        for name, one in (("ostinato", ours), *((n, found[i]) for n, found in theirs.items())):
            us = one["time_per_output_token_us"]
            ratio = None if one is ours else faster[name][i]
            rows.append(
                (
                    name,
                    str(one["batch_size"]),
                    f"{one['avg_latency']:.4f}",
                    f"{one['percentiles']['50']:.4f}",
                    f"{one['percentiles']['99']:.4f}",
                    f"{one['time_to_first_token_ms']:.2f}",
                    "-" if us is None else f"{us:.1f}",
                    "-"
                    if one["output_tokens_per_second"] is None
                    else f"{one['output_tokens_per_second']:.1f}",
                    "" if one is ours else "-" if ratio is None else f"{ratio:.2f}",
                )
            )
    columns = (
        *("", "batch", "avg_latency s", "p50 s", "p99 s", "first token ms"),
        *("us/output token", "tokens/s", "ours is faster by"),
    )
    return Table(columns if theirs else columns[:-1], rows if theirs else [row[:-1] for row in rows])


def _panels(runs: list[dict[str, Any]], theirs: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    sides = {"ostinato": runs, **theirs}
    sizes = [run["batch_size"] for run in runs]

    def panel(title: str, unit: str, field: str) -> Panel:
        if len(runs) == 1:
            heights = [found[0][field] or 0.0 for found in sides.values()]
            bars = [Series(f"batch size {sizes[0]}", (), heights)]
            return Panel(title, "", unit, bars, kind="stack", ticks=list(sides))
        series = [
            Series(name, sizes, [one[field] for one in found])
            for name, found in sides.items()
            if all(one[field] is not None for one in found)
        ]
        return Panel(title, "batch size", unit, series, log_x=True)

    return [
        panel("Time per output token", "us", "time_per_output_token_us"),
        panel("Time to first token", "ms", "time_to_first_token_ms"),
    ]
