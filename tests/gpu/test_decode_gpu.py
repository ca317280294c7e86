"""The fused kernels of a small step on a GPU, at real sizes: beside the plain ops, and the same bits each time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "unit"))
sys.path.append(str(Path(__file__).parent))
from test_ops_gpu import EPS, LLAMA, Weights, forward
from test_triton_decode import by_ops, check, exact, make_linear
from test_triton_ops import Seq, standard

from ostinato.ops import LayerWeights, Linear
from ostinato.ops.triton import TritonOps
from ostinato.ops.triton.compile import compile_ahead
from ostinato.ops.triton.tune import BUCKETS, Kind, Store, Table, Version, candidates, problem_of
from ostinato.types import StepKind
from tests.accuracy import no_worse

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
SHAPES = (
    ("norm_linear", 3072, 2048),
    ("linear_add", 2048, 2048),
    ("norm_gate_up", 8192, 2048),
    ("linear_add", 2048, 8192),
    ("norm_head", 128256, 2048),
    ("norm_linear", 960, 576),
    ("norm_gate_up", 1536, 576),
    ("norm_head", 50257, 72),
)
"""(op, outputs of the result, inputs)"""
ROWS = (1, 5, 16, 33, 64, 100)
"""Each bucket, full or with padding"""
LARGE = 1 << 27
"""Weights of which float64 takes a gibibyte: tried at one number of rows a kernel."""


@pytest.fixture(autouse=True)
def seed() -> int:
    value = int(torch.empty((), dtype=torch.int64).random_(2**31))
    torch.manual_seed(value)
    return value  # in every failing assertion's locals


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("op", "columns", "depth"), SHAPES)
def test_every_candidate_beside_the_plain_op(op: str, columns: int, depth: int, fp8: bool) -> None:
    """All versions that may be chosen for a shape, through the ops, twice: right, and the same bits."""
    gate = op == "norm_gate_up"
    linear = make_linear(columns * (2 if gate else 1), depth, BF16, bias=False, fp8=fp8, device=CUDA)
    norm = (1 + torch.randn(depth, device=CUDA) / 4).to(BF16)
    some = (1, 33) if columns * depth >= LARGE else ROWS
    with compile_ahead():
        for rows in sorted({next(b for b in BUCKETS if rows <= b) for rows in some}):
            check_candidates(op, linear, norm, rows, only_launch=True)
    for rows in some:
        check_candidates(op, linear, norm, rows)


def check_candidates(
    op: str, linear: Linear, norm: torch.Tensor, rows: int, only_launch: bool = False
) -> None:
    """One number of rows of that test."""
    columns, depth, gate = linear.out_features, linear.in_features, op == "norm_gate_up"
    if gate:
        columns //= 2
    x = torch.randn(rows, depth, device=CUDA).to(BF16) * 3
    before = torch.randn(rows, columns, device=CUDA).to(BF16)
    index = torch.randperm(rows, device=CUDA).int()
    source = x[index.long()] if op == "norm_head" else x
    if not only_launch:
        expected, plain = (
            which(source, linear, None if op == "linear_add" else norm, gate) for which in (exact, by_ops)
        )
        if op == "linear_add":
            expected, plain = before + expected, before + plain

    def poison(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.full(size, float("nan"), dtype=dtype, device=CUDA)

    def run(ops: TritonOps) -> torch.Tensor:
        room, normed = poison(rows + 2, columns), torch.full_like(x, float("nan"))
        out = room[:rows]
        if op == "linear_add":
            ops.linear_add(x, linear, residual=out.copy_(before))
        elif op == "norm_gate_up":
            wide = poison(rows, 2 * columns)
            ops.norm_gate_up(x, norm, EPS, linear, normed=normed, gate_up=wide, out=out)
        elif op == "norm_linear":
            ops.norm_linear(x, norm, EPS, linear, normed=normed, out=out)
        else:
            room = poison(rows + 2, columns, dtype=torch.float32)
            out = room[:rows]
            ops.norm_head(x, index, norm, EPS, linear, last=normed, logits=out)
        assert room[rows:].isnan().all()
        return out

    problem = problem_of(op, linear, next(b for b in BUCKETS if rows <= b), BF16)
    for version in candidates(problem):
        ops = TritonOps(Table({problem: version}))
        first = run(ops)
        if only_launch:
            continue
        no_worse(first, plain, expected, what=version)
        for _ in range(2):
            assert torch.equal(run(ops), first), version
        assert not ops._workspace(CUDA).semaphores.any()


@pytest.mark.parametrize(
    ("version", "rows"),
    [
        (Version(Kind.GEMV, True, 1, 4), 1),
        (Version(Kind.STREAM, True, 16, 32, 64, 1, 4, 4), 7),
        (Version(Kind.STREAM, False, 32, 64, 128, 3, 4, 3), 29),
        (Version(Kind.STREAM, True, 64, 64, 64, 4, 4, 4), 50),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("columns", "depth", "dtype", "fp8"),
    [
        (130, 72, torch.float16, False),
        (576, 1536, BF16, False),
        (130, 72, BF16, True),
        (1000, 2048, BF16, True),
    ],
)
def test_every_option_of_a_product(
    columns: int, depth: int, version: Version, rows: int, dtype: torch.dtype, fp8: bool
) -> None:
    """Bias, gather, activation and residual, launched dependently."""
    pdl = torch.cuda.get_device_capability() >= (9, 0)
    check(version, rows, columns, depth, dtype, fp8=fp8, device=CUDA, pdl=pdl)


@pytest.mark.parametrize("count", [1, 5, 33])
def test_dependent_launch_changes_no_bit(seed: int, count: int) -> None:
    """A chain of kernels, each starting before the last one has ended, against the same without."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launch needs compute capability 9.0")
    sizes = {"hidden": 2048, "intermediate": 8192, "vocab": 32000}
    seqs = [Seq(1 + 37 * i % 600) for i in range(count)]
    results = []
    for pdl in (False, True, True, True):
        ops = TritonOps()
        ops._pdl, ops._launch = pdl, {"PDL": pdl, "launch_pdl": pdl}
        world = standard(
            seed, LLAMA, StepKind.DECODE, seqs=seqs, pad_seqs=0, device="cuda", dtype=BF16, **sizes
        )
        weights = Weights.make(seed, world)
        for _ in range(20):
            forward(ops, world, weights)
        results.append([t.clone() for t in (world.scratch.logits, world.scratch.x, *world.cache)])
        assert not ops._workspace(world.scratch.x.device).semaphores.any()
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


