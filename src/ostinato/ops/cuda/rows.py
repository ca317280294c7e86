"""A decode step's model as one kernel, for two to eight sequences: `rows.cu`, its workspace, and when it can serve.

What `fused.py` is for one sequence. The op set's own kernels define what it must compute; see `rows.cu` for how.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import Linear, Scratch, Stack, StepView
from .fused import LOG2_E
from .fused import unsupported as unsupported_for_one
from .program import POINTERS, Kernel, addresses, build

SOURCE = Path(__file__).with_name("rows.cu")
MOST_TOKENS = 8
"""The columns of a tile"""
WARPS = 8
THREADS = (WARPS + 4) * 32
SHARED_BYTES = 227 * 1024
MOST_SPLITS = 16
TUNING = {
    "MOST_SLICES": 22, "FLIGHT": 3, "LEAD": 16, "PACE": 900, "CHUNK": 256, "TOGETHER": 2, "MOST_KEPT": 16, "SPINS": 1 << 24,
}  # fmt: skip
"""Of the stream of weights, as measured on an H200, and of how the work is cut."""

INITIAL = {"words": -1, "best": -torch.inf}
"""What workspaces are filled with, where it is not zero. Blocks without a tile of the head never write their best."""


@dataclass(frozen=True)
class _Bound:
    """Kernels for one model, and what they keep between blocks."""

    decode: Kernel
    finish: Kernel
    cells: dict[str, torch.Tensor]


class RowsDecode:
    """Runs the layers and the head of a decode step of up to `MOST_TOKENS` sequences in one persistent kernel.

    What `FusedDecode` says about workspace, and about one such kernel at a time on a GPU, holds here too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._grid = torch.cuda.get_device_properties(device).multi_processor_count
        self._bound: dict[tuple[tuple[str, int], ...], _Bound] = {}

    def load(self, stack: Stack, block_size: int, table_width: int) -> None:
        """Make all that `run` needs for a model that `unsupported` has nothing against.

        Args:
            stack: the model.
            block_size: tokens in a KV block.
            table_width: KV blocks of a sequence, at most.

        Raises:
            KernelError: the kernel cannot be compiled or loaded here.
        """
        self._bound_for(stack, block_size, table_width)

    def serves(self, stack: Stack, seqs: int) -> bool:
        """Whether each (row, KV head) of a step finds a block of its own."""
        return 1 <= seqs <= MOST_TOKENS and seqs * stack.attention.kv_heads <= self._grid

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
            view: of a decode step that `serves` admits.
            caches: keys and values of each layer, `[num_blocks, block_size, kv_heads, head_dim]`.
            scratch: where results go; nothing else of it is used.
            greedy: whether only the best tokens are wanted.
        """
        bound = self._bound_for(stack, caches[0][0].shape[1], view.block_table.shape[1])
        cells, tokens = bound.cells, view.seq_lens.shape[0]
        pointers = list(_pointers(stack, view, caches, cells, None if greedy else scratch.logits))
        results = [cells["best"], cells["best_at"], scratch.tokens]
        POINTERS[bound.decode.handle], POINTERS[bound.finish.handle] = len(pointers), len(results)
        bound.decode.launch(pack(pointers, stack, tokens, self._grid))
        if greedy:
            bound.finish.launch(addresses(results) + struct.pack("<i4x", tokens))

    def workspaces(self) -> dict[str, torch.Tensor]:
        """All that it keeps on the device, by name."""
        return {name: cells for bound in self._bound.values() for name, cells in bound.cells.items()}

    def reset(self) -> None:
        """Forget what a failed step left."""
        for bound in self._bound.values():
            for name, cells in bound.cells.items():
                cells.fill_(INITIAL.get(name, 0))

    def _bound_for(self, stack: Stack, block_size: int, table_width: int) -> _Bound:
        numbers = macros(stack, block_size, table_width, self._grid)
        key = tuple(numbers.items())
        if key not in self._bound:
            decode = build(
                SOURCE, "decode_rows", numbers,
                device=self._device, grid=self._grid, block=THREADS, shared_bytes=SHARED_BYTES,
            )  # fmt: skip
            finish = build(
                SOURCE, "finish_rows", numbers, device=self._device, grid=1, block=256, shared_bytes=0
            )
            self._bound[key] = _Bound(decode, finish, workspace(numbers, self._device))
        return self._bound[key]


def workspace(numbers: dict[str, int], device: torch.device) -> dict[str, torch.Tensor]:
    """What blocks tell each other, parts of long contexts, steps, and the blocks' best tokens; for `macros` of a model."""
    values = numbers["QKVN"] + numbers["QSIZE"] + 2 * numbers["HID"] + numbers["INTER"]
    group, grid = numbers["HEADS"] // numbers["KVH"], numbers["GRID"]
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "words": ((2, numbers["NL"], values * MOST_TOKENS // 2), torch.int32),
        "parts": ((grid, group, numbers["HD"] + 2), torch.int64),
        "steps": ((grid,), torch.int32),
        "best": ((grid, MOST_TOKENS), torch.float32),
        "best_at": ((grid, MOST_TOKENS), torch.int32),
    }
    return {
        name: torch.full(size, INITIAL.get(name, 0), dtype=dtype, device=device)
        for name, (size, dtype) in sizes.items()
    }


def macros(stack: Stack, block_size: int, table_width: int, grid: int) -> dict[str, int]:
    """What is compiled in."""
    a, first = stack.attention, stack.layers[0]
    return {
        "HID": stack.embedding.shape[1], "QSIZE": a.q_size, "QKVN": a.qkv_size,
        "INTER": first.down.in_features, "VOCAB": stack.head.out_features, "NL": len(stack.layers),
        "HEADS": a.heads, "KVH": a.kv_heads, "HD": a.head_dim,
        "BLOCK_SIZE": block_size, "WINDOW": a.sliding_window or 0, "TABLE_WIDTH": table_width,
        "QKNORM": int(first.q_norm is not None), "GRID": grid, "WARPS": WARPS, **TUNING,
    }  # fmt: skip


def pack(pointers: Sequence[torch.Tensor | None], stack: Stack, tokens: int, grid: int) -> bytes:
    """`struct Params`; the softmax is in powers of two."""
    splits = max(1, min(MOST_SPLITS, grid // (tokens * stack.attention.kv_heads)))
    return addresses(pointers) + struct.pack(
        "<ffii", stack.norm_eps, stack.attention.scale * LOG2_E, tokens, splits
    )


def _pointers(
    stack: Stack,
    view: StepView,
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    cells: dict[str, torch.Tensor],
    logits: torch.Tensor | None,
) -> Iterator[torch.Tensor | None]:
    """In the order of `struct Params`."""
    for w, cache in zip(stack.layers, caches, strict=True):
        linears: tuple[Linear, ...] = (w.qkv, w.output, w.gate_up, w.down)
        yield from (w.input_norm, w.q_norm, w.k_norm, w.mlp_norm)
        yield from (linear.weight for linear in linears)
        yield from cache
    yield from (stack.final_norm, stack.head.weight, stack.rope, stack.embedding, view.ids)
    yield from (cells[name] for name in ("words", "parts", "steps"))
    yield from (logits, cells["best"], cells["best_at"])
    yield from (view.positions, view.slots, view.rows, view.seq_lens, view.block_table)


def unsupported(stack: Stack, block_size: int) -> str | None:
    """Why a model cannot run in the one kernel; None if it can. Looks at shapes and dtypes alone."""
    why = unsupported_for_one(stack)
    if why is not None:
        return why
    a, first = stack.attention, stack.layers[0]
    if first.qkv.scale is not None:
        return "weights are quantised"
    if first.qkv.bias is not None or first.output.bias is not None:
        return "attention has biases"
    if a.heads // a.kv_heads > 8:
        return f"{a.heads} heads share {a.kv_heads} KV heads, it knows 1 to 8 for each"
    if block_size % 16:
        return f"a KV block has {block_size} tokens, no multiple of 16"
    hidden = stack.embedding.shape[1]
    if max(kept(hidden), 2 * kept(hidden // 2) if hidden % 64 == 0 else 0) > TUNING["MOST_KEPT"]:
        return f"hidden_size is {hidden}, more than its registers hold"
    return None


def kept(size: int) -> int:
    """16-byte pieces of each token that a lane keeps, where an op's inner dimension is this long: `COUNT` in `rows.cu`."""
    slices = size // 32
    chunk = next(d for d in range(TUNING["MOST_SLICES"], 0, -1) if slices % d == 0)
    return slices // chunk * -(-chunk // WARPS)
