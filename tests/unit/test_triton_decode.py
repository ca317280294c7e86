"""The fused kernels of a small step: in Triton's interpreter against float64, and compiled for an H100.

The choice of versions is tested without a GPU too: its rules, and what it keeps on disk.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent))
from compiled import Compiled, assembled, compile_launches, compiled_here
from test_triton_ops import DECODE, SMOLLM, Seq, _interpreter_loops, make_world  # noqa: F401 (a fixture)

from ostinato.models.quantize import FP8, Quantizer
from ostinato.ops import AttentionShape, Linear
from ostinato.ops.cuda import program
from ostinato.ops.reference import linear_product, rms_norm
from ostinato.ops.triton import TritonOps, tune
from ostinato.ops.triton.decode import Workspace, multiply
from ostinato.ops.triton.tune import CHAIN, LIBRARY, TILES, Kind, Problem, Store, Table, Timing, Version
from ostinato.types import StepKind
from tests.accuracy import FACTOR, GATE_FACTOR, no_worse

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers this on a GPU")
CPU = torch.device("cpu")
EPS = 1e-5
NAN = float("nan")


@pytest.fixture(autouse=True)
def seed() -> int:
    value = int(os.environ.get("OSTINATO_TEST_SEED", random.SystemRandom().randrange(2**31)))
    torch.manual_seed(value)
    return value  # in every failing assertion's locals


def make_linear(
    columns: int, depth: int, dtype: torch.dtype, *, bias: bool, fp8: bool, device: torch.device = CPU
) -> Linear:
    weight = torch.randn(columns, depth, device=device) / depth**0.5
    own = torch.randn(columns, device=device).to(dtype) if bias else None
    return Quantizer(device).linear("w", weight, own) if fp8 else Linear(weight.to(dtype), own)


def exact(x: torch.Tensor, linear: Linear, norm: torch.Tensor | None, gate: bool) -> torch.Tensor:
    """The product in float64."""
    x, weight = x.double(), linear.weight.double()
    if linear.scale is not None:
        weight = weight * linear.scale.double()[:, None]
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm.double()
    out = x @ weight.t()
    if linear.bias is not None:
        out = out + linear.bias.double()
    if gate:
        g, u = out.chunk(2, -1)
        out = torch.nn.functional.silu(g) * u
    return out


def by_ops(x: torch.Tensor, linear: Linear, norm: torch.Tensor | None, gate: bool) -> torch.Tensor:
    """The same by the plain ops, in the dtype of x."""
    out = linear_product(x if norm is None else rms_norm(x, norm, EPS), linear)
    if linear.bias is not None:
        out = out + linear.bias
    if gate:
        g, u = out.chunk(2, -1)
        out = torch.nn.functional.silu(g) * u
    return out


def poisoned_workspace(device: torch.device = CPU) -> Workspace:
    workspace = Workspace.on(device)
    workspace.partials.fill_(NAN)
    return workspace


def check(
    version: Version,
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    *,
    fp8: bool,
    device: torch.device = CPU,
    pdl: bool = False,
) -> None:
    """Every op that a version serves, with NaN around all that it may read and write."""

    def near(actual: torch.Tensor, *args: Any, before: torch.Tensor | float = 0) -> None:
        # A rounding: where there are so few numbers, plain ops may be exact by chance; one input of hundreds is ten times that.
        tiny = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
        factor = GATE_FACTOR if args[-1] else FACTOR
        no_worse(actual, before + by_ops(*args), before + exact(*args), factor, tiny=tiny)

    def poison(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.full(size, NAN, dtype=dtype, device=device)

    def run(linear: Linear, out: torch.Tensor, **more: Any) -> None:
        multiply(version, x, linear, out, workspace, eps=EPS, pdl=pdl, **more)
        assert not workspace.semaphores.any()

    workspace = poisoned_workspace(device)
    room = poison(rows + 3, depth)
    x = room[:rows].copy_(torch.randn(rows, depth, device=device) * 3)
    norm = (1 + torch.randn(depth, device=device) / 4).to(dtype)
    fused = norm if version.norms else None
    for bias in (False, True):
        linear = make_linear(columns, depth, dtype, bias=bias, fp8=fp8, device=device)
        whole = poison(rows + 2, columns)
        run(linear, whole[:rows], norm=fused)
        near(whole[:rows], x, linear, fused, False)
        assert whole[rows:].isnan().all()
        residual = torch.randn(rows, columns, device=device).to(dtype)
        before = residual.clone()
        run(linear, residual, add=True)
        near(residual, x, linear, None, False, before=before)

    pair = make_linear(2 * columns, depth, dtype, bias=False, fp8=fp8, device=device)
    whole = poison(rows + 2, columns)
    run(pair, whole[:rows], norm=fused, gate=True)
    near(whole[:rows], x, pair, fused, True)
    assert whole[rows:].isnan().all()

    linear = make_linear(columns, depth, dtype, bias=False, fp8=fp8, device=device)
    index = torch.randperm(rows, device=device).int()
    logits, again = (poison(rows, columns, dtype=torch.float32) for _ in range(2))
    run(linear, logits, norm=fused, index=index)
    near(logits, x[index.long()], linear, fused, False)
    run(linear, again, norm=fused, index=index)
    assert torch.equal(logits, again)


GEMV = Version(Kind.GEMV, True, 1, 4)
STREAM = Version(Kind.STREAM, True, 16, 16, 32, warps=4, stages=3)


@interpreted
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("version", "rows", "columns", "depth"),
    [
        (GEMV, 1, 30, 64),
        (replace(GEMV, columns=8), 1, 17, 97),
        (replace(GEMV, columns=1), 1, 7, 576),
        (STREAM, 2, 48, 128),
        (STREAM, 16, 37, 72),
        (replace(STREAM, norms=False), 5, 33, 32),
        (replace(STREAM, splits=2), 3, 40, 576),
        (replace(STREAM, splits=4, rows=32), 17, 20, 97),  # one part has no input at all
        (replace(STREAM, splits=3, rows=64, columns=32, depth=64), 33, 70, 576),
    ],
    ids=str,
)
def test_products_beside_the_plain_ones(
    version: Version, rows: int, columns: int, depth: int, dtype: torch.dtype, fp8: bool
) -> None:
    check(version, rows, columns, depth, dtype, fp8=fp8)


@interpreted
def test_a_row_that_is_nan_spoils_no_other() -> None:
    linear = make_linear(40, 96, torch.float32, bias=False, fp8=False)
    x, norm = torch.randn(9, 96), torch.ones(96)
    clean, spoilt = torch.empty(9, 40), torch.empty(9, 40)
    version = replace(STREAM, splits=2)
    multiply(version, x, linear, clean, poisoned_workspace(), norm=norm, eps=EPS)
    x[4] = NAN
    multiply(version, x, linear, spoilt, poisoned_workspace(), norm=norm, eps=EPS)
    others = [i for i in range(9) if i != 4]
    assert torch.equal(clean[others], spoilt[others])
    assert spoilt[4].isnan().all()


@interpreted
@pytest.mark.parametrize("shape", [SMOLLM, AttentionShape(4, 2, 24, sliding_window=100)])
def test_attention_does_not_depend_on_the_grid(seed: int, shape: AttentionShape) -> None:
    """However many programs share the work, each row has the same bits, and no count is left over."""
    seqs = [*DECODE, Seq(700), Seq(2)]
    results = []
    for programs in (1, 7, 1000):
        ops = TritonOps()
        ops._programs = programs
        world = make_world(seed, shape, seqs, StepKind.DECODE, pad_seqs=9)
        results.append(world.attend(ops).clone())
        assert not ops._workspace(CPU).semaphores.any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@interpreted
def test_reset_puts_semaphores_right(seed: int) -> None:
    ops = TritonOps()
    shape = AttentionShape(2, 1, 16)
    expected = make_world(seed, shape, [Seq(90)], StepKind.DECODE).attend(ops).clone()
    ops._workspace(CPU).semaphores.fill_(3)  # as a step that was cut off would
    ops.reset()
    assert torch.equal(make_world(seed, shape, [Seq(90)], StepKind.DECODE).attend(ops), expected)


# --- which version serves which shape ------------------------------------------------------

MODELS = {
    "smollm2-135m": (576, 960, 576, 1536, 49152),
    "llama-3.2-1b": (2048, 3072, 2048, 8192, 128256),
    "qwen3-0.6b": (1024, 4096, 2048, 3072, 151936),
    "llama-3.1-8b": (4096, 6144, 4096, 14336, 128256),
    "wide": (16384, 18432, 16384, 53248, 128256),
    "tiny": (40, 72, 40, 56, 130),
}
"""hidden, QKV outputs, query size, intermediate, vocabulary"""


def problems(dtype: torch.dtype, fp8: bool) -> list[Problem]:
    found = []
    for hidden, qkv, queries, inner, vocab in MODELS.values():
        shapes = (
            ("norm_linear", qkv, hidden),
            ("linear_add", hidden, queries),
            ("norm_gate_up", inner, hidden),
            ("linear_add", hidden, inner),
            ("norm_head", vocab, hidden),
        )
        found += [Problem(*shape, rows, dtype, fp8) for shape in shapes for rows in tune.BUCKETS]
    return found


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_candidate_fits(dtype: torch.dtype, fp8: bool) -> None:
    for problem in problems(dtype, fp8):
        versions = tune.candidates(problem)
        assert tune.default(problem) in versions
        assert LIBRARY in versions
        assert len(versions) <= 8
        for v in versions:
            if v.kind is Kind.LIBRARY:
                continue
            assert v.rows == problem.rows
            assert not (v.norms and not problem.has_norm)
            if v.kind is Kind.STREAM:
                assert dtype is not torch.float16 or not v.norms
                blocks = -(-problem.columns // v.columns)
                width = v.columns * (2 if problem.gate else 1)
                stage = v.depth * (width * (1 if fp8 else dtype.itemsize) + v.rows * dtype.itemsize)
                assert v.stages * stage <= 160 << 10
                assert v.depth >= 32
                if v.splits > 1:
                    assert blocks <= tune.SEMAPHORES
                    assert blocks * v.splits * v.rows * (width + 1) <= tune.PARTIALS


def test_rules_keep_a_large_gpu_busy() -> None:
    for problem in problems(torch.bfloat16, False):
        v = tune.default(problem)
        if problem.depth >= 512:
            assert v.kind is not Kind.LIBRARY or problem.depth > 32768 or problem.rows > 64
        if v.kind is Kind.STREAM and problem.depth >= 1024:
            assert tune._programs(problem, v) >= 60, (problem, v)


def test_more_rows_than_the_largest_bucket_are_the_librarys() -> None:
    linear = Linear(torch.zeros(3072, 2048, dtype=torch.bfloat16))
    table = Table()
    assert table("norm_linear", linear, 1, torch.bfloat16).kind is Kind.GEMV
    for rows in (2, 16, 17, 64):
        version = table("norm_linear", linear, rows, torch.bfloat16)
        assert version.kind is Kind.STREAM
        assert version.rows >= rows
    for rows in (65, 129):
        assert table("norm_linear", linear, rows, torch.bfloat16) is LIBRARY
    why = [table.why("norm_linear", linear, rows, torch.bfloat16) for rows in (1, 128, 129)]
    assert why == ["by rule", "by rule", "by rule: more than 128 rows"]


def test_what_was_measured_overrules() -> None:
    linear = Linear(torch.zeros(3072, 2048, dtype=torch.bfloat16))
    problem = tune.problem_of("norm_linear", linear, 16, torch.bfloat16)
    table = Table({problem: LIBRARY})
    assert table("norm_linear", linear, 9, torch.bfloat16) is LIBRARY
    assert table("norm_linear", linear, 17, torch.bfloat16) is not LIBRARY
    why = [table.why("norm_linear", linear, rows, torch.bfloat16) for rows in (9, 17)]
    assert why == ["measured", "by rule"]


def timings() -> list[Timing]:
    found = []
    for problem in problems(torch.bfloat16, True)[:9]:
        found.append(Timing(problem, {v: 1.0 + i for i, v in enumerate(tune.candidates(problem))}))
    return found


def test_choices_survive_on_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "new", {"gpu": "a"})
    assert store.load() == {}
    some = timings()
    store.save(some[:4])
    store.save(some[4:])
    assert Store(tmp_path / "new", {"gpu": "a"}).load() == {t.problem: t.best for t in some}
    assert Store(tmp_path / "new", {"gpu": "b"}).load() == {}


def test_versions_with_tiles_are_not_for_those_who_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSTINATO_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    problem = Problem("norm_linear", 64, 64, 32, torch.bfloat16, False)
    tile = Version(Kind.TILE, False, 32, 64, 64)
    Store.here(tiles=True).save([Timing(problem, {tile: 1.0}, tiles=True)])
    assert Store.here(tiles=True).load() == {problem: tile}
    assert Store.here(tiles=False).load() == {}


@pytest.mark.parametrize("text", ["", "[]", '{"versions": [{"problem": 3}]}', '{"versions": [{}]}', "\xff"])
def test_a_file_that_cannot_be_read_is_ignored(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path, {"gpu": "a"})
    store.path.write_text(text, encoding="latin-1")
    assert store.load() == {}
    store.save(timings()[:1])
    assert len(store.load()) == 1
    assert json.loads(store.path.read_text())["identity"] == {"gpu": "a"}


def test_who_is_first_decides_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines of one process would else differ, when another one starts meanwhile."""
    mine = timings()[:3]
    theirs = [Timing(mine[0].problem, dict(reversed(mine[0].times.items()))), Timing(mine[1].problem, {})]

    def measure(work: dict[Problem, Any], launcher: Callable[..., Any], **_: object) -> list[Timing]:
        Store(tmp_path, {}).save(theirs)
        return mine

    monkeypatch.setattr(tune, "measure", measure)
    work = {t.problem: [] for t in mine}
    first = tune.choose(work, lambda problem: pytest.fail("measured"), Store(tmp_path, {}))
    expected = {t.problem: t.best for t in (*theirs, mine[2])}
    assert Store(tmp_path, {}).load() == expected != {t.problem: t.best for t in mine}
    monkeypatch.setattr(tune, "measure", lambda *_, **__: pytest.fail("measured again"))
    second = tune.choose(work, lambda problem: pytest.fail("measured"), Store(tmp_path, {}))
    assert first.decided == second.decided == expected
    assert first._unmeasured == second._unmeasured == {theirs[1].problem}


