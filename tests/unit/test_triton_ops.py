"""Triton ops against the plain-torch reference, in Triton's interpreter on the CPU.

Inputs are random; the seed is logged and shown on failure, and OSTINATO_TEST_SEED repeats it.
Whatever an op must not read is NaN or absurd: outputs, workspace, the guard block, cache slots
past a context, padded tokens and rows that are asleep.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2]))  # where it runs as a script

from ostinato.inputs import FLAG_PENALTIES, Batch, BufferShapes, StepBuffers
from ostinato.ops import AttentionShape, Linear, NextNorm, OpSet, Peaks, Scratch, StepView, squares_words
from ostinato.ops.cuda.linear import Product
from ostinato.ops.reference import ReferenceOps, pick, rms_norm
from ostinato.ops.triton import TritonOps, pointwise
from ostinato.ops.triton.tune import Table, Version
from ostinato.types import GraphKey, Route, SamplerVariant, StepKind
from tests.accuracy import loud, loudness, no_worse

# The interpreter works on CPU tensors; with a GPU the kernels are compiled and tests/gpu runs them.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers this on a GPU")
pytestmark = interpreted

ABSURD = 1_000_003
EPS = 1e-5


@dataclass(frozen=True)
class Seq:
    """One sequence of a step."""

    context: int
    """Tokens in the cache once the step has written."""
    length: int = 1
    """Tokens that the step computes."""
    decode: bool = True
    """Its token comes from the device state."""
    active: bool = True
    enabled: bool = True
    samples: bool = True

    @property
    def live(self) -> bool:
        return not self.decode or (self.active and self.enabled)


@dataclass(frozen=True)
class World:
    """Everything that the ops of one layer read and write."""

    shape: AttentionShape
    buffers: StepBuffers
    batch: Batch
    scratch: Scratch
    cache: tuple[torch.Tensor, torch.Tensor]
    qkv: torch.Tensor
    rope: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor

    def attend(self, ops: OpSet, norm: bool = False) -> torch.Tensor:
        """Run `prepare` and `rope_paged_attention` once; the output."""
        self.scratch.qkv.copy_(self.qkv)
        ops.rope_paged_attention(
            self.scratch.qkv,
            ops.prepare(self.batch, self.scratch),
            self.cache,
            self.rope,
            self.q_norm if norm else None,
            self.k_norm if norm else None,
            EPS,
            self.shape,
            workspace=self.scratch.attention,
            out=self.scratch.attn,
        )
        return self.scratch.attn


def make_scratch(
    tokens: int,
    seqs: int,
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    sizes: dict[str, int],
) -> Scratch:
    """Scratch full of NaN and absurd integers."""
    hidden, inner, vocab = sizes["hidden"], sizes["intermediate"], sizes["vocab"]

    def poison(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        value = float("nan") if dtype.is_floating_point else ABSURD
        return torch.full(size, value, dtype=dtype, device=device)

    ints = {n: poison(tokens, dtype=torch.int32) for n in ("ids", "positions", "slots")}
    ints |= {
        n: poison(seqs, dtype=torch.int32) for n in ("tokens", "next_positions", "seq_lens", "last_index")
    }
    return Scratch(
        x=poison(tokens, hidden),
        normed=poison(tokens, hidden),
        qkv=poison(tokens, shape.qkv_size),
        attn=poison(tokens, shape.q_size),
        gate_up=poison(tokens, 2 * inner),
        act=poison(tokens, inner),
        squares=poison(squares_words(tokens, hidden), dtype=torch.float32),
        last=poison(seqs, hidden),
        logits=poison(seqs, vocab, dtype=torch.float32),
        attention=poison(TritonOps().attention_words(shape, seqs), dtype=torch.float32),
        sampler=poison(1, dtype=torch.int32),
        **ints,
    )


def make_world(
    seed: int,
    shape: AttentionShape,
    seqs: list[Seq],
    kind: StepKind,
    *,
    pad_tokens: int = 0,
    pad_seqs: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    hidden: int = 97,
    intermediate: int = 53,
    vocab: int = 211,
) -> World:
    """A step over `seqs`, the same for equal seeds on every device and in every dtype."""
    rng = torch.Generator().manual_seed(seed)
    target = torch.device(device)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=rng).to(torch.bfloat16)  # exact in every dtype

    decode = kind is StepKind.DECODE
    count = len(seqs) + pad_seqs
    tokens = count if decode else sum(q.length for q in seqs) + pad_tokens
    per_seq = max(-(-q.context // block_size) for q in seqs) + 1
    shapes = BufferShapes(count + 3, tokens + 5, per_seq, block_size, vocab)
    buffers = StepBuffers(shapes, torch.device("cpu"), depth=1)
    static, state = buffers.static, buffers.state
    for name in ("tokens", "token_positions", "samples", "seq_lens"):
        getattr(static, name).fill_(ABSURD)  # what no real token or sequence overwrites
    static.token_rows.fill_(-1)
    static.seq_rows.fill_(-1)
    state.emitted.fill_(ABSURD)
    state.last_token.fill_(ABSURD)
    state.position.fill_(ABSURD)
    # At the end of its round, in the middle, or a step that nobody waits for.
    places = len(state.posted) - 1
    state.number.fill_((places << 20, 6, 0)[seed % 3])

    sizes = [-(-q.context // block_size) for q in seqs]
    blocks = (torch.randperm(sum(sizes) + 3, generator=rng) + 1).tolist()  # 3 belong to nobody
    cache = torch.full(
        (2, len(blocks) + 1, block_size, shape.kv_heads, shape.head_dim), float("nan"), dtype=torch.bfloat16
    )
    rows = list(range(len(seqs)))
    if not decode:
        rows = torch.randperm(shapes.max_num_seqs, generator=rng)[: len(seqs)].tolist()
    at = 0
    for column, (seq, row, size) in enumerate(zip(seqs, rows, sizes, strict=True)):
        own = [blocks.pop() for _ in range(size)]
        static.block_table[row, :size] = torch.tensor(own)
        state.active[row], static.enabled[row] = seq.active, seq.enabled
        if seq.live:
            past = torch.arange(seq.context - seq.length)
            block = torch.tensor(own)[past // block_size]
            parts = normal(2, len(past), shape.kv_heads, shape.head_dim)
            if len(past):
                parts[1, loud(len(past) + 1, shape.sliding_window, rng)] *= loudness(
                    len(past), shape.sliding_window
                )
            cache[:, block, past % block_size] = parts
            if seq.decode:
                state.position[row] = seq.context - 1
                state.last_token[row] = column + 1
        if not decode:
            end = at + seq.length
            ids = torch.randint(vocab, (seq.length,), generator=rng)
            static.tokens[at:end] = -1 if seq.decode else ids
            static.token_positions[at:end] = torch.arange(seq.context - seq.length, seq.context)
            static.token_rows[at:end] = row
            static.seq_rows[column], static.seq_lens[column] = row, seq.context
            static.samples[column] = seq.samples
            static.query_start[column + 1] = at = end
    if not decode:
        static.query_start[len(seqs) :] = at
    static.flags.copy_(torch.randint(2, (shapes.max_num_seqs,), generator=rng) * FLAG_PENALTIES)
    static.min_position.copy_(torch.randint(4, (shapes.max_num_seqs,), generator=rng) * 40)
    for seq, row in zip(seqs, rows, strict=True):
        static.last_position[row] = seq.context + int(torch.randint(-1, 2, (), generator=rng))
    static.num_stop_ids.copy_(torch.randint(0, 4, (shapes.max_num_seqs,), generator=rng))
    static.stop_ids.copy_(torch.randint(0, 6, static.stop_ids.shape, generator=rng))
    state.output_counts.copy_(torch.randint(32760, 32768, state.output_counts.shape, generator=rng))

    half = shape.head_dim // 2
    angle = torch.arange(max(q.context for q in seqs) + 1)[:, None] / 100 ** (torch.arange(half) / half)
    qkv = normal(tokens, shape.qkv_size)
    # In every other KV head a query looks for its own token, which would else count as little as one of thousands.
    heads = qkv.view(tokens, -1, shape.head_dim)
    for kv in range(0, shape.kv_heads, 2):
        heads[:, shape.heads + kv] = heads[:, kv * (shape.heads // shape.kv_heads)] * (
            5 / shape.head_dim**0.5
        )
    q_norm, k_norm = normal(shape.head_dim), normal(shape.head_dim)
    if target.type != "cpu":
        moved = StepBuffers(shapes, target, depth=1)
        for name, tensor in buffers.tensors().items():
            moved.tensors()[name].copy_(tensor)
        buffers = moved
    key = GraphKey(kind, tokens, count, SamplerVariant.GREEDY)
    batch = Batch(Route(key, None), False, (), block_size, buffers.static, buffers.state, *buffers._cut(key))
    return World(
        shape,
        buffers,
        batch,
        make_scratch(
            tokens,
            count,
            shape,
            target,
            dtype,
            {"hidden": hidden, "intermediate": intermediate, "vocab": vocab},
        ),
        tuple(cache.to(target, dtype).unbind(0)),  # type: ignore[arg-type]
        qkv.to(target, dtype),
        torch.stack((angle.cos(), angle.sin()), 1).float().to(target),
        q_norm.to(target, dtype),
        k_norm.to(target, dtype),
    )


@pytest.fixture(autouse=True)
def _interpreter_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter takes a loop's bound by `int(array of one)`, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture
def seed() -> int:
    value = int(os.environ.get("OSTINATO_TEST_SEED", random.SystemRandom().randrange(2**31)))
    logging.warning("OSTINATO_TEST_SEED=%d", value)
    return value


SMOLLM = AttentionShape(heads=9, kv_heads=3, head_dim=64)
DECODE = [
    Seq(1),
    Seq(16),
    Seq(17),
    Seq(30, active=False),
    Seq(64),
    Seq(65),
    Seq(40, enabled=False),
    Seq(300),
]
MIXED = [
    Seq(19, 19, decode=False),
    Seq(33),
    Seq(50, active=False),
    Seq(100, 37, decode=False, samples=False),
    Seq(1, 1, decode=False),
    Seq(70, 1, decode=False),
    Seq(12, enabled=False),
    Seq(129),
]


SEQS = {StepKind.DECODE: DECODE, StepKind.MIXED: MIXED}


def standard(seed: int, shape: AttentionShape, kind: StepKind, **more: Any) -> World:
    """A step with dead rows and padding, unless `more` says otherwise."""
    options = {"seqs": SEQS.get(kind), "pad_tokens": 11, "pad_seqs": 2}
    return make_world(seed, shape, kind=kind, **(options | more))


def both(seed: int, shape: AttentionShape, kind: StepKind, **more: Any) -> tuple[World, World]:
    """The same step twice: for Triton and for the reference."""
    return standard(seed, shape, kind, **more), standard(seed, shape, kind, **more)


@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
@pytest.mark.parametrize("pad_seqs", [0, 2, 150])
def test_prepare(seed: int, kind: StepKind, pad_seqs: int) -> None:
    ours, theirs = both(seed, SMOLLM, kind, pad_seqs=pad_seqs)
    view, expected = (
        TritonOps().prepare(ours.batch, ours.scratch),
        ReferenceOps().prepare(theirs.batch, theirs.scratch),
    )
    for field in fields(StepView):
        a, b = getattr(view, field.name), getattr(expected, field.name)
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field.name
    live = [q.context if q.live else 0 for q in SEQS[kind]]
    assert view.seq_lens.tolist() == live + [0] * pad_seqs


def check_attention(ours: World, theirs: World, norm: bool = False) -> None:
    """Outputs and caches agree, and what was poison and not written still is."""
    actual, expected = ours.attend(TritonOps(), norm), theirs.attend(ReferenceOps(), norm)
    assert not expected.isnan().any()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    dead = ours.scratch.slots < 0
    assert dead.any()
    assert (actual[dead] == 0).all()
    for mine, other in zip(ours.cache, theirs.cache, strict=True):
        assert mine[0].isnan().all()
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        (SMOLLM, False),
        (AttentionShape(2, 2, 80), True),
        (AttentionShape(8, 1, 10, sliding_window=40), True),
        (AttentionShape(2, 1, 64, sliding_window=1), False),
        (AttentionShape(4, 2, 16, sliding_window=100), False),
        # 64 queries but 16 keys at a time: a query may see nothing of a block of keys.
        (AttentionShape(1, 1, 130, sliding_window=3), False),
    ],
    ids=lambda v: "" if isinstance(v, bool) else f"{v.heads}-{v.kv_heads}-{v.head_dim}-{v.sliding_window}",
)
def test_attention(seed: int, shape: AttentionShape, norm: bool, kind: StepKind) -> None:
    check_attention(*both(seed, shape, kind), norm)


def test_long_contexts_use_chunks_above_the_least(seed: int) -> None:
    seqs = [Seq(1023), Seq(1024), Seq(1025), Seq(2100), Seq(5, active=False)]
    check_attention(*both(seed, AttentionShape(2, 1, 16), StepKind.DECODE, seqs=seqs))


def test_prefill_of_many_short_sequences(seed: int) -> None:
    """More sequences than query blocks, and starts that straddle block boundaries."""
    lengths = torch.randint(1, 30, (14,), generator=torch.Generator().manual_seed(seed)).tolist()
    seqs = [Seq(n + 7 * (i % 3), n, decode=False) for i, n in enumerate(lengths)]
    check_attention(*both(seed, AttentionShape(4, 1, 16), StepKind.PREFILL, seqs=seqs, pad_seqs=0))


def test_head_groups_wider_than_a_tile(seed: int) -> None:
    shape = AttentionShape(heads=71, kv_heads=1, head_dim=8)
    check_attention(*both(seed, shape, StepKind.DECODE, seqs=[Seq(5), Seq(70)]))
    seqs = [Seq(9, 6, decode=False), Seq(70)]
    check_attention(*both(seed, shape, StepKind.MIXED, seqs=seqs))


def alone(world: World, row: int) -> World:
    """A batch of one: a decode row of `world`, moved to device row 0. Changes `world`'s buffers."""
    state, static = world.batch.state, world.batch.static
    for tensor in (state.active, state.position, state.last_token, static.enabled, static.block_table):
        tensor[0] = tensor[row].clone()
    key = replace(world.batch.key, num_tokens=1, num_seqs=1)
    views = {"rows": world.batch.rows[:1], "query_start": world.batch.query_start[:2]}
    workspaces = ("attention", "sampler", "squares")
    scratch = {f.name: getattr(world.scratch, f.name) for f in fields(Scratch)}
    return replace(
        world,
        batch=replace(world.batch, route=Route(key, None), **views),
        scratch=Scratch(**{name: t if name in workspaces else t[:1] for name, t in scratch.items()}),
        qkv=world.qkv[row : row + 1],
    )


