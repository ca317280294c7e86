"""Many streams at once, each with its own right text."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from ostinato import LLM, SamplingParams
from ostinato.bench.serve import Ask, Load, send
from tests.serve.agreement import disagreement
from tests.serve.servers import Server, serving

STREAMS = 200
WORDS = "river stone light under seven paper cloud engine quiet music glass winter"


def prompts(count: int) -> list[str]:
    rng = random.Random(7)
    return [" ".join(rng.choices(WORDS.split(), k=rng.randint(3, 20))) + f" {n}" for n in range(count)]


def check(server: Server, llm: LLM, model: str, asked: list[str], max_tokens: list[int]) -> Any:
    """Send all at once; every text is right, and the offline ones are worth comparing."""
    load = Load(server.url, model, body={"temperature": 0, "ignore_eos": True})
    asks = [Ask(prompt, length) for prompt, length in zip(asked, max_tokens, strict=True)]
    answers = asyncio.run(send(load, asks))
    assert [a.error for a in answers if a.error] == []
    assert [a.output_tokens for a in answers] == max_tokens
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=2) for n in max_tokens]
    wanted = [o.outputs[0] for o in llm.generate(asked, params, use_tqdm=False)]
    wrong = [
        said
        for answer, one in zip(answers, wanted, strict=True)
        if (said := disagreement(answer.text, one, llm.get_tokenizer()))
    ]
    assert wrong == []
    assert len({a.text for a in answers}) > 0.9 * len(asked)
    return answers


def test_200_streams_at_once(server: Server, model: Path) -> None:
    rng = random.Random(3)
    lengths = [rng.randint(5, 40) for _ in range(STREAMS)]
    llm = LLM(str(model), max_num_seqs=8, max_num_batched_tokens=256)
    answers = check(server, llm, "tiny", prompts(STREAMS), lengths)
    open_at_once = min(a.begin + a.latency for a in answers) > max(a.begin for a in answers)
    assert open_at_once, "the first ended before the last was sent"
    server.wait_for("num_requests_running", 0)
    server.wait_for("kv_cache_usage_perc", 0)


@pytest.mark.slow
def test_streams_of_the_default_model(tmp_path: Path) -> None:
    with serving("--max-model-len", "256", folder=tmp_path) as server:
        check(server, LLM(max_model_len=256), "SmolLM2-135M-Instruct", prompts(16), [8] * 16)
        assert server.end() == 0