def test_tuning_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTINATO_CACHE", str(tmp_path))
    monkeypatch.delenv("OSTINATO_TUNE", raising=False)

    def linear(columns: int, depth: int) -> Linear:
        return make_linear(columns, depth, BF16, bias=False, fp8=False, device=CUDA)

    norm = torch.ones(576, device=CUDA, dtype=BF16)
    layers = [
        LayerWeights(
            norm, linear(960, 576), None, None, linear(576, 576), norm, linear(3072, 576), linear(576, 1536)
        )
        for _ in range(3)
    ]
    head = linear(4096, 576)
    stack = SimpleNamespace(embedding=head.weight, layers=layers, head=head, attention=LLAMA)
    with torch.cuda.stream(torch.cuda.Stream()):
        ops = TritonOps()
        ops._fused = None
        ops.tune(stack, 20)  # type: ignore[arg-type]
    chosen = Store.here(tiles=ops._products is not None).load()
    assert {p.rows for p in chosen} == {1, 16, 32}
    assert len(chosen) == 5 * 3
    (file,) = (tmp_path / "kernels").glob("versions-*.json")
    written = file.stat().st_mtime_ns
    again = TritonOps()
    again._fused = None
    again.tune(stack, 20)  # type: ignore[arg-type]
    assert file.stat().st_mtime_ns == written
    for problem, version in chosen.items():
        asked = problem.op, _like(problem.columns, problem.depth, problem.gate), problem.rows, BF16
        assert again._table(*asked) == version
        assert again._table.why(*asked) == "measured"


def _like(columns: int, depth: int, gate: bool) -> Linear:
    return Linear(torch.empty(1, device=CUDA, dtype=BF16).expand(columns * (2 if gate else 1), depth))
