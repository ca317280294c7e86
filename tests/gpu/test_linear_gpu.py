"""`linear.cu` beside the plain op, both against float64: every way to cut a product, odd sizes, and what it leaves for the next norm."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ostinato.models.quantize import quantize
from ostinato.ops import Linear, NextNorm, Peaks, squares_words
from ostinato.ops.cuda.linear import ROWS, Product, Products, tile_of
from ostinato.ops.reference import rms_norm
from ostinato.ops.triton import TritonOps
from ostinato.ops.triton.sampling import greedy, pick, scratch_words
from ostinato.ops.triton.tune import Kind, Table, Version, candidates, problem_of
from tests.accuracy import TINY, no_worse

pytestmark = pytest.mark.gpu
CUDA, BF16, EPS = torch.device("cuda"), torch.bfloat16, 1e-5
COUNTS = (1, 5, 8, 13, 16, 31, 64, 100, 128)
CASES = [
    (Product.STORE, 3072, 2048, (1, 2, 128)),
    (Product.STORE, 960, 576, (1, 1, 128)),
    (Product.STORE, 200, 136, (1, 2, 64)),
    (Product.ADD, 2048, 2048, (1, 4, 128)),
    (Product.ADD, 2048, 8192, (2, 8, 64)),
    (Product.ADD, 576, 1536, (1, 8, 64)),
    (Product.GATE, 8192, 2048, (2, 1, 64)),
    (Product.GATE, 1544, 576, (1, 1, 128)),
    (Product.WIDE, 12825, 2048, (2, 1, 64)),
    (Product.WIDE, 1000, 72, (1, 1, 64)),
]
"""(what becomes of it, outputs, inputs, (warp groups, splits, depth))"""
FP8_CASES = [
    (Product.STORE, 3072, 2048, (1, 2, 256)),
    (Product.STORE, 200, 144, (1, 2, 128)),
    (Product.ADD, 2048, 2048, (1, 4, 128)),
    (Product.ADD, 2048, 8192, (2, 8, 128)),
    (Product.ADD, 576, 1552, (1, 8, 128)),
    (Product.GATE, 8192, 2048, (2, 1, 128)),
    (Product.GATE, 1544, 576, (1, 1, 256)),
    (Product.WIDE, 12825, 2048, (3, 1, 128)),
    (Product.WIDE, 1000, 80, (1, 1, 128)),
]
"""The same, of FP8 weights"""


@pytest.fixture(scope="module")
def products() -> Products:
    found = Products.on(CUDA)
    if found is None:
        pytest.skip("needs Hopper")
    return found


@pytest.fixture(autouse=True)
def seed() -> int:
    value = int(torch.empty((), dtype=torch.int64).random_(2**31))
    torch.manual_seed(value)
    return value


def by_hand(
    x: torch.Tensor,
    linear: Linear,
    gate: bool,
    factor: torch.Tensor | None,
    before: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product with what stands around it: in bfloat16 rounded where ops one by one round, or in float64 nowhere."""
    y = x.to(dtype) if factor is None else (x.double() * factor).to(dtype)
    if linear.scale is None:
        y = y @ linear.weight.to(dtype).T
    else:  # no product is rounded before its scale
        wide = torch.promote_types(dtype, torch.float32)
        y = (y.to(wide) @ linear.weight.to(wide).T * linear.scale).to(dtype)
    if linear.bias is not None:
        y = y + linear.bias.to(dtype)
    if gate:
        g, u = y.chunk(2, 1)
        y = torch.nn.functional.silu(g) * u
    return y if before is None else before.to(dtype) + y


def linear_of(weight: torch.Tensor, fp8: bool, bias: torch.Tensor | None = None) -> Linear:
    """Of a wide weight."""
    if not fp8:
        return Linear(weight.to(BF16), bias)
    found = Linear(
        torch.empty_like(weight, dtype=torch.float8_e4m3fn), bias, torch.empty(len(weight), device=CUDA)
    )
    assert found.scale is not None
    quantize(weight, found.weight, found.scale)
    return found


