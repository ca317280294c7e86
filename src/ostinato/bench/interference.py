"""`bench latency --interfere`: the time between tokens of decodes while prompts arrive.

Decodes run alone, then with a prompt arriving every few of their tokens, then alone again. The
figure is the 99th percentile of the times between two tokens of a decode, over that of the quiet
phases: what the arrival of others costs those who are already served.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from . import options
from .plot import Panel, Series
from .result import Result, Table, percentile

if TYPE_CHECKING:
    from ..engine import Engine

WARM_ARRIVALS = 10
"""Prompts that arrive before anything is timed: enough to capture the graphs that serve them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    at_least = options.at_least
    group = parser.add_argument_group("interference")
    group.add_argument(
        "--interfere",
        action="store_true",
        help="time between tokens of --interfere-decodes decodes while prompts arrive, over the quiet one",
    )
    group.add_argument("--interfere-decodes", type=at_least(1), default=32, help="decodes under way (32)")
    group.add_argument(
        "--interfere-input-len", type=at_least(1), default=512, help="tokens of a prompt that arrives (512)"
    )
    group.add_argument(
        "--interfere-every", type=at_least(2), default=16, help="decode tokens between two arrivals (16)"
    )
    group.add_argument(
        "--interfere-arrivals",
        type=at_least(1),
        default=32,
        help="prompts that arrive while it is timed (32)",
    )


def run(args: argparse.Namespace) -> Result:
    if args.baseline:
        raise ConfigError("--interfere compares the engine with itself: leave --baseline out")
    every, arrivals = args.interfere_every, args.interfere_arrivals
    loaded_steps = every * arrivals
    steps = every * (WARM_ARRIVALS + arrivals) + loaded_steps  # warm-up, loaded, and as many quiet ones
    llm = options.make_llm(
        options.engine_options(
            args,
            {
                "max_model_len": max(args.input_len + 2 * steps + 16, args.interfere_input_len + 2),
                "max_num_seqs": args.interfere_decodes + 1,
            },
            max_num_seqs=args.interfere_decodes + 4,
        )
    )
    try:
        phases = measure(llm.engine, args, every, arrivals)
        fields: dict[str, Any] = {
            "decodes": args.interfere_decodes,
            "input_len": args.input_len,
            "arriving_input_len": args.interfere_input_len,
            "tokens_between_arrivals": every,
            **phases,
            "engine": options.described(llm),
        }
    finally:
        llm.close()
    return Result(fields, [_table(phases)], [_panel(phases)])


def measure(engine: Engine, args: argparse.Namespace, every: int, arrivals: int) -> dict[str, Any]:
    """Times between tokens in seconds, quiet and loaded, and what follows from them."""
    rng = random.Random(args.seed)
    vocab = engine.spec.vocab_size

    def prompt(length: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(length)]

    params = options.sampling(args, engine.config.max_model_len - args.input_len)
    decodes = [engine.add_request(prompt(args.input_len), params) for _ in range(args.interfere_decodes)]
    watch = _Watch(engine, decodes)
    try:
        while watch.fewest < 2:
            watch.step()

        def phase(tokens: int, loaded: bool) -> list[float]:
            """Gaps while each decode gets `tokens` more tokens."""
            while engine.scheduler.num_running > len(decodes) or engine.scheduler.num_waiting:
                watch.step()  # who arrived in the phase before leaves first
            watch.gaps.clear()
            begin = watch.fewest
            due = begin + 1
            while watch.fewest < begin + tokens:
                if loaded and watch.fewest >= due:
                    due += every
                    one = options.sampling(args, 1)
                    engine.add_request(prompt(args.interfere_input_len), one)
                watch.step()
            return list(watch.gaps)

        phase(every * WARM_ARRIVALS, loaded=True)
        half = max(every * arrivals // 2, 1)
        quiet = phase(half, loaded=False)
        loaded = phase(every * arrivals, loaded=True)
        quiet += phase(half, loaded=False)
    finally:
        engine.abort(decodes)
        while engine.has_unfinished:
            engine.step()
    return {
        "quiet": _summary(quiet),
        "loaded": _summary(loaded),
        "p99_ratio": percentile(loaded, 99) / percentile(quiet, 99),
        "p99_over_quiet_median": percentile(loaded, 99) / statistics.median(quiet),
    }


class _Watch:
    """Steps an engine and notes when each decode's tokens come."""

    def __init__(self, engine: Engine, prompt_ids: Sequence[str]) -> None:
        self._engine = engine
        self._requests = [engine.outputs.running(name)[0] for name in prompt_ids]
        self._counts = [0] * len(self._requests)
        self._last = [0.0] * len(self._requests)
        self.gaps: list[float] = []

    @property
    def fewest(self) -> int:
        """Tokens of the decode that has fewest."""
        return min(self._counts)

    def step(self) -> None:
        self._engine.step()
        now = time.perf_counter()
        for i, request in enumerate(self._requests):
            count = len(request.output_token_ids)
            if count > self._counts[i]:
                if self._counts[i]:
                    self.gaps.append(now - self._last[i])
                self._counts[i], self._last[i] = count, now


def _summary(gaps: Sequence[float]) -> dict[str, Any]:
    return {
        "num_gaps": len(gaps),
        "mean_itl_ms": statistics.fmean(gaps) * 1e3,
        "median_itl_ms": statistics.median(gaps) * 1e3,
        "p90_itl_ms": percentile(gaps, 90) * 1e3,
        "p99_itl_ms": percentile(gaps, 99) * 1e3,
        "max_itl_ms": max(gaps) * 1e3,
        "percentiles_ms": [percentile(gaps, p) * 1e3 for p in range(101)],
    }


def _table(phases: dict[str, Any]) -> Table:
    names = ("mean_itl_ms", "median_itl_ms", "p90_itl_ms", "p99_itl_ms", "max_itl_ms")
    rows = [
        (name, str(phases[name]["num_gaps"]), *(f"{phases[name][field]:.3f}" for field in names))
        for name in ("quiet", "loaded")
    ]
    rows.append(
        ("ratio", "", *(f"{phases['loaded'][field] / phases['quiet'][field]:.2f}" for field in names))
    )
    columns = ("time between tokens", "samples", "mean ms", "median ms", "p90 ms", "p99 ms", "max ms")
    return Table(columns, rows)


def _panel(phases: dict[str, Any]) -> Panel:
    shares = list(range(101))
    series = [Series(name, shares, phases[name]["percentiles_ms"]) for name in ("quiet", "loaded")]
    return Panel("Time between tokens", "percentile", "ms", series)
