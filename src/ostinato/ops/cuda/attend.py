"""The QKV product and decode attention in one kernel: `attend.cu`, how it is cut, when it can serve, and how it is launched.

Its blocks wait for each other, so what `FusedDecode` says about one such kernel at a time on a GPU holds here too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import KernelError
from .. import AttentionShape, LayerWeights, NextNorm, Stack, StepView
from .attention import LONG, MOST, STEP
from .fused import LOG2_E
from .fused import unsupported as unsupported_for_one
from .linear import Maps
from .program import POINTERS, Kernel, addresses, build

SOURCE = Path(__file__).with_name("attend.cu")
ROWS = 32
"""Of x, at most. With half as many blocks would have one row each, with twice as many it loses to the two kernels."""
LEAST_ROWS = 17
BLOCKS = 16
"""That share a KV head."""
SPLIT = 8
"""Of them have different inner indices."""
SHARED_BYTES = 114 << 10
"""One block on a multiprocessor, beside one of a product: two on one would keep each other waiting."""
REGISTERS = 48 << 10
"""Of a multiprocessor, for the same reason"""
PACE = 400


@dataclass(frozen=True)
class Layout:
    """How a block works."""

    tiles: int
    """Of 64 rows of weights"""
    chunks: int
    """Of 64 inner indices"""
    groups: int
    """Warp groups, which share out the tiles"""
    pieces: int
    """Of 16 tokens' keys, or values, that are on their way to a warp at a time"""

    @property
    def warps(self) -> int:
        return self.groups * 4

    @property
    def threads(self) -> int:
        return self.warps * 32 + 64


