"""A cache in which places lie beyond 2^31 numbers: the same bits as in a small one."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "unit"))
from test_triton_ops import Seq, World, make_world

from ostinato.ops import AttentionShape
from ostinato.ops.triton import TritonOps
from ostinato.types import StepKind

pytestmark = pytest.mark.gpu

SHAPE = AttentionShape(32, 8, 128)
PLACES = 2**31 // (SHAPE.kv_heads * SHAPE.head_dim)
STEPS = {
    StepKind.DECODE: [Seq(700), Seq(33), Seq(1), Seq(2300)],
    StepKind.MIXED: [Seq(400, 300, decode=False), Seq(33), Seq(70, 70, decode=False)],
}


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
@pytest.mark.parametrize("kind", STEPS)
def test_attention(monkeypatch: pytest.MonkeyPatch, kind: StepKind, kernels: str) -> None:
    if kernels == "triton":
        monkeypatch.setenv("OSTINATO_CUDA_ATTENTION", "0")
    size = 16

    def world() -> World:
        return make_world(1, SHAPE, STEPS[kind], kind, device="cuda", dtype=torch.bfloat16, block_size=size)

    ops, small, large = TritonOps(), world(), world()
    expected = small.attend(ops).clone()
    count = len(large.cache[0])
    # Every other block at the 2^31st number, before it and behind; what lies between is never touched.
    cache = tuple(
        torch.empty(PLACES // size + count, *t.shape[1:], dtype=t.dtype, device="cuda") for t in large.cache
    )
    moved = torch.arange(count, device="cuda")
    moved[1:] += (moved[1:] % 2) * (PLACES // size - 8)
    for old, new in zip(large.cache, cache, strict=True):
        new[moved] = old
    table = large.batch.static.block_table
    table.copy_(moved[table.long()])
    assert int(table.max()) > PLACES // size
    far = dataclasses.replace(large, cache=cache)
    assert torch.equal(far.attend(ops), expected)
    for new, old in zip(cache, small.cache, strict=True):
        assert torch.equal(new[moved].view(torch.int16), old.view(torch.int16))
