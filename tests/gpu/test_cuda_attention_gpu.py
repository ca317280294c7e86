"""Decode attention in CUDA C++ on a GPU: beside the plain op, both against float64, and the same bits each time.

Worlds are those of the op tests: unused blocks, the guard block and slots past a context are NaN, rows are
ragged, some asleep, some padding. So a slot that is read or written and should not be shows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "unit"))
sys.path.append(str(Path(__file__).parent))
from test_ops_gpu import no_allocation
from test_triton_ops import Seq, World, make_world

from ostinato.ops import AttentionShape
from ostinato.ops.cuda.attention import DecodeAttention, grid_of
from ostinato.ops.cuda.program import POINTERS
from ostinato.ops.reference import ReferenceOps
from ostinato.ops.triton import TritonOps
from ostinato.types import StepKind
from tests.accuracy import no_worse

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 5000)
LLAMA_1B = AttentionShape(32, 8, 64)
QWEN = AttentionShape(16, 8, 128)


@pytest.fixture
def seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_(2**31))  # in every failing assertion's locals


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def ops() -> TritonOps:
    found = TritonOps()
    if found._attention is None:
        pytest.skip("needs compute capability 8.0 and cuda.bindings")
    return found


def sequences(seed: int, count: int, longest: int = 5000) -> list[Seq]:
    """Every length of the list at least once where they fit, then random ones; 0 stands for a row asleep."""
    rng = torch.Generator().manual_seed(seed)
    chosen = [n for n in LENGTHS if n <= longest]
    while len(chosen) < count:
        chosen.append(int(torch.randint(1, longest if len(chosen) % 5 == 0 else 700, (), generator=rng)))
    order = torch.randperm(len(chosen), generator=rng)[:count].tolist()
    seqs = [Seq(max(chosen[i], 1), active=chosen[i] > 0) for i in order]
    return seqs if any(seq.active for seq in seqs) else [Seq(257), *seqs[1:]]


def world_of(
    seed: int, shape: AttentionShape, seqs: list[Seq], dtype: torch.dtype = BF16, **more: Any
) -> World:
    return make_world(seed, shape, seqs, StepKind.DECODE, device="cuda", dtype=dtype, **more)


def run(ops: TritonOps, world: World, norm: bool = False) -> torch.Tensor:
    """The result, from the CUDA kernel; its semaphores are as it found them."""
    assert ops._attention is not None
    world.scratch.attn.fill_(float("nan"))
    world.scratch.attention.fill_(float("nan"))
    result = world.attend(ops, norm).clone()
    assert ops._attention._kernels
    assert not ops._workspace(result.device).semaphores.any()
    return result


def check(ops: TritonOps, seed: int, shape: AttentionShape, seqs: list[Seq], norm: bool, **more: Any) -> None:
    ours, plain, best = (world_of(seed, shape, seqs, dtype, **more) for dtype in (BF16, BF16, torch.float64))
    before = [part.clone() for part in ours.cache]
    actual = run(ops, ours, norm)
    others = [world.attend(ReferenceOps(), norm) for world in (plain, best)]
    dead = ours.scratch.slots < 0
    assert (actual[dead] == 0).all()
    no_worse(actual[~dead], *(other[~dead] for other in others))
    slots = ours.scratch.slots[~dead].long()
    for mine, *its, old in zip(ours.cache, plain.cache, best.cache, before, strict=True):
        mine, old = mine.flatten(0, 1), old.flatten(0, 1)
        no_worse(mine[slots], *(part.flatten(0, 1)[slots] for part in its))
        untouched = torch.ones(len(mine), dtype=torch.bool, device="cuda")
        untouched[slots] = False
        assert torch.equal(mine[untouched].view(torch.int16), old[untouched].view(torch.int16))
    for _ in range(3):
        assert torch.equal(run(ops, ours, norm), actual)


@pytest.mark.parametrize("block_size", [16, 48, 5, 1])
@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        (LLAMA_1B, False),
        (QWEN, True),
        (AttentionShape(9, 3, 64), False),
        (AttentionShape(8, 8, 128), False),
        (AttentionShape(8, 1, 64), True),
        (AttentionShape(16, 2, 128), False),
        (AttentionShape(7, 1, 128), True),
        (AttentionShape(8, 4, 64, sliding_window=300), False),
        (AttentionShape(8, 2, 128, sliding_window=1), True),
        (AttentionShape(8, 2, 64, sliding_window=2000), False),
    ],
    ids=lambda v: "" if isinstance(v, bool) else f"{v.heads}-{v.kv_heads}-{v.head_dim}-{v.sliding_window}",
)
def test_no_worse_than_the_op(
    ops: TritonOps, seed: int, shape: AttentionShape, norm: bool, block_size: int
) -> None:
    """Few rows: as many splits as there are."""
    check(ops, seed, shape, sequences(seed, 13), norm, pad_seqs=3, block_size=block_size)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 31, 64, 129, 134, 256])
@pytest.mark.parametrize(("shape", "norm"), [(LLAMA_1B, False), (QWEN, True)])
def test_every_number_of_rows(
    ops: TritonOps, seed: int, shape: AttentionShape, norm: bool, count: int
) -> None:
    check(ops, seed, shape, sequences(seed, count, 1000), norm, pad_seqs=count % 3)


def test_long_rows_among_many_have_helpers(ops: TritonOps, seed: int) -> None:
    """More splits than the key has blocks for: the blocks behind them take the rest."""
    shape, count = AttentionShape(16, 8, 64), 131
    seqs = [Seq(1 + 13 * i % 300, active=i % 11 != 4) for i in range(count)]
    seqs[3], seqs[77], seqs[130] = Seq(5000), Seq(40000), Seq(4097)
    world = world_of(seed, shape, seqs)
    context = world.batch.static.block_table.shape[1] * world.batch.block_size
    assert ops._attention is not None
    grid = grid_of(count, shape, context, ops._attention._processors)
    assert grid.splits < 4
    assert grid.helpers
    actual = run(ops, world)
    for row in range(count):
        # One row at a time: float64 over 131 rows as long as the longest would not fit.
        if seqs[row].context > 3000 or row < 8:
            no_worse(
                actual[row, None], *(by_hand(world, row, dtype)[None] for dtype in (BF16, torch.float64))
            )
    for _ in range(5):
        assert torch.equal(run(ops, world), actual)


def by_hand(world: World, row: int, dtype: torch.dtype) -> torch.Tensor:
    """A row's result from what the caches hold now; with queries, weights and the result rounded to the dtype."""
    shape, length = world.shape, int(world.scratch.seq_lens[row])
    if length == 0:
        return torch.zeros(shape.q_size, dtype=dtype, device="cuda")
    block_size = world.batch.block_size
    past = torch.arange(length, device="cuda")
    blocks = world.batch.static.block_table[row].long()
    slots = blocks[past // block_size] * block_size + past % block_size
    k, v = (part.flatten(0, 1)[slots].double() for part in world.cache)
    q = world.qkv[row, : shape.q_size].double().view(shape.kv_heads, -1, shape.head_dim)
    cos, sin = world.rope[length - 1].double()
    low, high = q.chunk(2, dim=-1)
    q = torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(dtype).double()
    weights = torch.einsum("hgd,nhd->hgn", q, k).mul(shape.scale)
    weights = (weights - weights.amax(-1, keepdim=True)).exp()
    sums = weights.sum(-1, keepdim=True)
    return (torch.einsum("hgn,nhd->hgd", weights.to(dtype).double(), v) / sums).to(dtype).flatten()


@pytest.mark.parametrize("shape", [LLAMA_1B, QWEN])
def test_bits_do_not_depend_on_neighbours(ops: TritonOps, seed: int, shape: AttentionShape) -> None:
    seqs = sequences(seed, 29)
    expected = run(ops, world_of(seed, shape, seqs, pad_seqs=3))
    other = world_of(seed, shape, seqs, pad_seqs=3)
    for row in range(0, len(seqs), 2):
        if row % 4:
            other.batch.state.active[row] = 0
        else:
            other.batch.state.position[row] //= 3
    actual = run(ops, other)
    assert torch.equal(actual[1::2], expected[1::2])
    assert not torch.equal(actual[::2], expected[::2])


@pytest.mark.parametrize("count", [5, 70])
@pytest.mark.parametrize("shape", [LLAMA_1B, QWEN])
def test_one_capture_serves_every_length(
    ops: TritonOps, seed: int, shape: AttentionShape, count: int
) -> None:
    """Captured once, three launches in a row; replayed with other lengths, against eager runs."""
    seqs = sequences(seed, count, 1000)
    world, plain = (world_of(seed, shape, seqs, pad_seqs=2) for _ in range(2))
    for each in (world, plain):
        run(ops, each)
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), no_allocation():
        for _ in range(3):
            world.attend(ops)
    rng = torch.Generator().manual_seed(seed)
    longest = [seq.context for seq in seqs]
    for _ in range(6):
        at = torch.tensor([int(torch.randint(n, (), generator=rng)) for n in longest], dtype=torch.int32)
        awake = (torch.rand(count, generator=rng) < 0.8).int()
        for each in (world, plain):
            each.batch.state.position[:count] = at.cuda()
            each.batch.state.active[:count] = awake.cuda() & torch.tensor([s.active for s in seqs]).cuda()
        world.scratch.attn.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(world.scratch.attn, run(ops, plain))
        for mine, other in zip(world.cache, plain.cache, strict=True):
            assert torch.equal(mine.view(torch.int16), other.view(torch.int16))
    assert not ops._workspace(world.scratch.attn.device).semaphores.any()


