"""`OpSet` for NVIDIA GPUs: Triton kernels around cuBLAS.

Nothing here allocates, synchronises or looks at device data: results and intermediates go to
tensors that the caller passes, grids follow from padded shapes, kernel configurations from the
model's constants. The same code runs eagerly and under capture.

All tensors have contiguous rows; an activation's leading dimension is the padded T or S.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from triton import cdiv, next_power_of_2

from ...inputs import FLAG_PENALTIES, Batch, StaticInputs, StepState
from ...types import SamplerVariant
from .. import AttentionShape, Linear, Scratch, Stack, StepView
from ..cuda.fused import MOST_TOKENS, FusedDecode, unsupported
from . import attention, pointwise
from .matmul import matmul_scaled

SPLITS = 16
"""Most chunks that a decode row's context is cut into."""
MIN_CHUNK = 64
"""Fewest tokens in a chunk; a longer one is a multiple of it."""
ROWS_BLOCK = 128
ADVANCE_BLOCK = 16
COLUMNS_BLOCK = 1024
HEAD_TILE = (16, 64, 64)


@dataclass(frozen=True)
class Tiles:
    """Sizes of the attention kernels' tiles; they follow from the model's shape and dtype alone."""

    group: int
    """Query heads of a KV head, padded to a power of two."""
    decode_group: int
    """The same, at least the 16 rows of a tensor-core tile."""
    dim: int
    """Head dimension, padded to a power of two of at least 16."""
    half: int
    """Half the head dimension, padded to a power of two."""
    queries: int
    """Tokens in a tile of `attention.varlen`."""
    rows: int
    """Rows in that tile: `queries * group`."""
    keys: int
    """Cached tokens at a time."""
    warps: int
    """Of `attention.varlen`."""


