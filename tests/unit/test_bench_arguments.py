"""Arguments of `ostinato bench` that cannot work: one line, status 2, and nothing is loaded or run before."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from ostinato.bench import baselines, options
from ostinato.cli import main
from ostinato.errors import ConfigError

SHAPE = ("--shape", "smollm2-135m")
STEP = ("step", *SHAPE, "--batch-size", "4", "--context-len", "32", "--output-len", "24")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("latency", *SHAPE, "--input-len", "8", "--max-model-len", "16"), "--max-model-len 16 is less than the 264"),
        (("latency", *SHAPE, "--batch-size", "4", "--max-num-seqs", "2"), "--max-num-seqs 2 is less than the 4"),
        (("latency", *SHAPE, "--interfere", "--max-model-len", "24"), "--max-model-len 24 is less than"),
        (("latency", *SHAPE, "--interfere", "--max-num-seqs", "32"), "--max-num-seqs 32 is less than the 33"),
        ((*STEP, "--max-model-len", "30"), "--max-model-len 30 is less than the 44"),
        ((*STEP, "--max-num-seqs", "2"), "--max-num-seqs 2 is less than the 4"),
        (("throughput", *SHAPE, "--input-len", "8", "--output-len", "8", "--max-model-len", "9"), "less than the 16"),
        (("throughput", *SHAPE, "--protocol", "nano-vllm", "--random-range-ratio", "0"), "fixes --random-range-ratio"),
        (("latency", *SHAPE, "--baseline", "transformers", "--temperature", "-1"), "temperature must be"),
        (("latency", *SHAPE, "--top-p", "5"), "top_p must be"),
        (("step", *SHAPE, "--temperature", "nan"), "temperature must be"),
        (("latency", *SHAPE, "--json", "{folder}/a.html", "--plot", "{folder}/a.html"), "one would overwrite the other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_cannot_work_is_said_first(
    words: tuple[str, ...],
    said: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(options, "make_llm", lambda chosen: pytest.fail(f"{chosen} was loaded"))
    monkeypatch.setattr(baselines, "_ask", lambda order: pytest.fail(f"{order} was run"))
    assert main(["bench", *(word.format(folder=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_request_that_ends_early_has_no_time() -> None:
    def generate(prompts: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * (params.max_tokens - (n == 1)))])
            for n in range(len(prompts))
        ]

    llm: Any = SimpleNamespace(generate=generate, engine=SimpleNamespace(spec=SimpleNamespace(vocab_size=9)))
    args = argparse.Namespace(seed=0, temperature=0.0, top_p=1.0, top_k=0, disable_detokenize=True)
    timed = options.timed_generate(llm, args, 4)
    assert timed(1, 5) >= 0
    with pytest.raises(ConfigError, match="5 tokens were asked for and 4 made"):
        timed(2, 5)


def test_a_ratio_of_quantised_and_plain_weights_says_so() -> None:
    both = argparse.Namespace(baseline=["transformers"], quantization="fp8")
    assert "unquantised" in baselines.notes(both)[0]
    assert not baselines.notes(argparse.Namespace(baseline=[], quantization="fp8"))
    assert not baselines.notes(argparse.Namespace(baseline=["transformers"], quantization=None))
