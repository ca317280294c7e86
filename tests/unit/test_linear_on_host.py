"""The source of `linear.cu` itself, all its blocks, run on the CPU by `host_tiles.h`, beside the plain op, both against float64.

Tiles arrive, and products read theirs, at random times as late as the source allows. What this cannot show: the memory model,
speed, and whether a GPU's copies and operands are as its manual says. tests/gpu does that.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.models.quantize import quantize
from ostinato.ops import Linear, NextNorm, Peaks, squares_words
from ostinato.ops.cuda import linear
from ostinato.ops.cuda.linear import Product, Products
from ostinato.ops.triton.tune import Kind, Version
from tests.accuracy import FACTOR, GATE_FACTOR, no_worse
from tests.unit.on_host import compiled, encoded, needs_compiler, run_tiles, tiles_launch

pytestmark = needs_compiler
CPU, BF16, EPS = torch.device("cpu"), torch.bfloat16, 1e-5
BESIDE = [*range(64), *range(-64, 0)]
STORE, ADD, GATE, WIDE, BEST = Product


@dataclass(frozen=True)
class Case:
    """A product, and how it is cut."""

    kind: Product
    n: int
    k: int
    rows: int
    groups: int = 1
    splits: int = 1
    share: int = 1
    depth: int = 64
    processors: int = 132
    bias: bool = False
    sums: int = 0
    """Of a norm that is begun; 0: x is as it is"""
    then: bool = True
    fp8: bool = False

    @property
    def version(self) -> Version:
        return Version(
            Kind.TILE, False, self.rows, 64 * self.groups, self.depth, self.splits, share=self.share
        )


CASES = [
    # Eight rows of x; what a block finishes is less than eight tokens; no stage divides k, no tile n.
    Case(STORE, 200, 136, 5, splits=2, bias=True),
    Case(ADD, 136, 576, 8, groups=2, splits=8, sums=3),
    Case(ADD, 64, 128, 1, depth=128, bias=True),
    # Sixteen, whole tiles of eight tokens.
    Case(STORE, 192, 512, 16, groups=2, depth=128, sums=8),
    Case(STORE, 320, 584, 13, splits=2, bias=True, sums=40),
    Case(ADD, 256, 576, 9, splits=4, sums=9),
    # 32, whose tiles of x a warp copies, or two blocks share.
    Case(ADD, 192, 1032, 31, splits=2),
    Case(ADD, 128, 64, 17, bias=True),
    Case(ADD, 320, 320, 32, share=2, sums=5),
    Case(ADD, 128, 512, 25, splits=4, share=2, then=False),
    # More: half a cluster's last tile is not there.
    Case(ADD, 320, 512, 50, splits=2, share=2, sums=6),
    Case(STORE, 128, 640, 64, groups=2, splits=4, bias=True),
    Case(ADD, 192, 384, 100, splits=2, share=2, bias=True),
    Case(STORE, 72, 320, 128),
    # Gate and up: a block goes from tile to tile.
    Case(GATE, 200, 520, 8, processors=2, sums=4),
    Case(GATE, 200, 192, 20, processors=1),
    Case(GATE, 160, 448, 64, groups=2, share=2, processors=2, sums=7),
    Case(GATE, 96, 136, 128, share=2, processors=1),
    # FP8 weights, of which a stage has 128 inner indices at least; those of x are shorter with more than 32 rows.
    Case(STORE, 200, 144, 5, splits=2, depth=128, bias=True, fp8=True),
    Case(ADD, 136, 1040, 8, groups=2, splits=8, depth=128, sums=3, fp8=True),
    Case(ADD, 64, 256, 1, depth=256, bias=True, fp8=True),
    Case(STORE, 192, 1024, 16, groups=2, depth=256, sums=8, fp8=True),
    Case(ADD, 192, 1040, 31, splits=2, depth=128, fp8=True),
    Case(ADD, 320, 320, 32, share=2, depth=128, sums=5, fp8=True),
    Case(ADD, 320, 528, 50, splits=2, share=2, depth=128, sums=6, fp8=True),
    Case(STORE, 128, 1280, 64, splits=4, depth=256, bias=True, fp8=True),
    Case(ADD, 192, 400, 100, splits=2, share=2, depth=128, bias=True, fp8=True),
    Case(GATE, 200, 528, 8, processors=2, depth=128, sums=4, fp8=True),
    Case(GATE, 200, 192, 20, processors=1, depth=128, fp8=True),
    Case(GATE, 160, 448, 64, groups=2, share=2, processors=2, depth=128, sums=7, fp8=True),
    Case(GATE, 96, 144, 128, share=2, processors=1, depth=128, fp8=True),
]
HEADS = [
    Case(WIDE, 8, 64, 2),
    Case(WIDE, 300, 72, 7, processors=2, sums=2),
    Case(WIDE, 333, 640, 30, depth=128, processors=1),
    Case(WIDE, 700, 136, 40, share=2, processors=2),
    Case(WIDE, 200, 264, 128, groups=2, share=2, processors=2, sums=5),
    Case(WIDE, 300, 80, 7, processors=2, depth=128, sums=2, fp8=True),
    Case(WIDE, 333, 640, 30, depth=256, processors=1, fp8=True),
    Case(WIDE, 700, 144, 40, groups=2, share=2, depth=128, processors=2, fp8=True),
    Case(WIDE, 200, 272, 128, groups=2, share=2, depth=128, processors=2, sums=5, fp8=True),
]


def rings(macros: dict[str, int], seed: int) -> dict[str, int]:
    """Short ones, so that all stages are used again and again."""
    found = (macros["MW"] * 32 + 4) * 8 * macros["TOK"] if macros["KIND"] in (WIDE, BEST) else 0
    stage = macros["KA"] * macros["MW"] * (4096 if macros["FP8"] else 8192)
    stages = min(macros["STAGES"], max(-(-found // stage), 2 + seed % 2))
    return {
        "STAGES": stages, "X_STAGES": min(macros["X_STAGES"], 3 + macros["FP8"] if macros["LAG"] else 2),
        "FLIGHT": min(macros["FLIGHT"], stages - 1),
    }  # fmt: skip


class Host:
    """`Products` itself, whose kernels run on the CPU."""

    def __init__(self, case: Case, folder: Path, patch: pytest.MonkeyPatch, seed: int) -> None:
        self.folder, self.seed, self.libraries = folder, seed, 0
        self.written: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = ()
        one = SimpleNamespace(multi_processor_count=case.processors)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: one)
        patch.setattr(linear, "build", self.build)
        patch.setattr(linear, "_encode", encoded)
        self.products = Products(CPU)

    def build(
        self, source: Path, name: str, macros: dict[str, int], *, block: int, cluster: int, **_: Any
    ) -> SimpleNamespace:
        made: dict[int, ctypes.CDLL] = {}
        self.libraries += 1
        file = f"{name}{self.libraries}"

        def launch(params: bytes, grid: int) -> None:
            assert grid % cluster == 0
            if grid not in made:
                numbers = macros | rings(macros, self.seed)
                numbers |= {
                    "WARPS": macros["MW"] * 4,
                    "GRID": grid,
                    "HOST_THREADS": block,
                    "HOST_CLUSTER": cluster,
                }
                headers, text = ["host_grid.h", "host_tiles.h"], tiles_launch(source, name)
                made[grid] = compiled(self.folder, f"{file}_{grid}", headers, text, numbers, "-O1")
            self.seed = (self.seed + 1) % 2**31
            ended = run_tiles(made[grid], self.written, params, self.seed)
            assert ended, (macros, grid, self.seed)

        return SimpleNamespace(handle=0, launch=launch)

    def behind(self, *tensors: torch.Tensor | None) -> None:
        """What a kernel in front of the next ones writes: it is something else until they have waited."""
        self.written = [(t, torch.full_like(t, torch.nan), t.clone()) for t in tensors if t is not None]


@pytest.fixture
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    torch.manual_seed(value)
    return value


def among(t: torch.Tensor) -> torch.Tensor:
    """The same between rows of NaN, at a multiple of 16 bytes."""
    room = torch.full((len(t) + 128, *t.shape[1:]), torch.nan, dtype=t.dtype)
    room[64:-64] = t
    return room[64:-64]


def linear_of(case: Case, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Of a wide weight [n, k]."""
    if not case.fp8:
        return Linear(among(weight.to(BF16)), bias)
    narrow, scale = torch.empty_like(weight, dtype=torch.float8_e4m3fn), among(torch.empty(len(weight)))
    quantize(weight, narrow, scale)
    narrow[::3, ::7] = 2.0**-9 * torch.arange(-3, 5)[torch.arange(narrow[::3, ::7].numel()) % 8].view(
        narrow[::3, ::7].shape
    )
    room = torch.full((len(weight) + 128, weight.shape[1]), 0x7E, dtype=torch.uint8)  # 448
    room[64:-64] = narrow.view(torch.uint8)
    return Linear(room.view(torch.float8_e4m3fn)[64:-64], bias, scale)


