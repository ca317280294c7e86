"""Products of small steps on Hopper: `linear.cu`, its tiles, and how it is launched."""

from __future__ import annotations

import logging
import os
import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import KernelError
from .. import Linear, NextNorm, Peaks
from .program import POINTERS, Kernel, addresses, build

if TYPE_CHECKING:
    from ..triton.tune import Version

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("linear.cu")
ROWS = (8, 16, 32, 64, 128)
"""Of x in a tile."""
SHARED_BYTES = 111 << 10
"""Two blocks on a multiprocessor: the next product fills its ring while this one works."""
FLIGHT_BYTES = 48 << 10
"""Of weights, under way to a multiprocessor; of the head's, which nothing waits behind, twice as many."""
LEAD_BYTES = 64 << 10
"""Of a block's weights, not yet asked for, when a product that adds launches its successor."""
TOGETHER = (32, 64)
"""Rows of x with which all blocks begin at the same inner index: measured, docs/log.md."""
AT_ONCE = 1 << 20
"""LEAD of a product whose successor is launched as early as can be."""


class Product(IntEnum):
    """What becomes of the product, as `linear.cu` numbers it."""

    STORE = 0
    ADD = 1
    GATE = 2
    WIDE = 3
    BEST = 4


HEADS = (Product.WIDE, Product.BEST)


@dataclass(frozen=True)
class Tile:
    """How a product is cut."""

    rows: int
    """Of x, at most: 8, 16, 32, 64 or 128"""
    groups: int
    """Warp groups of a block, with 64 rows of weights each"""
    splits: int
    """Blocks of a cluster that share the inner dimension"""
    share: int
    """Blocks of a cluster, with neighbouring tiles, that read x once"""
    depth: int
    """Inner indices of a stage, a multiple of 64, of 128 with FP8 weights"""
    stages: int
    """Of weights"""
    x_stages: int
    x_depth: int
    """Inner indices of one of them"""
    lag: int
    """Stages of x that a warp asks for before the first is there; 0: they are tensor copies"""
    parts_bytes: int
    """Of shared memory for parts of sums"""
    blocks: int
    """On a multiprocessor"""
    fp8: bool = False
    """Weights are bytes."""

    @property
    def threads(self) -> int:
        return self.groups * 128 + (96 if self.rows < 64 else 128)

    @property
    def weight_bytes(self) -> int:
        """Of a stage"""
        return self.depth * (1 if self.fp8 else 2) * self.groups * 64

    @property
    def shared_bytes(self) -> int:
        x_bytes = self.x_stages * self.x_depth * 2 * self.rows
        return self.stages * self.weight_bytes + x_bytes + self.parts_bytes + 1024


