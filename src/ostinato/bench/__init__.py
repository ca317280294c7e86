"""Benchmarks: `ostinato bench latency | throughput | startup | step | serve`.

Each command is a module with `add_arguments(parser)` and `run(args) -> Result`; `cli.py` prints
and writes results. Nothing heavy is imported before a command runs.
"""
