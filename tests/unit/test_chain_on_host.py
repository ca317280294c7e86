"""The source of `chain.cu` itself, all its blocks, run on the CPU by `host_tiles.h`, beside the plain ops and float32.

What this cannot show: the memory model, speed, and whether a GPU's copies and operands are as its manual says. tests/gpu does that.
"""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ostinato.ops import Linear
from ostinato.ops.cuda import chain, linear
from ostinato.ops.cuda.chain import TEAM, Chain, Sizes
from ostinato.ops.reference import ReferenceOps
from tests.accuracy import no_worse
from tests.stack import Model
from tests.unit.on_host import compiled, encoded, needs_compiler, run_tiles, tiles_launch
from tests.unit.test_chain import model, scratch_of

pytestmark = needs_compiler
CPU, BF16, TEAMS = torch.device("cpu"), torch.bfloat16, 4
SIZES = Sizes(hidden=512, queries=512, qkv=776, inner=1536)
"""Tiles that are not all as high; two turns of gate and up, and of queries, keys and values"""


class Host:
    """`Chain` itself, whose kernels run on the CPU."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.written: list[tuple[torch.Tensor, ...]] = []
        processors = SimpleNamespace(multi_processor_count=TEAMS * TEAM)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
        patch.setattr(chain, "build", self.build)
        patch.setattr(linear, "_encode", encoded)

    def build(
        self,
        source: Path,
        name: str,
        macros: dict[str, int],
        *,
        grid: int,
        block: int,
        cluster: int,
        **_: Any,
    ) -> SimpleNamespace:
        made: list[ctypes.CDLL] = []
        numbers = {"WARPS": block // 32 - 4, "GRID": grid, "HOST_THREADS": block, "HOST_CLUSTER": cluster}

        def launch(params: bytes) -> None:
            if not made:
                headers, text = ["host_grid.h", "host_tiles.h"], tiles_launch(source, name)
                made.append(
                    compiled(self.folder, f"{name}{macros['TOK']}", headers, text, macros | numbers, "-O1")
                )
            (library,) = made
            self.seed = (self.seed + 1) % 2**31
            assert run_tiles(library, self.written, params, self.seed), (macros, self.seed)

        return SimpleNamespace(handle=0, launch=launch, clusters_at_once=lambda: grid // cluster)


def filled() -> Model:
    made = model(SIZES)
    for layer in made.layers:
        for x in (layer.qkv, layer.output, layer.gate_up, layer.down):
            x.weight.copy_(torch.randn(x.weight.shape) * x.in_features**-0.5)
        for norm in (layer.input_norm, layer.mlp_norm):
            norm.copy_(torch.rand(norm.shape) + 0.5)
    made.final_norm.copy_(torch.rand(made.final_norm.shape) + 0.5)
    return made


def plain(
    model: Model, index: int, attn: torch.Tensor, x: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """x and, but behind the last layer, queries, keys and values, by the plain ops."""
    ops, layer = ReferenceOps(), model.layers[index]

    def of(linear: Linear) -> Linear:
        return Linear(linear.weight.to(dtype))

    inner, out = layer.down.in_features, x.to(dtype).clone()
    normed, wide, act = (out.new_empty(len(x), size) for size in (out.shape[1], 2 * inner, inner))
    ops.linear_add(attn.to(dtype), of(layer.output), residual=out)
    ops.norm_gate_up(
        out, layer.mlp_norm.to(dtype), model.norm_eps, of(layer.gate_up), normed=normed, gate_up=wide, out=act
    )
    ops.linear_add(act, of(layer.down), residual=out)
    if index + 1 == len(model.layers):
        return (out,)
    following = model.layers[index + 1]
    qkv = out.new_empty(len(x), following.qkv.out_features)
    ops.norm_linear(
        out, following.input_norm.to(dtype), model.norm_eps, of(following.qkv), normed=normed, out=qkv
    )
    return out, qkv


@pytest.mark.parametrize("rows", [41, 128])
def test_no_worse_than_the_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A layer in the middle, the last one, and the first one again in another order of threads."""
    seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    made, host = filled(), Host(tmp_path, monkeypatch, seed)
    kernel, s = Chain(CPU, made), scratch_of(made, rows)
    attn, x = (torch.randn(rows, size).to(BF16) for size in (s.attn.shape[1], s.x.shape[1]))
    first: list[list[torch.Tensor]] = []
    for turn in range(3):
        index = turn % 2
        s.attn.copy_(attn)
        s.x.copy_(x)
        host.written = [(t, torch.full_like(t, torch.nan), t.clone()) for t in (s.attn, s.x)]
        for t in (s.qkv, s.act, s.normed, kernel.workspaces()["squares"]):
            t.fill_(torch.nan)
        begun = kernel.run(index, s)
        found = [s.x.clone(), *([s.qkv.clone()] if index == 0 else [])]
        if index:
            assert s.qkv.isnan().all()
        assert begun.squares is not None
        norm = made.final_norm if index else made.layers[1].input_norm
        assert torch.equal(s.normed, (s.x.float() * norm.float()).to(BF16))
        sums = begun.squares[: TEAMS * rows].view(TEAMS, rows).sum(0)
        torch.testing.assert_close(sums, s.x.float().square().sum(1), rtol=1e-5, atol=0)
        if turn > 1:
            assert all(torch.equal(a, b) for a, b in zip(found, first[index], strict=True))
            continue
        first.append(found)
        others = [plain(made, index, attn, x, dtype) for dtype in (BF16, torch.float32)]
        for what, *three in zip(("x", "qkv"), found, *others, strict=False):
            no_worse(*three, what=(what, index))
