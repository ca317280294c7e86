"""A decode step's model as one kernel: `decode.cu`, its workspace, and when it can serve.

What it is for: one token of each of at most `MOST_TOKENS` sequences, where a step is as fast as
weights arrive. The op set's own kernels define what it must compute; see `decode.cu` for how.
"""

from __future__ import annotations

import gc
import logging
import struct
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from .. import Linear, Scratch, Stack, StepView
from .program import Kernel, build

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode.cu")
MOST_TOKENS = 1
"""Beyond one token the tagged words, twice the bytes, cost more than they save."""
WARPS = 8
THREADS = (WARPS + 4) * 32
SHARED_BYTES = 227 * 1024
SPLITS, CHUNK = 16, 256
TUNING = {
    False: {"MOST_SLICES": 22, "FLIGHT": 3, "LEAD": 16, "PACE": 900},
    True: {"MOST_SLICES": 45, "FLIGHT": 1, "LEAD": 8, "PACE": 1800},
}
"""Of the stream of weights, as measured on an H200; by whether they are FP8."""
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class _Bound:
    """Kernels for one model, and what they keep between blocks."""

    decode: Kernel
    finish: Kernel
    cells: dict[str, torch.Tensor]


POINTERS: dict[int, int] = {}
"""How many pointers, 8 bytes each, a launched kernel's parameter begins with, by function handle."""


