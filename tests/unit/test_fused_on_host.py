"""The source of `decode.cu` itself, all its blocks, run on the CPU by `host_grid.h`, against the plain reference.

What this cannot show: the memory model, speed, and whether a GPU's fragments are as its manual says.
tests/gpu does that.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.ops import StepView
from ostinato.ops.cuda import fused
from ostinato.ops.cuda.fused import FusedDecode
from ostinato.ops.reference import ReferenceOps
from tests.rows_world import BLOCK, World, planned, wide
from tests.unit.on_host import compiled, launches, needs_compiler, portable

pytestmark = needs_compiler
CPU = torch.device("cpu")
TABLE, SPARE = 80, 2
"""KV blocks of a row of the block table; rows of other sequences in front"""


@dataclass(frozen=True)
class Case:
    """A model, how it is run, and contexts, one step each, all in one workspace."""

    config: Mapping[str, Any]
    grid: int
    lengths: Sequence[int]
    tuning: Mapping[str, int] = field(default_factory=dict)
    """Macros other than the library's own"""
    fp8: bool = False
    orders: int = 1
    """In how many orders of threads each step runs"""


def shape(
    like: str, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int = 160, layers: int = 2, **more: Any
) -> dict[str, Any]:  # fmt: skip
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {**SHAPES[like], "head_dim": 64, "num_hidden_layers": layers, "vocab_size": vocab, **sizes, **more}


SHORT = {"CHUNK": 32, "LONGEST": 64}
"""Splits of 32 tokens, and of 64 before there are more than four"""

CASES = {
    # Halves of the token begin within a head.
    "smollm": Case(shape("smollm2-135m", 288, 192, 9, 3), 8, (1, 33, 90, 0, 128, 200, 257), SHORT),
}


def kernels(folder: Path, numbers: Mapping[str, int]) -> ctypes.CDLL:
    text = portable(fused.SOURCE) + launches(step="Params decode(*p)", best="FinishParams if (current < 32) finish(*p)")
    return compiled(folder, "decode", ["host_grid.h"], text, numbers)


def fused_on_host(patch: pytest.MonkeyPatch, grid: int) -> FusedDecode:
    patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=grid))
    return FusedDecode(CPU)


def model_of(case: Case, seed: int) -> Decoder:
    """Random, with numbers such that every part of it counts in the result."""
    spec = spec_from_config(dict(case.config))
    model = random_decoder(
        spec, dtype=torch.bfloat16, device=CPU, positions=TABLE * BLOCK, seed=seed, quantization="fp8" if case.fp8 else None
    )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    model.embedding.copy_(torch.randn(model.embedding.shape, generator=rng))
    for linear in (model.head, *(x for w in model.layers for x in (w.qkv, w.output, w.gate_up, w.down))):
        (linear.weight if linear.scale is None else linear.scale).mul_(50 * linear.in_features**-0.5)
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(linear.bias.shape, generator=rng))
    for w in model.layers:
        for norm in (w.input_norm, w.mlp_norm, w.q_norm, w.k_norm):
            if norm is not None:
                norm.copy_(torch.rand(norm.shape, generator=rng) + 0.5)
    model.final_norm.copy_(torch.rand(model.final_norm.shape, generator=rng) + 0.5)
    assert fused.unsupported(model) is None
    return model


def world_of(model: Decoder, length: int, seed: int, dtype: torch.dtype) -> World:
    """One sequence; what is no token of it is NaN in the cache, and no block in the table."""
    world = World(model, [length], seed, dtype, ReferenceOps(), "cpu")
    width = world.view.block_table.shape[1]
    table = torch.full((SPARE + 1, TABLE), 1 << 24, dtype=torch.int32)
    table[SPARE, :width] = world.view.block_table[0]
    world.view = dataclasses.replace(
        world.view, block_table=table, rows=torch.where(world.view.rows < 0, world.view.rows, SPARE)
    )
    for keys, values in world.caches():
        keys.mul_(2)
        tokens = torch.arange(width * BLOCK)
        places = table[SPARE, tokens // BLOCK].long() * BLOCK + tokens % BLOCK
        old = torch.zeros(keys.shape[0] * BLOCK, dtype=torch.bool)
        old[places[: max(length - 1, 0)]] = True
        for part in (keys, values):
            part.flatten(0, 1)[~old] = torch.nan
    return world


def results(world: World, live: bool) -> list[torch.Tensor]:
    """Logits, and what the new token has in the cache."""
    found = [world.scratch.logits[0].clone()]
    if live:
        at = int(world.view.slots[0])
        found += [part.flatten(0, 1)[at].flatten().clone() for layer in world.caches() for part in layer]
    return found


def plain(model: Decoder, world: World, live: bool) -> list[torch.Tensor]:
    model.forward(planned(world), world.cache, world.scratch, world.ops)
    return results(world, live)


def squares(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of relative errors."""
    return torch.stack(
        [((a.double() - e.double()).norm() / e.double().norm()).square() for a, e in zip(actual, expected, strict=True)]
    )


@pytest.mark.parametrize("name", list(CASES))
def test_against_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    model = model_of(case, seed)
    ours = fused_on_host(monkeypatch, case.grid)
    order = iter(range(seed % 2**31, 2**62))
    made: dict[str, SimpleNamespace] = {}
    lib: list[ctypes.CDLL] = []

    def build(source: Path, kernel: str, numbers: dict[str, int], **kwargs: Any) -> SimpleNamespace:
        if not lib:
            lib.append(kernels(tmp_path, numbers | dict(case.tuning)))
        entry = {"decode": lib[0].step, "finish": lib[0].best}[kernel]

        def launch(params: bytes) -> None:
            entry(ctypes.create_string_buffer(params, len(params)), next(order) % 2**32)

        return SimpleNamespace(handle=len(kernel), launch=launch)

    monkeypatch.setattr(fused, "build", build)
    exact = wide(model)
    for length in case.lengths:
        live = length > 0
        expected = plain(exact, world_of(model, length, seed + length, torch.float32), live)
        usual = plain(model, world_of(model, length, seed + length, torch.bfloat16), live)
        world = world_of(model, length, seed + length, torch.bfloat16)
        ours.run(model, world.view, world.caches(), world.scratch, greedy=False)
        found = results(world, live)
        a, b = squares(found, expected), squares(usual, expected)
        print(length, a.sqrt().tolist(), b.sqrt().tolist())