def operands(case: Case) -> tuple[torch.Tensor, Linear, torch.Tensor | None, torch.Tensor | None]:
    """x, weights, squares of a norm that is begun, and its factor."""
    n, k, rows = case.n, case.k, case.rows
    weight = torch.randn(n * (2 if case.kind is GATE else 1), k).mul_(k**-0.5)
    bias = among(torch.randn(n).to(BF16)) if case.bias else None
    squares = among(torch.rand(case.sums, rows) * 3 * k / case.sums) if case.sums else None
    factor = None if squares is None else torch.rsqrt(squares.double().sum(0) / k + EPS).unsqueeze(1)
    return among(torch.randn(rows, k).to(BF16)), linear_of(case, weight, bias), squares, factor


def by_hand(
    case: Case, x: torch.Tensor, linear: Linear, factor: torch.Tensor | None, before: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """In bfloat16 rounded where ops one by one round, or in float64 nowhere."""
    y = x.to(dtype) if factor is None else (x.double() * factor).to(dtype)
    if linear.scale is None:
        y = y @ linear.weight.to(dtype).T
    else:  # what no product rounds, before the scale
        wide = torch.promote_types(dtype, torch.float32)
        y = (y.to(wide) @ linear.weight.to(wide).T * linear.scale).to(dtype)
    if linear.bias is not None:
        y = y + linear.bias.to(dtype)
    if case.kind is GATE:
        gate, up = y.chunk(2, 1)
        y = torch.nn.functional.silu(gate) * up
    return before.to(dtype) + y if case.kind is ADD else y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_worse_than_the_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, case: Case) -> None:
    host = Host(case, tmp_path, monkeypatch, seed)
    n, rows = case.n, case.rows
    x, weights, squares, factor = operands(case)
    before = torch.randn(rows, n).to(BF16)
    out = among(torch.zeros(rows, n, dtype=BF16))
    then, results = None, []
    for _ in range(3):  # in as many orders of threads
        out.copy_(before if case.kind is ADD else torch.nan)
        if case.kind is ADD and case.then:
            then = NextNorm(
                among(1 + torch.rand(n).to(BF16)) if then is None else then.weight,
                among(torch.full((rows, n), torch.nan, dtype=BF16)),
                among(torch.full((squares_words(rows, n),), torch.nan)),
            )
        host.behind(x, squares, out if case.kind is ADD else None)
        sums = case.sums or None
        host.products.run(
            case.kind, case.version, x, weights, out, squares=squares, sums=sums, eps=EPS, then=then
        )
        results.append([out.clone()] + ([then.scaled.clone(), then.squares.clone()] if then else []))
    plain, exact = (by_hand(case, x, weights, factor, before, dtype) for dtype in (BF16, torch.float64))
    # Gates times ups: a row's error is that of its few large numbers.
    no_worse(out, plain, exact, GATE_FACTOR if case.kind is GATE else FACTOR)
    assert out._base is not None
    assert out._base[BESIDE].isnan().all()
    if then is not None:
        assert torch.equal(then.scaled, (out.float() * then.weight.float()).to(BF16))
        columns = torch.nn.functional.pad(out.float(), (0, -n % 64)).view(rows, -1, 64)
        expected = columns.square().sum(2).T
        count = expected.numel()
        torch.testing.assert_close(then.squares[:count].view(-1, rows), expected, rtol=1e-5, atol=0)
        assert then.squares[count:].isnan().all()
        for t in (then.scaled, then.squares):
            assert t._base is not None
            assert t._base[BESIDE].isnan().all()
    for again in results[1:]:
        for a, b in zip(again, results[0], strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16)), "the order of threads changes bits"


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_the_head_and_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, case: Case
) -> None:
    """Logits, and the first of the largest of each block's; NaN is larger than nothing."""
    host = Host(case, tmp_path, monkeypatch, seed)
    n, rows = case.n, case.rows
    x, weights, squares, factor = operands(case)
    for t in (weights.weight.view(torch.uint8), weights.scale):
        if t is not None:
            t[n // 2 :] = t[: n - n // 2].clone()  # each logit twice
    x[rows // 2] = 0
    x[rows // 3] = torch.nan
    parts = host.products.blocks(case.version, rows, weights)
    host.behind(x, squares)
    logits = among(torch.zeros(rows, n))
    found, results = [], []
    for kind in (WIDE, BEST, WIDE, BEST):
        logits.fill_(torch.nan)
        peaks = Peaks(
            among(torch.full((rows, parts), torch.nan)),
            among(torch.full((rows, parts), -7.0)).int() if kind is BEST else None,
        )
        host.products.run(
            kind, case.version, x, weights, logits if kind is WIDE else None,
            squares=squares, sums=case.sums or None, eps=EPS, peaks=peaks,
        )  # fmt: skip
        assert peaks.values._base is not None
        assert peaks.values._base[BESIDE].isnan().all()
        found.append(peaks)
        results += [logits.clone()] if kind is WIDE else []
    numbers = torch.arange(rows) != rows // 3
    exact = by_hand(case, x, weights, factor, logits, torch.float64)[numbers]
    first = results[0]
    no_worse(first[numbers], exact.float(), exact, tiny=1e-6)
    assert first[~numbers].isnan().all()
    assert torch.equal(first[numbers], results[1][numbers])
    assert first._base is None or first._base[BESIDE].isnan().all()
    plain = first.nan_to_num(nan=-torch.inf)
    largest = plain.amax(1)
    for peaks in found:
        assert torch.equal(peaks.values, found[0].values)
        assert torch.equal(peaks.values.amax(1), largest)
        if peaks.tokens is None:
            continue
        # Of a block's tokens the first that has its largest; of all blocks' the first one that has the largest of all.
        at = peaks.tokens.long()
        assert ((at >= 0) & (at < n))[numbers].all()
        assert torch.equal(plain.gather(1, at.clamp(0, n - 1))[numbers], peaks.values[numbers])
        best = torch.where(peaks.values == largest.unsqueeze(1), at, n).amin(1)
        assert torch.equal(best[numbers], plain.argmax(1)[numbers])


@pytest.mark.parametrize(
    "case", [Case(ADD, 128, 256, 32, splits=4), Case(STORE, 64, 256, 16, splits=4)], ids=str
)
def test_bits_of_a_row_do_not_depend_on_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, case: Case
) -> None:
    """The first and the last block's parts are large and cancel, so another order of the sum would change all numbers."""
    host = Host(case, tmp_path, monkeypatch, seed)
    x, weights, _, _ = operands(case)
    weights.weight[:, -64:] = weights.weight[:, :64]
    x[:] = x[0].clone()
    x[:, :64] *= 1e6
    x[:, -64:] = -x[:, :64]
    out = among(torch.zeros(case.rows, case.n, dtype=BF16))
    host.products.run(case.kind, case.version, x, weights, out, then=None)
    assert not out.isnan().any()
    assert torch.equal(out, out[:1].expand_as(out))
