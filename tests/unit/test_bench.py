"""The parts of the benchmarks that need no engine."""

from __future__ import annotations

import argparse
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ostinato import LLM, SamplingParams
from ostinato.bench import environment, options, plot, step
from ostinato.bench.baselines import padded_batches
from ostinato.bench.latency import measure
from ostinato.bench.plain import PlainDecoder, PlainGenerator
from ostinato.bench.plot import Panel, Series
from ostinato.bench.replay import Rows, capture, replay, summed
from ostinato.bench.result import Table, percentile
from ostinato.bench.step import required_bytes
from ostinato.bench.workload import PROTOCOLS, Work, nano_vllm, synthetic
from ostinato.errors import ConfigError, GraphError
from ostinato.graphs.survey import graph_kernels
from ostinato.models.checkpoint import open_checkpoint
from ostinato.models.registry import spec_from_config
from ostinato.types import GraphKey, SamplerVariant, StepKind
from tests.fakes import FakeBackend, FakeGraph, fake_engine


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


def test_latency_is_split_into_first_token_and_the_rest() -> None:
    def generate(batch: int, tokens: int) -> float:
        return 0.5 + 0.01 * (tokens - 1)

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


NODES = [("gemm", "norm_linear", 0), ("attend", "rope_paged_attention", 0), ("gemm", "norm_linear", 1)]


def trace_of(times: Iterable[tuple[float, float]], launch: int = 1) -> list[dict[str, Any]]:
    """Kernels of a graph's launch that begin and take so long, as a trace has them."""
    events: list[dict[str, Any]] = [
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "args": {"correlation": launch}}
    ]
    events += [
        {
            "cat": "kernel",
            "name": f"kernel of {launch}",
            "ts": ts,
            "dur": dur,
            "args": {"correlation": launch},
        }
        for ts, dur in times
    ]
    return graph_kernels(events)


def test_only_kernels_of_graph_launches_count_and_waiting_inside_a_kernel_does_not() -> None:
    """The second begins under the first and waits for it; the third lies wholly under the second."""
    other = {"cat": "kernel", "name": "eager", "ts": 0.0, "dur": 9.0, "args": {"correlation": 7}}
    found = trace_of([(1.0, 5.0), (2.0, 6.0), (3.0, 1.0), (10.0, 2.0)])
    assert [event["added"] for event in found] == [5.0, 2.0, 0.0, 2.0]
    assert graph_kernels([other, {"name": "cudaLaunchKernel", "args": {"correlation": 7}}]) == []


def test_kernel_times_are_summed_by_op_and_kernel() -> None:
    found = summed(
        trace_of((10.0 * i, d) for i, d in enumerate((4.0, 1.0, 6.0, 4.0, 3.0, 6.0))), NODES, replays=2
    )
    gemm, attend = found["kernels"]
    assert (gemm["op"], gemm["kernel"], gemm["launches"]) == ("norm_linear", "gemm", 2)
    assert (gemm["us_a_step"], gemm["us_each"]) == (10.0, 5.0)
    assert (attend["us_a_step"], attend["launches"]) == (2.0, 1)
    assert found["sum_us"] == 12.0
    assert found["replay_under_profiler_us"] == 28.0


def test_kernels_that_the_profiler_lost_are_not_given_other_names() -> None:
    found = summed(trace_of((float(i), 1.0) for i in range(5)), NODES, replays=2)
    assert [(row["op"], row["kernel"], row["launches"]) for row in found["kernels"]] == [
        ("", "kernel of 1", 2.5)
    ]


