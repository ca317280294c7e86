"""Arguments that the benchmarks share, and the engine that they describe."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ConfigError, suggest
from ..models.shapes import SHAPES

if TYPE_CHECKING:
    from ..llm import LLM
    from ..types import SamplingParams

BASELINES = ("transformers", "torch-compile")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the page of usage; the exit status is 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return parse


def share(text: str) -> float:
    """An argparse type: a number from 0 up to, but not including, 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def one_of(known: Mapping[str, Any] | tuple[str, ...], what: str) -> Callable[[str], str]:
    """An argparse type: a known name; the error names the nearest one."""

    def parse(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} {name!r}{suggest(name, known)}")
        return name

    return parse


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how the engine is set up."""
    group = parser.add_argument_group("engine")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--model", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct)")
    source.add_argument(
        "--shape",
        type=one_of(SHAPES, "shape"),
        metavar="SHAPE",
        help=f"random weights of a well-known model, no download: {', '.join(SHAPES)}",
    )
    group.add_argument(
        "--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights"
    )
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    group.add_argument("--device", default="auto", help="auto, cuda or cpu")
    group.add_argument("--quantization", help="as LLM(quantization=...)")
    group.add_argument("--max-model-len", type=at_least(2), help="default: what the workload needs")
    group.add_argument("--max-num-seqs", type=at_least(1), help="most sequences in one step")
    group.add_argument("--max-num-batched-tokens", type=at_least(1), help="most tokens in one step")
    group.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    group.add_argument("--seed", type=int, default=0)


def add_sampling_arguments(parser: argparse.ArgumentParser, temperature: float | None = 0.0) -> None:
    """How tokens are chosen."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=temperature, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--disable-detokenize", action="store_true", help="make no text")


def add_baseline_argument(parser: argparse.ArgumentParser, names: Sequence[str] = BASELINES) -> None:
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        type=one_of(BASELINES, "baseline"),
        metavar="NAME",
        help=f"run the same work through {' or '.join(names)} first; may be repeated",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write every figure, with machine, versions and commit")
    group.add_argument("--plot", metavar="FILE", help="draw the result: FILE.png (matplotlib) or FILE.html")


def engine_options(
    args: argparse.Namespace, needs: Mapping[str, int] | None = None, **defaults: Any
) -> dict[str, Any]:
    """Keyword arguments of `LLM`; `needs` and `defaults` fill in what the user left open.

    Args:
        args: as parsed.
        needs: what the workload cannot do with less of: a figure of less would be another one's.
        defaults: anything else.

    Raises:
        ConfigError: the user's own value is less than what is needed.
        SamplingParamsError: a sampling parameter is wrong, which is better said before minutes of measuring.
    """
    for name, least in (needs or {}).items():
        given = getattr(args, name)
        if given is not None and given < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} {given} is less than the {least} that this workload needs: leave it out"
            )
    if hasattr(args, "temperature"):
        sampling(args, 1, temperature=args.temperature or 0.0)
    chosen: dict[str, Any] = {
        **(needs or {}),
        **defaults,
        "model": args.shape or args.model,
        "load_format": "dummy" if args.shape else args.load_format,
        "seed": args.seed,
    }
    for name in (
        *("dtype", "device", "quantization", "max_model_len", "max_num_seqs"),
        *("max_num_batched_tokens", "gpu_memory_utilization", "enforce_eager"),
    ):
        if (value := getattr(args, name)) is not None:
            chosen[name] = value
    return chosen


def make_llm(options: Mapping[str, Any]) -> LLM:
    from ..llm import LLM

    return LLM(**options)


def sampling(args: argparse.Namespace, max_tokens: int, **changes: Any) -> SamplingParams:
    """Parameters of a request that gets exactly `max_tokens` tokens."""
    from ..types import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        temperature=changes.pop("temperature", args.temperature),
        top_p=args.top_p,
        top_k=args.top_k,
        detokenize=not args.disable_detokenize,
        **changes,
    )


def timed_generate(llm: LLM, args: argparse.Namespace, input_len: int) -> Callable[[int, int], float]:
    """`generate(batch, tokens)`: seconds of a batch of fresh prompts, so that no prefix is cached.

    It raises ConfigError where a request got fewer tokens: the figure would be too good.
    """
    rng, vocab = random.Random(args.seed), llm.engine.spec.vocab_size

    def generate(batch: int, tokens: int) -> float:
        prompts = [[rng.randrange(vocab) for _ in range(input_len)] for _ in range(batch)]
        params = sampling(args, tokens)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        fewest = min(len(output.outputs[0].token_ids) for output in outputs)
        if fewest != tokens:
            raise ConfigError(
                f"{tokens} tokens were asked for and {fewest} made: the figure would be too good"
            )
        return seconds

    return generate


def model_config(args: argparse.Namespace) -> Mapping[str, Any]:
    """The model's config in Hugging Face's terms; no weight is read.

    Raises:
        ModelError: there is no such model.
    """
    if args.shape:
        return SHAPES[args.shape]
    from ..models.checkpoint import open_checkpoint, read_json
    from ..models.hub import resolve

    path = resolve(args.model)
    return read_json(path / "config.json") if path.is_dir() else open_checkpoint(path).config


def described(llm: LLM) -> dict[str, Any]:
    """The engine of a figure: model, sizes, and how its steps ran."""
    config, metrics = llm.engine.config, llm.get_metrics()
    return {
        "model": llm.engine.name,
        "dtype": str(config.dtype).removeprefix("torch."),
        "device": config.device.type,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "weight_bytes": metrics["memory_bytes"]["weights"],
        "graph_steps": metrics["graph_steps"],
        "eager_steps": metrics["eager_steps"],
        "startup_seconds": metrics["startup_seconds"],
    }


def vocab_size(args: argparse.Namespace) -> int:
    """Of the model that the arguments name."""
    from ..models.registry import spec_from_config

    return spec_from_config(model_config(args)).vocab_size
