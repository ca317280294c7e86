"""What FP8 weights cost in accuracy: the same model and text, with and without `quantization="fp8"`.

    python benchmarks/fp8_accuracy.py [--model MODEL] [--device auto] [--json FILE]

Every token of `data/prose.txt` is predicted from all before it, once by each variant. The first is
the yardstick: the share of positions at which the others' most likely token is the same, how much
the log-probability of the text's own token moves, and each one's perplexity. A narrower `dtype`
without FP8 stands beside them, to show what counts as little.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import sys
from dataclasses import dataclass
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


def measure(model: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Every variant against the first."""
    import torch

    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    dtypes = ("bfloat16",) if on_gpu else ("float32", "bfloat16")
    text = TEXT.read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    yardstick: Predictions | None = None
    for dtype in dtypes:
        for quantization in (None, "fp8"):
            own = predict(text, model, device=device, dtype=dtype, quantization=quantization)
            yardstick = yardstick or own
            name = dtype if quantization is None else f"{dtype}, {quantization}"
            found[name] = {"perplexity": own.perplexity, "weight_bytes": own.weight_bytes}
            if own is not yardstick:
                found[name] |= own.against(yardstick)
            gc.collect()
    assert yardstick is not None
    return {
        "text": TEXT.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "predicted_tokens": len(yardstick.best),
        "yardstick": dtypes[0],
        "variants": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as for LLM (default: the default model)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from benchmarks.environment import describe
    from ostinato.models.hub import DEFAULT_MODEL_NAME

    result = {"model": args.model or DEFAULT_MODEL_NAME, **measure(args.model, args.device)}
    print(f"{result['model']}: {result['predicted_tokens']} tokens of {result['text']}")
    print(
        f"{'':18} {'perplexity':>10} {'ratio':>8} {'same top-1':>10} {'logprob moved':>13} {'weights MB':>10}"
    )
    for name, row in result["variants"].items():
        columns = f"{name:18} {row['perplexity']:10.3f}"
        if "top1_agreement" in row:
            columns += f" {row['perplexity_ratio']:8.4f} {row['top1_agreement']:10.2%} {row['mean_logprob_change']:13.4f}"
        else:
            columns += f" {'yardstick':>33}"
        print(columns + f" {row['weight_bytes'] / 1e6:10.1f}")
    if args.json:
        args.json.write_text(json.dumps(result | {"environment": describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
