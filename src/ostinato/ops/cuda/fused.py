"""A decode step's model as one kernel: `decode.cu`, its workspace, and when it can serve.

What it is for: one token of one sequence, where a step is as fast as weights arrive. The op set's own
kernels define what it must compute; see `decode.cu` for how.
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
from .program import POINTERS, Kernel, addresses, build

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode.cu")
MOST_TOKENS = 1
"""More than one was tried: the tagged words, twice the bytes, cost more than they save."""
WARPS = 8
THREADS = (WARPS + 4) * 32
SHARED_BYTES = 227 * 1024
TOGETHER = 2
"""Tiles of weights between two meetings of a block's warps"""
HELD = 8
"""Slices of weights, of 1 KiB, that a warp holds in registers"""
MOST_HELD = 12
"""The same, where that is all that a block has of gate and up"""
SPLITS = 16
PLACES = 256
"""Of tokens or KV blocks in the cache, that a block of the GPU looks up once a step"""
TUNING = {
    False: {"MOST_SLICES": 22, "FLIGHT": 3, "LEAD": 16, "PACE": 900},
    True: {"MOST_SLICES": 16, "FLIGHT": 2, "LEAD": 16, "PACE": 1200},
}
"""Of the stream of weights, as measured on an H200; by whether they are FP8"""
UNEVEN = {"MOST_SLICES": 45, "FLIGHT": 1, "LEAD": 8, "PACE": 1800}
"""The same of FP8 weights that do not come in whole chunks of 16 slices"""
LIGHT = 2**26
"""Bytes of a layer's weights below which blocks wait for each other and not for the memory"""
ASK, LIGHT_PACE = 1150, 600
"""Of light layers: cycles from op to op; PACE, where weights are bfloat16"""
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class _Bound:
    """Kernels for one model, and what they keep between blocks."""

    decode: Kernel
    finish: Kernel
    counts: bool
    """Whether `decode` itself counts the step, so that only a greedy one needs `finish`"""
    cells: dict[str, torch.Tensor]


