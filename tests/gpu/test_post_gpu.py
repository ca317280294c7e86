"""Tokens posted to pinned memory by a kernel equal those on the device."""

from __future__ import annotations

import pytest
import torch

from ostinato.ops.cuda.post import poster

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 1000])
def test_posts_as_many_as_it_is_told(n: int) -> None:
    stream = torch.cuda.Stream()
    post = poster(stream)
    if post is None:
        pytest.skip("needs the driver's bindings")
    tokens = torch.randint(2**31 - 1, (1001,), dtype=torch.int32, device="cuda")
    home = torch.full((1001,), -1, dtype=torch.int32, pin_memory=True)
    torch.cuda.synchronize()
    post(tokens.data_ptr(), home.data_ptr(), n)
    stream.synchronize()
    assert torch.equal(home[:n], tokens[:n].cpu())
    assert (home[n:] == -1).all()
