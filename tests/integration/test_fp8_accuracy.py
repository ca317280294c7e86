"""FP8 on the default model's real weights: the loss stays where it was measured (benchmarks/fp8_accuracy.json)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.fp8_accuracy import TEXT, Predictions, predict


def test_against() -> None:
    one, other = Predictions((-1.0, -3.0), (5, 6), 0), Predictions((-2.0, -2.0), (5, 7), 0)
    assert one.perplexity == pytest.approx(7.389056, rel=1e-6)
    assert one.against(other) == pytest.approx(
        {"top1_agreement": 0.5, "perplexity_ratio": 1.0, "mean_logprob_change": 1.0}
    )


@pytest.mark.slow
def test_the_default_model_loses_little() -> None:
    text = TEXT.read_text(encoding="utf-8")
    wide, narrow = (predict(text, tokens=300, device="cpu", quantization=q) for q in (None, "fp8"))
    found = narrow.against(wide)
    assert wide.perplexity < 40  # the yardstick is sound
    assert found["top1_agreement"] > 0.8
    assert found["perplexity_ratio"] < 1.08
    assert found["mean_logprob_change"] < 0.3
    assert narrow.weight_bytes < wide.weight_bytes / 2
