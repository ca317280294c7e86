"""The source of `attend.cu` itself, all its blocks, run on the CPU by `host_tiles.h`, beside the plain ops and float32.

What this cannot show: the memory model, speed, and whether a GPU's copies, operands and fragments are as its manual says.
tests/gpu does that.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent))
from test_triton_ops import EPS, Seq, World, make_world

from ostinato.ops import AttentionShape, LayerWeights, Linear, NextNorm, StepView, squares_words
from ostinato.ops.cuda import attend, linear
from ostinato.ops.cuda.attend import Attend
from ostinato.ops.cuda.attention import MOST
from ostinato.ops.reference import ReferenceOps
from ostinato.types import StepKind
from tests.accuracy import FACTOR, errors, no_worse
from tests.stack import Model
from tests.unit.on_host import compiled, encoded, needs_compiler, run_tiles, tiles_launch

pytestmark = needs_compiler
CPU, BF16 = torch.device("cpu"), torch.bfloat16


@dataclass(frozen=True)
class Case:
    hidden: int
    shape: AttentionShape
    norm: bool
    bias: bool
    lengths: Sequence[int]
    """Of rows; 0: not live"""
    pad: int = 0
    block_size: int = 16
    long: int = 0
    """Of a split, at most; 0: the library's own"""


MANY = (300, 1, 16, 0, 17, 33, 2, 100, 47, 48, 49, 96, 97, 15, 31, 64, 128)
CASES = {
    "llama": Case(1024, AttentionShape(4, 1, 64), False, False, (*MANY, 0, *MANY[:12]), pad=2),
    "qwen3": Case(512, AttentionShape(4, 2, 128), True, False, MANY),
    "single": Case(512, AttentionShape(1, 1, 128), True, True, (*MANY, 5, 260), pad=1, block_size=5),
    "window": Case(512, AttentionShape(2, 1, 64, sliding_window=40), False, True, (*MANY, *MANY[:15])),
    # Rows of several splits, whose blocks have long and short rows of their own, or none.
    "splits": Case(512, AttentionShape(4, 1, 64), False, True, (*MANY, 700, 190, 1, 1), pad=3, long=96),
    "all": Case(512, AttentionShape(2, 1, 128), True, False, tuple(range(200, 232)), long=100),
    "cut": Case(
        512, AttentionShape(2, 1, 64, sliding_window=300), True, False, (*MANY, 900, 513, 4), block_size=48, long=64
    ),
}  # fmt: skip


class Host:
    """`Attend` itself, whose kernel runs on the CPU."""

    def __init__(self, case: Case, folder: Path, patch: pytest.MonkeyPatch, seed: int) -> None:
        self.case, self.folder, self.seed = case, folder, seed
        self.written: list[tuple[torch.Tensor, ...]] = []
        patch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
        )
        patch.setattr(attend, "build", self.build)
        patch.setattr(linear, "_encode", encoded)

    def build(
        self, source: Path, name: str, macros: dict[str, int], *, grid: int, block: int, **_: Any
    ) -> SimpleNamespace:
        numbers = {
            "WARPS": block // 32 - 2, "GRID": grid, "HOST_THREADS": block, "HOST_CLUSTER": 1, "HOST_ROW_THREADS": (block - 64) // 2,
        }  # fmt: skip
        if self.case.long:
            numbers["LONG"] = self.case.long
        text = tiles_launch(source, name)
        library = compiled(self.folder, name, ["host_grid.h", "host_tiles.h"], text, macros | numbers, "-O1")

        def launch(params: bytes) -> None:
            self.seed = (self.seed + 1) % 2**31
            assert run_tiles(library, self.written, params, self.seed), self.seed

        return SimpleNamespace(handle=0, launch=launch)

    def behind(self, view: StepView, *tensors: torch.Tensor) -> None:
        """What the step has written in front of the kernel: until the wait it is anything, though rows are numbers of rows or nearly so."""
        numbers = (view.seq_lens, view.positions, view.slots, view.block_table)
        self.written = [(t, torch.randint(-(2**31), 2**31, t.shape).int(), t.clone()) for t in numbers]
        rows = torch.randint(-1, len(view.block_table), view.rows.shape).int()
        self.written.append(
            (view.rows, torch.where(torch.rand(rows.shape) < 1 / 3, rows, view.rows), view.rows.clone())
        )
        self.written += [(t, torch.full_like(t, torch.nan), t.clone()) for t in tensors]


def layers_of(case: Case, world: World) -> Model:
    hidden, a = case.hidden, case.shape

    def make(*size: int, scale: float = 0.02) -> torch.Tensor:
        return torch.randn(size).mul_(scale).to(BF16)

    def layer() -> LayerWeights:
        norms = [1 + make(a.head_dim, scale=0.2) if case.norm else None for _ in range(2)]
        bias = make(a.qkv_size, scale=0.5) if case.bias else None
        return LayerWeights(
            1 + make(hidden), Linear(make(a.qkv_size, hidden, scale=hidden**-0.5), bias), *norms,
            Linear(make(hidden, a.q_size)), 1 + make(hidden), Linear(make(1024, hidden)), Linear(make(hidden, 512)),
        )  # fmt: skip

    table = make(512, hidden)
    return Model(table, (layer(), layer()), 1 + make(hidden), Linear(table), world.rope.float(), a, EPS)