def test_a_graph_is_replayed_alone_and_everything_put_back(tiny: Callable[[str], tuple[Path, Any]]) -> None:
    backend = FakeBackend(replay_us=70.0)
    llm = fake_engine(tiny("llama3")[0], backend, enable_prefix_caching=False)
    engine, params = llm.engine, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    prompts = [[5, 6, 7], [9] * 20]
    before = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    words = engine.buffers.words.clone()
    key = capture(engine, params, 3)
    assert key == GraphKey(StepKind.DECODE, 4, 4, SamplerVariant.GREEDY)
    replays = backend.replays
    seconds, host = replay(engine, key, Rows(3, prompt=20, steps=7, params=params))
    assert backend.replays == replays + 3 + 7
    assert seconds == pytest.approx(10e-6)
    assert host > 0
    assert torch.equal(engine.buffers.words, words)
    after = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    assert after == before
    llm.close()


def test_a_row_that_stops_while_it_is_timed_is_an_error(tiny: Callable[[str], tuple[Path, Any]]) -> None:
    backend = FakeBackend()
    llm = fake_engine(tiny("llama3")[0], backend, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    key = capture(llm.engine, params, 2)
    assert key is not None

    def stop(graph: FakeGraph) -> None:
        llm.engine.buffers.state.active[1] = 0

    backend.corrupt = stop
    with pytest.raises(GraphError, match="a row stopped"):
        replay(llm.engine, key, Rows(2, prompt=8, steps=4, params=params))


def test_a_replay_alone_would_spoil_a_prefix_cache(tiny: Callable[[str], tuple[Path, Any]]) -> None:
    llm = fake_engine(tiny("llama3")[0], FakeBackend())
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    key = capture(llm.engine, params, 1)
    assert key is not None
    with pytest.raises(ConfigError, match="enable_prefix_caching=False"):
        replay(llm.engine, key, Rows(1, prompt=8, steps=4, params=params))


def test_a_step_reads_its_weights_once_and_its_own_context(
    tiny: Callable[[str], tuple[Path, Any]],
) -> None:
    for family in ("llama3", "llama2", "mistral-window"):  # tied, not tied, windowed
        llm = LLM(str(tiny(family)[0]), skip_tokenizer_init=True, max_model_len=64)
        spec = llm.engine.spec
        found = required_bytes(llm.engine, batch=3, context=20)
        untied = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
        assert found["weight_bytes"] == (spec.num_parameters - untied) * 4
        seen = 13 if family == "mistral-window" else 20
        a = spec.attention
        assert found["kv_bytes"] == 3 * seen * spec.num_layers * 2 * a.kv_heads * a.head_dim * 4
        assert found["bytes"] == found["weight_bytes"] + found["kv_bytes"]


def test_a_point_holds_the_step_against_the_graph(tiny: Callable[[str], tuple[Path, Any]]) -> None:
    backend = FakeBackend(eager_us=1000.0, replay_us=255.0)
    llm = fake_engine(tiny("llama3")[0], backend, enable_prefix_caching=False)
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    args = parser.parse_args(["--output-len", "24", "--num-iters", "1"])
    point = step.measure(llm, args, batch=2, context=40, ceiling=1e9)
    assert point["prompt_len"] == 28
    assert point["context_len"] == 28 + 1 + 11
    assert point["back_to_back_us"] == pytest.approx(255 / 23)
    assert point["share_of_ceiling"] == pytest.approx(
        point["bytes"] / 1e9 / (point["time_per_output_token_us"] / 1e6)
    )
    assert point["gpu_idle_share"] == pytest.approx(
        1 - point["back_to_back_us"] / point["time_per_output_token_us"]
    )
    assert point["commit_us_per_row"] == pytest.approx(point["commit_us"] / 2)
    assert "run" not in vars(llm.engine.runner)  # what was wrapped is unwrapped
    assert "step" not in vars(llm.engine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernel is launched for real (tests/gpu)")
def test_the_bandwidth_kernel_reads_every_value() -> None:
    from ostinato.ops.triton.bandwidth import read_sum

    x = torch.rand(4 * 32)
    out = torch.full((4,), -1.0)
    read_sum[(4,)](x, out, BLOCK=8, TIMES=4)
    assert torch.allclose(out, x.view(4, 32).sum(1))
