"""Random traffic through the whole engine: joins, leaves, aborts, preemption, compaction, lags."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ostinato import LLM, SamplingParams
from tests.fakes import FakeBackend, fake_engine


@pytest.mark.parametrize(("depth", "graphs"), [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_random_traffic(tiny: Callable[[str], tuple[Path, Any]], depth: int, graphs: bool) -> None:
    folder = tiny("llama3")[0]
    rng = random.Random(depth + 10 * graphs)
    limits: dict[str, Any] = {"num_gpu_blocks_override": 30, "pipeline_depth": depth, "max_model_len": 256}
    if graphs:
        llm = fake_engine(folder, FakeBackend(), cudagraph_verify_every=7, **limits)
    else:
        llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            strict=True,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            **limits,
        )
    engine = llm.engine
    wanted: dict[str, tuple[list[int], SamplingParams]] = {}
    results: dict[str, list[int]] = {}
    while len(results) < 60:
        most = 14 if len(results) // 8 % 2 else 3  # crowds and lulls
        while len(wanted) - len(results) < most and rng.random() < 0.4:
            prompt = [rng.randrange(3, 151) for _ in range(rng.randint(1, 70))]
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.9]), seed=rng.getrandbits(30), max_tokens=rng.randint(1, 60),
                ignore_eos=True, repetition_penalty=rng.choice([1.0, 1.0, 1.4]),
            )  # fmt: skip
            wanted[engine.add_request(prompt, params)] = prompt, params
        running = sorted(set(wanted) - set(results))
        if running and rng.random() < 0.03:
            engine.abort([victim := rng.choice(running)])
            del wanted[victim]
        for output in engine.step():
            if output.finished:
                results[output.request_id] = output.outputs[0].token_ids
    engine.abort(set(wanted) - set(results))
    while engine.has_unfinished:
        engine.step()
    engine.scheduler.check()
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_compactions > 0
    alone = LLM(
        str(folder), skip_tokenizer_init=True, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256
    )
    for request_id in sorted(results)[:15]:
        prompt, params = wanted[request_id]
        (output,) = alone.generate([prompt], params, use_tqdm=False)
        assert output.outputs[0].token_ids == results[request_id]
