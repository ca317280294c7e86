"""Prompts on a GPU: random models and mixed steps beside the plain ops, the real model in pieces, behind cached blocks and in company."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ostinato import LLM, SamplingParams
from ostinato.types import StepKind
from tests.prompt_steps import EDGES, check, draw, replayed

from .test_engine_gpu import default_by_transformers, make, random_prompts

pytestmark = pytest.mark.gpu
TEXT = Path(__file__).parents[2] / "benchmarks" / "data" / "prose.txt"
WINDOWS = (1, 64, 512, 1500)


@pytest.mark.parametrize("turn", range(3))
def test_no_worse_than_the_ops(turn: int) -> None:
    """A fresh seed each time; `tests.prompt_steps.draw(seed, tokens=...)` is the step again."""
    seed = random.SystemRandom().randrange(2**31)
    for tokens in random.Random(seed).sample(EDGES, 4):
        case = draw(seed, tokens=tokens)
        print(seed, tokens, case)  # shown when it fails
        check(case, "cuda")
    replayed(case, "cuda")
    torch.cuda.empty_cache()


def engine(**options: Any) -> LLM:
    sizes = {"max_num_seqs": 8, "max_model_len": 2048, "max_num_batched_tokens": 2048}
    return make(**{**sizes, **options})


def logarithms(llm: LLM, *prompts: list[int]) -> torch.Tensor:
    """Of the probability of each token of the first prompt but its first; the others are company."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    output = llm.generate(list(prompts), params, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    pairs = zip(output.prompt_logprobs[1:], prompts[0][1:], strict=True)
    return torch.tensor([at[token].logprob for at, token in pairs if at is not None])


def behind_prefixes(llm: LLM, text: list[int], seed: int) -> torch.Tensor:
    """The same of tokens behind prefixes of many lengths; NaN elsewhere.

    The second time they start from cached blocks; beside rows that decode, and on graphs where there are any.
    """
    rng = random.Random(seed)
    found = torch.full((len(text) - 1,), torch.nan)
    prompts, params = [], []
    for size in rng.sample(range(1, len(text)), 60):
        prompts.append(text[:size])
        # Only this token may come, and what is reported is of the distribution before that.
        params.append(
            SamplingParams(max_tokens=1, logprobs=0, allowed_token_ids=[text[size]], detokenize=False)
        )
        if rng.random() < 0.3:
            prompts.append(text[size : size + 1 + rng.randrange(99)])
            params.append(SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, detokenize=False))
    for _ in range(2):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        (choice,) = output.outputs
        if len(choice.token_ids) == 1:
            assert choice.logprobs is not None
            found[len(prompt) - 1] = choice.logprobs[0][text[len(prompt)]].logprob
    return found


def by_transformers(text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float32, and in bfloat16."""
    model = default_by_transformers()
    ids, found = torch.tensor([text], device="cuda"), []
    for dtype in (torch.bfloat16, torch.float32):  # of the weights as bfloat16 has them
        with torch.inference_mode():
            every = model.to(dtype)(ids).logits[0, :-1].float().log_softmax(-1)
        found.append(every.gather(1, ids[0, 1:, None])[:, 0].cpu())
    return found[1], found[0]


def test_a_text_whole_in_pieces_behind_prefixes_and_in_company() -> None:
    """The real model: as close to transformers in float32 as transformers in bfloat16 is, early in the text and late."""
    seed = random.SystemRandom().randrange(2**31)
    rng = random.Random(seed)
    runs: dict[str, torch.Tensor] = {}
    llm = engine(enable_prefix_caching=True)
    try:
        text = llm.get_tokenizer().encode(TEXT.read_text())[: WINDOWS[-1]]
        runs["whole"] = logarithms(llm, text)
        runs["in company"] = logarithms(llm, text, text[100:700], *random_prompts(49152, 9, seed), text[:333])
        runs["behind prefixes"] = behind_prefixes(llm, text, seed)
        assert llm.engine.scheduler.prefix_cache_hits > 0
        on_graphs = sum(n for key, n in llm.engine.plan.graph_steps.items() if key.kind is StepKind.MIXED)
    finally:
        llm.close()
    llm = engine(max_num_batched_tokens=rng.choice((rng.randint(30, 128), rng.randint(129, 250))))
    try:
        runs["in pieces"] = logarithms(llm, text, text[50:90], text[len(text) // 2 :])
    finally:
        llm.close()
    exact, theirs = by_transformers(text)
    for name, ours in runs.items():
        for start, end in zip(WINDOWS, WINDOWS[1:], strict=False):
            part = slice(start - 1, end - 1)
            off = (ours - exact)[part].abs()
            mine, plain = float(off.nanmean()), float((theirs - exact)[part].abs().mean())
            if (count := int((~off.isnan()).sum())) == 0:
                continue
            few = 1 + 3 / count**0.5
            print(f"{seed} {name}, tokens {start} to {end}: {mine:.5f} off, transformers {plain:.5f}")
            assert mine <= 1.2 * few * plain
    assert on_graphs > 0
