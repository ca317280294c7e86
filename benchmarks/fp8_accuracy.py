"""What FP8 weights cost in accuracy: the same model and text, with and without `quantization="fp8"`.

    python benchmarks/fp8_accuracy.py [--model MODEL] [--device auto] [--json FILE]

Every token of `data/prose.txt` is predicted from all before it, once by each variant. The first is
the yardstick: the share of positions at which the others' most likely token is the same, how much
the log-probability of the text's own token moves, and each one's perplexity. On a CPU the yardstick
is float32, and bfloat16 without FP8 stands beside it, to show what counts as little; on a GPU it is
bfloat16.

Prompts run other kernels than decode steps do. So on a GPU, or with `--decode`, all is predicted a
second time by decode steps of one sequence, each given the text's token whatever the one before drew.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TEXT = Path(__file__).parent / "data" / "prose.txt"
WINDOW = 2048
"""Tokens that are predicted with one context."""


@dataclass(frozen=True)
class Predictions:
    """What a model made of a text, by position; the first token is predicted by nothing."""

    logprobs: tuple[float, ...]
    """Of the text's own tokens, natural logarithm"""
    best: tuple[int, ...]
    """The most likely tokens"""
    weight_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(-math.fsum(self.logprobs) / len(self.logprobs))

    def without_first_of_contexts(self) -> Predictions:
        """What decode steps predict of the same text."""
        kept = [at for at in range(len(self.best)) if at % (WINDOW - 1)]
        return replace(
            self, logprobs=tuple(self.logprobs[at] for at in kept), best=tuple(self.best[at] for at in kept)
        )

    def against(self, other: Predictions) -> dict[str, float]:
        """Agreement with a yardstick over the same text."""
        count = len(self.best)
        same = sum(a == b for a, b in zip(self.best, other.best, strict=True))
        moved = math.fsum(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))
        return {
            "top1_agreement": same / count,
            "perplexity_ratio": self.perplexity / other.perplexity,
            "mean_logprob_change": moved / count,
        }


def predict(text: str, model: str | None = None, tokens: int | None = None, **options: Any) -> Predictions:
    """Run a model over a text, or over its first tokens.

    Args:
        text: what to predict.
        model: as for `LLM`.
        tokens: how many at most; None: all.
        **options: of `LLM`.
    """
    from ostinato import LLM, SamplingParams

    # As many sequences as logits that shall be computed at a time.
    llm = LLM(model, **{"max_model_len": WINDOW + 1, "max_num_seqs": 64} | options)
    try:
        ids = llm.get_tokenizer().encode(text)[:tokens]
        parts = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        logprobs: list[float] = []
        best: list[int] = []
        for part, output in zip(parts, llm.generate(parts, params, use_tqdm=False), strict=True):
            assert output.prompt_logprobs is not None
            for token, candidates in zip(part[1:], output.prompt_logprobs[1:], strict=True):
                assert candidates is not None
                logprobs.append(candidates[token].logprob)
                best.append(next(t for t, found in candidates.items() if found.rank == 1))
        return Predictions(tuple(logprobs), tuple(best), llm.get_metrics()["memory_bytes"]["weights"])
    finally:
        llm.close()


def predict_by_decode_steps(
    text: str, model: str | None = None, tokens: int | None = None, **options: Any
) -> Predictions:
    """The same by decode steps of one sequence, by the engine's own kernels.

    Not on graphs: the trial of a new one would overwrite logits before they are read. A context begins with a prompt
    of one token; what that predicts (the second one) is left out.

    Args:
        text: what to predict.
        model: as for `LLM`.
        tokens: how many at most; None: all.
        **options: of `LLM`.
    """
    from ostinato import LLM, SamplingParams

    llm = LLM(model, **{"max_model_len": WINDOW + 1, "max_num_seqs": 1, "enforce_eager": True} | options)
    try:
        ids = llm.get_tokenizer().encode(text)[:tokens]
        parts = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        found = [_decode(llm, part, SamplingParams) for part in parts if len(part) > 2]
        logprobs = tuple(value for values, _ in found for value in values)
        best = tuple(token for _, tokens in found for token in tokens)
        return Predictions(logprobs, best, llm.get_metrics()["memory_bytes"]["weights"])
    finally:
        llm.close()