class FusedDecode:
    """Runs the layers and the head of a decode step in one persistent kernel.

    Its workspace is made by `load`, or at the first run with a model, which must then not be
    captured. It holds tagged words that mean nothing between steps and must not be overwritten by
    anyone else: a tag that somebody forges would be believed.
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

    def load(self, stack: Stack, block_size: int, table_width: int) -> None:
        """Make all that `run` needs for a model.

        Args:
            stack: a model that `unsupported` has nothing against.
            block_size: tokens in a KV block.
            table_width: KV blocks of a sequence, at most.

        Raises:
            KernelError: the kernel cannot be compiled or loaded here.
        """
        self._bound_for(stack, block_size, table_width)

    def _bound_for(self, stack: Stack, block_size: int, table_width: int) -> _Bound:
        macros = self._macros(stack, block_size, table_width)
        key = tuple(macros.items())
        if key not in self._bound:
            self._bound[key] = self._bind(stack, macros)
        return self._bound[key]

    def run(
        self,
        stack: Stack,
        view: StepView,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        scratch: Scratch,
        *,
        greedy: bool,
    ) -> torch.Tensor:
        """Leave float32 logits in `scratch.logits`; or, greedy, only tokens in `scratch.tokens`.

        Args:
            stack: a model that `unsupported` has nothing against.
            view: of a decode step with one sequence.
            caches: keys and values of each layer, `[num_blocks, block_size, kv_heads, head_dim]`.
            scratch: where results go; nothing else of it is used.
            greedy: whether only the best token is wanted.

        Returns:
            The largest logit of each block's part of the row, -inf where it has none; until the next step.
        """
        bound = self._bound_for(stack, caches[0][0].shape[1], view.block_table.shape[1])
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
        pointers += [cells[name] for name in ("x", "qkv", "attn", "act", "parts", "steps")]
        pointers += [None if greedy else scratch.logits, cells["best"], cells["best_at"]]
        pointers += [view.positions, view.slots, view.rows, view.seq_lens, view.block_table]
        results = [cells["best"], cells["best_at"], scratch.tokens if greedy else None, cells["steps"]]
        POINTERS[bound.decode.handle], POINTERS[bound.finish.handle] = len(pointers), len(results)
        bound.decode.launch(addresses(pointers) + struct.pack("<ff", stack.norm_eps, a.scale * LOG2_E))
        if greedy or not bound.counts:
            bound.finish.launch(addresses(results))
        return cells["best"]

    def workspaces(self) -> dict[str, torch.Tensor]:
        """All that it keeps on the device, by name."""
        return {name: cells for bound in self._bound.values() for name, cells in bound.cells.items()}

    def reset(self) -> None:
        """Forget what a failed step left: its tags must not be taken for the next step's."""
        for bound in self._bound.values():
            for cells in bound.cells.values():
                cells.zero_()
            bound.cells["best"].fill_(-torch.inf)

    def _macros(self, stack: Stack, block_size: int, table_width: int) -> dict[str, int]:
        a, first = stack.attention, stack.layers[0]
        hidden, inner, fp8 = stack.embedding.shape[1], first.down.in_features, first.qkv.scale is not None
        stream = tuning(hidden, a.q_size, inner, fp8=fp8)
        weights = (first.qkv.weight, first.output.weight, first.gate_up.weight, first.down.weight)
        light = sum(w.numel() * w.element_size() for w in weights) < LIGHT
        if light and not fp8:
            stream["PACE"] = LIGHT_PACE
        # Then each block has tiles of the MLP and of the head, and the first one ends behind all others' start.
        counts = min(inner // 8, stack.head.out_features // 16) >= self._grid
        return {
            "HID": hidden, "QSIZE": a.q_size, "QKVN": a.qkv_size,
            "INTER": inner, "VOCAB": stack.head.out_features, "NL": len(stack.layers),
            "HEADS": a.heads, "KVH": a.kv_heads, "HD": a.head_dim,
            "BLOCK_SIZE": block_size, "WINDOW": a.sliding_window or 0, "TABLE_WIDTH": table_width,
            "FP8": fp8, "QKNORM": first.q_norm is not None,
            "QKV_BIAS": first.qkv.bias is not None, "O_BIAS": first.output.bias is not None,
            "GRID": self._grid, "WARPS": WARPS, "MAXS": SPLITS, "CHUNK": fewest_in_split(a.heads, a.head_dim),
            "LONGEST": longest_in_split(a.head_dim), "PLACES": PLACES,
            "TOGETHER": TOGETHER, "GATED_TOGETHER": gated_together(hidden, inner, self._grid, stream["MOST_SLICES"], fp8=fp8),
            "ASK": ASK if light else 0, "COUNTS": counts, **stream,
        }  # fmt: skip

    def _bind(self, stack: Stack, macros: dict[str, int]) -> _Bound:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        a = stack.attention
        cells = {
            "x": zeros(macros["HID"] // 2),
            "qkv": zeros(a.qkv_size // 2),
            "attn": zeros(a.q_size // 2),
            "act": zeros(macros["INTER"] // 2),
            "parts": zeros(a.heads, SPLITS, a.head_dim // 2 + 2),
            "steps": zeros(1, dtype=torch.int32),
            # Blocks without a tile of the head never write theirs.
            "best": zeros(self._grid, dtype=torch.float32).fill_(-torch.inf),
            "best_at": zeros(self._grid, dtype=torch.int32),
        }
        numbers = {name: int(value) for name, value in macros.items()}
        decode = build(
            SOURCE, "decode", numbers,
            device=self._device, grid=self._grid, block=THREADS, shared_bytes=SHARED_BYTES,
        )  # fmt: skip
        finish = build(SOURCE, "finish", numbers, device=self._device, grid=1, block=32, shared_bytes=0)
        return _Bound(decode, finish, bool(macros["COUNTS"]), cells)


def unsupported(stack: Stack) -> str | None:
    """Why a model cannot run in the one kernel; None if it can. Looks at shapes and dtypes alone."""
    a, hidden, inner = stack.attention, stack.embedding.shape[1], stack.layers[0].down.in_features
    linears = [stack.head, *(linear for w in stack.layers for linear in (w.qkv, w.output, w.gate_up, w.down))]
    scaled = {linear.scale is not None for linear in linears}
    if stack.embedding.dtype != torch.bfloat16:
        return f"activations are {stack.embedding.dtype}, it works in bfloat16"
    if len(scaled) > 1:
        return "only some weights are quantised"
    fp8 = True in scaled
    vectors = [stack.final_norm]
    for w in stack.layers:
        vectors += [t for t in (w.input_norm, w.q_norm, w.k_norm, w.mlp_norm) if t is not None]
    for what, wanted, tensors in (
        ("weights", torch.float8_e4m3fn if fp8 else torch.bfloat16, [linear.weight for linear in linears]),
        ("norms", torch.bfloat16, vectors),
        ("biases", torch.bfloat16, [linear.bias for linear in linears if linear.bias is not None]),
        ("scales", torch.float32, [linear.scale for linear in linears if linear.scale is not None]),
        ("angles", torch.float32, [stack.rope]),
    ):
        kinds = {t.dtype for t in tensors} - {wanted}
        if kinds:
            return f"{what} are {', '.join(sorted(map(str, kinds)))}, it reads {wanted}"
    if any(linear.bias is not None for w in stack.layers for linear in (w.gate_up, w.down)) or stack.head.bias is not None:  # fmt: skip
        return "the MLP or the head has a bias"
    if len({(w.qkv.bias is None, w.output.bias is None, w.q_norm is None, w.k_norm is None) for w in stack.layers}) > 1:  # fmt: skip
        return "only some layers have biases or norms of heads"
    if (stack.layers[0].q_norm is None) != (stack.layers[0].k_norm is None):
        return "only queries or only keys have a norm"
    if a.head_dim not in (64, 128):
        return f"head_dim is {a.head_dim}, it knows 64 and 128"
    slice_ = 64 if fp8 else 32
    for name, size, unit in (
        ("hidden_size", hidden, slice_), ("query size", a.q_size, slice_), ("intermediate_size", inner, slice_),
        ("query, key and value size", a.qkv_size, 16), ("hidden_size", hidden, 16),
        ("vocab_size", stack.head.out_features, 16),
    ):  # fmt: skip
        if size % unit:
            return f"{name} {size} is no multiple of {unit}"
    stages = ring_stages(
        hidden, a.q_size, inner, a.head_dim, a.heads // a.kv_heads, fp8=fp8, together=TOGETHER + 1
    )
    flight = tuning(hidden, a.q_size, inner, fp8=fp8)["FLIGHT"]
    if stages <= flight:
        return f"its rows leave shared memory for {max(stages, 0)} chunks of weights, it needs {flight + 1}"
    return None


def fewest_in_split(heads: int, head_dim: int) -> int:
    """Fewest tokens in a split of a context: `CHUNK` in `decode.cu`.

    Short splits are read sooner; but readers merge them, and all the longer the more heads there are.
    """
    if head_dim == 64:
        return 256
    return 32 if heads <= 16 else 128


def longest_in_split(head_dim: int) -> int:
    """Most tokens in a split as long as there are four at most: what a block takes at once. `LONGEST` in `decode.cu`."""
    return WARPS * 2048 // head_dim


def tuning(hidden: int, q_size: int, inner: int, *, fp8: bool) -> dict[str, int]:
    """How weights are streamed, by the sizes that are multiplied over."""
    even = all(size // 64 % TUNING[True]["MOST_SLICES"] == 0 for size in (hidden, q_size, inner))
    return dict(UNEVEN if fp8 and not even else TUNING[fp8])


def gated_together(hidden: int, inner: int, grid: int, most: int, *, fp8: bool) -> int:
    """Tiles of gate and up between two meetings of a block's warps: three where it has no more and can hold them.

    `most`: slices of a chunk.
    """
    fits = 3 * _turns(hidden // (64 if fp8 else 32), most)[0] <= MOST_HELD
    return TOGETHER + 1 if fits and -(-(inner // 8) // grid) == TOGETHER + 1 else TOGETHER


def _divisor(n: int, most: int) -> int:
    """The largest up to `most`; of a row's slices, those of a chunk."""
    return next(d for d in range(most, 0, -1) if n % d == 0)


def _turns(slices: int, most: int) -> tuple[int, int]:
    """Slices of a row that a warp multiplies; the same in whole batches."""
    each = -(-_divisor(slices, most) // WARPS)
    turns = slices // _divisor(slices, most) * each
    batch = max(1, min(turns, max(1, HELD // each) * each))
    return turns, -(-turns // batch) * batch


def ring_stages(
    hidden: int, q_size: int, inner: int, head_dim: int, group: int, *, fp8: bool, together: int = TOGETHER
) -> int:
    """Chunks of weights that fit into shared memory beside a token: `STAGES` in `decode.cu`.

    `group`: query heads of a KV head; `together`: tiles between two meetings, at most.
    """
    item, most = 1 if fp8 else 2, tuning(hidden, q_size, inner, fp8=fp8)["MOST_SLICES"]
    slices = [size // (64 // item) for size in (hidden, q_size, inner)]

    def apart(nbytes: int) -> int:
        return nbytes if nbytes // 64 % 2 else nbytes + 64

    stage = 16 * max(apart(_divisor(n, most) * 64) for n in slices)
    token = max(max(_turns(n, most)[1], sum(_turns(n // 2, most))) for n in slices) * 64 // item * 2
    reduced, attention = together * WARPS * 16, WARPS * head_dim + (WARPS + 2) // 2 * 4
    fixed = WARPS * token + 4 * (2 * reduced + attention) + 4 * 2 * WARPS + 4 * head_dim
    fixed += 2 * (_divisor(group, 8) + 2) * head_dim + 4 * PLACES  # the new token; places of old ones
    return (SHARED_BYTES - fixed) // (stage + 16)


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
