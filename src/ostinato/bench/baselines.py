"""The same work through something else, for a ratio: transformers, or plain torch compiled.

Each baseline runs in a process of its own, one after another and before the engine is made, so
that no two of them share the GPU's memory. Weights are random, of the model's own shapes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import ConfigError, OstinatoError
from . import options
from .workload import Work, synthetic

Generate = Callable[[Sequence[Sequence[int]], int], object]
"""A padded batch of prompts and the tokens that each gets."""


def latency(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The runs of `bench latency` by baseline, one for each batch size."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(args.baseline):
        order = _order(args, name) | {
            "kind": "latency",
            "input_len": args.input_len,
            "output_len": args.output_len,
            "iters": args.num_iters,
            "warmup": max(args.num_iters_warmup, 2),  # the first runs compile and record
        }
        found[name] = [_ask(order | {"batch": size}) for size in args.batch_size]
    return found


def throughput(args: argparse.Namespace, work: Work) -> dict[str, dict[str, Any]]:
    """The figures of `bench throughput` by baseline."""
    return {
        name: _ask(
            _order(args, name)
            | {
                "kind": "throughput",
                "batch": min(args.baseline_batch_size, len(work.prompts)),
                "prompts": work.prompts,
                "max_tokens": work.max_tokens,
            }
        )
        for name in dict.fromkeys(args.baseline)
    }


def startup(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The orders of `bench startup` by baseline, without prompt and weights; each run is another process.

    Raises:
        ConfigError: see `_order`; or torch-compile is among them.
    """
    names = tuple(dict.fromkeys(args.baseline))
    if "torch-compile" in names:
        raise ConfigError(
            "bench startup compares with transformers alone: the first token of torch-compile comes from the prompt, "
            "which it does not compile; leave --baseline torch-compile out"
        )
    return {name: _order(args, name) | {"kind": "startup"} for name in names}


def speedup(ours: float | None, theirs: float | None) -> float | None:
    """How many times as fast as a baseline we are, by two times for the same work."""
    return theirs / ours if ours and theirs is not None else None


def notes(args: argparse.Namespace) -> list[str]:
    """What a reader of a ratio has to know."""
    if not args.baseline or args.quantization is None:
        return []
    return [
        f"The baselines run unquantised, ostinato with {args.quantization} weights: the ratio is of both."
    ]


