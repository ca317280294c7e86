"""Triton ops on a GPU: beside the plain ones, bit for bit where promised, and under capture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "unit"))
from test_triton_ops import ABSURD, EPS, Seq, World, alone, make_world, standard

from ostinato.ops import AttentionShape, Linear, NextNorm, OpSet, Peaks, Scratch, StepView
from ostinato.ops.reference import ReferenceOps
from ostinato.ops.triton import TritonOps
from ostinato.types import SamplerVariant, StepKind
from tests.accuracy import FACTOR, TINY, no_worse
from tests.rows_world import STEP_FACTOR

pytestmark = pytest.mark.gpu

TINIES = {torch.float32: 1e-5, torch.bfloat16: TINY}
LLAMA = AttentionShape(32, 8, 128)


@pytest.fixture
def seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_(2**31))  # in every failing assertion's locals


def beside(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, factor: float = FACTOR) -> None:
    """NaN in the same places, and else as `no_worse`; [rows, ...], NaN by the row."""
    assert torch.equal(actual.isnan(), exact.isnan())
    real = ~exact.flatten(1).isnan().any(1)
    no_worse(actual[real], plain[real], exact[real], factor, tiny=TINIES[actual.dtype])


def random_step(seed: int, kind: StepKind, count: int = 33) -> list[Seq]:
    """Sequences with contexts up to 5000, some asleep."""
    rng = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=rng))

    seqs = [Seq(draw(5000 if i % 4 == 0 else 700), active=i % 7 != 3) for i in range(count)]
    if kind is StepKind.MIXED:
        for i in range(0, count, 3):
            length = draw(400)
            seqs[i] = Seq(length + draw(600) * (i % 2), length, decode=False)
    return seqs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        (LLAMA, False),
        (AttentionShape(16, 8, 128), True),
        (AttentionShape(9, 3, 64), False),
        (AttentionShape(8, 8, 80), False),
        (AttentionShape(8, 8, 96, sliding_window=300), False),
        (AttentionShape(8, 4, 256, sliding_window=512), True),
        (AttentionShape(71, 1, 64), False),
    ],
)
def test_attention(seed: int, shape: AttentionShape, norm: bool, kind: StepKind, dtype: torch.dtype) -> None:
    seqs = random_step(seed, kind, count=14)
    ours, plain, best = (
        standard(seed, shape, kind, seqs=seqs, device="cuda", dtype=d) for d in (dtype, dtype, torch.float64)
    )
    results = [
        world.attend(ops, norm)
        for world, ops in ((ours, TritonOps()), (plain, ReferenceOps()), (best, ReferenceOps()))
    ]
    live = ours.scratch.slots >= 0
    beside(*(result[live] for result in results))
    assert (results[0][~live] == 0).all()
    for parts in zip(ours.cache, plain.cache, best.cache, strict=True):
        beside(*(part.flatten(0, 1) for part in parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [LLAMA, AttentionShape(9, 3, 64, sliding_window=200)])
def test_a_decode_row_has_the_same_bits_alone_and_in_company(
    monkeypatch: pytest.MonkeyPatch, seed: int, shape: AttentionShape, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("OSTINATO_CUDA_ATTENTION", "0")  # whose bits depend on the padded rows too

    def world() -> World:
        seqs = random_step(seed, StepKind.DECODE)
        return make_world(seed, shape, seqs, StepKind.DECODE, device="cuda", dtype=dtype)

    expected = world().attend(TritonOps())
    for row in (0, 1, 4, 16, 32):
        assert torch.equal(alone(world(), row).attend(TritonOps())[0], expected[row])


@pytest.mark.parametrize("parts", [0, 1, 132])
@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
def test_prepare_and_advance(seed: int, kind: StepKind, parts: int) -> None:
    ours, theirs = (
        standard(seed, LLAMA, kind, seqs=random_step(seed, kind), pad_seqs=95, device=d)
        for d in ("cuda", "cpu")
    )
    sampled = torch.randint(6, (ours.batch.num_seqs,), dtype=torch.int32)
    values = torch.randint(-3, 3, (ours.batch.num_seqs, parts)).float()
    values[torch.rand_like(values) < 0.2] = torch.nan
    places, chosen = torch.randint(6, values.shape, dtype=torch.int32), []
    for world, ops in ((ours, TritonOps()), (theirs, ReferenceOps())):
        view = ops.prepare(world.batch, world.scratch)
        device = view.seq_lens.device
        tokens = torch.where(view.seq_lens > 0, sampled.to(device), ABSURD)
        peaks = Peaks(values.to(device), places.to(device)) if parts else None  # of which tokens are picked
        ops.advance(world.batch, view, tokens, peaks)
        chosen.append(tokens.cpu())
    assert torch.equal(*chosen)
    for field in fields(StepView):
        if isinstance(expected := getattr(theirs.scratch, field.name, None), torch.Tensor):
            assert torch.equal(getattr(ours.scratch, field.name).cpu(), expected), field.name
    for name, expected in theirs.buffers.tensors().items():
        assert torch.equal(ours.buffers.tensors()[name].cpu(), expected), name


@pytest.mark.parametrize("pad_seqs", [0, 90])
def test_prepare_may_embed(seed: int, pad_seqs: int) -> None:
    """In one kernel what `prepare`, `embed` and half a norm are: where tiles read the stream next."""
    seqs = random_step(seed, StepKind.DECODE)
    ours, theirs = (
        standard(
            seed, LLAMA, StepKind.DECODE, seqs=seqs, pad_seqs=pad_seqs, device="cuda", dtype=torch.bfloat16, hidden=576
        )
        for _ in range(2)
    )  # fmt: skip
    table, weight = (torch.randn(n, device="cuda").bfloat16() for n in ((7, 576), (576,)))
    ours.buffers.state.last_token.clamp_(max=6)
    theirs.buffers.state.last_token.clamp_(max=6)
    stack: Any = SimpleNamespace(layers=[SimpleNamespace(input_norm=weight)], embedding=table)
    ops = TritonOps()
    if ops._products is None:
        pytest.skip("needs Hopper")
    for room in (ours.scratch.x, ours.scratch.normed, ours.scratch.squares):
        room.fill_(float("nan"))
    view, plain = ops.prepare(ours.batch, ours.scratch, stack), ops.prepare(theirs.batch, theirs.scratch)
    assert plain.begun is None
    for name in ("ids", "positions", "slots", "seq_lens", "last_index"):
        assert torch.equal(getattr(view, name), getattr(plain, name)), name
    assert torch.equal(ours.buffers.state.number, theirs.buffers.state.number)
    s, x = theirs.scratch, table[plain.ids.long()]
    apart = ops.embed(plain.ids, table, s.x, NextNorm(weight, s.normed, s.squares))
    words = x.numel() // 64
    for begun, out in ((view.begun, ours.scratch.x), (apart, s.x)):
        assert begun is not None
        assert torch.equal(out, x)
        assert torch.equal(begun.scaled, (x.float() * weight.float()).bfloat16())
        sums = x.float().square().view(len(x), -1, 64).sum(2).T
        torch.testing.assert_close(begun.squares[:words].view(-1, len(x)), sums)


@dataclass(frozen=True)
class Weights:
    """One layer and a head."""

    table: torch.Tensor
    norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    o: torch.Tensor
    o_bias: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def make(cls, seed: int, world: World) -> Weights:
        """Weights that fit a world, on its device and in its dtype."""
        rng = torch.Generator().manual_seed(seed)
        s, shape = world.scratch, world.shape
        hidden, inner, vocab = s.x.shape[1], s.act.shape[1], s.logits.shape[1]

        def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(size, generator=rng) * (scale / size[-1] ** 0.5)).bfloat16().to(s.x)

        return cls(
            table=normal(vocab, hidden),
            norm=normal(hidden, scale=hidden**0.5),
            qkv=normal(shape.qkv_size, hidden),
            qkv_bias=normal(shape.qkv_size),
            o=normal(hidden, shape.q_size),
            o_bias=normal(hidden),
            gate_up=normal(2 * inner, hidden),
            down=normal(hidden, inner),
        )


def forward(ops: OpSet, world: World, w: Weights) -> StepView:
    """Everything but sampling and `advance`; nothing but ops."""
    s = world.scratch
    view = ops.prepare(world.batch, s)
    ops.embed(view.ids, w.table, s.x)
    ops.norm_linear(s.x, w.norm, EPS, Linear(w.qkv, w.qkv_bias), normed=s.normed, out=s.qkv)
    ops.rope_paged_attention(
        s.qkv, view, world.cache, world.rope, world.q_norm, world.k_norm, EPS, world.shape,
        workspace=s.attention, out=s.attn,
    )  # fmt: skip
    ops.linear_add(s.attn, Linear(w.o, w.o_bias), residual=s.x)
    ops.norm_gate_up(s.x, w.norm, EPS, Linear(w.gate_up), normed=s.normed, gate_up=s.gate_up, out=s.act)
    ops.linear_add(s.act, Linear(w.down), residual=s.x)
    ops.norm_head(s.x, view.last_index, w.norm, EPS, Linear(w.table), last=s.last, logits=s.logits)
    return view


SIZES = {"hidden": 576, "intermediate": 1536, "vocab": 4096}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
def test_a_layer_and_a_head(seed: int, kind: StepKind, dtype: torch.dtype) -> None:
    shape = AttentionShape(9, 3, 64)
    worlds = [
        standard(seed, shape, kind, device="cuda", dtype=d, **SIZES) for d in (dtype, dtype, torch.float64)
    ]
    for world, ops in zip(worlds, (TritonOps(), ReferenceOps(), ReferenceOps()), strict=True):
        forward(ops, world, Weights.make(seed, world))
    assert not worlds[0].scratch.logits.isnan().any()
    live, seqs = worlds[0].scratch.slots >= 0, worlds[0].scratch.seq_lens > 0
    beside(*(world.scratch.x[live] for world in worlds), STEP_FACTOR)
    no_worse(*(world.scratch.logits[seqs] for world in worlds), STEP_FACTOR, tiny=TINIES[dtype])


def test_torch_multiplies_into_float32() -> None:
    """If this fails, the head runs on our own, slower product."""
    assert TritonOps()._wide_mm


def test_our_own_product_for_the_head(seed: int) -> None:
    torch.manual_seed(seed)
    ops = TritonOps()
    ops._wide_mm = False
    x, w = (torch.randn(n, 576, device="cuda", dtype=torch.bfloat16) for n in (137, 5003))
    norm, index = torch.ones(576, device="cuda", dtype=torch.bfloat16), torch.arange(137, device="cuda").int()
    last, logits = torch.empty_like(x), torch.empty(137, 5003, device="cuda")
    ops.norm_head(x, index, norm, EPS, Linear(w), last=last, logits=logits)
    exact = last.double() @ w.double().t()
    no_worse(logits, exact.float(), exact, tiny=2e-5)


@contextmanager
def no_allocation() -> Iterator[None]:
    """Fail if anything inside asks the caching allocator for memory."""
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    yield
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("variant", list(SamplerVariant))
@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_allocates_nothing_and_replays_the_same_bits(
    seed: int, dtype: torch.dtype, kind: StepKind, variant: SamplerVariant
) -> None:
    pytest.importorskip("ostinato.ops.triton.sampling")
    ops, shape = TritonOps(), AttentionShape(9, 3, 64)
    world = standard(seed, shape, kind, device="cuda", dtype=dtype, **SIZES)
    words = ops.sampler_words(world.batch.num_seqs, SIZES["vocab"])
    scratch = replace(world.scratch, sampler=torch.zeros(words, dtype=torch.int32, device="cuda"))
    world = replace(world, scratch=scratch)
    weights = Weights.make(seed, world)
    batch = world.batch
    batch.static.temperature.fill_(0.7)
    batch.static.top_p.fill_(0.9)
    batch.static.repetition_penalty.fill_(1.1)
    batch.state.output_counts.clamp_(max=3)
    changes = [*world.buffers.tensors().values(), *world.cache]
    saved = [tensor.clone() for tensor in changes]
    results = [getattr(scratch, f.name) for f in fields(Scratch) if f.name not in ("attention", "sampler")]

    def restore() -> None:
        for tensor, value in zip(changes, saved, strict=True):
            tensor.copy_(value)
        for tensor in results:
            tensor.fill_(float("nan") if tensor.is_floating_point() else ABSURD)
        scratch.attention.fill_(float("nan"))
        torch.cuda.synchronize()

    def step() -> None:
        view = forward(ops, world, weights)
        ops.sample(
            scratch.logits, batch.rows, view.seq_lens, batch.static, batch.state,
            variant=variant, workspace=scratch.sampler, out=scratch.tokens,
        )  # fmt: skip
        ops.advance(batch, view, scratch.tokens)

    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # cuBLAS makes a workspace for each stream, at the first call on it
    with torch.cuda.stream(stream):
        step()
        restore()
        with no_allocation():
            step()
    torch.cuda.synchronize()
    eager = [tensor.clone() for tensor in (*results, *changes)]

    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), no_allocation():
        step()
    for _ in range(2):
        restore()
        graph.replay()
        torch.cuda.synchronize()
        for actual, expected in zip((*results, *changes), eager, strict=True):
            same = (actual == expected) | ((actual != actual) & (expected != expected))
            assert same.all()