@pytest.mark.parametrize("rows", COUNTS)
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize(
    ("fp8", "kind", "columns", "depth", "cut"),
    [*((False, *case) for case in CASES), *((True, *case) for case in FP8_CASES)],
)
def test_no_worse_than_the_op(
    products: Products,
    fp8: bool,
    kind: Product,
    columns: int,
    depth: int,
    cut: tuple[int, int, int],
    share: int,
    rows: int,
) -> None:
    groups, splits, chunk = cut
    if splits * share > 8:
        return
    size = next(n for n in ROWS if rows <= n)
    if tile_of(kind, size, groups, splits, share, chunk, fp8) is None:
        chunk = 128 if fp8 else 64
        if tile_of(kind, size, groups, splits, share, chunk, fp8) is None:
            return
    version = Version(Kind.TILE, False, 64, 64 * groups, chunk, splits, share=share)
    gate, add, wide = kind is Product.GATE, kind is Product.ADD, kind is Product.WIDE
    weight = torch.randn(columns * (2 if gate else 1), depth, device=CUDA).mul_(depth**-0.5)
    has_bias = kind in (Product.STORE, Product.ADD) and rows % 2 == 1
    linear = linear_of(weight, fp8, torch.randn(columns, device=CUDA).to(BF16) if has_bias else None)
    x = torch.randn(rows, depth, device=CUDA).to(BF16)
    room = torch.full((rows + 2, columns), float("nan"), device=CUDA, dtype=torch.float32 if wide else BF16)
    before = torch.randn(rows, columns, device=CUDA).to(BF16)
    squares = factor = None
    if depth % 64 == 0 and not gate and not has_bias:
        squares = torch.rand(depth // 64, rows, device=CUDA) * 100
        factor = torch.rsqrt(squares.double().sum(0) / depth + EPS).unsqueeze(1)
    then = None
    if add:
        words = squares_words(rows, columns)
        then = NextNorm(
            torch.randn(columns, device=CUDA).to(BF16),
            torch.full((rows + 1, columns), float("nan"), device=CUDA, dtype=BF16),
            torch.full((words + 1,), float("nan"), device=CUDA),
        )
    results = []
    for _ in range(3):
        out = room[:rows]
        if add:
            out.copy_(before)
        products.run(kind, version, x, linear, out, squares=squares, eps=EPS, then=then)
        results.append(out.clone())
    plain, exact = (
        by_hand(x, linear, gate, factor, before if add else None, dtype) for dtype in (BF16, torch.float64)
    )
    # The head's results are not rounded, and nor is what it multiplies.
    no_worse(results[0], exact.float() if wide else plain, exact, tiny=1e-4 if wide else TINY)
    assert all(torch.equal(result, results[0]) for result in results)
    assert room[rows:].isnan().all()
    if then is not None:
        assert torch.equal(then.scaled[:rows], (out.float() * then.weight.float()).to(BF16))
        sums = out.float().square().view(rows, -1, 64).sum(2).T
        torch.testing.assert_close(then.squares[:-1].view(-1, rows), sums, rtol=1e-4, atol=1e-4)
        assert then.scaled[rows:].isnan().all()
        assert then.squares[-1:].isnan().all()


def test_every_number_is_widened_exactly(products: Products) -> None:
    """All E4M3 bytes but NaN, each in every place of a tile, by a product with one and zeros."""
    numbers = torch.tensor([n for n in range(256) if n & 127 != 127], dtype=torch.uint8, device=CUDA)
    weight = numbers[(torch.arange(64 * 128, device=CUDA) * 7 + 3) % len(numbers)].view(64, 128)
    wide = weight.view(torch.float8_e4m3fn)
    scale = 2.0 ** torch.arange(-32, 32, device=CUDA)
    for rows in (8, 128):
        out = torch.full((128, 64), torch.nan, device=CUDA)
        for one, x in enumerate(torch.eye(128, device=CUDA, dtype=BF16).split(rows)):
            version = Version(Kind.TILE, False, 128, 64, 128)
            products.run(
                Product.WIDE, version, x, Linear(wide, None, scale), out[one * rows : (one + 1) * rows]
            )
        assert torch.equal(out, wide.float().T * scale)


@pytest.mark.parametrize(
    ("vocab", "hidden", "fp8"),
    [(128256, 2048, False), (12824, 576, False), (1000, 72, False), (136, 64, False), (8, 64, False),
     (128256, 2048, True), (12824, 576, True), (136, 80, True)],
)  # fmt: skip
def test_the_best_token_is_that_of_the_logits(products: Products, vocab: int, hidden: int, fp8: bool) -> None:
    """Bit for bit, the first of equals; whatever a NaN or an infinity does to a row."""
    weight = torch.randn(vocab, hidden, device=CUDA).mul_(hidden**-0.5)
    weight[vocab // 2 :] = weight[: vocab - vocab // 2].clone()  # each logit twice
    weight[vocab // 3] = 0
    weight[vocab // 3, 0] = 1 if fp8 else torch.inf
    head = linear_of(weight, fp8)
    weight = head.weight.float()
    if head.scale is not None:
        head.scale[vocab // 3] = torch.inf
        weight *= head.scale.unsqueeze(1)
    for rows in COUNTS:
        x = torch.randn(rows, hidden, device=CUDA).to(BF16)
        x[:, 0], x[0, 0] = -1, 1
        x[rows // 2] = 0
        x[rows // 3] = torch.nan
        some = torch.randint(vocab, (64,), device=CUDA)
        some = some[some != vocab // 3]
        numbers = torch.arange(rows, device=CUDA) != rows // 3
        expected = (x.double() @ weight[some].double().T)[numbers]
        for columns in (64, 128, 256)[: 3 if rows <= 64 else 2]:
            bucket = next(n for n in (16, 32, 64, 128) if rows <= n)
            version = Version(Kind.TILE, False, bucket, columns, 128 if fp8 else 64, share=2)
            parts = products.blocks(version, rows, head)
            peaks = Peaks(
                torch.full((rows, parts), torch.nan, device=CUDA),
                torch.full((rows, parts), -7, dtype=torch.int32, device=CUDA),
            )
            again = Peaks(torch.full_like(peaks.values, torch.nan))
            logits = torch.full((rows, vocab), torch.nan, device=CUDA)
            products.run(Product.WIDE, version, x, head, logits, peaks=again)
            products.run(Product.BEST, version, x, head, None, peaks=peaks)
            assert torch.equal(peaks.values, again.values)
            torch.testing.assert_close(logits[numbers][:, some].double(), expected, rtol=1e-3, atol=1e-3)
            plain = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            assert torch.equal(again.values.amax(1), plain.amax(1))
            index = torch.arange(rows, dtype=torch.int32, device=CUDA)
            index[rows // 4] = -1
            wanted, found = torch.full_like(index, -1), torch.full_like(index, -1)
            scratch = torch.full((scratch_words(rows, vocab),), -1, dtype=torch.int32, device=CUDA)
            greedy(logits, index, out=wanted, scratch=scratch)
            pick(peaks.values, peaks.tokens, index, parts=parts, out=found)
            assert torch.equal(found, wanted), (rows, columns)
            assert torch.equal(found, torch.where(index < 0, 0, plain.argmax(1).int()))
            assert rows < 2 or found.max() > 0


@pytest.mark.parametrize("rows", [2, 8, 11, 32, 50, 100])
@pytest.mark.parametrize(
    ("hidden", "inner", "fp8"),
    [(2048, 8192, False), (576, 1536, False), (2048, 8192, True), (576, 1536, True)],
)
def test_a_norm_that_is_begun_equals_one_that_is_not(rows: int, hidden: int, inner: int, fp8: bool) -> None:
    """The ops of half a layer, with `then` and without: the second way is the plain one."""
    down = linear_of(torch.randn(hidden, inner, device=CUDA).mul_(inner**-0.5), fp8)
    gate_up = linear_of(torch.randn(2 * inner, hidden, device=CUDA).mul_(hidden**-0.5), fp8)
    weight = (1 + torch.randn(hidden, device=CUDA) / 4).to(BF16)
    x, residual = (
        torch.randn(rows, inner, device=CUDA).to(BF16),
        torch.randn(rows, hidden, device=CUDA).to(BF16),
    )
    bucket = next(n for n in (16, 32, 64, 128) if rows <= n)
    table = Table(tiles=True)
    for op, linear in (("linear_add", down), ("norm_gate_up", gate_up)):
        assert table(op, linear, bucket, BF16).kind is Kind.TILE
    ops, outs = TritonOps(table), []
    for begin in (True, False):
        stream = residual.clone()
        normed, wide, out = (
            torch.empty_like(stream),
            stream.new_empty(rows, 2 * inner),
            stream.new_empty(rows, inner),
        )
        then = (
            NextNorm(weight, normed, torch.empty(squares_words(rows, hidden), device=CUDA)) if begin else None
        )
        begun = ops.linear_add(x, down, residual=stream, then=then)
        assert (begun is not None) == begin
        ops.norm_gate_up(stream, weight, EPS, gate_up, normed=normed, gate_up=wide, out=out, begun=begun)
        outs.append(out)
    plain, exact = (
        by_hand(
            rms_norm(by_hand(x, down, False, None, residual, dtype), weight, EPS),
            gate_up,
            True,
            None,
            None,
            dtype,
        )
        for dtype in (BF16, torch.float64)
    )
    for out in outs:
        no_worse(out, plain, exact)


@pytest.mark.parametrize("fp8", [False, True])
def test_every_candidate_can_be_launched(products: Products, fp8: bool) -> None:
    for op, columns, depth in (
        ("norm_linear", 3072, 2048), ("linear_add", 2048, 8192), ("norm_gate_up", 8192, 2048),
        ("linear_add", 1024, 2048), ("norm_linear", 6144, 4096), ("norm_head", 12800, 1024),
    ):  # fmt: skip
        linear = linear_of(torch.zeros(columns * (2 if op == "norm_gate_up" else 1), depth, device=CUDA), fp8)
        for rows in (2, 9, 32, 64, 128):
            problem = problem_of(op, linear, next(n for n in (16, 32, 64, 128) if rows <= n), BF16)
            for version in candidates(problem, tiles=True):
                if version.kind is Kind.TILE:
                    kind = {
                        "norm_linear": Product.STORE,
                        "linear_add": Product.ADD,
                        "norm_gate_up": Product.GATE,
                    }.get(op, Product.WIDE)
                    out = torch.full(
                        (rows, columns), 0.0, device=CUDA, dtype=torch.float32 if op == "norm_head" else BF16
                    )
                    x = torch.ones(rows, depth, device=CUDA, dtype=BF16)
                    products.run(kind, version, x, linear, out)
                    assert not out.any()
                    if kind is Product.WIDE:
                        parts = products.blocks(version, rows, linear)
                        peaks = Peaks(
                            torch.ones(rows, parts, device=CUDA),
                            torch.ones(rows, parts, dtype=torch.int32, device=CUDA),
                        )
                        products.run(Product.BEST, version, x, linear, None, peaks=peaks)
                        assert not peaks.values.any()
                        assert not peaks.tokens.amin(1).any()