def plain(world: World, layer: LayerWeights, y: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """In the world's dtype: rounded where ops one by one round, or to float32 alone."""
    dtype = world.qkv.dtype
    wide = torch.float64 if dtype is torch.float32 else dtype
    z = (y.double() * factor).to(wide) @ layer.qkv.weight.to(wide).T
    if layer.qkv.bias is not None:
        z = z + layer.qkv.bias.to(wide)
    norms = [None if norm is None else norm.to(dtype) for norm in (layer.q_norm, layer.k_norm)]
    ops, s = ReferenceOps(), world.scratch
    s.qkv.copy_(z.to(dtype))
    ops.rope_paged_attention(
        s.qkv, ops.prepare(world.batch, s), world.cache, world.rope, *norms, EPS, world.shape,
        workspace=s.attention, out=s.attn,
    )  # fmt: skip
    return s.attn.clone()


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    torch.manual_seed(value)
    return value


@pytest.mark.parametrize("name", list(CASES))
def test_against_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, name: str) -> None:
    """Two layers in turn, in two orders of threads each."""
    case = CASES[name]
    seqs = [Seq(max(n, 1), active=n > 0) for n in case.lengths]
    rows = len(seqs) + case.pad

    def world_of(dtype: torch.dtype) -> World:
        return make_world(
            seed,
            case.shape,
            seqs,
            StepKind.DECODE,
            pad_seqs=case.pad,
            block_size=case.block_size,
            dtype=dtype,
        )

    world = world_of(BF16)
    model, s, a = layers_of(case, world), world.scratch, case.shape
    host = Host(case, tmp_path, monkeypatch, seed)
    kernel = Attend(CPU, model, case.block_size, world.batch.static.block_table.shape[1])
    assert kernel.serves(model, rows)
    room = torch.full((rows + 9, case.hidden), torch.nan, dtype=BF16)
    y, squares = room[:rows], torch.full((squares_words(rows, case.hidden),), torch.nan)
    sums = case.hidden // 64
    y.copy_(torch.randn(y.shape))
    squares[: sums * rows] = torch.rand(sums * rows) * 100
    factor = torch.rsqrt(
        squares[: sums * rows].view(sums, rows).double().sum(0) / case.hidden + EPS
    ).unsqueeze(1)
    view = ReferenceOps().prepare(world.batch, s)
    live, found = s.slots >= 0, []
    assert live.any()
    assert not live.all() or 0 not in case.lengths
    slots = s.slots[live].long()
    semaphores = torch.zeros(rows * a.kv_heads, dtype=torch.int32)
    room_out = torch.full((rows + 2, a.q_size), torch.nan, dtype=BF16)
    for turn in range(4):
        layer = model.layers[turn % 2]
        cache = tuple(part.clone() for part in world.cache)
        before = [part.clone() for part in cache]
        room_out.fill_(torch.nan)
        out = room_out[1:-1]
        host.behind(view, y, squares, *cache)
        host.written[-2:] = []  # old keys and values are there
        kernel.run(
            layer, NextNorm(layer.input_norm, y, squares), view, cache,
            workspace=torch.full((rows * a.heads * MOST * (a.head_dim + 2),), torch.nan), semaphores=semaphores, out=out,
        )  # fmt: skip
        assert not semaphores.any()
        assert all((words == -1).all() for words in kernel.workspaces().values())
        assert room_out[[0, -1]].isnan().all()
        assert (out[~live] == 0).all()
        new = []
        for part, old in zip(cache, before, strict=True):
            flat = part.flatten(0, 1)
            new.append(flat[slots].clone())
            flat[slots] = old.flatten(0, 1)[slots]
            assert torch.equal(part.view(torch.int16), old.view(torch.int16)), "old keys or values changed"
        found.append([out.clone(), *new])
        if turn > 1:
            assert all(torch.equal(p, q) for p, q in zip(found[turn], found[turn - 2], strict=True))
            continue
        expected = []
        for dtype in (BF16, torch.float32):
            other = world_of(dtype)
            result = plain(other, layer, y, factor)
            expected.append([result[live], *(part.flatten(0, 1)[slots] for part in other.cache)])
        for what, *three in zip(("out", "keys", "values"), (out[live], *new), *expected, strict=True):
            if what == "out":
                # An error of a loud token's weight is one of the whole row, so rows differ much by chance; all together do not.
                ours, theirs = (errors(t, three[2]) for t in three[:2])
                assert (ours <= 4 * theirs.clamp(min=float(theirs.median()))).all(), (ours, theirs)
                assert ours.square().mean() <= 1.2**2 * theirs.square().mean(), (ours, theirs)
            no_worse(*three, factor=100 if what == "out" else FACTOR, what=what)
