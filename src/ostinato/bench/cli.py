"""`ostinato bench`: arguments, and what becomes of a result. Light: commands are imported when they run."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError
from ..files import check_writable, write
from . import plot
from .options import Parser
from .result import Result

_COMMANDS = {
    "latency": "One batch at a time: latency, first token, time per output token.",
    "throughput": "Many requests at once: tokens per second.",
    "startup": "From the command to its first token, with empty and with filled caches.",
    "step": "One decode step alone: kernels, bytes, share of the GPU's read bandwidth, idle share, host.",
}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks to the parser of `ostinato bench`."""
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK", parser_class=Parser)
    for name, text in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        module = importlib.import_module(f"{__package__}.{name}")
        module.add_arguments(sub)
        sub.add_argument("--verbose", action="store_true", help="log what happens")
        sub.set_defaults(run=_runner(name, module.run))
    text = "Requests over HTTP at a given rate."
    serve = commands.add_parser("serve", help=text, description=text)
    _add_serve(serve)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    """`bench serve` comes with the server, which an installation need not have."""
    name = f"{__package__}.serve"
    if importlib.util.find_spec(name) is None:

        def missing(args: argparse.Namespace) -> int:
            raise ConfigError(
                "bench serve needs the server, which this installation of ostinato does not have"
            )

        parser.set_defaults(run=missing, verbose=False)
        return
    module = importlib.import_module(name)
    module.add_arguments(parser)
    if parser.get_default("verbose") is None:
        parser.set_defaults(verbose=False)
    parser.set_defaults(run=module.main)


def _runner(name: str, run: Callable[[argparse.Namespace], Result]) -> Callable[[argparse.Namespace], int]:
    def measured(args: argparse.Namespace) -> int:
        plot.check(args.plot)
        for option in ("json", "plot"):
            check_writable(f"--{option}", getattr(args, option))
        if args.json is not None and args.plot is not None and Path(args.json) == Path(args.plot):
            raise ConfigError(f"--json and --plot both name {args.json}: one would overwrite the other")
        result = run(args)
        from .environment import describe

        environment = describe()
        where = environment.get("gpu") or environment.get("cpu")
        title = f"ostinato bench {name}: {args.shape or args.model or 'the default model'} on {where}"
        print(title)
        for table in result.tables:
            print(f"\n{table}")
        for note in result.notes:
            print(f"\n{note}")
        if args.json:
            fields = {"benchmark": name, "environment": environment, **result.fields}
            write(args.json, json.dumps(fields, indent=2, allow_nan=False) + "\n")
            print(f"\nwrote {args.json}")
        if args.plot:
            plot.save(args.plot, title, result.panels)
            print(f"wrote {args.plot}")
        return 0

    return measured