def layout(shape: AttentionShape, hidden: int) -> Layout | None:
    """How a model's layer is cut; None where it does not fit."""
    tiles, rest = divmod((shape.heads // shape.kv_heads + 2) * shape.head_dim, 64 * BLOCKS // SPLIT)
    chunks, rest2 = divmod(hidden, 64 * SPLIT)
    if rest or rest2:
        return None
    groups = next((groups for groups in (3, 2, 1) if tiles % groups == 0), 1)
    room = SHARED_BYTES - _fixed_bytes(shape, groups * 4, chunks)
    pieces = min(6, room // (groups * 4 * STEP * shape.head_dim * 2))
    found = Layout(tiles, chunks, groups, pieces)
    if pieces < 2 or chunks < 1 or tiles // groups > 2 or shared_bytes(shape, found) > SHARED_BYTES:
        return None
    return found


def _fixed_bytes(shape: AttentionShape, warps: int, chunks: int) -> int:
    """Of shared memory beside the rings: `Misc`, barriers, `Looked`."""
    rows, dim, group = ROWS // BLOCKS, shape.head_dim, shape.heads // shape.kv_heads
    misc = rows * dim * 4 + dim * 4 + rows * (group + 2) * dim * 2 + rows * dim * 2 + warps * 64
    return _up(misc + rows * 4, 16) + (2 * chunks + 2) * 8 + _looked_bytes()


def _looked_bytes() -> int:
    return ROWS * 3 * 4 + ROWS // BLOCKS * (3 * 4 + 32 * 4) + 4


def shared_bytes(shape: AttentionShape, cut: Layout) -> int:
    """What a block needs: weights and x, then keys and values in their place."""
    rings = cut.warps * cut.pieces * STEP * shape.head_dim * 2
    first = cut.tiles * cut.chunks * 8192 + cut.chunks * ROWS * 128
    behind = (2 * cut.chunks + 2) * 8 + _looked_bytes()
    return max(_up(first, 16) + behind, rings + _fixed_bytes(shape, cut.warps, cut.chunks))


def unsupported(stack: Stack, processors: int) -> str | None:
    """Why a model's layers cannot go through it; None if they can. Looks at shapes and dtypes alone."""
    why = unsupported_for_one(stack)
    if why is not None:
        return why
    a, first = stack.attention, stack.layers[0]
    if first.qkv.scale is not None:
        return "weights are quantised"
    group, rest = divmod(a.heads, a.kv_heads)
    if a.head_dim not in (64, 128) or rest or not 1 <= group <= 8:
        return f"{a.heads} heads of {a.head_dim} dimensions share {a.kv_heads} KV heads"
    if a.kv_heads * BLOCKS > processors:
        return f"{a.kv_heads} KV heads have more than {processors} blocks"
    if layout(a, first.qkv.in_features) is None:
        return f"{group} heads of {first.qkv.in_features} inputs do not fit into the shared memory of {BLOCKS} blocks"
    return None


class Attend:
    """Runs the QKV product and attention of decode steps in one kernel.

    Its words are empty between launches; nobody else may write to them. All launches are ordered by one stream.
    """

    def __init__(self, device: torch.device, stack: Stack, block_size: int, table_width: int) -> None:
        """Compiles the kernel.

        Raises:
            KernelError: the model is not one that it serves, or the kernel cannot be compiled or loaded here.
        """
        why = unsupported(stack, torch.cuda.get_device_properties(device).multi_processor_count)
        if why is not None:
            raise KernelError(why)
        self._stack, self._shape = stack, stack.attention
        self.block_size, self.table_width = block_size, table_width
        hidden = stack.layers[0].qkv.in_features
        cut = layout(self._shape, hidden)
        assert cut is not None
        norm = stack.layers[0].q_norm is not None
        self._kernel: Kernel = build(
            SOURCE, "attend", macros(self._shape, hidden, block_size, table_width, norm, cut), device=device,
            grid=self._shape.kv_heads * BLOCKS, block=cut.threads, shared_bytes=SHARED_BYTES,
        )  # fmt: skip
        POINTERS[self._kernel.handle] = 17
        self._maps = Maps()
        self._words = {
            "cells": torch.full((ROWS * SPLIT * self._shape.qkv_size,), -1, dtype=torch.int32, device=device),
            "tokens": torch.full((ROWS * self._shape.qkv_size // 2,), -1, dtype=torch.int32, device=device),
        }

    def serves(self, stack: Stack, rows: int) -> bool:
        """Whether this is the model that it was made for, in a step of so many rows."""
        return stack is self._stack and LEAST_ROWS <= rows <= ROWS

    def run(
        self,
        layer: LayerWeights,
        begun: NextNorm,
        view: StepView,
        cache: tuple[torch.Tensor, torch.Tensor],
        *,
        workspace: torch.Tensor,
        semaphores: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """`OpSet.norm_linear` and `OpSet.rope_paged_attention` of a decode step.

        Args:
            layer: of the model.
            begun: the norm in front.
            view: of the step, `ROWS` rows at most.
            cache: keys and values, as in the op.
            workspace: float32, `rows * heads * MOST * (head_dim + 2)` words.
            semaphores: int32, one for each row and KV head, zero before and after.
            out: [S, q_size].

        Raises:
            KernelError: it does not start.
        """
        stack, rows, qkv = self._stack, view.seq_lens.shape[0], layer.qkv
        pointers = (
            qkv.bias, begun.squares, view.positions, view.slots, stack.rope, layer.q_norm, layer.k_norm, *cache,
            view.block_table, view.rows, view.seq_lens, out, self._words["cells"], self._words["tokens"], workspace, semaphores,
        )  # fmt: skip
        sums = qkv.in_features // 64 if begun.sums is None else begun.sums
        self._kernel.launch(
            pack(
                pointers, stack.norm_eps, self._shape.scale, rows, sums, cache[0].shape[0], stack.rope.shape[0],
                view.block_table.shape[0],
            )
            + self._maps.rows(qkv.weight, 64)
            + self._maps.rows(begun.scaled, ROWS)
        )  # fmt: skip

    def workspaces(self) -> dict[str, torch.Tensor]:
        """All that it keeps on the device, by name."""
        return dict(self._words)

    def reset(self) -> None:
        """Forget what a failed step left."""
        for words in self._words.values():
            words.fill_(-1)


def macros(
    shape: AttentionShape, hidden: int, block_size: int, table_width: int, norm: bool, cut: Layout
) -> dict[str, int]:
    """What is compiled in."""
    return {
        "HD": shape.head_dim, "GROUP": shape.heads // shape.kv_heads, "KVH": shape.kv_heads, "BLOCK_SIZE": block_size,
        "WINDOW": shape.sliding_window or 0, "TABLE_WIDTH": table_width, "NORM": int(norm), "LONG": LONG, "MOST": MOST,
        "TILES": 1, "PIECES": cut.pieces, "HID": hidden, "TOK": ROWS, "TPW": cut.tiles // cut.groups, "PACE": PACE,
        "BOUND": (64 << 10) * cut.threads // REGISTERS,
    }  # fmt: skip


def pack(
    pointers: Sequence[torch.Tensor | None],
    eps: float,
    scale: float,
    rows: int,
    sums: int,
    blocks: int,
    angles: int,
    table_rows: int,
) -> bytes:
    """`struct Params` up to its maps; the softmax is in powers of two."""
    numbers = (eps, scale * LOG2_E, rows, sums, blocks, angles, table_rows)
    return addresses(pointers) + struct.pack("<2f5i28x", *numbers)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