def test_a_decode_row_has_the_same_bits_alone_and_in_company(seed: int) -> None:
    def world() -> World:
        return make_world(seed, SMOLLM, DECODE, StepKind.DECODE, pad_seqs=2)

    expected = world().attend(TritonOps())
    for row in (0, 2, 7):
        assert torch.equal(alone(world(), row).attend(TritonOps())[0], expected[row])


def test_embed(seed: int) -> None:
    torch.manual_seed(seed)
    table, ids = torch.randn(50, 1100), torch.randint(50, (7,), dtype=torch.int32)
    out = torch.full((7, 1100), float("nan"))
    TritonOps().embed(ids, table, out)
    assert torch.equal(out, table[ids.long()])


def check_begun(begun: NextNorm, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """The stream and its norm in two halves are those of x, and nothing else was written."""
    tokens = len(x)
    assert torch.equal(out[:tokens], x)
    scaled = x.float() * weight.float()  # the interpreter cuts off what does not fit
    torch.testing.assert_close(begun.scaled[:tokens].float(), scaled, rtol=2**-7, atol=0)
    sums, words = x.float().square().view(tokens, -1, 64).sum(2).T, x.numel() // 64
    torch.testing.assert_close(begun.squares[:words].view(-1, tokens), sums)
    assert out[tokens:].isnan().all()
    assert begun.scaled[tokens:].isnan().all()
    assert begun.squares[words:].isnan().all()


@pytest.mark.parametrize(("tokens", "hidden"), [(7, 576), (1, 64), (33, 2048)])
def test_embed_may_begin_the_first_norm(seed: int, tokens: int, hidden: int) -> None:
    torch.manual_seed(seed)
    table, weight = torch.randn(50, hidden).bfloat16(), torch.randn(hidden).bfloat16()
    ids = torch.randint(50, (tokens,), dtype=torch.int32)
    out, scaled = (torch.full((tokens + 1, hidden), float("nan")).bfloat16() for _ in range(2))
    then = NextNorm(weight, scaled, torch.full((hidden // 64 * tokens + 1,), float("nan")))
    ops: Any = TritonOps()
    assert ops.embed(ids, table, out[:tokens], then) is None
    ops._products = object()
    assert ops.embed(ids, table, out[:tokens], then) is then
    check_begun(then, out, table[ids.long()], weight)


@pytest.mark.parametrize("pad_seqs", [0, 2])
def test_prepare_may_embed(seed: int, pad_seqs: int) -> None:
    """The view is that of `prepare` alone; the stream is that of its ids."""
    ours, theirs = (
        standard(seed, SMOLLM, StepKind.DECODE, pad_seqs=pad_seqs, hidden=192, dtype=torch.bfloat16)
        for _ in range(2)
    )
    weight = torch.randn(192).bfloat16()
    table = torch.randn(1 + int(ours.buffers.state.last_token.max().clamp(max=300)), 192).bfloat16()
    stack: Any = SimpleNamespace(layers=[SimpleNamespace(input_norm=weight)], embedding=table)
    ops: Any = TritonOps()
    assert ops.prepare(theirs.batch, theirs.scratch, stack).begun is None
    ops._products = object()
    s = ours.scratch
    for room in (s.x, s.normed, s.squares):
        room.fill_(float("nan"))
    view, expected = ops.prepare(ours.batch, s, stack), theirs.scratch
    for name in ("ids", "positions", "slots", "seq_lens", "last_index"):
        assert torch.equal(getattr(view, name), getattr(expected, name)), name
    assert torch.equal(ours.buffers.state.number, theirs.buffers.state.number)
    check_begun(view.begun, s.x, table[view.ids.long()], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [576, 97])
def test_linear_ops(seed: int, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    tokens, inner, vocab = 5, 70, 131

    def weight(n: int, k: int) -> torch.Tensor:
        return torch.randn(n, k, dtype=dtype) / k**0.5

    x, norm, act = (torch.randn(size, dtype=dtype) for size in ((tokens, hidden), (hidden,), (tokens, inner)))
    w, b, down, c = (
        weight(inner, hidden),
        torch.randn(inner, dtype=dtype),
        weight(hidden, inner),
        torch.randn(hidden, dtype=dtype),
    )
    up, head, last_index = (
        weight(2 * inner, hidden),
        weight(vocab, hidden),
        torch.tensor([4, 0, 2], dtype=torch.int32),
    )
    results: list[dict[str, torch.Tensor]] = []
    for ops, kind in ((TritonOps(), dtype), (ReferenceOps(), dtype), (ReferenceOps(), torch.float64)):
        x, norm, act, w, b, down, c, up, head = (t.to(kind) for t in (x, norm, act, w, b, down, c, up, head))

        def poison(*size: int, dtype: torch.dtype = kind) -> torch.Tensor:
            return torch.full(size, float("nan"), dtype=dtype)

        made = {name: poison(tokens, inner) for name in ("linear", "biased", "gate")}
        made |= {"add": x.clone(), "add biased": x.clone(), "logits": poison(3, vocab, dtype=torch.float32)}
        normed = poison(tokens, hidden)
        for name, bias in (("linear", None), ("biased", b)):
            ops.norm_linear(x, norm, EPS, Linear(w, bias), normed=normed, out=made[name])
        for name, bias in (("add", None), ("add biased", c)):
            ops.linear_add(act, Linear(down, bias), residual=made[name])
        gate_up = poison(tokens, 2 * inner)
        ops.norm_gate_up(x, norm, EPS, Linear(up), normed=normed, gate_up=gate_up, out=made["gate"])
        ops.norm_head(x, last_index, norm, EPS, Linear(head), last=poison(3, hidden), logits=made["logits"])
        results.append(made)
    for name, actual in results[0].items():
        # A rounding: some of so few numbers may be exact by chance.
        tiny = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
        no_worse(actual, results[1][name], results[2][name], what=name, tiny=tiny)


class Heads:
    """In place of `linear.cu`: the kinds for the head, cut into parts of seven tokens."""

    def blocks(self, version: Version, rows: int, linear: Linear) -> int:
        return -(-linear.out_features // 7)

    def run(
        self,
        kind: Product,
        version: Version,
        x: torch.Tensor,
        linear: Linear,
        out: torch.Tensor | None,
        *,
        peaks: Peaks | None = None,
    ) -> None:
        logits = x.float() @ linear.weight.float().t()
        assert (out is None) == (kind is Product.BEST)
        assert peaks is not None
        assert (peaks.tokens is None) == (kind is Product.WIDE)
        if out is not None:
            out.copy_(logits)
        for part, own in enumerate(logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf).split(7, 1)):
            peaks.values[:, part] = own.amax(1)
            if peaks.tokens is not None:
                peaks.tokens[:, part] = part * 7 + own.argmax(1)


def test_greedy_without_logits(seed: int) -> None:
    """The first of equals, 0 for padding and where all is NaN; with logits, their parts' largest."""
    torch.manual_seed(seed)
    ops = TritonOps(Table(tiles=True))
    ops._products = Heads()  # type: ignore[assignment]
    seqs, hidden, vocab = 9, 64, 1000
    weight = torch.randn(vocab, hidden).bfloat16()
    weight[500:] = weight[:500]
    # A row of the head finds itself, whatever the norms' last bits are.
    meant = torch.randperm(499)[:20] + 1
    x, norm = weight[meant], torch.ones(hidden).bfloat16()
    x[3] = torch.nan
    index, rows = torch.arange(seqs).int() * 2 % 7, torch.tensor([4, 3, -1, 0, 1, -1, 2, 5, 6]).int()
    index[1] = 3
    head = Linear(weight)
    assert ops.picks(head, seqs, torch.bfloat16)
    assert not ops.picks(Linear(weight.half()), seqs, torch.float16)
    assert not TritonOps().picks(head, seqs, torch.bfloat16)
    workspace = torch.full((ops.sampler_words(seqs, vocab),), -1, dtype=torch.int32)
    given = {"last": torch.full((seqs, hidden), torch.nan, dtype=torch.bfloat16), "workspace": workspace}
    results = []
    for which in (ops, ReferenceOps()):
        tokens = torch.full((seqs,), ABSURD, dtype=torch.int32)
        peaks = which.best_token(x, index, norm, EPS, head, rows=rows, out=tokens, **given)
        assert (peaks is None) == (which is not ops)
        if peaks is not None:
            pick(peaks, rows, tokens)
        results.append(tokens.tolist())
    expected = torch.where((rows < 0) | (index == 3), 0, meant[index.long()]).tolist()
    assert results == [expected, expected]
    logits = torch.full((seqs, vocab), torch.nan)
    largest = ops.norm_head(x, index, norm, EPS, head, logits=logits, **given)
    assert largest is not None
    assert largest.values.shape[0] == seqs
    assert torch.equal(largest.values.amax(1), logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf).amax(1))


def test_norm_is_rounded_before_its_weight(seed: int) -> None:
    """Bit for bit: in half precision the order of rounding and weight shows."""
    torch.manual_seed(seed)
    x, norm, w = (torch.randn(*size).half() for size in ((8, 200), (200,), (4, 200)))
    normed, out = torch.full_like(x, float("nan")), torch.empty(8, 4).half()
    TritonOps().norm_linear(x, norm, EPS, Linear(w), normed=normed, out=out)
    differ = normed != rms_norm(x, norm, EPS)
    assert differ.float().mean() < 0.01  # a last bit of the reciprocal root may tip a rounding


def test_head_without_a_widening_product(seed: int) -> None:
    """The Triton product that stands in where torch cannot multiply into float32."""
    torch.manual_seed(seed)
    ops = TritonOps()
    assert not ops._wide_mm
    x, w = torch.randn(19, 72, dtype=torch.float16), torch.randn(1001, 72, dtype=torch.float16)
    norm, index = torch.ones(72, dtype=torch.float16), torch.randperm(19).int()
    logits, last = torch.full((19, 1001), float("nan")), torch.empty_like(x)
    ops.norm_head(x, index, norm, EPS, Linear(w), last=last, logits=logits)
    torch.testing.assert_close(logits.double(), last.double() @ w.double().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
def test_advance(seed: int, kind: StepKind) -> None:
    ours, theirs = both(seed, SMOLLM, kind, pad_seqs=9)
    sampled = torch.randint(0, 6, (ours.batch.num_seqs,), dtype=torch.int32)
    for world, ops in ((ours, TritonOps()), (theirs, ReferenceOps())):
        view = ops.prepare(world.batch, world.scratch)
        tokens = torch.where(view.seq_lens > 0, sampled, ABSURD)  # a row that is not live has no token
        ops.advance(world.batch, view, tokens)
    for name, expected in theirs.buffers.tensors().items():
        assert torch.equal(ours.buffers.tensors()[name], expected), name
    emitted = ours.batch.state.emitted[: len(SEQS[kind])].tolist()
    assert [token >= 0 for token in emitted] == [q.live and q.samples for q in SEQS[kind]]
    number = int(ours.buffers.state.number)
    assert number == (1, 7, 0)[seed % 3]
    place = ours.buffers.state.posted[1 + (number - 1) % 2 if number else 0]
    assert place[: 1 + len(emitted)].tolist() == [number, *emitted]


@pytest.mark.parametrize("parts", [1, 5, 132, 264])
@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
def test_advance_picks_the_best_of_peaks(seed: int, kind: StepKind, parts: int) -> None:
    """The first of equals, 0 for padding, NaN and -inf as less than any number; otherwise as if the token had been there."""
    ours, theirs = both(seed, SMOLLM, kind, pad_seqs=9)
    seqs = ours.batch.num_seqs
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 3, (seqs, parts), generator=g).float()
    values[torch.rand(seqs, parts, generator=g) < 0.3] = torch.nan
    values[0] = torch.nan
    values[1] = -torch.inf
    places = torch.stack([torch.randperm(6 * parts, generator=g)[:parts] for _ in range(seqs)]).int() % 6
    tokens = torch.full((seqs,), ABSURD, dtype=torch.int32)
    ops = TritonOps()
    view = ops.prepare(ours.batch, ours.scratch)
    ops.advance(ours.batch, view, tokens, Peaks(values, places))
    plain = ReferenceOps()
    view = plain.prepare(theirs.batch, theirs.scratch)
    picked = torch.full((seqs,), ABSURD, dtype=torch.int32)
    pick(Peaks(values, places), theirs.batch.rows, picked)
    plain.advance(theirs.batch, view, picked)
    assert torch.equal(tokens, picked)
    best = [
        min((-v if v == v else torch.inf, t) for v, t in zip(row, at, strict=True))[1]
        for row, at in zip(values.tolist(), places.tolist(), strict=True)
    ]
    assert picked.tolist() == [
        b if r >= 0 else 0 for b, r in zip(best, ours.batch.rows.tolist(), strict=True)
    ]
    for name, expected in theirs.buffers.tensors().items():
        assert torch.equal(ours.buffers.tensors()[name], expected), name


@pytest.mark.slow
def test_launches_compile_for_a_gpu(tmp_path: Path) -> None:
    """Every launch, with its real arguments, compiles to machine code for an H100."""
    script = Path(__file__).with_name("test_triton_ops.py")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [
        "add_bias", "advance", "attention", "begin_decode", "embed", "embed_norm", "matmul_float32", "prepare_decode",
        "prepare_mixed",
        "rms_norm", "rope_kv_write", "silu_mul", "stream", "varlen",
    ]  # fmt: skip


def compile_launches() -> None:
    """Run every op on CPU tensors with launches replaced by compilation; print the kernels' names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type

    seen: dict[tuple[object, ...], str] = {}

    def build(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        named |= {k: options.pop(k) for k in list(options) if k in self.arg_names}
        constant = {p.name for p in self.params if p.is_constexpr}
        signature = {n: "constexpr" if n in constant else mangle_type(named[n]) for n in self.arg_names}
        constexprs = {n: named[n] for n in constant}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n][0] == "*"}
        key = (self.__name__, *signature.items(), *sorted(constexprs.items()))
        if key not in seen:
            seen[key] = self.__name__
            source = ASTSource(self, signature, constexprs, aligned)
            kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert kernel.metadata.shared <= 227 * 1024

    JITFunction.run = build
    ops = TritonOps()
    for shape, dtype in (
        (AttentionShape(32, 8, 128), torch.bfloat16),
        (AttentionShape(4, 2, 256, sliding_window=100), torch.float32),
    ):
        for kind in (StepKind.DECODE, StepKind.MIXED):
            world = standard(0, shape, kind, dtype=dtype)
            world.attend(ops, norm=True)
            s = world.scratch
            view = ops.prepare(world.batch, s)
            ops.advance(world.batch, view, s.tokens)
            ops.advance(world.batch, view, s.tokens, Peaks(s.logits[:, :132], s.logits[:, :132].int()))
        hidden, inner, vocab = s.x.shape[1], s.act.shape[1], s.logits.shape[1]
        qkv, up, head, down = (
            torch.zeros(n, k, dtype=dtype)
            for n, k in ((shape.qkv_size, hidden), (2 * inner, hidden), (vocab, hidden), (hidden, inner))
        )
        norm = torch.zeros(hidden, dtype=dtype)
        ops.embed(s.ids, head, s.x)
        ops.norm_linear(s.x, norm, EPS, Linear(qkv, qkv[:, 0].contiguous()), normed=s.normed, out=s.qkv)
        ops.linear_add(s.act, Linear(down, norm), residual=s.x)
        ops.norm_gate_up(s.x, norm, EPS, Linear(up), normed=s.normed, gate_up=s.gate_up, out=s.act)
        ops.norm_head(s.x, s.last_index, norm, EPS, Linear(head), last=s.last, logits=s.logits)
        ops._wide_product(s.last, head, s.logits)
    world = standard(0, SMOLLM, StepKind.DECODE, dtype=torch.bfloat16, hidden=576)
    s, table = world.scratch, torch.zeros(9, 576, dtype=torch.bfloat16)
    stack: Any = SimpleNamespace(layers=[SimpleNamespace(input_norm=table[0])], embedding=table)
    tiled: Any = ops
    tiled._products = object()
    ops.embed(s.ids, table, s.x, ops.prepare(world.batch, s, stack).begun)
    sys.stdout.write("\n".join(sorted(set(seen.values()))))


if __name__ == "__main__":
    compile_launches()


@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
def test_a_step_begins_when_all_before_it_has_ended(monkeypatch: pytest.MonkeyPatch, kind: StepKind) -> None:
    """Attention loads old keys and values before it waits: what wrote them is complete if `prepare` is not early."""
    ops, seen = TritonOps(), []

    class Kernel:
        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: seen.append(options)

    ops._pdl = True
    ops._launch = {"PDL": True, "launch_pdl": True}
    monkeypatch.setattr(pointwise, "prepare_decode", Kernel())
    monkeypatch.setattr(pointwise, "prepare_mixed", Kernel())
    world = make_world(1, AttentionShape(4, 2, 64), [Seq(5), Seq(9)], kind)
    ops.prepare(world.batch, world.scratch)
    (options,) = seen
    assert options["PDL"]
    assert not options.get("launch_pdl")