class FusedDecode:
    """Runs the layers and the head of a decode step in one persistent kernel.

    Its workspace is made at the first run with a model, which must therefore not be captured; the
    engine's warm-up is that run. It holds tagged words that mean nothing between steps and must
    not be overwritten by anyone else: a tag that somebody forges would be believed.
    """

    _alive: ClassVar[weakref.WeakSet[FusedDecode]] = weakref.WeakSet()

    @classmethod
    def claim(cls, device: torch.device) -> FusedDecode | None:
        """One for this device, or None while another lives there.

        Its blocks wait for each other, so all of them must fit at once. Two such kernels on two streams
        could each hold some multiprocessors and wait for the rest for ever.
        """
        if any(other._device == device for other in cls._alive):
            gc.collect()  # an engine that nobody holds any more may still be there
        if any(other._device == device for other in cls._alive):
            logger.info(
                "another engine on %s runs the one-kernel decode step: this one goes op by op", device
            )
            return None
        return cls(device)

    def __init__(self, device: torch.device) -> None:
        self._alive.add(self)
        self._device = device
        self._grid = torch.cuda.get_device_properties(device).multi_processor_count
        self._bound: dict[tuple[tuple[str, int], ...], _Bound] = {}

    def run(
        self,
        stack: Stack,
        view: StepView,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        scratch: Scratch,
        *,
        greedy: bool,
    ) -> None:
        """Leave float32 logits in `scratch.logits`; or, greedy, only tokens in `scratch.tokens`.

        Args:
            stack: a model that `unsupported` has nothing against.
            view: of a decode step with at most `MOST_TOKENS` sequences.
            caches: keys and values of each layer, `[num_blocks, block_size, kv_heads, head_dim]`.
            scratch: where results go; nothing else of it is used.
            greedy: whether only the best token is wanted.
        """
        seqs = view.rows.shape[0]
        macros = self._macros(stack, caches[0][0].shape[1], view.block_table.shape[1])
        bound = self._bound.get(tuple(macros.items()))
        if bound is None:
            bound = self._bound[tuple(macros.items())] = self._bind(stack, macros)
        cells, a = bound.cells, stack.attention
        pointers = list(_layer_pointers(stack, caches))
        pointers += [
            stack.final_norm,
            stack.head.weight,
            stack.head.scale,
            stack.rope,
            stack.embedding,
            view.ids,
        ]
        pointers += [cells[name] for name in ("x", "qkv", "attn", "act", "parts", "semaphores", "steps")]
        pointers += [None if greedy else scratch.logits, cells["best"], cells["best_at"]]
        pointers += [view.positions, view.slots, view.rows, view.seq_lens, view.block_table]
        results = [cells["best"], cells["best_at"], scratch.tokens if greedy else None, cells["steps"]]
        POINTERS[bound.decode.handle], POINTERS[bound.finish.handle] = len(pointers), len(results)
        bound.decode.launch(_pack(pointers) + struct.pack("<ffi4x", stack.norm_eps, a.scale * LOG2_E, seqs))
        bound.finish.launch(_pack(results) + struct.pack("<i4x", seqs))

    def workspace(self) -> list[torch.Tensor]:
        """All that it keeps on the device."""
        return [cells for bound in self._bound.values() for cells in bound.cells.values()]

    def models(self) -> list[tuple[int, int]]:
        """(vocabulary, hidden size) of each model that has run."""
        return [(numbers["VOCAB"], numbers["HID"]) for numbers in map(dict, self._bound)]

    def reset(self) -> None:
        """Forget what a failed step left: its tags must not be taken for the next step's."""
        for bound in self._bound.values():
            for cells in bound.cells.values():
                cells.zero_()
            bound.cells["best"].fill_(-torch.inf)

    def _macros(self, stack: Stack, block_size: int, table_width: int) -> dict[str, int]:
        a, first = stack.attention, stack.layers[0]
        return {
            "HID": stack.embedding.shape[1], "QSIZE": a.q_size, "QKVN": a.qkv_size,
            "INTER": first.down.in_features, "VOCAB": stack.head.out_features, "NL": len(stack.layers),
            "HEADS": a.heads, "KVH": a.kv_heads, "HD": a.head_dim,
            "BLOCK_SIZE": block_size, "WINDOW": a.sliding_window or 0, "TABLE_WIDTH": table_width,
            "TOKENS": MOST_TOKENS, "FP8": first.qkv.scale is not None, "QKNORM": first.q_norm is not None,
            "QKV_BIAS": first.qkv.bias is not None, "O_BIAS": first.output.bias is not None,
            "GRID": self._grid, "WARPS": WARPS, "MAXS": SPLITS, "CHUNK": CHUNK, "QG": 1, **TUNING[first.qkv.scale is not None],
        }  # fmt: skip

    def _bind(self, stack: Stack, macros: dict[str, int]) -> _Bound:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        a, n = stack.attention, MOST_TOKENS
        cells = {
            "x": zeros(n, macros["HID"] // 2),
            "qkv": zeros(n, a.qkv_size // 2),
            "attn": zeros(n, a.q_size // 2),
            "act": zeros(n, macros["INTER"] // 2),
            "parts": zeros(n, a.heads, SPLITS, a.head_dim + 2),
            "semaphores": zeros(n, a.heads, dtype=torch.int32),
            "steps": zeros(1, dtype=torch.int32),
            # Blocks without a tile of the head never write theirs.
            "best": zeros(n, self._grid, dtype=torch.float32).fill_(-torch.inf),
            "best_at": zeros(n, self._grid, dtype=torch.int32),
        }
        numbers = {name: int(value) for name, value in macros.items()}
        decode = build(SOURCE, "decode", numbers, grid=self._grid, block=THREADS, shared_bytes=SHARED_BYTES)
        finish = build(SOURCE, "finish", numbers, grid=1, block=256, shared_bytes=0)
        return _Bound(decode, finish, cells)


def unsupported(stack: Stack) -> str | None:
    """Why a model cannot run in the one kernel; None if it can. Looks at shapes and dtypes alone."""
    a, hidden, inner = stack.attention, stack.embedding.shape[1], stack.layers[0].down.in_features
    linears = [stack.head, *(linear for w in stack.layers for linear in (w.qkv, w.output, w.gate_up, w.down))]
    scaled = {linear.scale is not None for linear in linears}
    if stack.embedding.dtype != torch.bfloat16:
        return f"activations are {stack.embedding.dtype}, it works in bfloat16"
    if len(scaled) > 1:
        return "only some weights are quantised"
    kinds = {linear.weight.dtype for linear in linears}
    if kinds != {torch.float8_e4m3fn if True in scaled else torch.bfloat16}:
        return f"weights are {', '.join(sorted(map(str, kinds)))}"
    if a.head_dim not in (64, 128):
        return f"head_dim is {a.head_dim}, it knows 64 and 128"
    slice_ = 64 if True in scaled else 32
    for name, size, unit in (
        ("hidden_size", hidden, slice_), ("query size", a.q_size, slice_), ("intermediate_size", inner, slice_),
        ("query, key and value size", a.qkv_size, 16), ("hidden_size", hidden, 16),
        ("vocab_size", stack.head.out_features, 16),
    ):  # fmt: skip
        if size % unit:
            return f"{name} {size} is no multiple of {unit}"
    if max(hidden, a.q_size, inner) > 32768:
        return "a row of activations would leave too little shared memory for weights"
    return None


def _layer_pointers(
    stack: Stack, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[torch.Tensor | None]:
    """In the order of `struct Layer`."""
    for w, cache in zip(stack.layers, caches, strict=True):
        linears: tuple[Linear, ...] = (w.qkv, w.output, w.gate_up, w.down)
        yield from (w.input_norm, w.q_norm, w.k_norm, w.mlp_norm)
        yield from (linear.weight for linear in linears)
        yield from (w.qkv.bias, w.output.bias)
        yield from (linear.scale for linear in linears)
        yield from cache


def _pack(tensors: Sequence[torch.Tensor | None]) -> bytes:
    return struct.pack(f"<{len(tensors)}Q", *(0 if t is None else t.data_ptr() for t in tensors))
