"""`bench startup`: from the command to its first token, in fresh processes.

The first run has empty caches (ostinato's, Triton's, the driver's; and Python's bytecode, where this
process writes none), the others what it left. With `--shape` the weights are random, but lie in files
as a checkpoint's do and are read from there: `--weights random` makes them on the device instead. What
a run does is what `ostinato generate` does, with the prompt as token ids. A baseline starts as often,
in processes of its own, over the same files.
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
from . import baselines, options
from .latency import PERCENTILES
from .plot import Panel, Series
from .result import Result, Table, percentile

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
    options.add_baseline_argument(parser, ("transformers",))
    options.add_engine_arguments(parser)
    options.add_output_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    orders = baselines.startup(args)
    with tempfile.TemporaryDirectory(prefix="ostinato-startup-") as temporary:
        folder = Path(args.folder or temporary)
        order = _order(args, folder)

        def starts(order: Mapping[str, Any], module: str) -> list[dict[str, Any]]:
            with tempfile.TemporaryDirectory(prefix="caches-", dir=temporary) as caches:
                return [measure(order, Path(caches), module) for _ in range(1 + args.num_iters)]

        shared = {name: order[name] for name in ("input_len", "seed")}
        if order["options"]["load_format"] != "dummy":
            shared["folder"] = order["options"]["model"]
        theirs = {name: starts(one | shared, "baselines") for name, one in orders.items()}
        runs = starts(order, "first_token")
    fields = {
        **first_tokens(runs),
        **_vllm_fields([one["building_seconds"] for one in runs]),
        "runs": runs,
        "bytecode": "kept between the runs" if sys.dont_write_bytecode else "as installed",
        "weights": args.weights if args.shape else "file",
        "engine": runs[0]["engine"],
    }
    if theirs:
        found = {name: first_tokens(ran) | {"runs": ran} for name, ran in theirs.items()}
        fields |= {
            "baselines": found,
            "speedup": {name: speedups(fields, one) for name, one in found.items()},
        }
    return Result(fields, [_table(runs, theirs)], [_panel(runs, theirs)])


def first_tokens(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds until the first token; the first run is the cold one."""
    warm = [one["first_token_seconds"] for one in runs[1:]]
    return {
        "cold_first_token_seconds": runs[0]["first_token_seconds"],
        "warm_first_token_seconds": statistics.median(warm),
        "warm_first_token_seconds_all": warm,
    }


def speedups(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float | None]:
    """Their seconds until the first token over ours: above 1 we are faster."""
    return {
        kind: baselines.speedup(ours[f"{kind}_first_token_seconds"], theirs[f"{kind}_first_token_seconds"])
        for kind in ("cold", "warm")
    }


def _vllm_fields(seconds: list[float]) -> dict[str, Any]:
    """What vLLM's file holds: `LLM(...)` alone, without interpreter and imports and before a first token."""
    fields: dict[str, Any] = {}
    for kind, times in (("cold", seconds[:1]), ("warm", seconds[1:])):
        fields |= {
            f"avg_{kind}_startup_time": statistics.fmean(times),
            f"{kind}_startup_times": times,
            f"{kind}_startup_percentiles": {str(p): percentile(times, p) for p in PERCENTILES},
        }
    return fields


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


def measure(order: Mapping[str, Any], caches: Path, module: str = "first_token") -> dict[str, Any]:
    """One start in a process of its own.

    Args:
        order: what it is told; the moment of its start is added.
        caches: folder of its caches.
        module: of this package: what answers the order.

    Returns:
        What it answers: seconds until the first token. They start before the process does.

    Raises:
        OstinatoError: it failed; the message ends with its last words.
    """
    environment = os.environ | {
        "OSTINATO_CACHE": str(caches / "ostinato"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    if sys.dont_write_bytecode:  # what is installed here may have none: keep it as other machines do
        environment |= {"PYTHONPYCACHEPREFIX": str(caches / "python"), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-m", f"{__package__}.{module}"]
    # The monotonic clock is the machine's, so that the other process can count from here.
    started = time.monotonic()
    done = subprocess.run(
        command,
        input=json.dumps({**order, "started": started}, default=list),
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
    held = total = 0

    def flush() -> None:
        nonlocal shard, held, total
        file = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})  # transformers asks for it
        index.update(dict.fromkeys(shard, file))
        total += held
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
    contents = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(contents))
    (folder / "config.json").write_text(json.dumps(dict(config)))


def _stages(runs: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(stage for one in runs for stage in one["stages"]))


def _table(runs: list[dict[str, Any]], theirs: Mapping[str, list[dict[str, Any]]]) -> Table:
    rows = [(stage, *(f"{one['stages'].get(stage, 0.0):.3f}" for one in runs)) for stage in _stages(runs)]
    rows.append(("until the first token", *(f"{one['first_token_seconds']:.3f}" for one in runs)))
    for name, found in theirs.items():
        rows.append((f"{name}, the same", *(f"{one['first_token_seconds']:.3f}" for one in found)))
        ratios = [
            baselines.speedup(a["first_token_seconds"], b["first_token_seconds"])
            for a, b in zip(runs, found, strict=True)
        ]
        rows.append(("ours is faster by", *(f"{ratio:.2f}" for ratio in ratios)))
    columns = ("seconds", "cold", *(f"warm {i}" for i in range(1, len(runs))))
    return Table(columns, rows)


def _panel(runs: list[dict[str, Any]], theirs: Mapping[str, list[dict[str, Any]]]) -> Panel:
    ticks = ["cold", *(f"warm {i}" for i in range(1, len(runs)))]
    ticks += [f"{name}, {kind}" for name in theirs for kind in ("cold", "warm")]
    others = [found[i]["first_token_seconds"] for found in theirs.values() for i in (0, -1)]
    series = [
        Series(stage, (), [one["stages"].get(stage, 0.0) for one in runs] + [0.0] * len(others))
        for stage in _stages(runs)
    ]
    if others:
        series.append(Series("the baseline", (), [0.0] * len(runs) + others))
    return Panel("From the command to the first token", "", "seconds", series, kind="stack", ticks=ticks)
