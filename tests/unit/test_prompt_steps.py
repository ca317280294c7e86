"""Steps with prompts, of random models: Triton's ops in the interpreter beside the plain ones; see `tests.prompt_steps`."""

from __future__ import annotations

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from tests.prompt_steps import check, draw, schedule

from .test_triton_ops import _interpreter_loops, interpreted  # noqa: F401 (a fixture)


@interpreted
@pytest.mark.parametrize("tokens", [1, 15, 33])
def test_no_worse_than_the_ops(tokens: int) -> None:
    """A fresh seed each time; `draw(seed, tokens=tokens, small=True)` is the step again."""
    seed = random.SystemRandom().randrange(2**31)
    case = draw(seed, tokens=tokens, small=True)
    print(seed, case)  # shown when it fails
    check(case, "cpu")


def test_steps_have_as_many_tokens_as_were_asked_for() -> None:
    for seed in range(300):
        tokens = 1 + seed % 70
        seqs, pad, _ = schedule(random.Random(seed), tokens, small=seed % 2 == 0)
        assert sum(seq.length for seq in seqs) + pad == tokens
        assert all(seq.context >= seq.length for seq in seqs)