@lru_cache
def tiles(shape: AttentionShape, dtype: torch.dtype) -> Tiles:
    """Tiles for a model."""
    group = next_power_of_2(shape.heads // shape.kv_heads)
    dim = max(16, next_power_of_2(shape.head_dim))
    rows = max(64, group)
    return Tiles(
        group=group,
        decode_group=max(16, group),
        dim=dim,
        half=next_power_of_2(shape.head_dim // 2),
        queries=rows // group,
        rows=rows,
        # 16 KiB of keys, and of values, so that two stages fit into shared memory.
        keys=min(64, max(16, 16384 // (dim * dtype.itemsize))),
        warps=4 if dim <= 128 else 8,
    )


class TritonOps:
    """`OpSet` for NVIDIA GPUs; on CPU tensors it runs in Triton's interpreter."""

    name = "triton"

    def __init__(self) -> None:
        self._fused = FusedDecode(torch.device("cuda")) if _has_fused() else None
        self._wide_mm = torch.cuda.is_available() and _mm_widens()

    def attention_words(self, shape: AttentionShape, max_seqs: int) -> int:
        return max_seqs * shape.heads * SPLITS * (shape.head_dim + 2)

    def sampler_words(self, max_seqs: int, vocab_size: int) -> int:
        from .sampling import scratch_words

        return scratch_words(max_seqs, vocab_size)

    def prepare(self, batch: Batch, scratch: Scratch) -> StepView:
        static, state = batch.static, batch.state
        table = static.block_table
        if batch.decode:
            pointwise.prepare_decode[(cdiv(batch.num_seqs, ROWS_BLOCK),)](
                batch.rows, static.enabled, state.active, state.last_token, state.position, table,
                scratch.ids, scratch.positions, scratch.slots, scratch.seq_lens, scratch.last_index,
                batch.num_seqs,
                TABLE_WIDTH=table.shape[1], BLOCK_SIZE=batch.block_size, BLOCK=ROWS_BLOCK, num_warps=4,
            )  # fmt: skip
        else:
            pointwise.prepare_mixed[(cdiv(max(batch.num_tokens, batch.num_seqs), ROWS_BLOCK),)](
                batch.rows, batch.query_start, batch.seq_lens,
                batch.tokens, batch.token_positions, batch.token_rows,
                static.enabled, state.active, state.last_token, table,
                scratch.ids, scratch.positions, scratch.slots, scratch.seq_lens, scratch.last_index,
                batch.num_tokens, batch.num_seqs,
                TABLE_WIDTH=table.shape[1], BLOCK_SIZE=batch.block_size, BLOCK=ROWS_BLOCK, num_warps=4,
            )  # fmt: skip
        return StepView(
            ids=scratch.ids,
            positions=scratch.positions,
            slots=scratch.slots,
            seq_lens=scratch.seq_lens,
            last_index=scratch.last_index,
            query_start=batch.query_start,
            rows=batch.rows,
            block_table=table,
            decode=batch.decode,
        )

    def fused(
        self,
        stack: Stack,
        view: StepView,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        scratch: Scratch,
        *,
        greedy: bool,
    ) -> bool:
        if self._fused is None or not view.decode or len(view.rows) > MOST_TOKENS or unsupported(stack):
            return False
        self._fused.run(stack, view, caches, scratch, greedy=greedy)
        return True

    def embed(self, ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
        tokens, width = out.shape
        grid = (tokens, cdiv(width, COLUMNS_BLOCK))
        pointwise.embed[grid](ids, table, out, WIDTH=width, BLOCK=COLUMNS_BLOCK, num_warps=4)

    def norm_linear(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        *,
        normed: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        _rms_norm(x, None, norm, eps, normed)
        if linear.scale is not None:
            matmul_scaled(normed, linear, out)
        elif linear.bias is None:
            torch.mm(normed, linear.weight.t(), out=out)
        else:
            # The bias first and the product onto it: one rounding, as in `addmm`, and no temporary.
            _add_bias(out, linear.bias, add=False)
            out.addmm_(normed, linear.weight.t())

    def rope_paged_attention(
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
        out: torch.Tensor,
    ) -> None:
        tile = tiles(shape, qkv.dtype)
        keys, values = cache
        tokens, seqs = qkv.shape[0], view.seq_lens.shape[0]
        has_norm = q_norm is not None and k_norm is not None
        pointwise.rope_kv_write[(tokens, shape.kv_heads)](
            qkv, view.positions, view.slots, rope,
            q_norm if has_norm else qkv, k_norm if has_norm else qkv,
            keys, values, out, eps,
            HEADS=shape.heads, KV_HEADS=shape.kv_heads, HALF=shape.head_dim // 2, NORM=has_norm,
            GROUP_PAD=tile.group, HALF_PAD=tile.half, num_warps=2,
        )  # fmt: skip
        scale = shape.scale * 1.4426950408889634  # the softmax is in powers of two
        window = shape.sliding_window or 0
        table_width, block_size = view.block_table.shape[1], keys.shape[1]
        if view.decode:
            attention.decode_partial[(seqs, shape.kv_heads, SPLITS)](
                qkv, keys, values, view.block_table, view.rows, view.seq_lens, workspace, scale,
                HEADS=shape.heads, KV_HEADS=shape.kv_heads, DIM=shape.head_dim, WINDOW=window,
                TABLE_WIDTH=table_width, BLOCK_SIZE=block_size, SPLITS=SPLITS, MIN_CHUNK=MIN_CHUNK,
                GROUP_PAD=tile.decode_group, DIM_PAD=tile.dim, BLOCK_N=tile.keys,
                num_warps=4, num_stages=2,
            )  # fmt: skip
            attention.decode_merge[(seqs, shape.heads)](
                view.seq_lens, workspace, out,
                HEADS=shape.heads, DIM=shape.head_dim, WINDOW=window,
                SPLITS=SPLITS, MIN_CHUNK=MIN_CHUNK, DIM_PAD=tile.dim, num_warps=4,
            )  # fmt: skip
        else:
            attention.varlen[(cdiv(tokens, tile.queries) + seqs, shape.kv_heads)](
                qkv, keys, values, view.block_table, view.rows, view.query_start, view.seq_lens, out,
                scale, seqs,
                HEADS=shape.heads, KV_HEADS=shape.kv_heads, DIM=shape.head_dim, WINDOW=window,
                TABLE_WIDTH=table_width, BLOCK_SIZE=block_size,
                GROUP_PAD=tile.group, DIM_PAD=tile.dim, BLOCK_M=tile.rows, BLOCK_N=tile.keys,
                num_warps=tile.warps, num_stages=2,
            )  # fmt: skip

    def linear_add(self, x: torch.Tensor, linear: Linear, *, residual: torch.Tensor) -> None:
        if linear.scale is not None:
            matmul_scaled(x, linear, residual, add=True)
            return
        residual.addmm_(x, linear.weight.t())
        if linear.bias is not None:
            _add_bias(residual, linear.bias, add=True)

    def norm_gate_up(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        *,
        normed: torch.Tensor,
        gate_up: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        _rms_norm(x, None, norm, eps, normed)
        if linear.scale is not None:
            matmul_scaled(normed, linear, gate_up)
        else:
            torch.mm(normed, linear.weight.t(), out=gate_up)
        tokens, width = out.shape
        grid = (tokens, cdiv(width, COLUMNS_BLOCK))
        pointwise.silu_mul[grid](gate_up, out, WIDTH=width, BLOCK=COLUMNS_BLOCK, num_warps=4)

    def norm_head(
        self,
        x: torch.Tensor,
        last_index: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        *,
        last: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """As the protocol says; `last` receives the normed rows."""
        weight = linear.weight
        _rms_norm(x, last_index, norm, eps, last)
        if linear.scale is not None:
            matmul_scaled(last, linear, logits)
        elif logits.dtype == weight.dtype:
            torch.mm(last, weight.t(), out=logits)
        elif self._wide_mm:
            torch.mm(last, weight.t(), out_dtype=logits.dtype, out=logits)
        else:
            (seqs, vocab), (m, n, k) = logits.shape, HEAD_TILE
            pointwise.matmul_float32[(cdiv(seqs, m), cdiv(vocab, n))](
                last, weight, logits, seqs,
                WIDTH=weight.shape[1], COLUMNS=vocab, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k,
                num_warps=4, num_stages=3,
            )  # fmt: skip

    def sample(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        inputs: StaticInputs,
        state: StepState,
        *,
        variant: SamplerVariant,
        workspace: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        from .sampling import sample

        sample(logits, rows, positions, inputs, state, variant=variant, out=out, scratch=workspace)

    def advance(self, batch: Batch, view: StepView, tokens: torch.Tensor) -> None:
        static, state = batch.static, batch.state
        pointwise.advance[(cdiv(batch.num_seqs, ADVANCE_BLOCK),)](
            batch.rows, view.seq_lens, batch.samples, tokens,
            state.emitted, state.last_token, state.position, state.active, state.output_counts,
            static.stop_ids, static.num_stop_ids, static.min_position, static.last_position, static.flags,
            batch.num_seqs,
            DECODE=batch.decode, VOCAB=state.output_counts.shape[1], STOP_IDS=static.stop_ids.shape[1],
            COUNT_FLAG=FLAG_PENALTIES, BLOCK=ADVANCE_BLOCK, num_warps=4,
        )  # fmt: skip


def _has_fused() -> bool:
    """Whether the one-kernel decode step runs here: Hopper's bulk copies, and NVRTC to compile it."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    return importlib.util.find_spec("cuda.bindings") is not None


def _mm_widens() -> bool:
    """Whether `torch.mm` multiplies bfloat16 into float32 without a temporary."""
    x = torch.ones(8, 8, dtype=torch.bfloat16, device="cuda")
    out = torch.zeros(8, 8, device="cuda")
    try:
        torch.mm(x, x, out_dtype=torch.float32, out=out)
    except (TypeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
    return True


def _rms_norm(
    x: torch.Tensor, index: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    """out[r] = rms_norm(x[r]), or of x[index[r]]; x [T, hidden], out [rows, hidden]."""
    rows, width = out.shape
    block = next_power_of_2(width)
    pointwise.rms_norm[(rows,)](
        x, x if index is None else index, weight, out, eps,
        WIDTH=width, GATHER=index is not None, BLOCK=block,
        num_warps=4 if block <= 1024 else 8 if block <= 4096 else 16,
    )  # fmt: skip


def _add_bias(out: torch.Tensor, bias: torch.Tensor, *, add: bool) -> None:
    """out = bias, or out += bias; out [T, n], bias [n]."""
    tokens, width = out.shape
    grid = (tokens, cdiv(width, COLUMNS_BLOCK))
    pointwise.add_bias[grid](out, bias, WIDTH=width, ADD=add, BLOCK=COLUMNS_BLOCK, num_warps=4)
