"""The bytes that a decode step must read at least, whole and by the op that reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..engine import Engine
    from ..ops import LayerWeights, Linear, Stack


@dataclass(frozen=True)
class Call:
    """One op of a step and the kernels that it launched."""

    part: str
    """Which of an op's products it is, where a layer has several."""
    nodes: range
    """Its kernels in the graph's order."""
    nbytes: float | None
    """None: neither weights nor keys and values are its to read."""


def required_bytes(engine: Engine, batch: int, context: float) -> dict[str, float]:
    """What a decode step must read at least: every weight once, and the keys and values of its rows.

    Tables of which a step reads single rows (the embedding where the head is another tensor, the
    rotary table) are left out.
    """
    from ..kv_cache import KVCache

    config, spec = engine.config, engine.spec
    weights = engine.program.model.step_bytes
    a = spec.attention
    block = KVCache.bytes_per_block(spec.num_layers, config.block_size, a.kv_heads, a.head_dim, config.dtype)
    seen = min(context, a.sliding_window) if a.sliding_window else context
    kv = batch * seen * block / config.block_size
    return {"weight_bytes": weights, "kv_bytes": kv, "bytes": weights + kv}


def by_call(stack: Stack, kv_bytes: float, nodes: Sequence[tuple[str, str, int | None]]) -> list[Call]:
    """The ops of a step and what each must read.

    A norm's weight counts for the op that needs the norm, whoever begins it.

    Args:
        stack: the model.
        kv_bytes: keys and values of all layers.
        nodes: name, op and layer of each kernel, in order; neighbours of one op and layer are one call.
    """
    kv = kv_bytes / len(stack.layers)
    turns: Counter[tuple[str, int | None]] = Counter()
    found: list[Call] = []
    for (op, layer), group in groupby(nodes, key=lambda node: node[1:]):
        start = found[-1].nodes.stop if found else 0
        part = ("output", "down")[min(turns[op, layer], 1)] if op == "linear_add" else ""
        turns[op, layer] += 1
        span = range(start, start + len(list(group)))
        found.append(Call(part, span, _bytes(stack, kv, op, part, layer)))
    return found


def _bytes(stack: Stack, kv: float, op: str, part: str, layer: int | None) -> float | None:
    if op in ("norm_head", "best_token"):
        return _head(stack)
    if op == "fused":
        return _head(stack) + sum(kv + _qkv(own) + _rest(own) for own in stack.layers)
    if layer is None:
        return None
    own = stack.layers[layer]
    if op == "norm_linear":
        return _qkv(own, heads=False)
    if op == "rope_paged_attention":
        return kv + _size(own.q_norm, own.k_norm)
    if op == "attend":
        return kv + _qkv(own)
    if op == "linear_add":
        return _linear(own.output if part == "output" else own.down)
    if op == "norm_gate_up":
        return _size(own.mlp_norm) + _linear(own.gate_up)
    if op == "chain":
        after = stack.layers[layer + 1 : layer + 2]
        return _rest(own) + sum(_qkv(following, heads=False) for following in after)
    return None


def _qkv(own: LayerWeights, heads: bool = True) -> int:
    return _size(own.input_norm, *((own.q_norm, own.k_norm) if heads else ())) + _linear(own.qkv)


def _rest(own: LayerWeights) -> int:
    """Behind attention."""
    return _size(own.mlp_norm) + sum(map(_linear, (own.output, own.gate_up, own.down)))


def _head(stack: Stack) -> int:
    return _size(stack.final_norm) + _linear(stack.head)


def _linear(linear: Linear) -> int:
    return _size(linear.weight, linear.bias, linear.scale)


def _size(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
