"""The source of `decode.cu` itself, all its blocks, run on the CPU by `host_grid.h`, against the plain reference.

What this cannot show: the memory model, speed, and whether a GPU's fragments are as its manual says.
tests/gpu does that.
"""

from __future__ import annotations

import ctypes
import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.ops.cuda import fused
from ostinato.ops.cuda.fused import FusedDecode
from ostinato.ops.reference import ReferenceOps
from tests.rows_world import BLOCK, World, planned, untouched, wide
from tests.unit.on_host import compiled, launches, needs_compiler, portable

pytestmark = needs_compiler
CPU = torch.device("cpu")
TABLE, ROW = 80, 2
"""KV blocks of a row of the block table; which row is the sequence's"""


@dataclass(frozen=True)
class Case:
    """A model, how it runs, and contexts, one after the other in the same workspace."""

    config: Mapping[str, Any]
    grid: int
    lengths: Sequence[int]
    tuning: Mapping[str, int] = field(default_factory=dict)
    """Macros other than the library's own"""
    fp8: bool = False


def shape(
    like: str, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int = 160, **more: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab, "num_hidden_layers": 2}
    return {
        **SHAPES[like],
        **sizes,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        **more,
    }


SHORT = {"CHUNK": 32, "LONGEST": 64}
"""Splits of 32 tokens, up to 64 before there are more than four"""
TINY = (1, 33, 90, 128, 0, 200, 256, 257, 700, 1100)
"""For them: one split, one of the new token alone, two to four, more that all blocks merge, as many as fit at once and longer; not live"""

CASES = {
    # Halves of the token begin within a head; three tiles of gate and up between two meetings.
    "smollm": Case(shape("smollm2-135m", 96, 96, 9, 3), 4, TINY, SHORT),
    # Blocks without a tile, which cannot count the step; for each few splits a block, and for a part of those longer than LONGEST.
    "llama": Case(shape("llama-3.2-1b", 192, 128, 4, 2, vocab=544), 17, TINY, SHORT | {"ASK": 0, "MAXS": 8}),
    # Splits that begin within a KV block.
    "window": Case(
        shape("llama-3.2-1b", 160, 160, 2, 1, architectures=["MistralForCausalLM"], rope_scaling=None, sliding_window=100),
        5, (99, 100, 101, 150, 1000), SHORT,
    ),
    # Far ones, too.
    "far-window": Case(
        shape("llama-3.2-1b", 96, 96, 4, 2, architectures=["MistralForCausalLM"], rope_scaling=None, sliding_window=300),
        9, (257, 300, 301, 700), SHORT,
    ),
    # Norms of heads; more weights of an op than a warp holds.
    "qwen3": Case(shape("qwen3-0.6b", 128, 1056, 2, 1, head_dim=128, vocab=176), 9, (1, 33, 100, 128, 613), {"ASK": 0}),
    # Where a warp lacks a slice of a chunk, shares of splits have stood.
    "lacking": Case(shape("llama-3.2-1b", 96, 96, 18, 2), 4, (60, 100, 300), SHORT | {"MOST_SLICES": 9}),
    # Biases; two heads in a warp's part of a chunk; splits as the library has them.
    "qwen2": Case(
        shape("llama-3.2-1b", 128, 192, 16, 4, architectures=["Qwen2ForCausalLM"], rope_scaling=None, use_sliding_window=False),
        8, (256, 257, 600), {"MOST_SLICES": 32},
    ),
    # Many small chunks, batches that are not all full.
    "chunks": Case(
        shape("llama-3.2-1b", 576, 576, 2, 2, attention_bias=True), 5, (1, 40, 200, 400), SHORT | {"MOST_SLICES": 2}
    ),
    # More query heads of a KV head than a product has columns; far contexts of head_dim 128, in places that do not fit and places that do.
    "sixteen": Case(shape("llama-3.2-1b", 128, 128, 16, 1), 4, (257, 700, 1100), SHORT | {"LONGEST": 32, "PLACES": 32}),
    "far-128": Case(shape("qwen3-0.6b", 128, 128, 8, 2, head_dim=128), 17, (257, 700, 1200), SHORT | {"ASK": 0}),
    "fp8": Case(shape("llama-3.2-1b", 128, 640, 10, 2, attention_bias=True), 7, (1, 70, 0, 200, 300), SHORT, fp8=True),
    # Halves begin within a head here too.
    "fp8-128": Case(
        shape("qwen3-0.6b", 192, 192, 9, 3, head_dim=128), 7, (1, 100, 500),
        {"ASK": 0, "CHUNK": 64, "LONGEST": 64, "MOST_SLICES": 16}, fp8=True,
    ),
}  # fmt: skip


