"""Decode steps of a few sequences of given lengths, for tests of the one kernel that runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from ostinato.graphs.runner import Arena
from ostinato.kv_cache import KVCache
from ostinato.models.decoder import Decoder
from ostinato.ops import Linear, OpSet, Scratch, StepView
from ostinato.ops.reference import ReferenceOps
from tests.accuracy import loud, loudness, no_worse
from tests.stack import Model

BLOCK = 16


AnyModel = TypeVar("AnyModel", Decoder, Model)


def wide(model: AnyModel) -> AnyModel:
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


def telling(model: Decoder, seed: int) -> Decoder:
    """The same with weights in which a wrong index shows.

    Norms, scales and biases are as different from each other as weights are; and in every other KV head one query head looks for the
    new token itself (its weights are the key's), which would else count as much as one old token of thousands.
    """
    a, hidden = model.attention, model.embedding.shape[1]
    rng = torch.Generator(model.embedding.device).manual_seed(seed)

    def spread(norm: torch.Tensor | None) -> torch.Tensor | None:
        if norm is None:
            return None
        return (1 + torch.randn(norm.shape, generator=rng, device=norm.device) / 4).to(norm.dtype)

    def scaled(linear: Linear) -> Linear:
        if linear.scale is None:
            return linear
        factors = torch.rand(linear.scale.shape, generator=rng, device=linear.scale.device) + 0.5
        return dataclasses.replace(linear, scale=linear.scale * factors)

    def biased(linear: Linear) -> Linear:
        if linear.bias is None:
            return linear
        noise = torch.randn(linear.bias.shape, generator=rng, device=linear.bias.device) / 4
        return dataclasses.replace(linear, bias=noise.to(linear.bias.dtype))

    def inward(qkv: Linear) -> Linear:
        weight, scale = qkv.weight.clone(), None if qkv.scale is None else qkv.scale.clone()
        size, bias = a.head_dim, None if qkv.bias is None else qkv.bias.clone()
        strength = 5 / (size**0.5 * 0.0004 * hidden)
        for kv in range(0, a.kv_heads, 2):
            head = kv * (a.heads // a.kv_heads)
            query = slice(head * size, (head + 1) * size)
            key = slice((a.heads + kv) * size, (a.heads + kv + 1) * size)
            if scale is None:
                weight[key] = weight[query] * strength
            else:
                weight[key], scale[key] = weight[query].clone(), scale[query] * strength
            if bias is not None:
                bias[key] = bias[query] * strength
        return Linear(weight, bias, scale)

    layers = tuple(
        dataclasses.replace(
            w, input_norm=spread(w.input_norm), mlp_norm=spread(w.mlp_norm), q_norm=spread(w.q_norm), k_norm=spread(w.k_norm),
            qkv=inward(biased(scaled(w.qkv))), output=biased(scaled(w.output)), gate_up=scaled(w.gate_up), down=scaled(w.down),
        )
        for w in model.layers
    )  # fmt: skip
    final_norm = spread(model.final_norm)
    return dataclasses.replace(model, layers=layers, final_norm=final_norm, head=scaled(model.head))


class World:
    """Sequences of given lengths (0: padding) with blocks of their own.

    The cache has random numbers where it has tokens, larger values at some of them (`loud`). All else in it is NaN.
    """

    def __init__(
        self,
        model: Decoder,
        lengths: Sequence[int],
        seed: int,
        dtype: torch.dtype,
        ops: OpSet,
        device: str = "cuda",
        *,
        block: int = BLOCK,
        width: int | None = None,
    ) -> None:
        """`block`: tokens of a KV block. `width`: of the block table, where it has room for more than the longest."""
        spec, rows = model.spec, len(lengths)
        self.block = block
        rng = torch.Generator().manual_seed(seed)
        own = [-(-length // block) for length in lengths]
        width = max(1, *own) if width is None else width
        order = torch.randperm(rows, generator=rng).tolist()  # device rows in another order than the step's
        blocks = 1 + torch.randperm(sum(own), generator=rng).int()
        table = torch.zeros(rows, width, dtype=torch.int32)
        for row, part in zip(order, blocks.split(own), strict=True):
            table[row, : len(part)] = part
        self.cache = KVCache.allocate(
            layers=spec.num_layers, num_blocks=1 + len(blocks), block_size=block, kv_heads=spec.attention.kv_heads,
            head_dim=spec.attention.head_dim, dtype=dtype, device=torch.device(device),
        )  # fmt: skip
        slots = [
            (table[row].long().unsqueeze(1) * block + torch.arange(block)).flatten()[:length]
            for row, length in zip(order, lengths, strict=True)
        ]
        noise = torch.Generator(device).manual_seed(seed)
        values = torch.randn(
            self.cache.data.shape, generator=noise, device=device
        )  # [layers, 2, blocks, block, ...]
        window = spec.attention.sliding_window
        flat = values.flatten(2, 3)
        known = torch.zeros(flat.shape[2], dtype=torch.bool)
        for mine, length in zip(slots, lengths, strict=True):
            known[mine[:-1]] = True
            flat[:, 1, mine[loud(length, window, rng)].to(device)] *= loudness(length, window)
        flat[:, :, ~known.to(device)] = torch.nan
        self.cache.data.copy_(values.bfloat16())
        self.ops = ops
        self.arena = Arena(
            max_tokens=rows, max_seqs=rows, hidden=spec.hidden_size, intermediate=spec.intermediate_size,
            vocab=spec.vocab_size, attention=spec.attention, ops=ops, dtype=dtype, device=torch.device(device),
        )  # fmt: skip
        ids = torch.randint(spec.vocab_size, (rows,), generator=rng).tolist()

        def ints(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        self.view = StepView(
            ids=ints([t if n else 0 for t, n in zip(ids, lengths, strict=True)]),
            positions=ints([max(n - 1, 0) for n in lengths]), seq_lens=ints(lengths), last_index=ints(range(rows)),
            rows=ints([row if n else -1 for row, n in zip(order, lengths, strict=True)]),
            slots=ints([int(mine[-1]) if len(mine) else -1 for mine in slots]),
            query_start=ints(range(rows + 1)), block_table=table.to(device), decode=True,
        )  # fmt: skip

    @property
    def scratch(self) -> Scratch:
        rows = len(self.view.ids)
        return self.arena.view(rows, rows)

    def caches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [self.cache.layer(i) for i in range(self.cache.data.shape[0])]


def planned(world: World) -> StepView:
    """Its view with what `ReferenceOps` keeps beside it."""
    view = world.view
    batch = SimpleNamespace(
        query_start=view.query_start, rows=view.rows, static=SimpleNamespace(block_table=view.block_table),
        block_size=world.block, decode=True,
    )  # fmt: skip
    names = ("ids", "positions", "slots", "seq_lens", "last_index")
    scratch = dataclasses.replace(world.scratch, **{name: getattr(view, name) for name in names})
    return ReferenceOps()._plan(batch, scratch)  # type: ignore[arg-type]


def run_plain(model: Decoder, lengths: Sequence[int], seed: int, dtype: torch.dtype, **more: Any) -> World:
    """A world behind a step by the plain ops; `more`: of `World`."""
    world = World(model, lengths, seed, dtype, ReferenceOps(), **more)
    model.forward(planned(world), world.cache, world.scratch, world.ops)
    return world


STEP_FACTOR = 1.5
"""Of whole steps: a few heads share most of a small model's errors, which differ by chance."""


def check(ours: World, plain: World, exact: World, what: object = "") -> None:
    """Logits, and keys and values of the new tokens, are about as exact as the plain ops'; see `no_worse`."""
    live = ours.view.seq_lens > 0
    if not live.any():
        return
    no_worse(*(w.scratch.logits[live] for w in (ours, plain, exact)), STEP_FACTOR, what=(what, "logits"))
    slots = ours.view.slots[live].long()
    for layer, caches in enumerate(zip(*(w.caches() for w in (ours, plain, exact)), strict=True)):
        for name, parts in zip(("keys", "values"), zip(*caches, strict=True), strict=True):
            no_worse(*(part.flatten(0, 1)[slots] for part in parts), STEP_FACTOR, what=(what, name, layer))


def untouched(ours: World, before: World) -> bool:
    """Whether the cache has the bits it had, but for the new tokens."""
    mine, old = (w.cache.data.flatten(2, 3).view(torch.int16).clone() for w in (ours, before))
    slots = ours.view.slots[ours.view.slots >= 0].long()
    mine[:, :, slots] = old[:, :, slots] = 0
    return torch.equal(mine, old)
