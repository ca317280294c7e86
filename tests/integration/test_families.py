"""Every family against transformers, in float32: logits, greedy tokens, prompt logprobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ostinato import LLM, SamplingParams
from tests.models import FAMILIES

TOLERANCE = 1e-4
Tiny = Callable[[str], tuple[Path, Any]]


def run_with_logits(llm: LLM, prompt: Sequence[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits that each was chosen from, [tokens, vocab]."""
    engine = llm.engine
    assert engine.config.pipeline_depth == 1
    engine.add_request(list(prompt), SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
    logits: list[torch.Tensor] = []
    outputs: list[Any] = []
    while engine.has_unfinished:
        for output in engine.step():
            outputs.append(output)
            logits.append(engine.runner.eager.program.arena.view(1, 1).logits[0].clone())
    assert outputs[-1].finished
    return outputs[-1].outputs[0].token_ids, torch.stack(logits)


def compare(llm: LLM, reference: Any, prompt: list[int], tokens: int) -> None:
    ours, logits = run_with_logits(llm, prompt, tokens)
    with torch.inference_mode():
        theirs = reference(torch.tensor([prompt + ours[:-1]])).logits[0, len(prompt) - 1 :].float()
    assert (logits - theirs).abs().max().item() < TOLERANCE, "prefill and decode logits, given our tokens"
    with torch.inference_mode():
        greedy = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
        )[0, len(prompt) :].tolist()
    for step, (mine, wanted) in enumerate(zip(ours, greedy, strict=True)):
        if mine != wanted:
            best = logits[step].topk(2).values
            gap = (best[0] - best[1]).item()
            assert gap < TOLERANCE, f"step {step}: token {mine}, transformers has {wanted}, gap {gap}"
            print(
                f"near-tie at step {step}: the two best logits differ by {gap:.2e}; tokens after it are not compared"
            )
            return


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [1, 40])
def test_logits_and_greedy_tokens(tiny: Tiny, name: str, length: int) -> None:
    folder, reference = tiny(name)
    llm = LLM(str(folder), skip_tokenizer_init=True, strict=True, max_num_batched_tokens=32, max_num_seqs=4)
    prompt = torch.randint(3, 151, (length,)).tolist()
    compare(llm, reference, prompt, 64)


@pytest.mark.parametrize("name", ["llama3", "mistral-window"])
def test_prompt_logprobs(tiny: Tiny, name: str) -> None:
    folder, reference = tiny(name)
    llm = LLM(str(folder), skip_tokenizer_init=True, strict=True, max_num_batched_tokens=16, max_num_seqs=4)
    prompt = torch.randint(3, 151, (45,)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=4, prompt_logprobs=3, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    found = output.prompt_logprobs
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    with torch.inference_mode():
        exact = (
            reference(torch.tensor([prompt + output.outputs[0].token_ids])).logits[0].double().log_softmax(-1)
        )
    for position in range(1, len(prompt)):
        candidates = found[position]
        assert candidates is not None
        _check(candidates, exact[position - 1], prompt[position], 3)
    assert output.outputs[0].logprobs is not None
    for step, candidates in enumerate(output.outputs[0].logprobs):
        _check(candidates, exact[len(prompt) - 1 + step], output.outputs[0].token_ids[step], 4)
    total = sum(
        c[t].logprob for c, t in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
    )
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def _check(candidates: dict[int, Any], exact: torch.Tensor, token: int, k: int) -> None:
    assert token in candidates
    best = exact.topk(k).indices.tolist()
    assert set(candidates) == {token, *best}
    for t, p in candidates.items():
        assert p.logprob == pytest.approx(exact[t].item(), abs=1e-4)
        assert p.rank == 1 + int((exact > exact[t]).sum())


@pytest.mark.slow
def test_default_model_against_transformers() -> None:
    """SmolLM2's real weights, dequantised by both sides from the same file."""
    from transformers import AutoModelForCausalLM

    from ostinato.models.hub import resolve

    path = resolve(None)
    llm = LLM(str(path), strict=True, max_num_seqs=4, max_model_len=512)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    text = "The history of the city begins with a river, a hill and"
    compare(llm, reference, llm.get_tokenizer().encode(text), 64)
