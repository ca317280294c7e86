"""`linear.cu` as far as it can be seen without a GPU: how products are cut, and what a launch is given."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ostinato.errors import KernelError
from ostinato.ops import Linear, NextNorm, Peaks, squares_words
from ostinato.ops.cuda import linear
from ostinato.ops.cuda.linear import ROWS, SHARED_BYTES, Product, Products, tile_of
from ostinato.ops.cuda.program import POINTERS
from ostinato.ops.triton import tune
from ostinato.ops.triton.tune import Kind, Problem, Table, Version
from tests.unit.compiled import no_gpu_needed, struct_fields

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
MODELS = {  # hidden, QKV, queries, intermediate, vocabulary
    "llama-3.2-1b": (2048, 3072, 2048, 8192, 128256),
    "qwen3-0.6b": (1024, 4096, 2048, 3072, 151936),
    "llama-3.1-8b": (4096, 6144, 4096, 14336, 128256),
    "llama-2-7b": (4096, 12288, 4096, 11008, 32000),
    "smollm2-135m": (576, 960, 576, 1536, 49152),
}
PRODUCTS = {
    "norm_linear": Product.STORE,
    "linear_add": Product.ADD,
    "norm_gate_up": Product.GATE,
    "norm_head": Product.WIDE,
}


def problems(rows: int, dtype: torch.dtype = BF16, fp8: bool = False) -> list[Problem]:
    return [
        Problem(op, columns, depth, rows, dtype, fp8)
        for hidden, qkv, queries, inner, vocab in MODELS.values()
        for op, columns, depth in (
            ("norm_linear", qkv, hidden), ("linear_add", hidden, queries), ("norm_gate_up", inner, hidden),
            ("linear_add", hidden, inner), ("norm_head", vocab, hidden),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_every_candidate_fits_for_every_number_of_rows(rows: int, fp8: bool) -> None:
    for problem in problems(rows, fp8=fp8):
        versions = [v for v in tune.candidates(problem, tiles=True) if v.kind is Kind.TILE]
        assert versions
        assert tune.default(problem, tiles=True) in versions
        for v in versions:
            for size in (n for n in ROWS if n <= rows):
                tile = tile_of(PRODUCTS[problem.op], size, v.columns // 64, v.splits, v.share, v.depth, fp8)
                assert tile is not None, (problem, v, size)
                assert tile.stages >= 2
                assert tile.depth % (128 if fp8 else 64) == tile.depth % tile.x_depth == 0
                assert tile.lag == 0 or tile.x_stages > tile.lag + fp8
                assert (tile.shared_bytes + 1024) * tile.blocks <= 2 * SHARED_BYTES
                assert v.splits * v.share <= 8, (
                    "the most blocks of a cluster that every Hopper GPU has room for"
                )


def test_narrow_products_are_shared_by_about_one_block_a_multiprocessor() -> None:
    chosen = {(p.op, p.columns, p.depth): tune.default(p, tiles=True).splits for p in problems(16)}
    assert chosen["norm_linear", 3072, 2048] == 2
    assert chosen["linear_add", 2048, 2048] == 4
    assert chosen["linear_add", 2048, 8192] == 4
    assert chosen["linear_add", 1024, 3072] == 8
    assert chosen["norm_linear", 12288, 4096] == 1


def test_many_rows_are_read_once_for_two_tiles() -> None:
    chosen = {(p.op, p.columns, p.depth): tune.default(p, tiles=True) for p in problems(64)}
    for shape, splits in (
        (("norm_linear", 3072, 2048), 4),
        (("linear_add", 2048, 8192), 4),
        (("norm_gate_up", 8192, 2048), 1),
    ):
        assert (chosen[shape].splits, chosen[shape].share) == (splits, 2)
    assert chosen["linear_add", 1024, 3072].share == 1, "eight blocks share its tiles"
    assert tile_of(Product.GATE, 8, 1, 1, 2, 128).share == 1, "eight rows of x are one piece"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "problem",
    [
        Problem("norm_linear", 3072, 2048, 1, BF16, False),
        Problem("norm_linear", 3072, 2048, 16, torch.float16, False),
        Problem("norm_linear", 3072, 2048, 16, torch.float16, True),
        Problem("linear_add", 2048, 2056, 16, BF16, True),
        Problem("norm_linear", 3072, 72, 16, BF16, False),
        Problem("linear_add", 72, 2048, 16, BF16, False),
    ],
)
def test_what_it_does_not_multiply_is_left_to_others(problem: Problem) -> None:
    assert all(v.kind is not Kind.TILE for v in tune.candidates(problem, tiles=True))
    assert tune.default(problem, tiles=True) == tune.default(problem)


def test_without_it_nothing_changes() -> None:
    for problem in problems(16):
        assert all(v.kind is not Kind.TILE for v in tune.candidates(problem))
    assert (
        Table(tiles=True)("linear_add", Linear(torch.zeros(64, 128, dtype=BF16)), 8, BF16).kind is Kind.TILE
    )
    assert Table()("linear_add", Linear(torch.zeros(64, 128, dtype=BF16)), 8, BF16).kind is not Kind.TILE


class FakeKernel:
    def __init__(self, macros: dict[str, int], options: dict[str, Any]) -> None:
        self.macros, self.options = macros, options
        self.handle, self.launches = 77, []  # type: ignore[var-annotated]

    def launch(self, params: bytes, grid: int) -> None:
        self.launches.append((params, grid))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeKernel]:
    """A GPU that compiles anything, and remembers."""
    return no_gpu_needed(monkeypatch, linear, FakeKernel)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_launch_is_given_what_the_source_reads(made: list[FakeKernel], fp8: bool) -> None:
    """The C++ struct is read here, so that a field moved there cannot go unnoticed."""
    source = linear.SOURCE.read_text()
    names, numbers = struct_fields(source)
    assert numbers == [
        "rows",
        "n",
        "k",
        "tiles",
        "chunks",
        "eps",
        "sums",
        "weight_map",
        "x_map",
    ]
    rows, n, k = 5, 256, 512
    x, out, weight = (
        torch.zeros(rows, k, dtype=BF16),
        torch.zeros(rows, n, dtype=BF16),
        torch.zeros(n, k, dtype=BF16),
    )
    squares = torch.zeros(k // 64, rows)
    then = NextNorm(
        torch.zeros(n, dtype=BF16), torch.zeros(rows, n, dtype=BF16), torch.zeros(squares_words(rows, n))
    )
    version = Version(Kind.TILE, False, 16, 64, 128, 4)
    scale = torch.zeros(n) if fp8 else None
    if fp8:
        weight = weight.to(torch.float8_e4m3fn)
    weights = Linear(weight, scale=scale)
    Products(GPU).run(Product.ADD, version, x, weights, out, squares=squares, eps=1e-5, then=then)
    (kernel,) = made
    ((params, grid),) = kernel.launches
    assert grid == n // 64 * 4
    assert len(params) == 128 + 2 * 128
    expected = {
        "weight": weight, "x": x, "out": out, "bias": None, "squares": squares, "gain": then.weight, "y": then.scaled,
        "next_squares": then.squares, "best": None, "best_at": None, "scale": scale,
    }  # fmt: skip
    assert list(expected) == names
    assert source[source.index("#if FP8\n    const") :].split("\n")[2] == "#endif", (
        "the last pointer, where there is one"
    )
    if not fp8:
        names.remove("scale")
        del expected["scale"]
    end = 8 * len(names)
    found = struct.unpack(f"<{len(names)}Q", params[:end])
    assert found == tuple(0 if t is None else t.data_ptr() for t in expected.values())
    assert struct.unpack("<5ifi", params[end : end + 28]) == (rows, n, k, 4, 4, pytest.approx(1e-5), k // 64)
    assert POINTERS.pop(kernel.handle) == len(names)
    assert kernel.options["cluster"] == 4
    assert (kernel.macros["TOK"], kernel.macros["FP8"], kernel.macros["KA"]) == (8, fp8, 2)
    listed = source[source.index("// Macros:") :].split("\n\n")[0]
    assert all(name in listed or f"{name} " in source for name in kernel.macros)


def test_the_best_of_each_block_has_a_place(made: list[FakeKernel]) -> None:
    rows, n, k = 33, 128256, 64
    x, head = torch.zeros(rows, k, dtype=BF16), Linear(torch.zeros(1, k, dtype=BF16).expand(n, k))
    products, version = Products(GPU), Version(Kind.TILE, False, 64, 128, 64, share=2)
    parts = products.blocks(version, rows, head)
    assert parts == 2 * 132, "two on a multiprocessor"
    peaks = Peaks(torch.zeros(rows, parts), torch.zeros(rows, parts, dtype=torch.int32))
    products.run(Product.BEST, version, x, head, None, peaks=peaks)
    products.run(Product.WIDE, version, x, head, torch.zeros(rows, n), peaks=Peaks(peaks.values))
    best, wide = made
    assert (best.macros["KIND"], wide.macros["KIND"]) == (4, 3)
    assert best.macros | {"KIND": 3} == wide.macros
    for kernel, tokens in ((best, peaks.tokens), (wide, None)):
        ((params, grid),) = kernel.launches
        assert grid == parts
        pointers = struct.unpack("<10Q", params[:80])
        assert pointers[8:] == (peaks.values.data_ptr(), 0 if tokens is None else tokens.data_ptr())
        assert (pointers[2] == 0) == (kernel is best), "the best alone is no row of logits"
    assert best.macros["LINES"] * parts * 4 >= n > best.macros["LINES"] * parts * 4 - parts * 4, "four each"
    few = products.blocks(Version(Kind.TILE, False, 16, 64, 64), 2, Linear(torch.zeros(320, 64, dtype=BF16)))
    assert few == 5, "a small vocabulary has fewer tiles"


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_blocks_of_a_large_head_have_as_many_tiles(made: list[FakeKernel], rows: int) -> None:
    """All of them but the last, which may have rows to spare."""
    products = Products(GPU)
    for problem in problems(rows):
        if problem.op != "norm_head":
            continue
        for v in (v for v in tune.candidates(problem, tiles=True) if v.kind is Kind.TILE):
            tile = tile_of(Product.BEST, rows, v.columns // 64, v.splits, v.share, v.depth)
            assert tile is not None
            lines, tiles, grid = products._cut(Product.BEST, tile, problem.columns)
            rounds = -(-tiles // grid)
            assert lines <= v.columns
            assert (tiles - 1) * lines < problem.columns <= tiles * lines
            assert rounds == 1 or grid * rounds - tiles < 16, "the last round is nearly full"
            assert rounds == -(-problem.columns // (v.columns * grid)), "no round more than with whole tiles"


def test_rows_choose_the_narrowest_tile(made: list[FakeKernel]) -> None:
    products, version = Products(GPU), Version(Kind.TILE, False, 64, 64, 64)
    for rows in (1, 8, 9, 17, 33, 64):
        x = torch.zeros(rows, 64, dtype=BF16)
        products.run(
            Product.WIDE, version, x, Linear(torch.zeros(640, 64, dtype=BF16)), torch.zeros(rows, 640)
        )
    assert [kernel.macros["TOK"] for kernel in made] == [8, 16, 32, 64], "each is compiled once"


@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn])
def test_gates_and_ups_are_interleaved_by_the_map(
    made: list[FakeKernel], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    maps: list[tuple[Any, ...]] = []
    monkeypatch.setattr(linear, "_encode", lambda *what: maps.append(what) or bytes(128))
    k, n = 128, 96
    size = dtype.itemsize
    weight = torch.zeros(2 * n, k).to(dtype)
    weights = Linear(weight, scale=None if dtype is BF16 else torch.zeros(2 * n))
    version = Version(Kind.TILE, False, 16, 64, 128)
    Products(GPU).run(
        Product.GATE, version, torch.zeros(3, k, dtype=BF16), weights, torch.zeros(3, n, dtype=BF16)
    )
    address, sizes, strides, box = maps[0]
    assert (address, sizes, box) == (weight.data_ptr(), (k, 8, 2, n // 8), (128 // size, 8, 2, 4))
    plain = torch.arange(2 * n).view(2, n // 8, 8)
    for group in range(n // 8):
        for half in range(2):
            for row in range(8):
                at = row * strides[0] + half * strides[1] + group * strides[2]
                assert at == int(plain[half, group, row]) * size * k


def test_what_cannot_be_compiled_leaves_it_to_others(
    made: list[FakeKernel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert Products.on(GPU) is not None

    def broken(*args: Any, **more: Any) -> Any:
        raise KernelError("libnvrtc cannot be found")

    monkeypatch.setattr(linear, "build", broken)
    assert Products.on(GPU) is None
    assert "libnvrtc cannot be found" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert Products.on(GPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("OSTINATO_TILES", "0")
    monkeypatch.setattr(linear, "build", lambda *a, **m: pytest.fail("compiled"))
    assert Products.on(GPU) is None


def test_blocks_without_a_share_are_refused(made: list[FakeKernel]) -> None:
    """They would send sums that they never began."""
    problem = Problem("linear_add", 64, 128, 16, BF16, False)
    assert {v.splits for v in tune.candidates(problem, tiles=True) if v.kind is Kind.TILE} == {1}
    x, out = torch.zeros(2, 128, dtype=BF16), torch.zeros(2, 64, dtype=BF16)
    version = Version(Kind.TILE, False, 16, 64, 128, 2)
    with pytest.raises(KernelError, match="128 inputs are too few to be shared by 2 blocks"):
        Products(GPU).run(Product.ADD, version, x, Linear(torch.zeros(64, 128, dtype=BF16)), out)


def test_a_version_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(KernelError, match="does not fit into shared memory for 64 rows"):
        linear._tile(Product.ADD, 64, Version(Kind.TILE, False, 64, 128, 256, 4))
