"""Decode attention in CUDA C++: `attention.cu`, when it can serve, and how it is launched.

`rope_paged_attention` for one new token of each row, in bfloat16, on Ampere and later. What it must
compute is said in `ops/__init__.py`; where this cannot serve, the Triton version does. How a row is cut into
splits depends on the padded rows of the step and on the row's own length, so its bits do too, and on
nothing else of its neighbours.
"""

from __future__ import annotations

import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import KernelError
from .. import AttentionShape, StepView
from .fused import LOG2_E
from .program import POINTERS, Kernel, addresses, build, has_bindings

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.cu")
MOST = 16
"""Splits of a row at most: what `OpSet.attention_words` has room for."""
STEP = 16
"""Tokens of a tile."""
LONG = 2048
"""Most tokens of a split, where the number of splits allows."""
HELPERS = 4
"""Blocks a multiprocessor for what rows have beyond the key's splits."""
MOST_CLUSTER = 4
"""Blocks of a cluster: parts of more would take room in shared memory, and those without work room on multiprocessors."""


@dataclass(frozen=True)
class Block:
    """How a block works."""

    warps: int
    tiles: int
    """That a warp looks at together: a step."""
    pieces: int
    """Of a step's keys, or of its values, that are on their way to a warp at a time; two at least."""
    resident: int
    """Blocks of a multiprocessor that its registers must leave room for."""

    @property
    def step(self) -> int:
        """Tokens that all warps look at together."""
        return self.warps * self.tiles * STEP


BLOCKS = {
    64: ((1, Block(8, 2, 2, 2)), (2, Block(4, 2, 3, 5)), (8, Block(2, 1, 6, 12))),
    128: ((3, Block(4, 1, 4, 5)), (8, Block(4, 1, 3, 5))),
}  # fmt: skip
"""By head_dim: up to so many rows and KV heads for each multiprocessor."""
IN_TURN = {64: Block(8, 2, 2, 2), 128: Block(8, 1, 2, 2)}
"""With more. A long row that comes late keeps the others waiting, the longer the fewer warps it has."""
SPREAD = {64: 1, 128: 2}
"""Blocks of a multiprocessor, by head_dim, up to which rows are cut into more splits: a short row leaves some idle."""


@dataclass(frozen=True)
class Cut:
    """How a row's visible tokens are shared out; the C++ has the same rule."""

    base: int
    """Where splits begin: the first visible token, rounded down to a multiple of 16."""
    chunk: int
    """Tokens of a split; the last one may have fewer."""
    count: int
    """Splits, at least one."""


@dataclass(frozen=True)
class Grid:
    """The blocks of a launch: of each key, whatever the lengths."""

    splits: int
    """Splits of each (row, KV head) that have a block of their own."""
    primary: int
    """Those blocks."""
    helpers: int
    """Blocks that share further splits of long rows."""