def test_nothing_is_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Problem] = []
    some = timings()
    some = [Timing(t.problem, dict(reversed(t.times.items()))) for t in some]  # not what rules say

    def measure(work: dict[Problem, Any], launcher: Callable[..., Any], **_: object) -> list[Timing]:
        asked.extend(work)
        return [
            t if i < 2 else Timing(t.problem, {}) for i, t in enumerate(t for t in some if t.problem in work)
        ]

    def chosen(count: int) -> tune.Table:
        work = {t.problem: [] for t in some[:count]}
        return tune.choose(work, lambda problem: pytest.fail("measured"), Store(tmp_path, {}))

    def asked_for(p: Problem) -> tuple[str, Linear, int, torch.dtype]:
        columns = p.columns * (2 if p.gate else 1)
        weight = torch.empty(1, dtype=torch.float8_e4m3fn if p.fp8 else p.dtype).expand(columns, p.depth)
        return p.op, Linear(weight, None, torch.ones(1) if p.fp8 else None), p.rows, p.dtype

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "default", lambda problem, tiles: LIBRARY)
    first = chosen(4)
    monkeypatch.setattr(tune, "default", lambda problem, tiles: pytest.fail("decided again"))
    second, larger = chosen(4), chosen(6)
    assert asked == [t.problem for t in (*some[:4], *some[4:6])]
    for table in (first, second):
        found = [table(*asked_for(t.problem)) for t in some[:4]]
        assert found == [some[0].best, some[1].best, LIBRARY, LIBRARY]
        # As `ostinato explain` prints them.
        why = [table.why(*asked_for(t.problem)) for t in some[:4]]
        assert why == ["measured"] * 2 + ["by rule: the time to measure was up"] * 2
        assert table.why(*asked_for(some[5].problem)) == "by rule"
        op, linear, _, dtype = asked_for(some[0].problem)
        assert table.why(op, linear, tune.BUCKETS[-1] + 1, dtype) == "by rule: more than 128 rows"
    assert larger.decided == second.decided | {t.problem: t.best for t in some[4:6]}


