"""Products with FP8 weights, for every number of rows: x @ weight.T * scale + bias.

Weights are widened to the activations' type in registers, in a handful of packed integer
instructions: on sm_90 the conversion that Triton would choose ends in one F2F instruction for each
weight, on a pipe with few lanes. Up to 32 rows warps share out the columns of a tile and multiply
with `mma`; above, Hopper's warp-group products take over. Configurations follow from shapes alone.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton import cdiv

from .. import Linear
from .pointwise import enter


@dataclass(frozen=True)
class Config:
    """Sizes of a tile, and how it is computed."""

    rows: int
    columns: int
    """Outputs"""
    depth: int
    """Inputs at a time"""
    warps: int
    stages: int


ENOUGH = 96
"""Tiles that are worth a smaller tile: most of the multiprocessors of a large GPU."""


@lru_cache
def config(rows: int, columns: int, depth: int, dtype: torch.dtype) -> Config:
    """The configuration for x [rows, depth] and a weight [columns, depth].

    The widest tile that still gives `ENOUGH` of them. Narrow ones are deeper, so that about as many
    bytes are on their way; and where 128 rows a tile give too few of any width, a tile has 64.
    """
    if dtype is torch.float32:  # no tensor cores: exact, and not meant to be fast
        return Config(16, 64, 32, 4, 2)
    tile = next((size for size in (16, 32, 64) if rows <= size), 128)
    if tile == 128 and cdiv(rows, 128) * cdiv(columns, 64) < ENOUGH:
        tile = 64
    widths = {16: (64, 32, 16), 32: (64, 32), 64: (128, 64, 32), 128: (128, 64)}[tile]
    down = cdiv(rows, tile)
    width = next((w for w in widths if down * cdiv(columns, w) >= ENOUGH), widths[-1])
    if tile <= 32:
        deep, warps, stages = 256 if width < 64 else 128, max(2, width // 16), 5
    else:
        deep, warps, stages = 128 if tile == 64 and width < 128 else 64, 8 if tile * width > 8192 else 4, 4
    return Config(tile, width, min(deep, max(32, triton.next_power_of_2(depth))), warps, stages)


def matmul_scaled(
    x: torch.Tensor, linear: Linear, out: torch.Tensor, *, add: bool = False, pdl: bool = False
) -> None:
    """out = linear(x), or out += linear(x) with `add`; sums in float32, rounded once.

    Args:
        x: [T, in] bfloat16, float16 or float32.
        linear: E4M3 weights with a scale, all finite.
        out: [T, out] of any floating point type.
        add: onto what `out` holds.
        pdl: launch dependently.
    """
    (rows, depth), columns = x.shape, linear.out_features
    c = config(rows, columns, depth, x.dtype)
    grid = (cdiv(rows, c.rows), cdiv(columns, c.columns))
    _matmul_scaled[grid](
        x, linear.weight.view(torch.uint8), linear.scale,
        linear.scale if linear.bias is None else linear.bias, out, rows, columns,
        DEPTH=depth, BIAS=linear.bias is not None, ADD=add,
        PACKED=COMPILED and x.dtype is not torch.float32,
        BLOCK_M=c.rows, BLOCK_N=c.columns, BLOCK_K=c.depth, num_warps=c.warps, num_stages=c.stages,
        PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_scaled(
    x, weight, scale, bias, out, num_rows, columns,
    DEPTH: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, columns) / BLOCK; blocks that share weights are neighbours."""
    enter(PDL)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    real = (m < num_rows)[:, None]
    used = (n < columns)[:, None]
    a_at = x + m.to(tl.int64)[:, None] * DEPTH + k[None, :]
    w_at = weight + n.to(tl.int64)[:, None] * DEPTH + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(a_at, mask=real, other=0.0)
            w = tl.load(w_at, mask=used, other=0)
        else:
            inside = (start + k < DEPTH)[None, :]
            a = tl.load(a_at, mask=real & inside, other=0.0)
            w = tl.load(w_at, mask=used & inside, other=0)
        total = tl.dot(a, tl.trans(widen(w, a.dtype, PACKED)), total, input_precision="ieee")
        a_at += BLOCK_K
        w_at += BLOCK_K
    total *= tl.load(scale + n, mask=n < columns, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * columns + n[None, :]
    inside = real & (n < columns)[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


COMPILED = isinstance(_matmul_scaled, triton.JITFunction)
"""Triton's interpreter knows no assembly."""

_ASSEMBLY = """{
.reg .b32 a, b, factor, zero;
mov.b32 factor, FACTOR;
mov.b32 zero, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 $0, a, SHIFT;
shr.b32 $1, b, SHIFT;
and.b32 a, a, 0x80008000;
and.b32 b, b, 0x80008000;
lop3.b32 $0, $0, MASK, a, 0xea;
lop3.b32 $1, $1, MASK, b, 0xea;
fma.rn.TYPE $0, $0, factor, zero;
fma.rn.TYPE $1, $1, factor, zero;
}"""
"""Four E4M3 bytes to four 16-bit floats: each byte becomes the upper half of a word, its exponent and
mantissa move to where the wider type has them, and one exact product corrects the exponent's bias."""


def _assembly(kind: str, shift: int, mask: int, factor: int) -> tl.constexpr:
    words = {"TYPE": kind, "SHIFT": str(shift), "MASK": f"{mask:#010x}", "FACTOR": f"{factor:#010x}"}
    text = _ASSEMBLY
    for name, value in words.items():
        text = text.replace(name, value)
    return tl.constexpr(text)


_TO_BFLOAT16 = _assembly("bf16x2", 4, 0x07F007F0, 0x7B807B80)  # times 2^120
_TO_FLOAT16 = _assembly("f16x2", 1, 0x3F803F80, 0x5C005C00)  # times 2^8


@triton.jit
def widen(w, dtype: tl.constexpr, PACKED: tl.constexpr):
    """Finite E4M3 numbers, given as bytes, in a wider type; exact. PACKED: a GPU's 16-bit type."""
    if not PACKED:
        bits = w.to(tl.uint32)
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        wide = (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)  # times 2^120
    elif dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(_TO_BFLOAT16, "=&r,=&r,r", [w], tl.bfloat16, True, 4)
    else:
        wide = tl.inline_asm_elementwise(_TO_FLOAT16, "=&r,=&r,r", [w], tl.float16, True, 4)
    return wide