def block_of(rows: int, shape: AttentionShape, processors: int) -> Block:
    """How blocks of a key work: fewer rows have more warps, as merging in a block is cheap."""
    each = -(-rows * shape.kv_heads // processors)
    return next((block for most, block in BLOCKS[shape.head_dim] if each <= most), IN_TURN[shape.head_dim])


def splits_of(rows: int, shape: AttentionShape, processors: int) -> int:
    """Splits of each row and KV head that have blocks of their own, which are a cluster."""
    splits = 1
    while splits < MOST_CLUSTER and 2 * splits * rows * shape.kv_heads <= SPREAD[shape.head_dim] * processors:
        splits *= 2
    return splits


def cut(length: int, splits: int, window: int, least: int = 64) -> Cut:
    """How a row is cut.

    Args:
        length: tokens of the row.
        splits: of the key, see `Grid`.
        window: as `AttentionShape.sliding_window`, 0 for none.
        least: tokens of a split, a multiple of them: `Block.step`.
    """
    base = max(length - window, 0) // 16 * 16 if window else 0
    seen = length - base
    chunk = _up(_up(seen, splits) // splits, least)
    if chunk > LONG:
        parts = min(MOST, -(-seen // LONG))
        chunk = _up(_up(seen, parts) // parts, least)
    chunk = max(chunk, least)
    return Cut(base, chunk, max(-(-seen // chunk), 1))


def grid_of(rows: int, shape: AttentionShape, context: int, processors: int) -> Grid:
    """The grid of a key.

    Args:
        rows: of the step, padding included.
        shape: of the model.
        context: the most tokens that a row's block table has room for.
        processors: multiprocessors of the GPU.
    """
    splits = splits_of(rows, shape, processors)
    least = block_of(rows, shape, processors).step
    seen = min(context, shape.sliding_window + 15) if shape.sliding_window else context
    more = seen > splits * (LONG - least)
    helpers = HELPERS * processors // splits * splits if more else 0
    return Grid(splits, rows * shape.kv_heads * splits, helpers)


def unsupported(dtype: torch.dtype, cache: torch.dtype, shape: AttentionShape) -> str | None:
    """Why a model's decode attention cannot run here; None if it can. Looks at shapes and dtypes alone."""
    group, rest = divmod(shape.heads, shape.kv_heads)
    if dtype != torch.bfloat16 or cache != torch.bfloat16:
        return f"activations are {dtype} and the cache is {cache}, it works in bfloat16"
    if shape.head_dim not in BLOCKS:
        return f"head_dim is {shape.head_dim}, it knows 64 and 128"
    if rest or not 1 <= group <= 8:
        return f"{shape.heads} heads share {shape.kv_heads} KV heads, it knows 1 to 8 for each"
    return None


class DecodeAttention:
    """Launches `attention.cu`; a kernel is compiled at the first use with a model, which is no capture."""

    @classmethod
    def claim(cls, device: torch.device) -> DecodeAttention | None:
        """One for a GPU, or None where it cannot run; OSTINATO_CUDA_ATTENTION=0 turns it off."""
        if os.environ.get("OSTINATO_CUDA_ATTENTION") == "0" or not torch.cuda.is_available():
            return None
        if torch.cuda.get_device_capability(device) < (8, 0):
            return None
        return cls(device) if has_bindings() else None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._pdl = torch.cuda.get_device_capability(device) >= (9, 0)
        self._kernels: dict[tuple[tuple[str, int], ...], Kernel] = {}
        self._broken = False

    def serves(self, dtype: torch.dtype, cache: torch.dtype, shape: AttentionShape) -> bool:
        """Whether `run` does what it is asked, as far as is known before it compiles."""
        return not self._broken and unsupported(dtype, cache, shape) is None

    def run(
        self,
        qkv: torch.Tensor,
        view: StepView,
        cache: tuple[torch.Tensor, torch.Tensor],
        rope: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        shape: AttentionShape,
        *,
        workspace: torch.Tensor,
        semaphores: torch.Tensor,
        out: torch.Tensor,
    ) -> bool:
        """`OpSet.rope_paged_attention` of a decode step; False: nothing was done, it cannot serve.

        Args beyond the op's:
            workspace: float32, `rows * heads * MOST * (head_dim + 2)` words.
            semaphores: int32, one for each row and KV head, zero before and after.

        Raises:
            KernelError: it does not compile, load or start.
        """
        keys, values = cache
        if not self.serves(qkv.dtype, keys.dtype, shape):
            return False
        norms = (q_norm, k_norm) if q_norm is not None and k_norm is not None else (None, None)
        table = view.block_table
        rows = view.seq_lens.shape[0]
        grid = grid_of(rows, shape, table.shape[1] * keys.shape[1], self._processors)
        block = block_of(rows, shape, self._processors)
        cluster = self._pdl and grid.splits > 1
        numbers = macros(
            shape, keys.shape[1], table.shape[1], norms[0] is not None, block, grid.splits, cluster
        )
        kernel = self._kernel(numbers)
        if kernel is None:
            return False
        pointers = (
            qkv, view.positions, view.slots, rope, *norms, keys, values,
            table, view.rows, view.seq_lens, workspace, semaphores, out,
        )  # fmt: skip
        POINTERS[kernel.handle] = len(pointers)
        params = pack(
            pointers, eps, shape.scale, rows, grid.primary, keys.shape[0], rope.shape[0], table.shape[0]
        )
        kernel.launch(params, grid=grid.primary + grid.helpers)
        return True

    def _kernel(self, macros: dict[str, int]) -> Kernel | None:
        found = self._kernels.get(tuple(macros.items()))
        if found is None:
            try:
                found = build(
                    SOURCE, "attention", macros, device=self._device, block=macros["WARPS"] * 32, grid=1,
                    shared_bytes=shared_bytes(macros), pdl=self._pdl,
                    cluster=macros["SPLITS"] if macros["CLUSTER"] else 1,
                )  # fmt: skip
            except KernelError as error:
                logger.warning(
                    "decode attention goes through Triton, its kernel cannot be built: %s", str(error)
                )
                self._broken = True
                return None
            self._kernels[tuple(macros.items())] = found
        return found


def macros(
    shape: AttentionShape, block_size: int, table_width: int, norm: bool, block: Block, splits: int, cluster: bool
) -> dict[str, int]:  # fmt: skip
    """What is compiled in; `cluster`: the GPU has clusters, and blocks of a row's splits are one."""
    return {
        "HD": shape.head_dim, "GROUP": shape.heads // shape.kv_heads, "KVH": shape.kv_heads,
        "BLOCK_SIZE": block_size, "WINDOW": shape.sliding_window or 0, "TABLE_WIDTH": table_width,
        "NORM": int(norm), "CHUNK": block.step, "LONG": LONG, "MOST": MOST, "WARPS": block.warps,
        "TILES": block.tiles, "PIECES": block.pieces, "SPLITS": splits, "CLUSTER": int(cluster),
        "BLOCKS": block.resident,
    }  # fmt: skip


def shared_bytes(macros: dict[str, int]) -> int:
    """Of a block: `struct Shared`."""
    dim, group, warps = macros["HD"], macros["GROUP"], macros["WARPS"]
    size = warps * macros["PIECES"] * macros["TILES"] * STEP * dim * 2
    norms = warps if macros["NORM"] else 1
    size += (warps + norms + 1) * dim * 4  # angles, norms, the new token
    size += warps * 64 + 8
    size += (macros["SPLITS"] if macros["CLUSTER"] else 1) * group * (dim + 2) * 4
    return _up(size, 128)


def pack(
    pointers: tuple[torch.Tensor | None, ...],
    eps: float,
    scale: float,
    rows: int,
    primary: int,
    blocks: int,
    angles: int,
    table_rows: int,
) -> bytes:
    """`struct Params`; the softmax is in powers of two."""
    numbers = (eps, scale * LOG2_E, rows, primary, blocks, angles, table_rows)
    return addresses(pointers) + struct.pack("<ffiiiii4x", *numbers)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
