"""`ostinato bench`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ostinato import LLM, SamplingParams
from ostinato.bench import startup
from ostinato.bench.startup import write_checkpoint
from ostinato.bench.workload import PROTOCOLS, Protocol, Work, synthetic
from ostinato.cli import main
from ostinato.models.checkpoint import open_checkpoint
from ostinato.models.decoder import check_tensors
from ostinato.models.registry import spec_from_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a model that takes no time: a config alone, random weights."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return ["--model", str(folder), "--load-format", "dummy"]


def bench(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = main(["bench", *args])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_latency(capsys: pytest.CaptureFixture[str], small: list[str], tmp_path: Path) -> None:
    file, page = tmp_path / "out.json", tmp_path / "out.html"
    args = ["--batch-size", "2", "--input-len", "8", "--output-len", "6", "--num-iters", "3"]
    status, out, _ = bench(capsys, "latency", *small, *args, "--json", str(file), "--plot", str(page))
    assert status == 0
    assert "us/output token" in out
    found = json.loads(file.read_text())
    assert len(found["latencies"]) == 3
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3)
    assert set(found["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert found["time_to_first_token_ms"] / 1e3 < found["avg_latency"]
    assert found["engine"]["max_num_seqs"] == 2
    assert found["engine"]["max_model_len"] == 14
    assert found["environment"]["commit"]
    assert "<svg" in page.read_text()


def test_latency_of_several_batch_sizes(
    capsys: pytest.CaptureFixture[str], small: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    args = ["--batch-size", "1", "3", "--input-len", "4", "--output-len", "3", "--num-iters", "1"]
    assert bench(capsys, "latency", *small, *args, "--json", str(file))[0] == 0
    found = json.loads(file.read_text())
    assert [run["batch_size"] for run in found["runs"]] == [1, 3]
    assert "avg_latency" not in found  # of which?


def test_interference(capsys: pytest.CaptureFixture[str], small: list[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    args = ["--interfere", "--interfere-decodes", "3", "--interfere-input-len", "64", "--input-len", "8"]
    args += ["--interfere-every", "4", "--interfere-arrivals", "5"]
    status, out, _ = bench(capsys, "latency", *small, *args, "--json", str(file))
    assert status == 0
    assert "quiet" in out
    found = json.loads(file.read_text())
    assert found["loaded"]["num_gaps"] == 3 * 4 * 5
    assert found["quiet"]["num_gaps"] == 2 * 3 * (4 * 5 // 2)
    assert found["p99_ratio"] == pytest.approx(found["loaded"]["p99_itl_ms"] / found["quiet"]["p99_itl_ms"])


def test_throughput(capsys: pytest.CaptureFixture[str], small: list[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    args = ["--num-prompts", "6", "--input-len", "9", "--output-len", "5", "--random-range-ratio", "0.5"]
    status, out, _ = bench(capsys, "throughput", *small, *args, "--json", str(file))
    assert status == 0
    assert "output tokens/s" in out
    found = json.loads(file.read_text())
    assert found["num_requests"] == 6
    assert found["total_num_tokens"] == found["total_input_tokens"] + found["total_output_tokens"]
    assert found["tokens_per_second"] == pytest.approx(found["total_num_tokens"] / found["elapsed_time"])
    assert found["requests_per_second"] == pytest.approx(6 / found["elapsed_time"])


def test_a_protocol_fixes_requests_and_temperature(
    capsys: pytest.CaptureFixture[str], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []

    def make(vocab: int, seed: int) -> Work:
        drawn.append((vocab, seed))
        return synthetic(5, 9, 7, vocab_size=vocab, spread=0.5, seed=seed)

    asked: list[SamplingParams] = []
    generate = LLM.generate

    def watched(self: LLM, prompts: Any, params: Any, **options: Any) -> Any:
        asked.extend(params)
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(LLM, "generate", watched)
    monkeypatch.setitem(PROTOCOLS, "nano-vllm", Protocol(make, temperature=0.6, max_model_len=40))
    file = tmp_path / "out.json"
    args = ["--protocol", "nano-vllm", "--num-warmup-runs", "1", "--json", str(file)]
    assert bench(capsys, "throughput", *small, *args)[0] == 0
    work = synthetic(5, 9, 7, vocab_size=512, spread=0.5)
    assert drawn == [(512, 0)]
    assert [p.max_tokens for p in asked] == [*work.max_tokens] * 2  # the warm-up, and the measured run
    assert {p.temperature for p in asked} == {0.6}
    found = json.loads(file.read_text())
    assert found["total_output_tokens"] == work.output_tokens
    assert found["engine"]["max_model_len"] == 40


def test_step_says_what_needs_a_gpu(
    capsys: pytest.CaptureFixture[str], small: list[str], tmp_path: Path
) -> None:
    file, page = tmp_path / "out.json", tmp_path / "out.html"
    args = ["--batch-size", "1", "3", "--context-len", "30", "60", "--output-len", "24", "--num-iters", "1"]
    args += ["--device", "cpu", "--json", str(file), "--plot", str(page)]
    status, out, _ = bench(capsys, "step", *small, *args)
    assert status == 0
    assert "On a CPU there is no replay" in out
    assert "% of ceiling" not in out
    found = json.loads(file.read_text())
    assert [(p["batch_size"], p["prompt_len"]) for p in found["points"]] == [(1, 18), (3, 18), (1, 48)]
    assert found["points"][0]["kv_bytes"] < found["points"][2]["kv_bytes"] < found["points"][1]["kv_bytes"]
    assert found["points"][0]["back_to_back_us"] is None
    assert page.read_text().count("<svg") == 2  # by batch size and by context


def test_startup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "out.json"
    write_checkpoint(folder, CONFIG)
    args = ["--model", str(folder), "--num-iters", "2", "--device", "cpu", "--json", str(file)]
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    before = time.monotonic()
    status, out, _ = bench(capsys, "startup", *args)
    took = time.monotonic() - before
    assert status == 0
    assert "until the first token" in out
    found = json.loads(file.read_text())
    assert len(found["runs"]) == 3
    for run in found["runs"]:
        assert {"interpreter", "imports", "weights", "first token"} <= run["stages"].keys()
        assert sum(run["stages"].values()) == pytest.approx(run["first_token_seconds"], abs=0.05)
    assert sum(run["first_token_seconds"] for run in found["runs"]) < took
    assert found["warm_first_token_seconds"] == pytest.approx(sum(found["warm_first_token_seconds_all"]) / 2)


def test_a_start_that_fails_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", CONFIG)
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 32}))
    status, _, err = bench(capsys, "startup", "--model", str(tmp_path / "model"))
    assert status == 1
    assert "weights do not match config.json" in err


def test_the_written_checkpoint_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "SHARD_BYTES", 30_000)  # several files
    write_checkpoint(tmp_path, CONFIG)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    check_tensors(spec_from_config(checkpoint.config), checkpoint)
    assert checkpoint.read("model.layers.1.mlp.down_proj.weight").float().std() > 0.01


@pytest.mark.slow
def test_a_baseline_runs_the_same_work(
    capsys: pytest.CaptureFixture[str], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # what the compiler makes of it is not the question here
    file = tmp_path / "out.json"
    args = ["--num-prompts", "5", "--input-len", "9", "--output-len", "5", "--baseline-batch-size", "2"]
    args += ["--baseline", "transformers", "--baseline", "torch-compile"]
    status, out, _ = bench(capsys, "throughput", *small, *args, "--json", str(file))
    assert status == 0
    assert "ours is faster by" in out
    found = json.loads(file.read_text())
    for theirs in found["baselines"].values():
        assert theirs["total_output_tokens"] == found["total_output_tokens"]
        assert theirs["output_tokens_per_second"] > 0
    assert set(found["baselines"]) == {"transformers", "torch-compile"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["latency", "--shape", "llama-3.2-2b"], "did you mean 'llama-3.2-1b'?"),
        (["latency", "--input-len", "-4"], "--input-len: must be at least 1, got -4"),
        (["latency", "--output-len", "many"], "expected an integer, got 'many'"),
        (["latency", "--baseline", "torch"], "unknown baseline 'torch'"),
        (["latency", "--plot", "x.pdf"], "must end in .png or .html"),
        (["latency", "--json", "/no/such/folder/x"], "/no/such/folder/x cannot be written"),
        (["latency", "--shape", "smollm2-135m", "--input-len", "9000"], "8192 positions"),
        (["latency", "--interfere", "--baseline", "transformers"], "leave --baseline out"),
        (["throughput", "--protocol", "nano"], "did you mean 'nano-vllm'?"),
        (["throughput", "--protocol", "nano-vllm", "--input-len", "9"], "fixes --input-len"),
        (["throughput", "--random-range-ratio", "1.5"], "below 1, got 1.5"),
        (["latency", "--shape", "llama-3.2-1b", "--model", "x"], "not allowed with"),
        (["step", "--context-len", "0"], "must be at least 2, got 0"),
        (["step", "--output-len", "5"], "must be at least 24, got 5"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(args: list[str], words: str) -> None:
    command = [sys.executable, "-m", "ostinato", "bench", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr


def test_a_model_that_is_not_there_is_an_error_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = bench(capsys, "throughput", "--model", "/no/such/folder")
    assert status == 1
    assert "/no/such/folder" in err