def model_of(case: Case, seed: int) -> Decoder:
    """Random, with numbers such that every part of it counts in the result."""
    model = random_decoder(
        spec_from_config(dict(case.config)), dtype=torch.bfloat16, device=CPU, positions=TABLE * BLOCK,
        seed=seed, quantization="fp8" if case.fp8 else None,
    )  # fmt: skip
    assert fused.unsupported(model) is None
    rng = torch.Generator().manual_seed(seed)
    model.embedding.copy_(torch.randn(model.embedding.shape, generator=rng))
    for linear in (model.head, *(x for w in model.layers for x in (w.qkv, w.output, w.gate_up, w.down))):
        (linear.weight if linear.scale is None else linear.scale).mul_(50 * linear.in_features**-0.5)
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(linear.bias.shape, generator=rng))
    norms = [n for w in model.layers for n in (w.input_norm, w.mlp_norm, w.q_norm, w.k_norm)]
    for norm in (model.final_norm, *norms):
        if norm is not None:
            norm.copy_(torch.rand(norm.shape, generator=rng) + 0.5)
    return model


def world_of(model: Decoder, length: int, seed: int, dtype: torch.dtype) -> World:
    """One sequence, in the last row of a block table that is full of what is no block."""
    world = World(model, [length], seed, dtype, ReferenceOps(), "cpu")
    (blocks,) = world.view.block_table
    table = torch.full((ROW + 1, TABLE), 1 << 24, dtype=torch.int32)
    table[ROW, : len(blocks)] = blocks
    rows = torch.where(world.view.rows < 0, world.view.rows, ROW)
    world.view = dataclasses.replace(world.view, block_table=table, rows=rows)
    return world


def outcome(world: World) -> list[torch.Tensor]:
    """Logits, and what the new token has in the cache."""
    found, slot = [world.scratch.logits[0].clone()], int(world.view.slots[0])
    if slot >= 0:
        found += [part.flatten(0, 1)[slot].clone() for layer in world.caches() for part in layer]
    return found


def plain(model: Decoder, world: World) -> list[torch.Tensor]:
    model.forward(planned(world), world.cache, world.scratch, world.ops)
    return outcome(world)


