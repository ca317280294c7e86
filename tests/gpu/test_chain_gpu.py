"""`chain.cu` beside the plain ops in bfloat16 and in float32: sizes of models, numbers of rows, many launches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ostinato.ops import AttentionShape, LayerWeights, Linear, NextNorm, Scratch, squares_words
from ostinato.ops.cuda import chain
from ostinato.ops.cuda.linear import Products
from ostinato.ops.reference import ReferenceOps
from ostinato.ops.triton import TritonOps
from ostinato.ops.triton.tune import Table
from tests.accuracy import no_worse
from tests.rows_world import wide
from tests.stack import Model

pytestmark = pytest.mark.gpu
CUDA, BF16, EPS = torch.device("cuda", 0), torch.bfloat16, 1e-5
SHAPES = {  # hidden, attention, intermediate
    "llama-3.2-1b": (2048, AttentionShape(32, 8, 64), 8192),
    "qwen3-0.6b": (1024, AttentionShape(16, 8, 128), 3072),
    "llama-3.1-8b": (4096, AttentionShape(32, 8, 128), 14336),
}
COUNTS = (33, 40, 64, 65, 100, 128)


@pytest.fixture(
    scope="module",
    params=[(name, bias) for name in SHAPES for bias in (False, True)],
    ids=lambda param: param[0] + ("-bias" if param[1] else ""),
)
def model(request: pytest.FixtureRequest) -> Model:
    if Products.on(CUDA) is None:
        pytest.skip("needs Hopper")
    name, bias = request.param
    hidden, a, inner = SHAPES[name]

    def make(*size: int, scale: float = 0.02) -> torch.Tensor:
        return torch.randn(size, device=CUDA).mul_(scale).to(BF16)

    def norm() -> torch.Tensor:
        return (1 + torch.randn(hidden, device=CUDA) / 8).to(BF16)

    layers = tuple(
        LayerWeights(
            norm(),
            Linear(make(a.qkv_size, hidden), make(a.qkv_size, scale=0.5) if bias else None),
            None,
            None,
            Linear(make(hidden, a.q_size), make(hidden, scale=0.5) if bias else None),
            norm(),
            Linear(make(2 * inner, hidden)),
            Linear(make(hidden, inner)),
        )
        for _ in range(3)
    )
    return Model(make(512, hidden), layers, norm(), Linear(make(512, hidden)), torch.zeros(16, 2, a.head_dim // 2, device=CUDA), a)  # fmt: skip


@pytest.fixture(scope="module")
def kernel(model: Model) -> chain.Chain:
    return chain.Chain(CUDA, model)


def scratch_of(model: Model, rows: int) -> Scratch:
    """Poisoned, but for what the chain reads."""
    hidden, a, inner = model.embedding.shape[1], model.attention, model.layers[0].down.in_features

    def nan(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.full(size, float("nan"), device=CUDA, dtype=dtype)

    words = nan(squares_words(rows, hidden), dtype=torch.float32)
    rest = dict.fromkeys(("last", "logits", "tokens", "next_positions", "ids", "positions", "slots", "seq_lens", "last_index", "attention", "sampler"), words)  # fmt: skip
    # A row more of each, which nobody may write.
    parts = {
        "x": hidden,
        "normed": hidden,
        "qkv": a.qkv_size,
        "attn": a.q_size,
        "gate_up": 2 * inner,
        "act": inner,
    }
    made = {name: nan(rows + 1, size)[:rows] for name, size in parts.items()}
    return Scratch(**made, squares=words, **rest)


def plain(model: Model, index: int, attn: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x and, but behind the last layer, queries, keys and values, by the plain ops in the dtype of the model."""
    ops, layer, dtype = ReferenceOps(), model.layers[index], model.embedding.dtype
    inner, out = layer.down.in_features, x.to(dtype).clone()
    normed, wide_, act = (out.new_empty(len(x), size) for size in (out.shape[1], 2 * inner, inner))
    ops.linear_add(attn.to(dtype), layer.output, residual=out)
    ops.norm_gate_up(out, layer.mlp_norm, EPS, layer.gate_up, normed=normed, gate_up=wide_, out=act)
    ops.linear_add(act, layer.down, residual=out)
    if index + 1 == len(model.layers):
        return (out,)
    following = model.layers[index + 1]
    qkv = out.new_empty(len(x), following.qkv.out_features)
    ops.norm_linear(out, following.input_norm, EPS, following.qkv, normed=normed, out=qkv)
    return out, qkv


def check(model: Model, index: int, attn: torch.Tensor, x: torch.Tensor, *found: torch.Tensor) -> None:
    """x, and queries, keys and values where they are passed, are about as exact as those of the plain ops."""
    parts = zip(found, plain(model, index, attn, x), plain(wide(model), index, attn, x), strict=False)
    for name, part in zip(("x", "qkv"), parts, strict=False):
        no_worse(*part, what=(name, index))


