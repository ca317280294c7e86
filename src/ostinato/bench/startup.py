"""`bench startup`: from the command to its first token, in fresh processes.

The first run has empty caches (ostinato's, Triton's, the driver's; and Python's bytecode, where this
process writes none), the others what it left. With `--shape` the weights are random, but lie in files
as a checkpoint's do and are read from there: `--weights random` makes them on the device instead. What
a run does is what `ostinato generate` does, with the prompt as token ids.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OstinatoError
from ..models.shapes import SHAPES
from . import options
from .plot import Panel, Series
from .result import Result, Table

SHARD_BYTES = 2 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    at_least = options.at_least
    parser.add_argument("--num-iters", type=at_least(1), default=3, help="starts after the cold one (3)")
    parser.add_argument("--input-len", type=at_least(1), default=16, help="tokens of the prompt (16)")
    parser.add_argument("--output-len", type=at_least(1), default=1, help="tokens of the output (1)")
    parser.add_argument(
        "--weights",
        choices=("file", "random"),
        default="file",
        help="with --shape: read random weights from files, or make them on the device (file)",
    )
    parser.add_argument("--tokenizer", help="with --shape: load this tokenizer too (folder or file)")
    parser.add_argument(
        "--folder", help="keep the files and caches of --shape here instead of a temporary folder"
    )
    options.add_engine_arguments(parser)
    options.add_output_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory(prefix="ostinato-startup-") as temporary:
        folder = Path(args.folder or temporary)
        order = _order(args, folder)
        with tempfile.TemporaryDirectory(prefix="caches-", dir=temporary) as caches:
            runs = [measure(order, Path(caches)) for _ in range(1 + args.num_iters)]
    warm = [one["first_token_seconds"] for one in runs[1:]]
    fields = {
        "cold_first_token_seconds": runs[0]["first_token_seconds"],
        "warm_first_token_seconds": statistics.median(warm),
        "warm_first_token_seconds_all": warm,
        "runs": runs,
        "bytecode": "kept between the runs" if sys.dont_write_bytecode else "as installed",
        "weights": args.weights if args.shape else "file",
        "engine": runs[0]["engine"],
    }
    return Result(fields, [_table(runs)], [_panel(runs)])


def _order(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every run is told."""
    from ..models.hub import resolve

    chosen = options.engine_options(args)
    if args.shape and args.weights == "file":
        folder = folder / args.shape
        if not (folder / "config.json").exists():
            write_checkpoint(folder, SHAPES[args.shape])
        chosen |= {"model": str(folder), "load_format": "auto"}
    elif not args.shape:
        chosen["model"] = str(resolve(args.model))  # the runs' cache folders are empty
    if args.tokenizer:
        chosen["tokenizer"] = str(resolve(args.tokenizer))
    elif args.shape:
        chosen["skip_tokenizer_init"] = True
    return {"options": chosen, "input_len": args.input_len, "output_len": args.output_len, "seed": args.seed}


def measure(order: Mapping[str, Any], caches: Path) -> dict[str, Any]:
    """One start in a process of its own.

    Returns:
        The seconds of each stage, and until the first token. They start before the process does.

    Raises:
        OstinatoError: it failed; the message ends with its last words.
    """
    environment = os.environ | {
        "OSTINATO_CACHE": str(caches / "ostinato"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
    }
    if sys.dont_write_bytecode:  # what is installed here may have none: keep it as other machines do
        environment |= {"PYTHONPYCACHEPREFIX": str(caches / "python"), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-m", f"{__package__}.first_token"]
    # The monotonic clock is the machine's, so that the other process can count from here.
    started = time.monotonic()
    done = subprocess.run(
        command,
        input=json.dumps({**order, "started": started}),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        words = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise OstinatoError(f"a start ended with status {done.returncode}:\n{words}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def write_checkpoint(folder: Path, config: Mapping[str, Any]) -> None:
    """A checkpoint of random bfloat16 weights in files of about 2 GiB, config.json last."""
    import torch
    from safetensors.torch import save_file

    from ..models.decoder import expected_tensors
    from ..models.registry import spec_from_config

    folder.mkdir(parents=True, exist_ok=True)
    shapes = expected_tensors(spec_from_config(config))
    block = torch.randn(1 << 22).mul_(0.02).to(torch.bfloat16)  # repeated: who reads them does not mind
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    held = 0

    def flush() -> None:
        nonlocal shard, held
        file = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / file)
        index.update(dict.fromkeys(shard, file))
        shard, held = {}, 0

    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            shard[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            count = torch.Size(shape).numel()
            shard[name] = block.repeat(-(-count // len(block)))[:count].view(shape).clone()
        held += shard[name].numel() * 2
        if held >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(dict(config)))


def _stages(runs: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(stage for one in runs for stage in one["stages"]))


def _table(runs: list[dict[str, Any]]) -> Table:
    rows = [(stage, *(f"{one['stages'].get(stage, 0.0):.3f}" for one in runs)) for stage in _stages(runs)]
    rows.append(("until the first token", *(f"{one['first_token_seconds']:.3f}" for one in runs)))
    columns = ("seconds", "cold", *(f"warm {i}" for i in range(1, len(runs))))
    return Table(columns, rows)


def _panel(runs: list[dict[str, Any]]) -> Panel:
    series = [Series(stage, (), [one["stages"].get(stage, 0.0) for one in runs]) for stage in _stages(runs)]
    ticks = ["cold", *(f"warm {i}" for i in range(1, len(runs)))]
    return Panel("From the command to the first token", "", "seconds", series, kind="stack", ticks=ticks)