def _decode(llm: Any, ids: list[int], params: Any) -> tuple[list[float], list[int]]:
    """Logarithms of the probabilities of ids[2:], and the most likely tokens there."""
    import torch

    from ostinato.types import StepKind

    runner = llm.engine.runner
    program, run, again = runner.program, runner.run, runner.again
    seen: list[torch.Tensor] = []

    def forced(batch: Any) -> Any:
        if batch.key.kind is not StepKind.DECODE or len(seen) + 2 >= len(ids):
            return run(batch)
        batch.state.last_token.fill_(ids[len(seen) + 1])  # in the order of the engine's stream
        pending = run(batch)
        assert program.keeps_logits(batch.key)
        logits = program.arena.view(batch.num_tokens, batch.num_seqs).logits[0]
        logprob = logits.log_softmax(0)[ids[len(seen) + 2]]
        seen.append(torch.stack((logprob.double(), logits.argmax().double())))
        return pending

    # Drawn, so that logits are kept; what is drawn is used for nothing.
    drawn = params(temperature=1.0, seed=0, max_tokens=len(ids) - 1, ignore_eos=True, detokenize=False)
    runner.run, runner.again = forced, lambda batch: None  # every step goes through `run`
    try:
        llm.generate([ids[:1]], drawn, use_tqdm=False)
    finally:
        runner.run, runner.again = run, again
    values = torch.stack(seen).tolist()
    assert len(values) == len(ids) - 2
    return [value for value, _ in values], [int(token) for _, token in values]


Predict = Callable[..., Predictions]


def compare(predict: Predict, text: str, dtypes: tuple[str, ...], **options: Any) -> dict[str, Predictions]:
    """Predictions of every variant by name, the yardstick's first."""
    found = {}
    for dtype in dtypes:
        for quantization in (None, "fp8"):
            name = dtype if quantization is None else f"{dtype}, {quantization}"
            found[name] = predict(text, dtype=dtype, quantization=quantization, **options)
            gc.collect()
    return found


def described(found: dict[str, Predictions]) -> dict[str, Any]:
    """Every variant against the first."""
    first, *others = found
    rows = {
        name: {"perplexity": own.perplexity, "weight_bytes": own.weight_bytes} for name, own in found.items()
    }
    for name in others:
        rows[name] |= found[name].against(found[first])
    return {"predicted_tokens": len(found[first].best), "yardstick": first, "variants": rows}


def measure(model: str | None = None, device: str = "auto", decode: bool = False) -> dict[str, Any]:
    """Every variant against the first; on a GPU or with `decode` through decode steps too."""
    import torch

    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    dtypes = ("bfloat16",) if on_gpu else ("float32", "bfloat16")
    text = TEXT.read_text(encoding="utf-8")
    options = {"model": model, "device": device}
    prompts = compare(predict, text, dtypes, **options)
    result = {"text": TEXT.name, "text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    result |= described(prompts)
    if on_gpu or decode:
        steps = compare(predict_by_decode_steps, text, dtypes, **options)
        result["decode_steps"] = described(steps)
        for name, own in steps.items():  # the first prediction of each context is the prompt's
            read = prompts[name].without_first_of_contexts()
            result["decode_steps"]["variants"][name]["against_prompts"] = own.against(read)
    return result


def table(found: dict[str, Any]) -> None:
    """Print what `described` returned."""
    print(
        f"{'':18} {'perplexity':>10} {'ratio':>8} {'same top-1':>10} {'logprob moved':>13} {'weights MB':>10}"
    )
    for name, row in found["variants"].items():
        columns = f"{name:18} {row['perplexity']:10.3f}"
        if "top1_agreement" in row:
            columns += f" {row['perplexity_ratio']:8.4f} {row['top1_agreement']:10.2%} {row['mean_logprob_change']:13.4f}"
        else:
            columns += f" {'yardstick':>33}"
        print(columns + f" {row['weight_bytes'] / 1e6:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as for LLM (default: the default model)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--decode", action="store_true", help="through decode steps too, as on a GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from benchmarks.environment import describe
    from ostinato.models.hub import DEFAULT_MODEL_NAME

    name = args.model or DEFAULT_MODEL_NAME
    name = Path(name).name if Path(name).exists() else name
    result = {"model": name, **measure(args.model, args.device, args.decode)}
    print(f"{name}: {result['predicted_tokens']} tokens of {result['text']}")
    table(result)
    if "decode_steps" in result:
        print(f"\nby decode steps: {result['decode_steps']['predicted_tokens']} tokens")
        table(result["decode_steps"])
        for variant, row in result["decode_steps"]["variants"].items():
            apart = row["against_prompts"]
            print(
                f"{variant}: decode steps beside prompts: same top-1 {apart['top1_agreement']:.2%}, "
                f"logprob moved by {apart['mean_logprob_change']:.4f}"
            )
    if args.json:
        args.json.write_text(json.dumps(result | {"environment": describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