def _order(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What every baseline is told: the model's config, and the type and device that the engine would choose.

    Raises:
        ConfigError: an option that the engine or the baseline cannot take.
    """
    from ..config import EngineOptions, resolve
    from ..models.registry import spec_from_config

    config = options.model_config(args)
    resolved = resolve(
        EngineOptions.from_kwargs(options.engine_options(args)),
        model_dtype=config.get("dtype") or config.get("torch_dtype"),
        model_positions=spec_from_config(config).max_positions,
    )
    if getattr(args, "top_p", 1.0) != 1.0 or getattr(args, "top_k", 0) != 0:
        raise ConfigError("--baseline samples by temperature alone: leave --top-p and --top-k out")
    return {
        "baseline": name,
        "config": dict(config),
        "dtype": str(resolved.dtype).removeprefix("torch."),
        "device": resolved.device.type,
        "temperature": getattr(args, "temperature", 0.0),
        "seed": args.seed,
    }


def _ask(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run one order in a fresh process.

    Raises:
        OstinatoError: it failed; the message ends with its last words.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(order, default=list),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise OstinatoError(f"the baseline {order['baseline']} ended with status {done.returncode}:\n{words}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


# --- in the other process ---------------------------------------------------------------


def main() -> None:
    """Answer one order from standard input with one line of JSON."""
    order = json.load(sys.stdin)
    found = {"latency": _latency, "throughput": _throughput, "startup": _startup}[order["kind"]](order)
    print(json.dumps(found))


def _latency(order: Mapping[str, Any]) -> dict[str, Any]:
    from ..models.registry import spec_from_config
    from .latency import measure

    generate = _MAKERS[order["baseline"]](order, order["batch"], order["input_len"] + order["output_len"])
    vocab = spec_from_config(order["config"]).vocab_size
    work = synthetic(
        order["batch"], order["input_len"], order["output_len"], vocab_size=vocab, seed=order["seed"]
    )

    def seconds(batch: int, tokens: int) -> float:
        begin = time.perf_counter()
        generate(work.prompts, tokens)
        return time.perf_counter() - begin

    return measure(
        seconds,
        order["batch"],
        order["output_len"],
        order["iters"],
        order["warmup"],
    )


def _throughput(order: Mapping[str, Any]) -> dict[str, Any]:
    from .throughput import figures

    work = Work(tuple(map(tuple, order["prompts"])), tuple(order["max_tokens"]))
    room = max(map(len, work.prompts)) + max(work.max_tokens)
    generate = _MAKERS[order["baseline"]](order, order["batch"], room)
    batches = padded_batches(work, order["batch"])
    # Compiles and records at the longest sequence, so that no later batch is a new shape.
    longest = max(work.prompts, key=len)
    generate([longest] * order["batch"], max(work.max_tokens))
    begin = time.perf_counter()
    for prompts, tokens in batches:
        generate(prompts, tokens)
    return figures(work, time.perf_counter() - begin)


def _startup(order: Mapping[str, Any]) -> dict[str, Any]:
    from ..models.registry import spec_from_config

    generate = _MAKERS[order["baseline"]](order, 1, order["input_len"] + 1)
    vocab = spec_from_config(order["config"]).vocab_size
    work = synthetic(1, order["input_len"], 1, vocab_size=vocab, seed=order["seed"])
    generate(work.prompts, 1)
    # The monotonic clock is the machine's: it has run since the command was started.
    return {"first_token_seconds": time.monotonic() - order["started"]}


def padded_batches(work: Work, size: int) -> list[tuple[list[tuple[int, ...]], int]]:
    """Full batches of requests of like output length; the last is filled up by repeating its first.

    A batch runs until its longest output is complete, as static batching does.
    """
    order = sorted(range(len(work.prompts)), key=lambda i: work.max_tokens[i])
    batches = []
    for start in range(0, len(order), size):
        taken = order[start : start + size]
        prompts = [work.prompts[i] for i in taken]
        prompts += prompts[:1] * (size - len(prompts))
        batches.append((prompts, max(work.max_tokens[i] for i in taken)))
    return batches


def _transformers(order: Mapping[str, Any], batch: int, length: int) -> Generate:
    """transformers' `generate`, with a static cache and its own compilation on a GPU."""
    import torch

    transformers: Any = importlib.import_module("transformers")  # untyped
    transformers.utils.logging.set_verbosity_error()
    name = order["config"]["architectures"][0]
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**order["config"])
    make, dtype, device = transformers.AutoModelForCausalLM, getattr(torch, order["dtype"]), order["device"]
    if folder := order.get("folder"):
        # Straight to the device, for which it needs another package; else through host memory.
        place = {"device_map": device} if importlib.util.find_spec("accelerate") else {}
        model = make.from_pretrained(folder, config=config, dtype=dtype, **place).to(device)
    else:
        torch.manual_seed(0)
        with torch.device(device):
            model = make.from_config(config, dtype=dtype)
    model.eval()
    model.generation_config.eos_token_id = None
    sampled = order["temperature"] > 0
    how = {"do_sample": sampled} | ({"temperature": order["temperature"], "top_k": 0} if sampled else {})
    if order["device"] == "cuda":
        how["cache_implementation"] = "static"

    def generate(prompts: Sequence[Sequence[int]], tokens: int) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=order["device"])
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=order["device"]
        )
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **how
            )
        made[:, -1].tolist()  # until the last token is there

    return generate


def _torch_compile(order: Mapping[str, Any], batch: int, length: int) -> Generate:
    """Plain torch with `torch.compile(mode="reduce-overhead")` around the decode step."""
    import torch

    from ..models.registry import spec_from_config
    from .plain import PlainDecoder, PlainGenerator, random_weights

    spec = spec_from_config(order["config"])
    get = random_weights(spec, getattr(torch, order["dtype"]), torch.device(order["device"]))
    generator = PlainGenerator(PlainDecoder(spec, get, batch=batch, length=length), order["temperature"])
    return partial(generator.generate)


_MAKERS: Mapping[str, Callable[[Mapping[str, Any], int, int], Generate]] = {
    "transformers": _transformers,
    "torch-compile": _torch_compile,
}


if __name__ == "__main__":
    main()