def squares(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of relative errors."""
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)]
    return torch.stack([((a - e).norm() / e.norm()).square() for a, e in pairs])


class Host:
    """`FusedDecode` itself, whose kernels run on the CPU."""

    def __init__(
        self, case: Case, model: Decoder, folder: Path, patch: pytest.MonkeyPatch, seed: int
    ) -> None:
        self.case, self.model, self.folder, self.seed = case, model, folder, seed
        self.library: ctypes.CDLL | None = None
        self.written: list[tuple[torch.Tensor, ...]] = []
        one = SimpleNamespace(multi_processor_count=case.grid)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: one)
        patch.setattr(fused, "build", self.build)
        stream, own = fused.tuning, {k: v for k, v in case.tuning.items() if k in fused.TUNING[case.fp8]}
        patch.setattr(fused, "tuning", lambda *sizes, fp8: stream(*sizes, fp8=fp8) | own)
        self.decode = FusedDecode(CPU)
        self.decode.load(model, BLOCK, TABLE)
        self.cells = self.decode.workspaces()

    def build(self, source: Path, name: str, numbers: dict[str, int], **_: Any) -> SimpleNamespace:
        if self.library is None:
            text = portable(source) + launches(
                decode="Params decode(*p)", finish="FinishParams if (current < 32) finish(*p)"
            )
            every = numbers | dict(self.case.tuning)
            self.library = compiled(self.folder, "decode", ["host_grid.h"], text, every)
        library, kernel = self.library, getattr(self.library, f"run_{name}")

        def launch(params: bytes) -> None:
            self.seed = (self.seed + 1) % 2**31
            for now, *both in self.written if name == "decode" else ():
                places = (ctypes.c_void_p(t.data_ptr()) for t in (now, *both))
                library.write_at_the_wait(*places, ctypes.c_size_t(now.nbytes))
            assert len(params) == getattr(library, f"bytes_of_{name}")()
            ended = kernel(ctypes.create_string_buffer(params, len(params)), self.seed)
            library.forget()
            assert ended, name

        return SimpleNamespace(handle=len(name), launch=launch)

    def step(self, world: World, *, greedy: bool) -> torch.Tensor:
        """One step. What a kernel in front writes is something else until it is waited for."""
        view, steps, length = world.view, self.cells["steps"], int(world.view.seq_lens[0])
        before = (
            (view.ids, 1), (view.positions, length // 2), (view.seq_lens, length // 2 + 1), (view.rows, 0), (view.slots, 0),
            (view.block_table, 0), (world.cache.data, torch.nan), (steps, int(steps) - 1),
        )  # fmt: skip
        self.written = [(now, torch.full_like(now, old), now.clone()) for now, old in before]
        return self.decode.run(self.model, view, world.caches(), world.scratch, greedy=greedy)


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().randrange(2**31)


@pytest.mark.parametrize("name", list(CASES))
def test_against_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, name: str) -> None:
    case = CASES[name]
    model = model_of(case, seed)
    exact, host = wide(model), Host(case, model, tmp_path, monkeypatch, seed)
    cells = host.cells
    errors, usual = [], []
    for number, length in enumerate(case.lengths):
        if number == 2:  # behind the next step tags begin again
            cells["steps"].fill_(0xFFFFFFFF // (2 * len(model.layers)) - 1)
        found, steps = [], int(cells["steps"])
        for greedy in (False, True):  # in two orders of threads
            world, before = (world_of(model, length, seed, torch.bfloat16) for _ in range(2))
            world.arena.data.fill_(0xFF)
            best = host.step(world, greedy=greedy)
            found.append([best.clone(), *outcome(world)])
            if greedy:
                assert int(world.scratch.tokens[0]) == int(found[0][1].argmax())
                assert found[1].pop(1).isnan().all(), "logits that nobody asked for"
            assert untouched(world, before)
        assert int(cells["steps"]) == steps + 2
        best, logits, *tokens = found[0]
        assert float(best.max()) == float(logits.max())
        assert all(torch.equal(a, b) for a, b in zip((best, *tokens), found[1], strict=True)), length
        expected = plain(exact, world_of(model, length, seed, torch.float32))
        errors.append(squares([logits, *tokens], expected))
        usual.append(squares(plain(model, world_of(model, length, seed, torch.bfloat16)), expected))
        assert (errors[-1] <= 2**2 * usual[-1]).all(), (length, errors[-1].sqrt(), usual[-1].sqrt())
    ours, theirs = (torch.stack([e for e in one if len(e) > 1]).mean(0) for one in (errors, usual))
    assert (ours <= 1.3**2 * theirs).all(), (ours / theirs).sqrt()


def test_the_order_of_threads_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Steps of few splits and of many in turn. Sometimes words are there when a warp asks for all, sometimes not."""
    case = Case(shape("llama-3.2-1b", 96, 64, 3, 1), 5, (), SHORT)
    model = model_of(case, seed)
    host = Host(case, model, tmp_path, monkeypatch, seed)
    worlds = [world_of(model, n, seed, torch.bfloat16) for n in (100, 300)]
    first = []
    for order in range(24):
        for i, world in enumerate(worlds):
            world.arena.data.fill_(0xFF)
            host.step(world, greedy=False)
            first += [outcome(world)] if order == 0 else []
            assert all(torch.equal(a, b) for a, b in zip(outcome(world), first[i], strict=True)), (order, i)