def test_measuring_leaves_out_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of what can be launched and captured; the rest of the problems when time is up keep rules."""
    first, second, third = (t.problem for t in timings()[:3])
    linears = [Linear(torch.zeros(1))] * 5
    launched: list[Version] = []
    apart: list[bool] = []
    """Whether CUDA C++ was compiled by others, launch by launch"""

    def launcher(problem: Problem) -> Callable[[Version, Linear], None]:
        def launch(version: Version, linear: Linear) -> None:
            launched.append(version)
            apart.append(program._apart is not None and {TILES, CHAIN} == set(program._apart.sources))
            if problem is first and version == tune.default(first):
                raise RuntimeError("out of shared memory")

        return launch

    def time_launches(launch: Any, version: Version, some: list[Linear], repeats: int) -> float:
        if version is LIBRARY:
            raise RuntimeError("no capture")
        clock.now += 4
        return 100.0 - tune.candidates(first).index(version) if version in tune.candidates(first) else 1.0

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tune, "time_launches", time_launches)
    monkeypatch.setattr(tune, "compile_ahead", nullcontext)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = tune.measure({first: linears, second: linears, third: linears}, launcher, seconds=10)
    assert tune.default(first) in launched
    candidates = sum(len(tune.candidates(problem)) for problem in (first, second, third))
    assert apart == [True] * candidates + [False] * (len(apart) - candidates)
    assert found[0].problem is first
    assert found[0].best == tune.candidates(first)[-1]
    assert not {LIBRARY, tune.default(first)} & set(found[0].times)
    assert found[-1] == Timing(third, {}), "the time was up"
    assert found[-1].best == tune.default(third)


# --- compiled for an H100 ------------------------------------------------------------------


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """No register spills; weights are asked for before the wait, and nothing is stored there."""
    found = compiled_here(__file__, tmp_path)
    assert len(found) > 20, found


def compile_kernels(ptxas: str) -> None:
    """Replace launches by compilation; print what became of each kernel."""

    def look(made: Compiled) -> None:
        registers, spills = assembled(made.ptx, ptxas)
        before, wait, after = made.ptx.partition("griddepcontrol.wait")
        constexprs = made.constexprs
        sizes = {n: v for n, v in constexprs.items() if isinstance(v, int) and not isinstance(v, bool)}
        flags = [n for n, v in constexprs.items() if v is True]
        print(made.name, sizes, flags, made.options, registers, made.metadata.shared, spills, flush=True)
        assert wait
        assert "griddepcontrol.launch_dependents" in before
        assert "griddepcontrol.wait" not in after
        assert "st.global" not in before
        assert "atom" not in before
        assert not any(spills), spills
        assert made.metadata.shared <= 160 << 10
        if made.name in ("gemv", "stream"):
            assert "ld.global" in before
            if made.name == "stream":
                assert "cp.async.cg" in after, "weights are not streamed"
                assert "mma" in after
                assert "e4m3" not in made.ptx, "the slow conversion"
        else:
            assert "ld.global" not in before

    compile_launches(look, aligned=("width", "columns"))
    bf16, workspace = torch.bfloat16, Workspace(torch.zeros(1).int(), torch.zeros(1))
    shapes = (
        ("norm_linear", 3072, 2048), ("linear_add", 2048, 2048), ("norm_gate_up", 8192, 2048),
        ("linear_add", 2048, 8192), ("norm_head", 128256, 2048), ("linear_add", 576, 1536),
    )  # fmt: skip
    for fp8 in (False, True):
        for op, columns, depth in shapes:
            outputs = columns * (2 if op == "norm_gate_up" else 1)
            weight = torch.zeros(1, dtype=FP8 if fp8 else bf16).expand(outputs, depth)
            linear = Linear(weight, None, torch.zeros(1) if fp8 else None)
            for rows in tune.BUCKETS:
                problem = Problem(op, columns, depth, rows, bf16, fp8)
                for version in tune.candidates(problem):
                    if version.kind is Kind.LIBRARY:
                        continue
                    x = torch.zeros(1, dtype=bf16).expand(rows, depth)
                    out = torch.zeros(1, dtype=torch.float32 if op == "norm_head" else bf16)
                    multiply(
                        version, x, linear, out.expand(rows, columns), workspace,
                        norm=x if version.norms else None, eps=EPS, gate=problem.gate,
                        index=torch.zeros(1).int() if op == "norm_head" else None,
                        add=op == "linear_add", pdl=True,
                    )  # fmt: skip
    for shape, dtype in (
        (AttentionShape(32, 8, 64), bf16),
        (AttentionShape(16, 8, 128), bf16),
        (AttentionShape(8, 4, 256, sliding_window=512), bf16),
        (AttentionShape(9, 3, 64), torch.float32),
    ):
        ops = TritonOps()
        ops._pdl, ops._launch = True, {"PDL": True, "launch_pdl": True}
        for count in (1, 33):
            world = make_world(0, shape, [Seq(40)] * count, StepKind.DECODE, dtype=dtype)
            world.attend(ops, norm=True)


if __name__ == "__main__":
    compile_kernels(sys.argv[1])
