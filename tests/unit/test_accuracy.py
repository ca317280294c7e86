"""The yardstick of the kernels' tests: rounding passes, the smallest mistakes do not."""

from __future__ import annotations

import pytest
import torch

from ostinato.models.decoder import random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from tests.accuracy import loud, no_worse
from tests.rows_world import World, check, planned, run_plain, telling, untouched, wide

CHANGES = {
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "intermediate_size": 256,
    "hidden_size": 192,
    "head_dim": 64,
}
LENGTH = 1100


def test_rounding_passes_and_what_is_larger_does_not() -> None:
    exact = torch.randn(4, 1000, dtype=torch.float64)
    plain, other = exact.bfloat16(), (exact * (1 + torch.randn_like(exact) / 2000)).bfloat16()
    no_worse(plain, plain, exact)
    no_worse(other, plain, exact)
    with pytest.raises(AssertionError, match="row 2 is"):
        no_worse(plain * torch.tensor([1, 1, 1.02, 1]).unsqueeze(1), plain, exact)
    wrong = plain.clone()
    wrong[1, 7] += 0.5  # one of a thousand
    with pytest.raises(AssertionError, match="row 1"):
        no_worse(wrong, plain, exact)
    wrong[1, 7] = torch.nan
    with pytest.raises(AssertionError, match="NaN"):
        no_worse(wrong, plain, exact)


def test_a_token_in_the_wrong_place_shows() -> None:
    """A step of SmolLM2's heads in which one old token is not the one that it was."""
    seed = int(torch.empty((), dtype=torch.int64).random_(2**31))
    spec = spec_from_config({**SHAPES["smollm2-135m"], **CHANGES})
    model = telling(
        random_decoder(spec, dtype=torch.bfloat16, device=torch.device("cpu"), positions=2000), seed
    )
    plain, exact = (
        run_plain(which, [LENGTH], seed, dtype, device="cpu")
        for which, dtype in ((model, torch.bfloat16), (wide(model), torch.float32))
    )
    check(plain, plain, exact)
    assert untouched(plain, World(model, [LENGTH], seed, torch.bfloat16, plain.ops, "cpu"))
    for token in loud(LENGTH, None, torch.Generator().manual_seed(seed))[:3]:
        other = World(model, [LENGTH], seed, torch.bfloat16, plain.ops, "cpu")
        block = int(other.view.block_table[int(other.view.rows[0]), token // other.block])
        other.cache.data[:, :, block, token % other.block] = 0
        model.forward(planned(other), other.cache, other.scratch, other.ops)
        with pytest.raises(AssertionError, match="logits"):
            check(other, plain, exact, seed)