@pytest.mark.parametrize("rows", COUNTS)
def test_no_worse_than_the_ops(model: Model, kernel: chain.Chain, rows: int) -> None:
    """Layers in any order, and the same bits each time."""
    s, first = scratch_of(model, rows), {}
    attn, x = (torch.randn(rows, size, device=CUDA).to(BF16) for size in (s.attn.shape[1], s.x.shape[1]))
    known = set[int]()
    for index in (0, 1, 2, 2, 0, 2, 1, 1):
        for part in (s.normed, s.act, s.qkv):
            part.fill_(torch.nan)
        s.attn.copy_(attn)
        s.x.copy_(x)
        begun = kernel.run(index, s)
        assert begun.scaled is s.normed
        found = (s.x.clone(), s.qkv.clone(), s.normed.clone())
        if index not in known:  # later it has the same bits
            known.add(index)
            check(model, index, attn, x, *found[: 2 if index < 2 else 1])
        if index == 2:
            assert found[1].isnan().all(), "nobody asked for them"
        assert torch.equal(found[2], (found[0].float() * begun.weight.float()).to(BF16))
        assert begun.sums is not None
        sums = begun.squares[: begun.sums * rows].view(-1, rows).sum(0)
        torch.testing.assert_close(sums, found[0].float().square().sum(1), rtol=1e-4, atol=1e-4)
        kept = first.setdefault(index, found)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kept, found, strict=True))
        for part in (s.x, s.normed, s.qkv, s.act):
            beyond = torch.as_strided(part, (1, part.shape[1]), part.stride(), rows * part.shape[1])
            assert beyond.isnan().all()


def test_hundreds_of_launches_have_the_same_bits(model: Model, kernel: chain.Chain) -> None:
    """In a graph, without anything between them that would keep them apart."""
    rows = 128
    s = scratch_of(model, rows)
    attn, x = (torch.randn(rows, size, device=CUDA).to(BF16) for size in (s.attn.shape[1], s.x.shape[1]))

    def step() -> None:
        s.x.copy_(x)
        s.attn.copy_(attn)
        for index in range(3):
            kernel.run(index, s)

    step()
    torch.cuda.synchronize()
    expected = s.x.clone(), s.normed.clone(), s.qkv.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(100):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, (s.x, s.normed, s.qkv), strict=True))


@pytest.mark.parametrize("rows", [34, 64, 128])
def test_neighbours_change_no_bit(model: Model, kernel: chain.Chain, rows: int) -> None:
    s, results = scratch_of(model, rows), []
    attn, x = (torch.randn(rows, size, device=CUDA).to(BF16) for size in (s.attn.shape[1], s.x.shape[1]))
    for others in (1.0, 8.0):
        s.attn.copy_(attn * others)
        s.x.copy_(x * others)
        s.attn[5], s.x[5] = attn[5], x[5]
        kernel.run(0, s)
        results.append((s.x[5].clone(), s.qkv[5].clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rows", [48, 128])
def test_a_head_behind_it_equals_one_behind_the_ops(model: Model, kernel: chain.Chain, rows: int) -> None:
    ops, logits = TritonOps(Table(tiles=True)), []
    index = torch.arange(rows, dtype=torch.int32, device=CUDA)
    s = scratch_of(model, rows)
    attn, x = (torch.randn(rows, size, device=CUDA).to(BF16) for size in (s.attn.shape[1], s.x.shape[1]))
    for chained in (True, False):
        s.attn.copy_(attn)
        s.x.copy_(x)
        layer, out = model.layers[2], torch.empty(rows, 512, device=CUDA)
        if chained:
            begun: NextNorm | None = kernel.run(2, s)
        else:
            then = NextNorm(layer.mlp_norm, s.normed, s.squares)
            begun = ops.linear_add(s.attn, layer.output, residual=s.x, then=then)
            ops.norm_gate_up(
                s.x,
                layer.mlp_norm,
                EPS,
                layer.gate_up,
                normed=s.normed,
                gate_up=s.gate_up,
                out=s.act,
                begun=begun,
            )
            ops.linear_add(s.act, layer.down, residual=s.x)
            begun = None
        last = torch.empty_like(s.x)
        ops.norm_head(s.x, index, model.final_norm, EPS, model.head, last=last, logits=out, begun=begun)
        logits.append(out)
    expected = []
    for which in (model, wide(model)):
        (stream,) = plain(which, 2, attn, x)
        out = torch.empty(rows, 512, device=CUDA)
        ReferenceOps().norm_head(
            stream, index, which.final_norm, EPS, which.head, last=torch.empty_like(stream), logits=out
        )
        expected.append(out)
    for found in logits:
        no_worse(found, *expected)


def test_what_a_failed_step_left_is_forgotten(model: Model, kernel: chain.Chain) -> None:
    s = scratch_of(model, 64)
    attn, x = (torch.randn(64, size, device=CUDA).to(BF16) for size in (s.attn.shape[1], s.x.shape[1]))
    kernel.workspaces()["words.64"].fill_(12345)
    kernel.reset()
    s.attn.copy_(attn)
    s.x.copy_(x)
    kernel.run(0, s)
    check(model, 0, attn, x, s.x)


def test_words_may_wrap(model: Model, kernel: chain.Chain) -> None:
    """After 2^32 arrivals at a word, some weeks of steps."""
    s = scratch_of(model, 64)
    attn, x = (torch.randn(64, size, device=CUDA).to(BF16) for size in (s.attn.shape[1], s.x.shape[1]))
    words, teams = kernel.workspaces()["words.64"], kernel._teams[64]
    blocks, team = teams * chain.TEAM, chain.TEAM
    epoch = 2**32 // blocks
    turns = -(-(2 * s.act.shape[1]) // (blocks * chain.layout(kernel._sizes, 64, teams).gate))
    values = [epoch, epoch * blocks, epoch * blocks] + [epoch * blocks * turns // team] * team
    words[:, 0] = torch.tensor([(v + 2**31) % 2**32 - 2**31 for v in values], device=CUDA).int()
    for _ in range(3):
        s.attn.copy_(attn)
        s.x.copy_(x)
        kernel.run(0, s)
        check(model, 0, attn, x, s.x)
    kernel.reset()
