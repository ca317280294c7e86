"""Guided rows on captured graphs: the mask row that the host writes is the one that a replay reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ostinato import LLM, SamplingParams
from tests.integration.test_grammar import Counting
from tests.models import tiny

__all__ = ["tiny"]
pytestmark = pytest.mark.gpu


def test_masks_follow_the_tokens_on_graphs(tiny: Any) -> None:
    folder: Path = tiny("llama3")[0]
    llm = LLM(str(folder), skip_tokenizer_init=True, max_num_seqs=8, max_num_batched_tokens=64)
    engine = llm.engine
    plain = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=0)
    llm.generate([[5, 6, 7]] * 2, plain, use_tqdm=False)  # captures
    free = llm.generate([[5, 6, 7]], plain, use_tqdm=False)[0].outputs[0].token_ids
    params = SamplingParams(temperature=0.9, max_tokens=60, ignore_eos=True)
    guided = [engine.add_request([5, 6, 7], params, grammar=Counting()) for _ in range(3)]
    beside = engine.add_request([5, 6, 7], plain)
    found = {}
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id] = output.outputs[0].token_ids
    assert [found[name] for name in guided] == [list(range(10, 70))] * 3
    assert found[beside] == free
    assert engine.scheduler.num_host_dependency > 0
    on_graphs = sum(n for key, n in engine.plan.graph_steps.items() if key.sampler.name == "FULL")
    assert on_graphs > 30
    llm.close()
