"""`ostinato bench` on a GPU: what only `step` measures, and the baselines, compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ostinato.bench.startup import write_checkpoint
from ostinato.cli import main

pytestmark = pytest.mark.gpu

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def test_the_read_bandwidth_is_a_plausible_ceiling() -> None:
    from ostinato.ops.triton.bandwidth import read_bandwidth

    found = read_bandwidth(1 << 30, repeats=5)
    x = torch.empty(1 << 28, device="cuda")
    y = torch.empty_like(x)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    y.copy_(x)
    begin.record()
    for _ in range(5):
        y.copy_(x)
    end.record()
    end.synchronize()
    copied = 5 * 2 * x.numel() * 4 / (begin.elapsed_time(end) / 1e3)
    assert max(found.values()) > 0.9 * copied  # reading alone is no slower than reading and writing
    assert max(found.values()) < 3 * copied


def test_step_fills_every_column(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    args = ["--shape", "smollm2-135m", "--batch-size", "1", "4", "--context-len", "64", "--output-len", "64"]
    assert main(["bench", "step", *args, "--num-iters", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    for point in found["points"]:
        for name in ("back_to_back_us", "launch_us", "commit_us_per_row", "gpu_idle_share_by_events"):
            assert point[name] is not None, name
        assert 0 < point["share_of_ceiling"] < 1.5  # the weights of so small a model fit into the cache
        assert point["back_to_back_us"] <= point["time_per_output_token_us"] * 1.05
        assert point["replay_host_us"] < point["back_to_back_us"]
    assert [kernels["batch_size"] for kernels in found["kernels"]] == [1, 4]
    for kernels in found["kernels"]:
        rows = kernels["kernels"]
        ops = {row["op"] for row in rows}
        assert {"prepare", "advance"} <= ops
        assert "fused" in ops or {"norm_linear", "linear_add", "norm_gate_up"} <= ops
        assert kernels["sum_us"] > 0.3 * kernels["replay_undisturbed_us"]
        # Every byte is some kernel's, and no kernel of bookkeeping has any.
        assert sum(row["bytes_a_step"] or 0 for row in rows) == pytest.approx(kernels["bytes_a_step"])
        for row in rows:
            assert (row["bytes_a_step"] is None) == (row["share_of_ceiling"] is None)
            assert row["bytes_a_step"] is None or row["op"] not in ("prepare", "embed", "advance")


@pytest.mark.parametrize("name", ["transformers", "torch-compile"])
def test_a_baseline_is_compiled_and_held_against_ours(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "out.json"
    args = ["--model", str(tmp_path), "--load-format", "dummy", "--batch-size", "2", "--input-len", "8"]
    # Keys serve from the third run on.
    args += ["--output-len", "24", "--num-iters", "3", "--num-iters-warmup", "4"]
    assert main(["bench", "latency", *args, "--baseline", name, "--json", str(file)]) == 0
    assert list((tmp_path / "inductor").rglob("*.py"))  # the compiler wrote what it made
    found = json.loads(file.read_text())
    (theirs,), (ratio,) = found["baselines"][name], found["speedup"][name]
    us = "time_per_output_token_us"
    assert ratio == pytest.approx(theirs[us] / found[us])
    assert ratio > 1  # of two layers nothing counts but what lies between kernels: there is no bound above
    assert theirs[us] < 50_000  # compiled in the warm-up, not while it was timed


def test_startup_is_held_against_transformers(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "out.json"
    write_checkpoint(folder, CONFIG)
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    args = ["--model", str(folder), "--num-iters", "1", "--baseline", "transformers", "--json", str(file)]
    assert main(["bench", "startup", *args]) == 0
    found = json.loads(file.read_text())
    theirs = found["baselines"]["transformers"]
    for kind in ("cold", "warm"):
        seconds = f"{kind}_first_token_seconds"
        assert found["speedup"]["transformers"][kind] == pytest.approx(theirs[seconds] / found[seconds])
        assert 1 < theirs[seconds] < 120


def test_a_graphs_bare_replay_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    from ostinato import LLM, SamplingParams
    from ostinato.bench.replay import Rows, capture, replay

    llm = LLM(
        "smollm2-135m", load_format="dummy", max_model_len=256, max_num_seqs=4, enable_prefix_caching=False
    )
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [[5, 6, 7], [9] * 20]
    before = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    key = capture(llm.engine, params, 3)
    assert key is not None
    device, host = replay(llm.engine, key, Rows(3, prompt=20, steps=50, params=params))
    assert host > 0
    assert 0 < device < 0.1
    assert [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)] == before
    llm.close()
