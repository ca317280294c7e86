"""The source of `attention.cu` itself, run on the CPU by `host_cuda.h`, against the plain reference.

What this cannot show: races, the memory model, speed, and whether a GPU's fragments are as its manual says.
tests/gpu does that.
"""

from __future__ import annotations

import ctypes
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent))
from on_host import compiled, needs_compiler
from test_triton_ops import EPS, Seq, World, make_world

from ostinato.ops import AttentionShape, StepView
from ostinato.ops.cuda import attention
from ostinato.ops.cuda.attention import MOST, Block, cut, macros, pack, shared_bytes
from ostinato.ops.cuda.program import source_text
from ostinato.ops.reference import ReferenceOps
from ostinato.types import StepKind
from tests.accuracy import no_worse

pytestmark = needs_compiler


def host_source() -> str:
    """The kernel's source without what is written in assembler, which the header has."""
    pieces = re.split(r"(?m)^(?=__device__ __forceinline__ )", source_text(attention.SOURCE))
    kept = []
    for piece in pieces:
        function, end, rest = piece.partition("\n}\n")
        kept.append(rest if "asm" in function and piece.startswith("__device__") else function + end + rest)
    source = "".join(kept).replace("extern __shared__ __align__(128)", "alignas(128) static")
    source = source.replace("memory[]", "memory[sizeof(Shared)]")
    assert "asm" not in source
    launch = (
        'extern "C" int launch(const Params *p, int blocks, int backwards) {'
        " return run_blocks(blocks, backwards, [&] { attention(*p); }); }\n"
        'extern "C" int shared() { return sizeof(Shared); }\n'
    )
    return source + launch


def attend(
    library: ctypes.CDLL, world: World, norm: bool, splits: int, helpers: int, backwards: bool, guess: Guess
) -> torch.Tensor:  # fmt: skip
    """The op, by the kernel's source."""
    view = ReferenceOps().prepare(world.batch, world.scratch)
    rows, shape = world.batch.num_seqs, world.shape
    semaphores = torch.zeros(rows * shape.kv_heads, dtype=torch.int32)
    space = torch.full((rows * shape.heads * MOST * (shape.head_dim + 2),), float("nan"))
    out = torch.full_like(world.scratch.attn, float("nan"))
    norms = (world.q_norm, world.k_norm) if norm else (None, None)
    pointers = (
        world.qkv, view.positions, view.slots, world.rope, *norms, *world.cache,
        view.block_table, view.rows, view.seq_lens, space, semaphores, out,
    )  # fmt: skip
    held = []
    for now, before in guess(world, view):
        held += [before, now.clone()]
        library.write_at_the_wait(
            *(ctypes.c_void_p(t.data_ptr()) for t in (now, *held[-2:])), ctypes.c_size_t(now.nbytes)
        )
    primary = rows * shape.kv_heads * splits
    params = pack(
        pointers, EPS, shape.scale, rows, primary,
        world.cache[0].shape[0], world.rope.shape[0], len(view.block_table),
    )  # fmt: skip
    assert library.launch(ctypes.create_string_buffer(params, len(params)), primary + helpers, int(backwards))
    library.forget()
    assert not semaphores.any()
    return out


Guess = Callable[[World, StepView], list[tuple[torch.Tensor, torch.Tensor]]]
"""What a step writes, and what stands there before the kernel has waited."""


def known(world: World, view: StepView) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All but the queries: as in every layer but the first."""
    return [(world.qkv, torch.full_like(world.qkv, float("nan")))]


def stale(world: World, view: StepView) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each number is another with a probability of one third, and may be any that fits into 32 bits."""
    found = known(world, view)
    for now in (view.seq_lens, view.positions, view.slots, view.block_table):
        wild = torch.randint(-(2**31), 2**31, now.shape).int()
        near = now + torch.randint(-1, 2, now.shape)
        which = torch.rand(now.shape)
        found.append((now, torch.where(which < 1 / 6, wild, torch.where(which < 1 / 3, near, now).int())))
    rows = torch.randint(-1, len(view.block_table), view.rows.shape).int()
    found.append((view.rows, torch.where(torch.rand(rows.shape) < 1 / 3, rows, view.rows)))
    return found


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().randrange(2**31)


@pytest.mark.parametrize(
    ("shape", "norm", "block_size", "splits", "helpers", "block"),
    [
        (AttentionShape(8, 2, 64), False, 16, 8, 0, Block(4, 2, 3, 1)),
        (AttentionShape(4, 2, 128), True, 16, 2, 0, Block(4, 1, 2, 1)),
        (AttentionShape(3, 1, 128), False, 5, 4, 0, Block(4, 1, 5, 1)),
        (AttentionShape(8, 1, 64, sliding_window=100), True, 32, 4, 0, Block(8, 1, 4, 1)),
        (AttentionShape(2, 2, 64, sliding_window=20), False, 3, 2, 0, Block(8, 2, 2, 1)),
        (AttentionShape(1, 1, 128), False, 16, 1, 0, Block(8, 1, 3, 1)),
        (AttentionShape(1, 1, 64), False, 16, 1, 3, Block(1, 2, 3, 1)),
        (AttentionShape(5, 1, 64), True, 16, 2, 4, Block(2, 1, 6, 1)),
    ],
    ids=lambda v: f"{v.heads}-{v.kv_heads}-{v.head_dim}" if isinstance(v, AttentionShape) else str(v),
)
@pytest.mark.parametrize("cluster", [True, False])
def test_against_the_reference(
    tmp_path: Path, seed: int, shape: AttentionShape, norm: bool, block_size: int, splits: int, helpers: int,
    block: Block, cluster: bool,
) -> None:  # fmt: skip
    if cluster and splits == 1:
        pytest.skip("one block is no cluster")
    lengths = [1, 15, 16, 17, 30, 64, 65, 129, 257]
    if splits == 1 or helpers:
        lengths = [40, 4500, 9, 2100]
    seqs = [Seq(n, active=n != 30) for n in lengths]
    ours, plain, best = (
        make_world(seed, shape, seqs, StepKind.DECODE, pad_seqs=2, block_size=block_size, dtype=dtype)
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)
    )
    table = ours.batch.static.block_table
    numbers = macros(shape, block_size, table.shape[1], norm, block, splits, cluster)
    if splits == 1 and not helpers:
        numbers["LONG"] = 1 << 14  # a warp has more than 32 steps: it looks into the block table again
    library = compiled(tmp_path, "attention", ["host_cuda.h"], host_source(), numbers)
    assert library.shared() <= shared_bytes(numbers)
    if helpers:
        assert max(cut(n, splits, 0, block.step).count for n in lengths) > splits
    others = [world.attend(ReferenceOps(), norm) for world in (plain, best)]
    actual = attend(library, ours, norm, splits, helpers, backwards=False, guess=known)
    assert not actual.isnan().any()
    assert (actual[ours.scratch.slots < 0] == 0).all()
    live = ours.scratch.slots >= 0
    no_worse(actual[live], *(other[live] for other in others))
    slots = ours.scratch.slots[live].long()
    for parts in zip(ours.cache, plain.cache, best.cache, strict=True):
        assert torch.equal(parts[0].isnan(), parts[2].isnan())
        no_worse(*(part.flatten(0, 1)[slots] for part in parts))
    torch.manual_seed(seed)
    for backwards in (True, False):
        again = attend(library, ours, norm, splits, helpers, backwards, guess=stale)
        assert torch.equal(again, actual)
