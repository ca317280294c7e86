"""The parts of the benchmarks that need no engine."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ostinato import LLM, SamplingParams
from ostinato.bench import baselines, environment, options, plot, startup, step, throughput
from ostinato.bench.baselines import padded_batches
from ostinato.bench.latency import measure
from ostinato.bench.plain import PlainDecoder, PlainGenerator
from ostinato.bench.plot import Panel, Series
from ostinato.bench.replay import PROFILED_REPLAYS, Rows, capture, profile_kernels, replay, summed
from ostinato.bench.result import Table, percentile
from ostinato.bench.traffic import Call, by_call, required_bytes
from ostinato.bench.workload import PROTOCOLS, Work, nano_vllm, synthetic
from ostinato.cli import main
from ostinato.errors import ConfigError, GraphError, OstinatoError
from ostinato.graphs import survey
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


def test_an_ops_bytes_count_for_its_costliest_kernel() -> None:
    """A norm in front of a product, twice; one kernel that nothing is known of."""
    nodes: list[tuple[str, str, int | None]] = [
        ("norm", "linear_add", 0), ("gemm", "linear_add", 0), ("gate", "norm_gate_up", 0),
        ("gemm", "linear_add", 0), ("advance", "advance", None),
    ]  # fmt: skip
    calls = [
        Call("output", range(2), 100.0), Call("", range(2, 3), 400.0), Call("down", range(3, 4), 300.0),
        Call("", range(4, 5), None),
    ]  # fmt: skip
    times = (1.0, 2.0, 4.0, 3.0, 1.0)
    ran = trace_of((100.0 * turn + 10.0 * i, d) for turn in range(2) for i, d in enumerate(times))
    rows = summed(ran, nodes, 2, calls, ceiling=200e6)["kernels"]
    found = {(row["op"], row["part"], row["kernel"]): row for row in rows}
    assert {name: row["bytes_a_step"] for name, row in found.items()} == {
        ("linear_add", "output", "norm"): None,
        ("linear_add", "output", "gemm"): 100.0,
        ("norm_gate_up", "", "gate"): 400.0,
        ("linear_add", "down", "gemm"): 300.0,
        ("advance", "", "advance"): None,
    }
    shares = {name: row["share_of_ceiling"] for name, row in found.items()}
    assert shares["linear_add", "output", "gemm"] == pytest.approx(100 / 2e-6 / 200e6)
    assert shares["norm_gate_up", "", "gate"] == pytest.approx(400 / 4e-6 / 200e6)
    assert shares["linear_add", "output", "norm"] is None
    unknown = summed(ran, nodes, 2, calls)["kernels"]
    assert all(row["share_of_ceiling"] is None for row in unknown)
    assert all(row["bytes_a_step"] is None for row in summed(ran[:-1], nodes, 2, calls, 1e6)["kernels"])


ONE_BY_ONE = ("norm_linear", "rope_paged_attention", "linear_add", "norm_gate_up", "linear_add")


@pytest.mark.parametrize(
    "layer", [ONE_BY_ONE, ("attend", *ONE_BY_ONE[2:]), None], ids=["one by one", "attend", "chain"]
)
@pytest.mark.parametrize("family", ["llama3", "llama2", "qwen3", "qwen2"])
def test_every_byte_of_a_step_is_some_ops(
    tiny: Callable[[str], tuple[Path, Any]], family: str, layer: tuple[str, ...] | None
) -> None:
    llm = LLM(str(tiny(family)[0]), skip_tokenizer_init=True, max_model_len=64)
    model, count = llm.engine.program.model, llm.engine.spec.num_layers
    needed = required_bytes(llm.engine, batch=3, context=20)
    ops: list[tuple[str, int | None]] = [("prepare", None), ("embed", None)]
    if layer is None:
        ops.append(("norm_linear", 0))
        ops += [(op, i) for i in range(count) for op in ("rope_paged_attention", "chain")]
    else:
        ops += [(op, i) for i in range(count) for op in layer]
    ops += [("best_token", None), ("advance", None)]
    # Two kernels of each.
    nodes = [(f"{op} {half}", op, i) for op, i in ops for half in "ab"]
    calls = by_call(model, needed["kv_bytes"], nodes)
    assert [list(call.nodes) for call in calls] == [[2 * i, 2 * i + 1] for i in range(len(ops))]
    assert sum(call.nbytes or 0 for call in calls) == needed["bytes"]
    named = [(op, call) for (op, _), call in zip(ops, calls, strict=True)]
    assert all((call.nbytes is None) == (op in ("prepare", "embed", "advance")) for op, call in named)
    first = model.layers[0]
    if layer is not None:
        added = [call for op, call in named if op == "linear_add"][:2]  # in the order in which they run
        for call, part, linear in zip(added, ("output", "down"), (first.output, first.down), strict=True):
            own = [t for t in (linear.weight, linear.bias) if t is not None]
            assert (call.part, call.nbytes) == (part, sum(t.numel() * t.element_size() for t in own))
    fused = by_call(model, needed["kv_bytes"], [("decode", "fused", None), ("finish", "fused", None)])
    assert [call.nbytes for call in fused] == [needed["bytes"]]


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


def test_kernels_are_profiled_where_the_undisturbed_replays_are_on_average(
    tiny: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend(replay_us=51.0)  # of all replays together
    llm = fake_engine(tiny("llama3")[0], backend, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    key = capture(llm.engine, params, 2)
    assert key is not None
    nodes = [("decode", "fused", None), ("finish", "fused", None)]
    state, reached = llm.engine.buffers.state, []
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(survey, "kernels", lambda *_: nodes)
    monkeypatch.setattr(
        survey,
        "replayed_kernels",
        lambda _: trace_of((10.0 * i, d) for i, d in enumerate((4.0, 1.0) * PROFILED_REPLAYS)),
    )
    backend.corrupt = lambda _: reached.append(int(state.position[0]))
    found = profile_kernels(llm.engine, key, Rows(2, prompt=20, steps=51, params=params), ceiling=1e9)
    assert reached[-PROFILED_REPLAYS:] == list(range(41, 51))  # positions 20 to 70 before
    assert found["context_len"] == 45.5  # the new token is one of them
    needed = required_bytes(llm.engine, 2, 45.5)["bytes"]
    assert found["bytes_a_step"] == needed
    assert [(row["kernel"], row["bytes_a_step"]) for row in found["kernels"]] == [
        ("decode", needed),
        ("finish", None),
    ]
    assert found["kernels"][0]["share_of_ceiling"] == pytest.approx(needed / 4e-6 / 1e9)
    assert found["share_of_ceiling_sum"] == pytest.approx(needed / 5e-6 / 1e9)
    assert found["share_of_ceiling_undisturbed"] == pytest.approx(needed / 1e-6 / 1e9)
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


def test_the_share_of_the_ceiling_is_drawn_by_batch_size_and_by_context() -> None:
    """As on a GPU: three batch sizes at the first context, two more contexts at the first size."""
    sizes = ((1, 256, 0.9), (8, 256, 0.8), (32, 256, 0.7), (1, 4096, 0.6), (1, 1024, 0.5))
    points = [
        {
            "batch_size": batch,
            "context_len": context,
            "time_per_output_token_us": 600.0,
            "back_to_back_us": 590.0,
            "floor_us": 500.0,
            "share_of_ceiling": share,
            "share_of_ceiling_back_to_back": share + 0.01,
        }
        for batch, context, share in sizes
    ]
    panels = {panel.title: panel for panel in step._panels(points, 3)}
    assert list(panels) == [
        *("Step time by batch size", "Share of ceiling by batch size"),
        *("Step time by context, tokens", "Share of ceiling by context, tokens"),
    ]
    by_batch, by_context = (panels[name] for name in panels if name.startswith("Share"))
    assert by_batch.top == by_context.top == 100
    through, replayed = by_batch.series
    assert list(through.x) == [1, 8, 32]
    assert list(through.y) == pytest.approx([90, 80, 70])
    assert list(replayed.y) == pytest.approx([91, 81, 71])
    through, _ = by_context.series
    assert list(through.x) == [256, 1024, 4096]  # in order, though measured in another
    assert list(through.y) == pytest.approx([90, 50, 60])
    page = plot.page("step", list(panels.values()))
    assert page.count("<svg") == 4
    assert "replay, back to back: 61 at 4096" in page
    assert len(step._panels(points[:3], 3)) == 2  # one context: nothing to plot against


@pytest.mark.parametrize(
    ("args", "contexts"),
    [
        (["--shape", "llama-3.2-1b"], [256, 1024, 4096]),
        (["--shape", "llama-2-7b"], [256, 1024]),  # 4,096 positions
        (["--shape", "llama-3.2-1b", "--max-model-len", "1152"], [256, 1024]),
        (["--shape", "llama-3.2-1b", "--max-model-len", "1151"], [256]),
        (["--shape", "llama-3.2-1b", "--max-model-len", "100"], [256]),  # the engine says what is wrong
    ],
)
def test_default_contexts_are_those_that_the_model_has(args: list[str], contexts: list[int]) -> None:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    assert step._contexts(parser.parse_args(args)) == contexts


# --- against baselines -----------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture
def random_model(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return ["--model", str(tmp_path), "--load-format", "dummy", "--device", "cpu"]


def ratios(text: str, title: str) -> list[str]:
    """The last column of rows that begin with a baseline's name."""
    lines = text[text.index(title) :].splitlines()
    return [line.split()[-1] for line in lines if line.startswith(("transformers", "torch-compile"))]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Our token takes 1 ms for each sequence, transformers' 3, torch-compile's half a one; gathers orders."""
    orders: list[dict[str, Any]] = []
    cost = {"transformers": 3.0, "torch-compile": 0.5}

    def generate(factor: float) -> Callable[[int, int], float]:
        return lambda batch, tokens: factor * (0.02 + 0.001 * batch * (tokens - 1))

    def ask(order: dict[str, Any]) -> dict[str, Any]:
        orders.append(order)
        factor = cost[order["baseline"]]
        if order["kind"] == "throughput":
            work = Work(tuple(order["prompts"]), tuple(order["max_tokens"]))
            return throughput.figures(work, 2.0 * factor)
        return measure(generate(factor), order["batch"], order["output_len"], order["iters"], order["warmup"])

    monkeypatch.setattr(baselines, "_ask", ask)
    monkeypatch.setattr(options, "timed_generate", lambda *_: generate(1.0))
    monkeypatch.setattr(throughput, "_seconds", lambda *_: 2.0)
    host = {"launch_us": None, "commit_us": 1.0, "wait_us": 1.0, "device_step_us": None}
    monkeypatch.setattr(step, "_host_times", lambda *_: host)
    return orders


BOTH = ["--baseline", "transformers", "--baseline", "torch-compile"]


def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, *args: str) -> tuple[str, dict[str, Any]]:
    file = tmp_path / "out.json"
    assert main(["bench", *args, "--json", str(file)]) == 0
    return capsys.readouterr().out, json.loads(file.read_text())


def test_latency_says_how_many_times_as_fast_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, random_model: list[str], timed: list[dict[str, Any]]
) -> None:
    args = ["--batch-size", "1", "4", "--input-len", "9", "--output-len", "5", "--num-iters", "2"]
    out, found = bench(capsys, tmp_path, "latency", *random_model, *args, *BOTH)
    assert found["speedup"] == {
        "transformers": pytest.approx([3.0, 3.0]),
        "torch-compile": pytest.approx([0.5, 0.5]),
    }
    assert ratios(out, "ours is faster by") == ["3.00", "0.50", "3.00", "0.50"]
    theirs = found["baselines"]["transformers"]
    assert [run["time_per_output_token_us"] for run in theirs] == pytest.approx([3000, 12_000])
    asked = [(order["baseline"], order["batch"]) for order in timed]
    assert asked == [(name, size) for name in options.BASELINES for size in (1, 4)]
    assert {(o["input_len"], o["output_len"], o["iters"], o["dtype"]) for o in timed} == {
        (9, 5, 2, "float32")
    }


def test_latency_of_one_token_has_no_ratio(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, random_model: list[str], timed: list[dict[str, Any]]
) -> None:
    args = ["--output-len", "1", "--num-iters", "1"]
    out, found = bench(capsys, tmp_path, "latency", *random_model, *args, *BOTH)
    assert found["speedup"] == {"transformers": [None], "torch-compile": [None]}
    assert ratios(out, "ours is faster by") == ["-", "-"]


def test_throughput_says_how_many_times_as_fast_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, random_model: list[str], timed: list[dict[str, Any]]
) -> None:
    args = ["--num-prompts", "6", "--input-len", "9", "--output-len", "5", "--num-warmup-runs", "0"]
    out, found = bench(capsys, tmp_path, "throughput", *random_model, *args, *BOTH)
    assert found["speedup"] == {"transformers": pytest.approx(3.0), "torch-compile": pytest.approx(0.5)}
    assert ratios(out, "ours is faster by") == ["3.00", "0.50"]
    assert found["output_tokens_per_second"] == pytest.approx(30 / 2)
    assert found["baselines"]["transformers"]["output_tokens_per_second"] == pytest.approx(30 / 6)
    assert [len(order["prompts"]) for order in timed] == [6, 6]  # the very same requests
    # vLLM's names
    assert {
        *("elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second")
    } <= found.keys()


def test_step_says_how_many_times_as_fast_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, random_model: list[str], timed: list[dict[str, Any]]
) -> None:
    args = ["--batch-size", "1", "3", "--context-len", "64", "128", "--output-len", "24", "--num-iters", "1"]
    out, found = bench(capsys, tmp_path, "step", *random_model, *args, *BOTH)
    assert found["speedup"] == {
        "transformers": pytest.approx([3.0, 3.0]),
        "torch-compile": pytest.approx([0.5, 0.5]),
    }
    assert ratios(out, "at the first context length alone") == ["3.00", "3.00", "0.50", "0.50"]
    table = out[out.index("The same through others") :].splitlines()
    rows = [line.split()[1:] for line in table if line.startswith(options.BASELINES)]
    batch_ours_theirs = [(row[0], row[2], row[3]) for row in rows]
    assert batch_ours_theirs[:2] == [("1", "1,000.0", "3,000.0"), ("3", "3,000.0", "9,000.0")]
    assert len(found["points"]) == 3
    assert {order["input_len"] for order in timed} == {found["points"][0]["prompt_len"]}


def test_startup_says_how_many_times_as_fast_it_is_and_has_vllms_fields(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    random_model: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {"first_token": iter([8.0, 2.0, 2.5, 3.0]), "baselines": iter([16.0, 9.0, 10.0, 11.0])}
    orders: list[dict[str, Any]] = []

    def start(order: dict[str, Any], caches: Path, module: str) -> dict[str, Any]:
        assert caches.is_dir()
        assert not list(caches.iterdir()) or module == orders[-1]["module"]  # neither has the other's caches
        (caches / "something").touch()
        orders.append({**order, "module": module})
        total = next(seconds[module])
        if module == "baselines":
            return {"first_token_seconds": total}
        stages = {"imports": total - 1, "weights": 1.0}
        return {"first_token_seconds": total, "building_seconds": total / 2, "stages": stages, "engine": {}}

    monkeypatch.setattr(startup, "measure", start)
    args = [*random_model, "--num-iters", "3", "--input-len", "7", "--baseline", "transformers"]
    out, found = bench(capsys, tmp_path, "startup", *args, "--plot", str(tmp_path / "out.html"))
    assert found["speedup"] == {"transformers": {"cold": pytest.approx(2.0), "warm": pytest.approx(4.0)}}
    assert found["baselines"]["transformers"]["warm_first_token_seconds"] == 10.0
    rows = {line[:23].strip(): line[23:].split() for line in out.splitlines()}
    assert rows["transformers, the same"] == ["16.000", "9.000", "10.000", "11.000"]
    assert rows["ours is faster by"] == ["2.00", "4.50", "4.00", "3.67"]
    assert [order["module"] for order in orders] == ["baselines"] * 4 + ["first_token"] * 4
    assert {order["input_len"] for order in orders} == {7}
    assert "transformers, warm" in (tmp_path / "out.html").read_text()
    # vLLM's, of building alone
    assert found["avg_cold_startup_time"] == 4.0
    assert found["cold_startup_times"] == [4.0]
    assert found["cold_startup_percentiles"] == dict.fromkeys(("10", "25", "50", "75", "90", "99"), 4.0)
    assert found["warm_startup_times"] == [1.0, 1.25, 1.5]
    assert found["avg_warm_startup_time"] == pytest.approx(1.25)
    assert found["warm_startup_percentiles"]["50"] == 1.25


def test_startup_has_no_torch_compile(capsys: pytest.CaptureFixture[str], random_model: list[str]) -> None:
    assert main(["bench", "startup", *random_model, "--baseline", "torch-compile"]) == 2
    assert "compares with transformers alone" in capsys.readouterr().err


@pytest.mark.slow
def test_transformers_starts_over_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # else a folder of its own, empty at first
    folder = tmp_path / "model"
    startup.write_checkpoint(folder, CONFIG)
    order = {
        "kind": "startup", "baseline": "transformers", "config": CONFIG, "folder": str(folder), "dtype": "float32",
        "device": "cpu", "temperature": 0.0, "seed": 0, "input_len": 5,
    }  # fmt: skip
    assert 0 < startup.measure(order, tmp_path, "baselines")["first_token_seconds"] < 300
    (folder / "model-00000.safetensors").unlink()
    with pytest.raises(OstinatoError, match=r"model-00000\.safetensors"):
        startup.measure(order, tmp_path, "baselines")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernel is launched for real (tests/gpu)")
def test_the_bandwidth_kernel_reads_every_value() -> None:
    from ostinato.ops.triton.bandwidth import read_sum

    x = torch.rand(4 * 32)
    out = torch.full((4,), -1.0)
    read_sum[(4,)](x, out, BLOCK=8, TIMES=4)
    assert torch.allclose(out, x.view(4, 32).sum(1))
