"""The parts of the benchmarks that need no engine."""

from __future__ import annotations

import argparse
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ostinato.bench import environment, options, plot
from ostinato.bench.baselines import padded_batches
from ostinato.bench.latency import measure
from ostinato.bench.plain import PlainDecoder, PlainGenerator
from ostinato.bench.plot import Panel, Series
from ostinato.bench.result import Table, percentile
from ostinato.bench.workload import PROTOCOLS, Work, nano_vllm, synthetic
from ostinato.errors import ConfigError
from ostinato.models.checkpoint import open_checkpoint
from ostinato.models.registry import spec_from_config


def test_the_nano_vllm_protocol_is_the_published_one() -> None:
    work = nano_vllm(151_936)
    assert (work.input_tokens, work.output_tokens) == (142_827, 133_966)
    assert len(work.prompts) == 256
    # The protocol in its own words: the global generator, seeded with 0, in this order.
    state = random.getstate()
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    tokens = [random.randint(100, 1024) for _ in range(256)]
    random.setstate(state)
    assert [list(p) for p in work.prompts] == prompts
    assert list(work.max_tokens) == tokens
    assert PROTOCOLS["nano-vllm"].max_model_len >= work.longest


def test_the_nano_vllm_protocol_needs_its_vocabulary() -> None:
    with pytest.raises(ConfigError, match="vocabulary has 10000"):
        nano_vllm(10_000)


@pytest.mark.parametrize("spread", [0.0, 0.5, 0.99])
def test_synthetic_lengths_stay_within_their_spread(spread: float) -> None:
    work = synthetic(200, 40, 10, vocab_size=7, spread=spread, seed=3)
    sizes = [len(p) for p in work.prompts]
    assert min(sizes) >= max(1, round(40 * (1 - spread)))
    assert max(sizes) <= round(40 * (1 + spread))
    assert all(1 <= n <= round(10 * (1 + spread)) for n in work.max_tokens)
    assert {t for p in work.prompts for t in p} == set(range(7))
    assert (len(set(sizes)) > 1) == (spread > 0)
    assert work == synthetic(200, 40, 10, vocab_size=7, spread=spread, seed=3)
    assert work != synthetic(200, 40, 10, vocab_size=7, spread=spread, seed=4)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).random(count).tolist()
    for share in (0, 1, 10, 50, 90, 99, 100):
        assert percentile(values, share) == pytest.approx(np.percentile(values, share))


def test_latency_is_split_into_first_token_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def generate(batch: int, tokens: int) -> None:
        nonlocal now
        now += 0.5 + 0.01 * (tokens - 1)

    monkeypatch.setattr("ostinato.bench.latency.time.perf_counter", lambda: now)
    found = measure(generate, 4, 101, iters=3, warmup=1)
    assert found["avg_latency"] == pytest.approx(1.5)
    assert found["latencies"] == pytest.approx([1.5] * 3)
    assert found["percentiles"]["99"] == pytest.approx(1.5)
    assert found["time_to_first_token_ms"] == pytest.approx(500)
    assert found["time_per_output_token_us"] == pytest.approx(10_000)
    assert found["output_tokens_per_second"] == pytest.approx(400)
    single = measure(generate, 4, 1, iters=1, warmup=0)
    assert single["time_per_output_token_us"] is None


def test_padded_batches_are_full_and_hold_every_request() -> None:
    work = Work(tuple((i,) for i in range(7)), (5, 1, 4, 2, 3, 9, 8))
    batches = padded_batches(work, 3)
    assert [len(prompts) for prompts, _ in batches] == [3, 3, 3]
    assert [tokens for _, tokens in batches] == [3, 8, 9]
    assert batches[2][0] == [(5,)] * 3
    assert {p for prompts, _ in batches for p in prompts} == set(work.prompts)


@pytest.mark.parametrize("family", ["llama2", "llama3", "llama-bias", "mistral-window", "qwen2", "qwen3"])
def test_the_plain_decoder_computes_what_transformers_computes(
    tiny: Callable[[str], tuple[Path, Any]], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = tiny(family)
    checkpoint = open_checkpoint(folder)
    model = PlainDecoder(spec_from_config(checkpoint.config), checkpoint.read, batch=2, length=40)
    prompts = [list(range(3, 23)), list(range(50, 57))]  # the second is padded on the left
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    generator = PlainGenerator(model, temperature=0.0)
    for prompt, made in zip(prompts, generator.generate(prompts, 16), strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert made == expected[0, len(prompt) :].tolist()


def test_a_table_lines_up() -> None:
    text = str(Table(("", "one", "number"), [("a", "1", "2"), ("long name", "10", "20,000")], "Title"))
    assert text.splitlines() == [
        "Title",
        "           one  number",
        "---------  ---  ------",
        "a            1       2",
        "long name   10  20,000",
    ]


LINES = Panel("Step <time>", "batch", "us", [Series("a", [1, 2, 8], [3.0, 4.0, 9.0])], log_x=True, top=10)
BARS = Panel(
    "Stages", "", "s", [Series("x", (), [1.0, 2.0]), Series("y", (), [0.5, 0.25])], "stack", ["1", "2"]
)


def test_a_page_is_well_formed_and_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plot.html"
    plot.save(str(path), "a & b", [LINES, BARS])
    text = path.read_text()
    assert "http" not in text
    assert "<script" not in text
    assert "a &amp; b" in text
    lines, bars = (ElementTree.fromstring(plot.svg(panel)) for panel in (LINES, BARS))
    points = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in lines.findall("circle")]
    assert points[1][0] - points[0][0] == pytest.approx((points[2][0] - points[1][0]) / 2, abs=0.2)  # log2
    assert points[0][1] > points[1][1] > points[2][1]  # more is higher up
    # The second segment of a bar stands on the first.
    heights = [(float(r.get("y", 0)), float(r.get("height", 0))) for r in bars.findall("rect")][:4]
    assert heights[2][0] + heights[2][1] == pytest.approx(heights[0][0], abs=0.2)


def test_a_png_is_one(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot.save(str(path), "title", [LINES, BARS])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.html"):
        plot.check("result.svg")


def test_defaults_of_a_benchmark_give_way_to_the_users_options() -> None:
    parser = argparse.ArgumentParser()
    options.add_engine_arguments(parser)
    args = parser.parse_args(["--shape", "llama-3.2-1b", "--max-num-seqs", "7"])
    chosen = options.engine_options(args, max_num_seqs=1, max_model_len=99, enable_prefix_caching=False)
    assert chosen["max_num_seqs"] == 7
    assert chosen["max_model_len"] == 99
    assert chosen["enable_prefix_caching"] is False
    assert (chosen["model"], chosen["load_format"]) == ("llama-3.2-1b", "dummy")
    assert options.vocab_size(args) == 128_256


def test_a_figure_says_where_it_was_measured() -> None:
    found = environment.describe()
    assert found["torch"] == torch.__version__
    assert found.get("gpu") or found["cpu"]
    assert found["commit"]
