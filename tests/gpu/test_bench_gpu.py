"""`ostinato bench step` and what only it measures, on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ostinato.cli import main

pytestmark = pytest.mark.gpu


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
    kernels = found["kernels"]
    ops = {row["op"] for row in kernels["kernels"]}
    assert {"prepare", "advance"} <= ops
    assert "fused" in ops or {"norm_linear", "linear_add", "norm_gate_up"} <= ops
    assert kernels["sum_us"] > 0.3 * kernels["replay_undisturbed_us"]


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
