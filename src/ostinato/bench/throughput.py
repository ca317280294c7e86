"""`bench throughput`: many requests at once, as fast as they go."""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

from ..errors import ConfigError
from . import baselines, options
from .plot import Panel, Series
from .result import Result, Table
from .workload import PROTOCOLS, Work, synthetic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    at_least = options.at_least
    parser.add_argument("--num-prompts", type=at_least(1), help="requests (256)")
    parser.add_argument("--input-len", type=at_least(1), help="tokens of a prompt (512)")
    parser.add_argument("--output-len", type=at_least(1), help="tokens of an output (128)")
    parser.add_argument(
        "--random-range-ratio",
        type=options.share,
        help="lengths are uniform within this share of the given ones: 0.5 is half to one and a half (0)",
    )
    parser.add_argument(
        "--protocol",
        type=options.one_of(PROTOCOLS, "protocol"),
        metavar="NAME",
        help="a published workload instead: nano-vllm (256 requests, 100 to 1024 tokens in and out)",
    )
    parser.add_argument(
        "--num-warmup-runs",
        type=at_least(0),
        default=1,
        help="runs before the measured one, of other prompts of the same lengths (1)",
    )
    options.add_baseline_argument(parser)
    parser.add_argument(
        "--baseline-batch-size",
        type=at_least(1),
        default=32,
        help="a baseline runs padded batches of this size (32)",
    )
    options.add_engine_arguments(parser)
    options.add_sampling_arguments(parser, temperature=None)
    options.add_output_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    protocol = PROTOCOLS[args.protocol] if args.protocol else None
    given = [
        n
        for n in ("num_prompts", "input_len", "output_len", "random_range_ratio")
        if getattr(args, n) is not None
    ]
    if protocol and given:
        raise ConfigError(
            f"--protocol {args.protocol} fixes --{given[0].replace('_', '-')}: leave one of the two out"
        )
    if args.temperature is None:
        args.temperature = protocol.temperature if protocol else 0.0
    work = _work(args, options.vocab_size(args), args.seed)
    longest = {"max_model_len": work.longest}
    chosen = options.engine_options(
        args, longest, **({"max_model_len": protocol.max_model_len} if protocol else {})
    )
    theirs = baselines.throughput(args, work)
    llm = options.make_llm(chosen)
    try:
        for turn in range(args.num_warmup_runs):
            _seconds(llm, args, _refilled(work, llm.engine.spec.vocab_size, args.seed + 1 + turn))
        before = _steps(llm)
        elapsed = _seconds(llm, args, work)
        steps = _steps(llm) - before
        ours = figures(work, elapsed)
        fields: dict[str, Any] = {
            "protocol": args.protocol,
            **ours,
            "num_steps": steps,
            "engine": options.described(llm),
        }
    finally:
        llm.close()
    if theirs:
        faster = {name: speedup(ours, one) for name, one in theirs.items()}
        fields |= {"baselines": theirs, "speedup": faster}
    sides = {"ostinato": ours, **theirs}
    return Result(fields, [_table(sides)], [_panel(sides)], baselines.notes(args))


def _work(args: argparse.Namespace, vocab: int, seed: int) -> Work:
    if args.protocol:
        return PROTOCOLS[args.protocol].make(vocab, seed)
    return synthetic(
        args.num_prompts or 256,
        args.input_len or 512,
        args.output_len or 128,
        vocab_size=vocab,
        spread=args.random_range_ratio or 0.0,
        seed=seed,
    )


def _refilled(work: Work, vocab: int, seed: int) -> Work:
    """Requests of the same lengths with other ids: the prefix cache must not know the measured ones."""
    rng = random.Random(seed)
    prompts = tuple(tuple(rng.randrange(vocab) for _ in prompt) for prompt in work.prompts)
    return Work(prompts, work.max_tokens)


def _seconds(llm: Any, args: argparse.Namespace, work: Work) -> float:
    params = [options.sampling(args, tokens) for tokens in work.max_tokens]
    prompts = [list(prompt) for prompt in work.prompts]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - begin
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    if made != work.output_tokens:
        raise ConfigError(
            f"{work.output_tokens} tokens were asked for and {made} made: raise --max-model-len"
        )
    return elapsed


def _steps(llm: Any) -> int:
    metrics: dict[str, dict[str, int]] = llm.get_metrics()
    return sum(metrics["graph_steps"].values()) + sum(metrics["eager_steps"].values())


def figures(work: Work, elapsed: float) -> dict[str, Any]:
    """vLLM's fields of a run of `elapsed` seconds, and the outputs by themselves."""
    total = work.input_tokens + work.output_tokens
    return {
        "elapsed_time": elapsed,
        "num_requests": len(work.prompts),
        "total_num_tokens": total,
        "total_input_tokens": work.input_tokens,
        "total_output_tokens": work.output_tokens,
        "requests_per_second": len(work.prompts) / elapsed,
        "tokens_per_second": total / elapsed,
        "output_tokens_per_second": work.output_tokens / elapsed,
    }


def speedup(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Our output tokens a second over theirs: above 1 we are faster."""
    return float(ours["output_tokens_per_second"] / theirs["output_tokens_per_second"])


def _table(sides: dict[str, dict[str, Any]]) -> Table:
    ours = sides["ostinato"]
    rows = [
        (
            name,
            str(one["num_requests"]),
            f"{one['total_input_tokens']:,}",
            f"{one['total_output_tokens']:,}",
            f"{one['elapsed_time']:.2f}",
            f"{one['requests_per_second']:.2f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['output_tokens_per_second']:,.0f}",
            "" if one is ours else f"{speedup(ours, one):.2f}",
        )
        for name, one in sides.items()
    ]
    columns = (
        *("", "requests", "tokens in", "tokens out", "elapsed s"),
        *("requests/s", "tokens/s", "output tokens/s", "ours is faster by"),
    )
    one_sided = len(sides) == 1
    return Table(columns[:-1] if one_sided else columns, [r[:-1] for r in rows] if one_sided else rows)


def _panel(sides: dict[str, dict[str, Any]]) -> Panel:
    series = [
        Series(label, (), [one[field] for one in sides.values()])
        for label, field in (("output tokens/s", "output_tokens_per_second"),)
    ]
    return Panel("Throughput", "", "tokens/s", series, kind="stack", ticks=list(sides))
