"""Decode steps of a few sequences of given lengths, for tests of the one kernel that runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ostinato.graphs.runner import Arena
from ostinato.kv_cache import KVCache
from ostinato.models.decoder import Decoder
from ostinato.ops import Linear, OpSet, Scratch, StepView
from ostinato.ops.reference import ReferenceOps

BLOCK = 16


def wide(model: Decoder) -> Decoder:
    """The same weights in float32."""

    def up(part: Any) -> Any:
        if isinstance(part, Linear):
            weight = part.weight.float()
            if part.scale is not None:
                weight = weight * part.scale.unsqueeze(1)
            return Linear(weight, None if part.bias is None else part.bias.float())
        return part if part is None else part.float()

    layers = tuple(
        dataclasses.replace(w, **{f.name: up(getattr(w, f.name)) for f in dataclasses.fields(w)})
        for w in model.layers
    )
    return dataclasses.replace(
        model, embedding=model.embedding.float(), layers=layers, final_norm=model.final_norm.float(), head=up(model.head)
    )  # fmt: skip


class World:
    """Sequences of given lengths (0: padding) with blocks of their own, the cache filled with random numbers."""

    def __init__(
        self,
        model: Decoder,
        lengths: Sequence[int],
        seed: int,
        dtype: torch.dtype,
        ops: OpSet,
        device: str = "cuda",
    ) -> None:
        spec, rows = model.spec, len(lengths)
        rng = torch.Generator().manual_seed(seed)
        width = max(1, -(-max(lengths) // BLOCK))
        blocks = 1 + torch.randperm(rows * width, generator=rng).int().view(rows, width)
        self.cache = KVCache.allocate(
            layers=spec.num_layers, num_blocks=1 + rows * width, block_size=BLOCK, kv_heads=spec.attention.kv_heads,
            head_dim=spec.attention.head_dim, dtype=dtype, device=torch.device(device),
        )  # fmt: skip
        noise = torch.Generator(device).manual_seed(seed)
        self.cache.data.copy_(torch.randn(self.cache.data.shape, generator=noise, device=device).bfloat16())
        self.ops = ops
        self.arena = Arena(
            max_tokens=rows, max_seqs=rows, hidden=spec.hidden_size, intermediate=spec.intermediate_size,
            vocab=spec.vocab_size, attention=spec.attention, ops=ops, dtype=dtype, device=torch.device(device),
        )  # fmt: skip
        at = [max(n - 1, 0) for n in lengths]
        order = torch.randperm(rows, generator=rng).tolist()  # device rows in another order than the step's
        table = torch.zeros_like(blocks)
        for i, row in enumerate(order):
            table[row] = blocks[i]
        ids = torch.randint(spec.vocab_size, (rows,), generator=rng).tolist()

        def ints(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        self.view = StepView(
            ids=ints(t if n else 0 for t, n in zip(ids, lengths, strict=True)),
            positions=ints(at), seq_lens=ints(lengths), last_index=ints(range(rows)),
            rows=ints(row if n else -1 for row, n in zip(order, lengths, strict=True)),
            slots=ints(
                int(blocks[i, a // BLOCK]) * BLOCK + a % BLOCK if n else -1
                for i, (a, n) in enumerate(zip(at, lengths, strict=True))
            ),
            query_start=ints(range(rows + 1)), block_table=table.to(device), decode=True,
        )  # fmt: skip

    @property
    def scratch(self) -> Scratch:
        rows = len(self.view.ids)
        return self.arena.view(rows, rows)

    def caches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [self.cache.layer(i) for i in range(self.cache.data.shape[0])]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def planned(world: World) -> StepView:
    """Its view with what `ReferenceOps` keeps beside it."""
    view = world.view
    batch = SimpleNamespace(
        query_start=view.query_start, rows=view.rows, static=SimpleNamespace(block_table=view.block_table),
        block_size=BLOCK, decode=True,
    )  # fmt: skip
    names = ("ids", "positions", "slots", "seq_lens", "last_index")
    scratch = dataclasses.replace(world.scratch, **{name: getattr(view, name) for name in names})
    return ReferenceOps()._plan(batch, scratch)  # type: ignore[arg-type]