def test_dependent_launch_changes_no_bit(ops: TritonOps, seed: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launch needs compute capability 9.0")
    results = []
    for pdl in (False, True, True):
        assert ops._attention is not None
        ops._attention._pdl = pdl
        ops._attention._kernels.clear()
        world = world_of(seed, LLAMA_1B, sequences(seed, 33))
        for _ in range(20):
            world.attend(ops)
        results.append(world.scratch.attn.clone())
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_agrees_with_the_triton_version(ops: TritonOps, seed: int) -> None:
    ours, theirs = (world_of(seed, QWEN, sequences(seed, 20)) for _ in range(2))
    best = world_of(seed, QWEN, sequences(seed, 20), torch.float64).attend(ReferenceOps(), norm=True)
    triton = TritonOps()
    triton._attention = None
    actual, other = run(ops, ours, norm=True), theirs.attend(triton, norm=True)
    live = ours.scratch.slots >= 0
    no_worse(actual[live], other[live], best[live])
    no_worse(other[live], actual[live], best[live])


def test_registers_suffice_and_pointers_are_known(ops: TritonOps, seed: int) -> None:
    from cuda.bindings import driver

    attention = DecodeAttention.claim(torch.device("cuda", torch.cuda.current_device()))
    assert attention is not None
    ops._attention = attention
    for shape, norm in ((LLAMA_1B, False), (QWEN, True), (AttentionShape(32, 8, 128), False)):
        run(ops, world_of(seed, shape, [Seq(20), Seq(70)]), norm)
    for kernel in attention._kernels.values():
        assert POINTERS[kernel.handle] == 14
        local = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        status, spilled = driver.cuFuncGetAttribute(local, kernel._function)
        assert int(status) == 0
        if torch.cuda.get_device_capability()[0] == 9:
            assert spilled == 0
