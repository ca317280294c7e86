"""`debug_graphs=True`: the same tokens, and a look at every op."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ostinato import LLM, SamplingParams
from ostinato.graphs.debug import describe

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def test_it_names_every_op_and_layer_and_changes_no_token(
    tiny: Callable[[str], tuple[Path, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tiny("llama3")[0])
    common: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    prompts = [[5, 6, 7], [8], [9, 10]]
    plain = LLM(folder, **common).generate(prompts, GREEDY, use_tqdm=False)
    llm = LLM(folder, debug_graphs=True, **common)
    with caplog.at_level(logging.INFO, logger="ostinato.graphs.debug"):
        debugged = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in plain] == [o.outputs[0].token_ids for o in debugged]
    assert "step decode[tokens=4, seqs=4, greedy]" in caplog.text  # at the padded shape
    for layer in range(3):
        for op in ("norm_linear", "rope_paged_attention", "linear_add", "norm_gate_up"):
            assert f"layer {layer} {op}" in caplog.text
    assert "layer 3" not in caplog.text
    assert "norm_head: logits [4, 151] float32" in caplog.text
    assert llm.engine.why_no_graphs == "debug_graphs=True runs every step op by op"


def test_profiler_ranges_carry_the_layer(tiny: Callable[[str], tuple[Path, Any]]) -> None:
    llm = LLM(str(tiny("llama3")[0]), skip_tokenizer_init=True, debug_graphs=True, max_num_seqs=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        llm.generate([[5, 6]], GREEDY, use_tqdm=False)
    assert {"layer 2 norm_gate_up", "sample"} <= {event.key for event in profiler.key_averages()}


def test_values_that_are_no_numbers_are_counted() -> None:
    assert describe(torch.tensor([1.0, torch.nan, -2.0])) == "[3] float32, -2 to 1, 1 not finite"
    assert describe(torch.full((2,), torch.nan)) == "[2] float32, no finite value"
