"""A row whose mask depends on its last token: held back alone, and its steps run on graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ostinato import SamplingParams
from tests.fakes import FakeBackend, fake_engine

Tiny = Callable[[str], tuple[Path, Any]]


class Counting:
    """Allows 10, 11, 12, ...; takes nothing after the token at which it is told to refuse."""

    def __init__(self, refuse_at: int = 1000) -> None:
        self.count, self.refuse_at = 0, refuse_at

    def fill(self, words: Any) -> None:
        bits = np.zeros(len(words) * 32, bool)
        bits[10 + self.count] = True
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> bool:
        assert token_id == 10 + self.count, "a token that the mask does not allow"
        self.count += 1
        return self.count < self.refuse_at


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_masks_follow_the_tokens_on_graphs(tiny: Tiny, depth: int) -> None:
    backend = FakeBackend()
    llm = fake_engine(tiny("llama3")[0], backend, pipeline_depth=depth)
    engine = llm.engine
    plain = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0)
    free = llm.generate([[5, 6, 7]], plain, use_tqdm=False)[0].outputs[0].token_ids
    params = SamplingParams(temperature=0.9, max_tokens=40, ignore_eos=True)
    guided = engine.add_request([5, 6, 7], params, grammar=Counting())
    beside = engine.add_request([5, 6, 7], plain)
    found = {}
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id] = output.outputs[0].token_ids
    assert found[guided] == list(range(10, 50))
    assert found[beside] == free
    assert (engine.scheduler.num_host_dependency > 0) == (depth > 1)
    assert sum(n for key, n in engine.plan.graph_steps.items() if key.sampler.name == "FULL") > 20


def test_a_token_that_does_not_fit_ends_that_request_alone(tiny: Tiny) -> None:
    engine = fake_engine(tiny("llama3")[0], FakeBackend()).engine
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    bad = engine.add_request([5], params, grammar=Counting(refuse_at=3))
    good = engine.add_request([6], params, grammar=Counting())
    ended = {}
    while engine.has_unfinished:
        ended |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
    assert (ended[bad].finish_reason, ended[bad].token_ids) == ("error", [10, 11, 12])
    assert (ended[good].finish_reason, len(ended[good].token_ids)) == ("length", 9)


def test_masks_survive_preemption(tiny: Tiny) -> None:
    options = {"num_gpu_blocks_override": 7, "block_size": 8, "max_model_len": 40, "max_num_seqs": 4}
    engine = fake_engine(tiny("llama3")[0], FakeBackend(), **options).engine
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    for n in range(3):
        engine.add_request([n + 3], params, grammar=Counting())
    ended = []
    while engine.has_unfinished:
        ended += [o.outputs[0].token_ids for o in engine.step() if o.finished]
    assert ended == [list(range(10, 40))] * 3
    assert engine.scheduler.num_preemptions > 0
