"""`attend.cu` against float64 and against the two kernels it stands for: shapes, lengths, numbers of rows, many launches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "unit"))
from test_triton_ops import EPS, Seq, World, make_world

from ostinato.ops import AttentionShape, LayerWeights, Linear, NextNorm, StepView, squares_words
from ostinato.ops.cuda.attend import LEAST_ROWS, ROWS, Attend
from ostinato.ops.cuda.attention import LONG
from ostinato.ops.cuda.linear import Products
from ostinato.ops.cuda.program import POINTERS
from ostinato.ops.triton import TritonOps
from ostinato.ops.triton.tune import LIBRARY, Table
from ostinato.types import StepKind
from tests.stack import Model

pytestmark = pytest.mark.gpu
CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
SHAPES = {  # hidden, attention, norms of heads, bias
    "llama-3.2-1b": (2048, AttentionShape(32, 8, 64), False, False),
    "qwen3-0.6b": (1024, AttentionShape(16, 8, 128), True, False),
    "qwen2-like": (1024, AttentionShape(16, 8, 64), False, True),
    "window": (1024, AttentionShape(8, 4, 128, sliding_window=100), True, True),
}
LENGTHS = (0, 1, 2, 15, 16, 17, 31, 33, 95, 96, 97, 255, 256, 257, 400, 1000)


@pytest.fixture
def seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_(2**31))  # in every failing assertion's locals


@pytest.fixture
def ops() -> TritonOps:
    found = TritonOps(Table(tiles=True))
    if Products.on(CUDA) is None or found._attention is None:
        pytest.skip("needs Hopper")
    return found


class Case:
    """A layer's weights, a step of ragged rows, and what a kernel finds and leaves."""

    def __init__(self, name: str, seed: int, seqs: list[Seq], pad: int = 0, block_size: int = 16) -> None:
        hidden, a, norm, bias = SHAPES[name]
        self.world: World = make_world(
            seed, a, seqs, StepKind.DECODE, pad_seqs=pad, device="cuda", dtype=BF16, block_size=block_size
        )
        g = torch.Generator(CUDA).manual_seed(seed)

        def make(*size: int, scale: float = 0.02) -> torch.Tensor:
            return torch.randn(size, device=CUDA, generator=g).mul_(scale).to(BF16)

        q_norm, k_norm = (self.world.q_norm, self.world.k_norm) if norm else (None, None)
        qkv = Linear(make(a.qkv_size, hidden), make(a.qkv_size, scale=0.5) if bias else None)
        self.layer = LayerWeights(
            1 + make(hidden, scale=0.1), qkv, q_norm, k_norm,
            Linear(make(hidden, a.q_size)), 1 + make(hidden), Linear(make(1024, hidden)), Linear(make(hidden, 512)),
        )  # fmt: skip
        table = make(512, hidden)
        self.model = Model(table, (self.layer,), self.layer.mlp_norm, Linear(table), self.world.rope, a, EPS)
        self.rows = len(seqs) + pad
        # A row more of each, which nobody may read.
        self.y = torch.full((self.rows + 1, hidden), torch.nan, device=CUDA, dtype=BF16)[: self.rows]
        self.y.copy_(make(self.rows, hidden, scale=1.0))
        self.squares = torch.full((squares_words(self.rows, hidden),), torch.nan, device=CUDA)
        self.squares[: hidden // 64 * self.rows] = (
            torch.rand(hidden // 64 * self.rows, device=CUDA, generator=g) * 100
        )
        self.before = tuple(part.clone() for part in self.world.cache)

    def kernel(self) -> Attend:
        table = self.world.batch.static.block_table
        return Attend(CUDA, self.model, self.world.batch.block_size, table.shape[1])

    def view(self, ops: TritonOps) -> StepView:
        return ops.prepare(self.world.batch, self.world.scratch)

    @property
    def begun(self) -> NextNorm:
        return NextNorm(self.layer.input_norm, self.y, self.squares)

    def run(self, ops: TritonOps, kernel: Attend | None) -> torch.Tensor:
        """The result of one kernel or, None, of two, which find what was there before; it is all that they have written."""
        s, a = self.world.scratch, self.world.shape
        for part, before in zip(self.world.cache, self.before, strict=True):
            part.copy_(before)
        s.attn.fill_(torch.nan)
        s.attention.fill_(torch.nan)
        view = self.view(ops)
        semaphores = ops._workspace(CUDA).semaphores
        if kernel is None:
            ops.norm_linear(
                self.y, self.layer.input_norm, EPS, self.layer.qkv,
                normed=torch.empty_like(self.y), out=s.qkv, begun=self.begun,
            )  # fmt: skip
            ops.rope_paged_attention(
                s.qkv, view, self.world.cache, self.world.rope, self.layer.q_norm, self.layer.k_norm, EPS, a,
                workspace=s.attention, out=s.attn,
            )  # fmt: skip
        else:
            kernel.run(
                self.layer, self.begun, view, self.world.cache,
                workspace=s.attention, semaphores=semaphores, out=s.attn,
            )  # fmt: skip
            assert all((words == -1).all() for words in kernel.workspaces().values())
        assert not semaphores.any()
        return s.attn.clone()

    def exact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The result, and new keys and values, in float64 without any rounding; behind a run."""
        s, a, hidden = self.world.scratch, self.world.shape, self.y.shape[1]
        block_size, table = self.world.batch.block_size, self.world.batch.static.block_table
        squares = self.squares[: hidden // 64 * self.rows].view(-1, self.rows).double().sum(0)
        z = self.y.double() @ self.layer.qkv.weight.double().T
        z *= torch.rsqrt(squares / hidden + EPS).unsqueeze(1)
        if self.layer.qkv.bias is not None:
            z += self.layer.qkv.bias.double()
        q, k, v = z.view(self.rows, -1, a.head_dim).split([a.heads, a.kv_heads, a.kv_heads], 1)
        angles = self.world.rope[s.positions.clamp(min=0).long()].double().unsqueeze(1)

        def turned(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
            if norm is not None:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm.double()
            low, high = x.chunk(2, -1)
            cos, sin = angles[:, :, 0], angles[:, :, 1]
            return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

        q, k = turned(q, self.layer.q_norm), turned(k, self.layer.k_norm)
        out = torch.zeros(self.rows, a.q_size, dtype=torch.float64, device=CUDA)
        for row in range(self.rows):
            length = int(s.seq_lens[row])
            if length == 0:
                continue
            past = torch.arange(max(length - (a.sliding_window or length), 0), length - 1, device=CUDA)
            slots = table[row].long()[past // block_size] * block_size + past % block_size
            keys, values = (
                torch.cat((part.flatten(0, 1)[slots].double(), new[row : row + 1]))
                for part, new in zip(self.before, (k, v), strict=True)
            )
            heads = q[row].view(a.kv_heads, -1, a.head_dim)
            weights = torch.einsum("hgd,nhd->hgn", heads, keys).mul(a.scale).softmax(-1)
            out[row] = torch.einsum("hgn,nhd->hgd", weights, values).flatten()
        return out, k, v


def sequences(seed: int, count: int, longest: int = 1000) -> list[Seq]:
    """Every length of the list where they fit, then random ones; 0 stands for a row asleep."""
    rng = torch.Generator().manual_seed(seed)
    chosen = list(LENGTHS)
    while len(chosen) < count:
        chosen.append(int(torch.randint(1, longest, (), generator=rng)))
    order = torch.randperm(len(chosen), generator=rng)[:count].tolist()
    return [Seq(max(chosen[i], 1), active=chosen[i] > 0) for i in order]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert not actual.isnan().any()
    return float((actual.double() - expected).norm() / expected.norm())


def check(ops: TritonOps, case: Case) -> None:
    kernel = case.kernel()
    theirs = case.run(ops, None)
    out, k, v = case.exact()
    slots = case.world.scratch.slots
    live, at = slots >= 0, slots[slots >= 0].long()
    their_cache = [part.flatten(0, 1)[at].clone() for part in case.world.cache]
    actual = case.run(ops, kernel)
    assert (actual[~live] == 0).all()
    assert error(actual[live], out[live]) <= 1.2 * error(theirs[live], out[live])
    for row in live.nonzero().flatten().tolist():  # a row that is wrong among thirty that are right
        assert error(actual[row], out[row]) <= 3e-2
    for part, other, new, old in zip(case.world.cache, their_cache, (k, v), case.before, strict=True):
        flat = part.flatten(0, 1)
        assert error(flat[at], new[live]) <= 1.2 * error(other, new[live])
        untouched = torch.ones(len(flat), dtype=torch.bool, device=CUDA)
        untouched[at] = False
        assert torch.equal(flat[untouched].view(torch.int16), old.flatten(0, 1)[untouched].view(torch.int16))
    for _ in range(3):
        assert torch.equal(case.run(ops, kernel), actual)


@pytest.mark.parametrize("rows", [LEAST_ROWS, 24, 31, ROWS])
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(ops: TritonOps, seed: int, name: str, rows: int) -> None:
    check(ops, Case(name, seed, sequences(seed, rows - rows % 3), pad=rows % 3))


@pytest.mark.parametrize("block_size", [1, 5, 48])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "window"])
def test_other_sizes_of_blocks(ops: TritonOps, seed: int, name: str, block_size: int) -> None:
    check(ops, Case(name, seed, sequences(seed, 20), pad=1, block_size=block_size))


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b"])
@pytest.mark.parametrize("contexts", [(5000,), (LONG + 1, 2 * LONG, 4 * LONG + 1), (9000, 40000, 3, 2500)])
def test_long_rows_are_shared_out(ops: TritonOps, seed: int, name: str, contexts: tuple[int, ...]) -> None:
    seqs = sequences(seed, 19, 300)
    for row, context in enumerate(contexts):
        seqs[5 * row + 1] = Seq(context)
    check(ops, Case(name, seed, seqs, pad=2))


def test_all_rows_are_long(ops: TritonOps, seed: int) -> None:
    check(ops, Case("llama-3.2-1b", seed, [Seq(2100 + 3 * row) for row in range(ROWS)]))


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b"])
def test_bits_do_not_depend_on_neighbours(ops: TritonOps, seed: int, name: str) -> None:
    """Nor on whether others are long."""
    seqs = sequences(seed, 29)
    seqs[3], seqs[4] = Seq(5000), Seq(3000)
    cases = [Case(name, seed, seqs, pad=3) for _ in range(2)]
    kernel = cases[0].kernel()
    expected = cases[0].run(ops, kernel)
    state = cases[1].world.batch.state
    for row in range(0, len(seqs), 2):
        if row % 4:
            state.active[row] = 0
        else:
            state.position[row] //= 3
        cases[1].y[row] *= 2
    actual = cases[1].run(ops, kernel)
    assert torch.equal(actual[1::2], expected[1::2])
    assert not torch.equal(actual[::2], expected[::2])


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b"])
def test_hundreds_of_launches_have_the_same_bits(ops: TritonOps, seed: int, name: str, long: bool) -> None:
    """In a graph, one behind the other with nothing between them."""
    seqs = sequences(seed, 30)
    if long:
        seqs[7] = Seq(7000)
    case = Case(name, seed, seqs)
    kernel = case.kernel()
    expected = case.run(ops, kernel)
    caches = [part.clone() for part in case.world.cache]
    view, s = case.view(ops), case.world.scratch
    outs = [torch.empty_like(s.attn) for _ in range(4)]
    semaphores = ops._workspace(CUDA).semaphores
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            kernel.run(
                case.layer, case.begun, view, case.world.cache,
                workspace=s.attention, semaphores=semaphores, out=out,
            )  # fmt: skip
    for _ in range(100):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)
    for part, other in zip(case.world.cache, caches, strict=True):
        assert torch.equal(part.view(torch.int16), other.view(torch.int16))


def test_one_capture_serves_every_length(ops: TritonOps, seed: int) -> None:
    """Replayed behind `prepare` with other lengths and rows asleep, against eager runs."""
    seqs = sequences(seed, 28)
    seqs[0] = Seq(6000)
    case = Case("llama-3.2-1b", seed, seqs, pad=2)
    kernel, s = case.kernel(), case.world.scratch
    case.run(ops, kernel)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.run(
            case.layer, case.begun, case.view(ops), case.world.cache,
            workspace=s.attention, semaphores=ops._workspace(CUDA).semaphores, out=s.attn,
        )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    state = case.world.batch.state
    for _ in range(8):
        at = torch.tensor(
            [int(torch.randint(seq.context, (), generator=rng)) for seq in seqs], dtype=torch.int32
        )
        awake = (torch.rand(len(seqs), generator=rng) < 0.8).int() & torch.tensor(
            [seq.active for seq in seqs]
        )
        state.position[: len(seqs)], state.active[: len(seqs)] = at.cuda(), awake.cuda()
        expected = case.run(ops, kernel)
        for part, before in zip(case.world.cache, case.before, strict=True):
            part.copy_(before)
        s.attn.fill_(torch.nan)
        graph.replay()
        assert torch.equal(s.attn, expected)


def test_what_a_failed_step_left_is_forgotten(ops: TritonOps, seed: int) -> None:
    case = Case("llama-3.2-1b", seed, sequences(seed, 20))
    kernel = case.kernel()
    expected = case.run(ops, kernel)
    for words in kernel.workspaces().values():
        words.fill_(12345)
    kernel.reset()
    assert torch.equal(case.run(ops, kernel), expected)


def test_the_op_set_asks_its_table(ops: TritonOps, seed: int) -> None:
    case = Case("llama-3.2-1b", seed, sequences(seed, 20))
    ops._attend = kernel = case.kernel()
    expected = case.run(ops, kernel)
    s, view = case.world.scratch, case.view(ops)
    s.attn.fill_(torch.nan)
    x = torch.empty_like(case.y)
    scratch = type(s)(**{**{name: getattr(s, name) for name in s.__dataclass_fields__}, "x": x})
    assert not ops.attend(case.model, 0, view, case.world.cache, scratch, None), "a norm that nobody began"
    assert ops.attend(case.model, 0, view, case.world.cache, scratch, case.begun)
    assert torch.equal(s.attn, expected)
    said = ops.versions(case.model, 20, decode=True)
    assert [line.version for line in said if line.op == "attend"] == [
        "attend.cu: QKV and attention in one kernel"
    ]
    (problem,) = [p for p in ops._table._asked if p.op == "attend"]
    launch = ops._layers(case.model, problem)
    for version in (ops._table._asked[problem], LIBRARY):
        launch(version, case.layer.qkv)
    torch.cuda.synchronize()


def test_registers_suffice_and_pointers_are_known(ops: TritonOps, seed: int) -> None:
    for name in SHAPES:
        kernel = Case(name, seed, sequences(seed, 20)).kernel()._kernel
        assert POINTERS[kernel.handle] == 17
        assert kernel.spilled_bytes == 0
