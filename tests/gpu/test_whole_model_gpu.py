"""Steps of random models, at random lengths, by each kernel that accepts them: about as exact as the plain ops."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

pytest.importorskip("triton")

from ostinato.ops.cuda import fused, rows
from tests.rows_world import wide
from tests.whole_model import draw, few_rows, many_rows, one_row

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("turn", range(4))
def test_no_worse_than_the_ops(turn: int) -> None:
    """A fresh seed each time; `tests.whole_model.draw(seed)` is the model again."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    seed = random.SystemRandom().randrange(2**31)
    case = draw(seed)
    print(seed, case)  # shown when it fails
    model = case.model()
    exact = wide(model)
    held = fused.FusedDecode(CUDA)  # no op set claims another
    assert list(one_row(case, model, exact, held, 10))
    if rows.unsupported(model, case.block) is None:
        assert list(few_rows(case, model, exact, rows.RowsDecode(CUDA), 4))
    most = (16, 32, 64, 128)[turn]
    assert list(many_rows(case, model, exact, (random.Random(seed).randint(most // 2 + 1, most),)))
    del held, model, exact
    torch.cuda.empty_cache()


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("count", [129, 200, 256])
def test_more_rows_than_our_tiles_multiply(count: int, quantization: str | None) -> None:
    """Products are the library's or, FP8, of plain tiles; attention's blocks come in turn."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    seed = random.SystemRandom().randrange(2**31)
    case = dataclasses.replace(draw(seed), quantization=quantization)
    print(seed, case)  # shown when it fails
    model, held = case.model(), fused.FusedDecode(CUDA)  # no op set claims another
    assert list(many_rows(case, model, wide(model), (count,))) == [f"{count} rows"]
    del held, model
    torch.cuda.empty_cache()