@cache
def _tile(kind: Product, rows: int, version: Version, fp8: bool = False) -> Tile:
    """Raises: KernelError: it does not fit."""
    found = tile_of(kind, rows, version.columns // 64, version.splits, version.share, version.depth, fp8)
    if found is None:
        raise KernelError(f"{version} does not fit into shared memory for {rows} rows")
    return found


def tile_of(
    kind: Product, rows: int, groups: int, splits: int, share: int, depth: int, fp8: bool = False
) -> Tile | None:
    """The tile with as many stages as fit; None where two do not."""
    gathered = kind in (Product.STORE, Product.ADD)
    if rows % splits or (splits > 1 and not gathered):
        return None
    # The head, and gate and up, have tiles for a whole multiprocessor, and take it.
    blocks = 1 if gathered or groups > 2 or (groups > 1 and (kind is Product.GATE or rows > 64)) else 2
    shared = SHARED_BYTES if gathered else 2 * SHARED_BYTES // blocks
    own = rows // splits  # tokens that a block finishes: eight or more as their threads hold them
    parts = (splits - 1) * own * groups * 256 if own % 8 == 0 else splits * max(2, own) * groups * 72 * 4
    parts = parts if gathered else 0
    tall = not gathered and blocks == 1 and rows <= 64
    x_stages = 5 if tall else {8: 4, 16: 4, 32: 3, 64: 5 if gathered else 3, 128: 3 if gathered else 4}[rows]
    x_depth = depth
    if fp8:
        # Weights of as many bytes have twice the inner indices: so has x, in smaller pieces.
        x_depth, x_stages = (
            64 if rows >= 64 else 128,
            {
                8: 5,
                16: 5,
                32: 4,
                64: 6 if groups == 1 else 4,
                128: 3 if gathered else 4 if groups == 1 else 6,
            }[rows],
        )
    share = min(share, rows // 8)
    lag = 2 if rows == 32 and share == 1 and kind not in HEADS else 0
    tile = Tile(rows, groups, splits, share, depth, 0, x_stages, x_depth, lag, parts, blocks, fp8)
    stages = min(16, (shared - 1024 - tile.shared_bytes) // tile.weight_bytes)
    return replace(tile, stages=stages) if stages >= 2 else None


SIMPLE = Tile(8, 1, 1, 1, 64, 2, 2, 64, 0, 0, 1)


class Products:
    """Launches `linear.cu`; holds its kernels and the tensor maps of what it has multiplied."""

    @classmethod
    def on(cls, device: torch.device) -> Products | None:
        """None where the GPU, or what compiles for it, cannot do it."""
        if torch.cuda.get_device_capability(device)[0] != 9 or os.environ.get("OSTINATO_TILES") == "0":
            return None
        made = cls(device)
        try:
            made._kernel(Product.STORE, SIMPLE, 64, 1)
        except KernelError as error:
            logger.warning("products of small steps are left to other kernels: %s", str(error))
            return None
        return made

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernels: dict[tuple[Product, Tile, int, int], Kernel] = {}
        self._maps = Maps()

    def run(
        self,
        kind: Product,
        version: Version,
        x: torch.Tensor,
        linear: Linear,
        out: torch.Tensor | None,
        *,
        squares: torch.Tensor | None = None,
        sums: int | None = None,
        eps: float = 0.0,
        then: NextNorm | None = None,
        peaks: Peaks | None = None,
    ) -> None:
        """out = x W^T, or out += x W^T, or silu(gate) * up, or the best of x W^T.

        Args:
            kind: what becomes of it.
            version: how it is cut, for at least `len(x)` rows.
            x: [rows, k] bfloat16.
            linear: weights [n, k], for GATE [2 n, k], bfloat16, or finite E4M3 with a scale, where k is a multiple of 16; bias for
                STORE and ADD only.
            out: [rows, n] bfloat16; float32 for WIDE; None for BEST.
            squares: [sums, rows] of a norm whose weight x already has; None: x is as it is.
            sums: k / 64 where nothing is said.
            eps: of that norm.
            then: ADD: what the next norm needs.
            peaks: BEST, and WIDE where somebody asks: of `blocks` parts of each row.

        Raises:
            KernelError: it does not fit, or does not compile.
        """
        (rows, k), weight, fp8 = x.shape, linear.weight, linear.scale is not None
        n = linear.out_features // (2 if kind is Product.GATE else 1)
        tile = _tile(kind, next(size for size in ROWS if rows <= size), version, fp8)
        lines, tiles, grid = self._cut(kind, tile, n)
        chunks = -(-k // tile.depth)
        if chunks < tile.splits:
            raise KernelError(f"{version}: {k} inputs are too few to be shared by {tile.splits} blocks")
        kernel = self._kernel(kind, tile, lines, chunks // tile.splits)
        pointers = (
            weight,
            x,
            out,
            linear.bias,
            squares,
            *((then.weight, then.scaled, then.squares) if then else (None,) * 3),
            *((peaks.values, peaks.tokens) if peaks else (None,) * 2),
            *((linear.scale,) if fp8 else ()),
        )
        params = addresses(pointers) + struct.pack(
            "<5ifi", rows, n, k, tiles, chunks, eps, k // 64 if sums is None else sums
        )
        params += bytes(-len(params) % 64)
        if kind is Product.GATE:
            params += self._maps.pairs(weight, lines)
        else:
            params += self._maps.rows(weight, lines)
        params += self._maps.rows(x, tile.rows // tile.share)
        kernel.launch(params, grid)

    def blocks(self, version: Version, rows: int, linear: Linear) -> int:
        """Parts of a row of the head's outputs in the two kinds for it."""
        fp8 = linear.scale is not None
        tile = _tile(Product.BEST, next(size for size in ROWS if rows <= size), version, fp8)
        return self._cut(Product.BEST, tile, linear.out_features)[2]

    def _cut(self, kind: Product, tile: Tile, n: int) -> tuple[int, int, int]:
        """Rows of weights in a tile, tiles, and blocks, for n outputs."""
        lines = 64 * tile.groups
        most = self._processors * tile.blocks // tile.share * tile.share  # blocks that run at once
        if kind in HEADS and n > lines * most:
            # Lower tiles, so that all blocks have the same number of them: a last round of a few takes as long as any.
            lines = -(-n // (-(-n // (lines * most)) * most))
        tiles = -(-n // (lines // 2 if kind is Product.GATE else lines))
        grid = -(-tiles // tile.share) * tile.share
        if kind is Product.GATE or kind in HEADS:  # a block goes from tile to tile
            grid = min(grid, most)
        return lines, tiles, grid * tile.splits

    def _kernel(self, kind: Product, tile: Tile, lines: int, stages: int) -> Kernel:
        """`stages`: of a block's tile."""
        # A product that adds leaves the memory to itself for a while; others launch their successor at once.
        lead = (
            max(4, min(LEAD_BYTES // tile.weight_bytes, stages * 3 // 4)) if kind is Product.ADD else AT_ONCE
        )
        found = self._kernels.get((kind, tile, lines, lead))
        if found is None:
            tall_gate = kind is Product.GATE and tile.blocks == 1 and tile.rows == 64
            flight = FLIGHT_BYTES * (2 if kind in HEADS else 4 / 3 if tall_gate else 1)
            pace = 300 if tall_gate else 800 if kind is Product.GATE and tile.depth > 64 else 600
            under_way = round(flight / tile.blocks / tile.weight_bytes)
            macros = {
                "KIND": int(kind), "TOK": tile.rows, "MW": tile.groups, "SPLIT": tile.splits, "SHARE": tile.share,
                "LINES": lines, "FP8": int(tile.fp8), "KA": tile.depth // 64, "XA": tile.x_depth // 64, "STAGES": tile.stages, "X_STAGES": tile.x_stages, "LAG": tile.lag,
                "FLIGHT": max(1, min(under_way, tile.stages - 1)), "LEAD": lead, "PACE": pace,
                "ROTATE": int(tile.rows not in TOGETHER),
            }  # fmt: skip
            found = self._kernels[kind, tile, lines, lead] = build(
                SOURCE, "linear", macros, device=self._device, grid=1, block=tile.threads,
                shared_bytes=tile.shared_bytes, cluster=tile.splits * tile.share,
            )  # fmt: skip
            POINTERS[found.handle] = 11 if tile.fp8 else 10
        return found


class Maps:
    """Tensor maps of matrices of bfloat16 or bytes, swizzled by 128 bytes, which is how wide boxes are."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], bytes] = {}

    def rows(self, t: torch.Tensor, box: int) -> bytes:
        """Of t [n, k]: boxes of so many rows."""
        (n, k), size = t.shape, t.itemsize
        return self._map(t, (k, n), (size * k,), (128 // size, box))

    def pairs(self, t: torch.Tensor, box: int) -> bytes:
        """Of gate and up, t [2 n, k]: boxes of so many rows, eight gates and eight ups in turn."""
        n, row, size = t.shape[0] // 2, t.shape[1] * t.itemsize, t.itemsize
        return self._map(
            t, (t.shape[1], 8, 2, n // 8), (row, row * n, 8 * row), (128 // size, 8, 2, box // 16)
        )

    def _map(
        self, t: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
    ) -> bytes:
        """`strides` in bytes, of all dimensions but the first."""
        key = (t.data_ptr(), *sizes, *strides, *box)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = _encode(t.data_ptr(), sizes, strides, box)
        return found


def _encode(address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    from cuda.bindings import driver

    from .program import _check

    types = driver.CUtensorMapDataType
    made = _check(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if box[0] == 64 else types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "tensor map",
    )
    return struct.pack("<16Q", *(int(word) for word in made.opaque))
