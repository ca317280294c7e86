"""Every op in plain torch: the definition of correct, and the CPU implementation.

Written for a CPU where that costs nothing: batched where shapes allow it, masked values
selected away rather than multiplied by zero (0 times NaN is NaN). It reads device values on
the host (`tolist`), so it cannot be captured; on a GPU it serves tests only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .. import sampling
from ..inputs import FLAG_PENALTIES, POST_CYCLE, Batch, StaticInputs, StepState
from ..types import SamplerVariant
from . import AttentionShape, Linear, NextNorm, Peaks, Scratch, Stack, StepView, VersionLine


@dataclass(frozen=True)
class ReferenceView(StepView):
    """The view plus the host-side plan that attention over all layers shares."""

    all_live: bool
    live: torch.Tensor
    """[n] int64 indices of live tokens"""
    live_slots: torch.Tensor
    """[n] int64 their slots"""
    singles: torch.Tensor
    """[m] int64 token indices of live sequences that compute one token"""
    singles_cache: torch.Tensor
    """[m * longest] int64 slots of their contexts; past a row's end its first slot repeats"""
    singles_mask: torch.Tensor | None
    """[m, 1, 1, longest] bool, or None where all contexts are equally long"""
    chunks: tuple[tuple[int, int, int, torch.Tensor], ...]
    """(first token, end, context length, slots [context]) of the other live sequences"""
    angles: dict[int, torch.Tensor] = field(default_factory=dict)
    """Rows of the rope table at the step's positions, looked up by the first layer for all"""


class ReferenceOps:
    """`OpSet` in plain torch."""

    name = "torch"

    def load(self, stack: Stack, block_size: int, table_width: int, max_seqs: int) -> None:
        pass

    def tune(self, stack: Stack, max_rows: int) -> None:
        pass

    def versions(self, stack: Stack, rows: int, *, decode: bool) -> list[VersionLine]:
        return [VersionLine("every op", "", "plain torch, the reference")]

    def reset(self) -> None:
        pass

    def workspaces(self) -> dict[str, torch.Tensor]:
        return {}

    def attention_words(self, shape: AttentionShape, max_seqs: int) -> int:
        return 0

    def sampler_words(self, max_seqs: int, vocab_size: int) -> int:
        return 0

    def prepare(self, batch: Batch, scratch: Scratch, stack: Stack | None = None) -> ReferenceView:
        static, state = batch.static, batch.state
        (number,) = state.number.tolist()
        if number:
            state.number.fill_(number % ((len(state.posted) - 1) * POST_CYCLE) + 1)
        rows = batch.rows.clamp(min=0).long()
        awake = (state.active[rows] != 0) & (static.enabled[rows] != 0) & (batch.rows >= 0)  # [S]
        block_size = batch.block_size
        if batch.decode:
            live = awake
            ids, positions = state.last_token[rows], state.position[rows]
            seq_lens = torch.where(awake, positions + 1, 0)
            token_rows = rows
            scratch.last_index.copy_(torch.arange(batch.num_seqs))
        else:
            token_rows = batch.token_rows.clamp(min=0).long()
            from_state = batch.tokens < 0
            row_awake = (state.active[token_rows] != 0) & (static.enabled[token_rows] != 0)
            live = (batch.token_rows >= 0) & (~from_state | row_awake)
            ids = torch.where(from_state, state.last_token[token_rows], batch.tokens)
            positions = batch.token_positions
            last = (batch.query_start[1:] - 1).clamp(min=0).long()
            seq_lens = torch.where((batch.rows >= 0) & live[last], batch.seq_lens, 0)
            scratch.last_index.copy_(torch.where(seq_lens > 0, last, 0))
        zero = torch.zeros((), dtype=torch.int32, device=ids.device)
        positions = torch.where(live, positions, zero)
        block = static.block_table[token_rows, (positions // block_size).long()]
        scratch.ids.copy_(torch.where(live, ids, zero))
        scratch.positions.copy_(positions)
        scratch.slots.copy_(torch.where(live, block * block_size + positions % block_size, -1))
        scratch.seq_lens.copy_(seq_lens)
        return self._plan(batch, scratch)

    def _plan(self, batch: Batch, scratch: Scratch) -> ReferenceView:
        lens = scratch.seq_lens.tolist()
        starts = batch.query_start.tolist()
        rows = batch.rows.tolist()
        block_size = batch.block_size
        singles = [s for s, n in enumerate(lens) if n > 0 and starts[s + 1] - starts[s] == 1]
        longest = max((lens[s] for s in singles), default=0)
        table = batch.static.block_table
        offsets = torch.arange(block_size, device=table.device)

        def context(row: torch.Tensor, length: int) -> torch.Tensor:
            blocks = table[row, : (length + block_size - 1) // block_size].long()
            return (blocks.unsqueeze(-1) * block_size + offsets).flatten(-2)[..., :length]

        index = torch.tensor([rows[s] for s in singles], dtype=torch.long, device=table.device)
        cache = context(index, longest)
        mask = None
        if singles and min(lens[s] for s in singles) != longest:
            length = torch.tensor([lens[s] for s in singles], device=table.device).unsqueeze(1)
            inside = torch.arange(longest, device=table.device) < length
            cache = torch.where(inside, cache, cache[:, :1])
            mask = inside[:, None, None, :]
        live = (scratch.slots >= 0).nonzero().squeeze(1)
        return ReferenceView(
            ids=scratch.ids,
            positions=scratch.positions,
            slots=scratch.slots,
            seq_lens=scratch.seq_lens,
            last_index=scratch.last_index,
            query_start=batch.query_start,
            rows=batch.rows,
            block_table=table,
            decode=batch.decode,
            all_live=live.numel() == scratch.slots.numel(),
            live=live,
            live_slots=scratch.slots[live].long(),
            singles=torch.tensor([starts[s] for s in singles], dtype=torch.long, device=table.device),
            singles_cache=cache.flatten(),
            singles_mask=mask,
            chunks=tuple(
                (starts[s], starts[s + 1], n, context(torch.tensor(rows[s], device=table.device), n))
                for s, n in enumerate(lens)
                if n > 0 and starts[s + 1] - starts[s] > 1
            ),
        )

    def fuses(self, stack: Stack, seqs: int) -> bool:
        return False

    def fused(
        self,
        stack: Stack,
        view: StepView,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        scratch: Scratch,
        *,
        greedy: bool,
    ) -> Peaks | None:
        raise NotImplementedError("no step is fused in plain torch")

    def embed(
        self, ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor, then: NextNorm | None = None
    ) -> None:
        torch.index_select(table, 0, ids, out=out)

    def norm_linear(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        *,
        normed: torch.Tensor,
        out: torch.Tensor,
        begun: NextNorm | None = None,
    ) -> None:
        apply(rms_norm(x, norm, eps), linear, out)

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
        assert isinstance(view, ReferenceView)
        tokens = qkv.shape[0]
        heads = qkv.view(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        angles = view.angles.get(id(rope))
        if angles is None:  # [T, 2, 1, head_dim / 2]
            angles = view.angles[id(rope)] = rope[view.positions.long()].unsqueeze(2)
        if q_norm is not None and k_norm is not None:
            q, k = rotate(rms_norm(q, q_norm, eps), angles), rotate(rms_norm(k, k_norm, eps), angles)
        else:  # queries and keys lie side by side: one rotation for both
            both = rotate(heads[:, : shape.heads + shape.kv_heads], angles)
            q, k = both.split([shape.heads, shape.kv_heads], dim=1)
        keys, values = (part.view(-1, shape.kv_heads, shape.head_dim) for part in cache)
        if view.all_live:
            keys.index_copy_(0, view.live_slots, k)
            values.index_copy_(0, view.live_slots, v)
        else:
            keys.index_copy_(0, view.live_slots, k[view.live])
            values.index_copy_(0, view.live_slots, v[view.live])
            out.zero_()
        result = out.view(tokens, shape.heads, shape.head_dim)
        group = shape.heads // shape.kv_heads
        if count := view.singles.numel():
            # The query heads of one KV head stand where SDPA expects query positions.
            own_q = q[view.singles].view(count, shape.kv_heads, group, shape.head_dim)
            past_k, past_v = (
                part.index_select(0, view.singles_cache)
                .view(count, -1, shape.kv_heads, shape.head_dim)
                .transpose(1, 2)
                for part in (keys, values)
            )
            mask = view.singles_mask
            if shape.sliding_window is not None and past_k.shape[2] > shape.sliding_window:
                oldest = view.positions[view.singles].view(count, 1, 1, 1) - shape.sliding_window
                near = torch.arange(past_k.shape[2], device=qkv.device) > oldest
                mask = near if mask is None else mask & near
            attended = F.scaled_dot_product_attention(
                own_q, past_k, past_v, attn_mask=mask, scale=shape.scale
            )
            result[view.singles] = attended.reshape(count, shape.heads, shape.head_dim)
        for start, end, length, slots in view.chunks:
            own_q = q[start:end].transpose(0, 1).unsqueeze(0)
            past_k, past_v = (
                part.index_select(0, slots).transpose(0, 1).repeat_interleave(group, 0).unsqueeze(0)
                for part in (keys, values)
            )
            fresh = length == end - start
            if fresh and shape.sliding_window is None:
                attended = F.scaled_dot_product_attention(
                    own_q, past_k, past_v, is_causal=True, scale=shape.scale
                )
            else:
                query = torch.arange(length - (end - start), length, device=qkv.device).unsqueeze(1)
                key = torch.arange(length, device=qkv.device)
                mask = key <= query
                if shape.sliding_window is not None:
                    mask &= key > query - shape.sliding_window
                attended = F.scaled_dot_product_attention(
                    own_q, past_k, past_v, attn_mask=mask, scale=shape.scale
                )
            result[start:end] = attended[0].transpose(0, 1)

    def attend(self, *args: object) -> bool:
        return False

    def linear_add(
        self, x: torch.Tensor, linear: Linear, *, residual: torch.Tensor, then: NextNorm | None = None
    ) -> None:
        residual.add_(linear_product(x, linear))
        if linear.bias is not None:
            residual.add_(linear.bias)

    def chain(self, stack: Stack, index: int, scratch: Scratch) -> None:
        pass

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
        begun: NextNorm | None = None,
    ) -> None:
        gate, up = linear_product(rms_norm(x, norm, eps), linear).chunk(2, dim=-1)
        out.copy_(F.silu(gate).mul_(up))

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
        begun: NextNorm | None = None,
        workspace: torch.Tensor | None = None,
    ) -> None:
        torch.index_select(x, 0, last_index, out=last)
        apply(rms_norm(last, norm, eps), linear, logits)

    def picks(self, linear: Linear, seqs: int, dtype: torch.dtype) -> bool:
        return False

    def best_token(
        self,
        x: torch.Tensor,
        last_index: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        *,
        rows: torch.Tensor,
        last: torch.Tensor,
        workspace: torch.Tensor,
        out: torch.Tensor,
        begun: NextNorm | None = None,
    ) -> Peaks | None:
        logits = torch.empty((len(rows), linear.out_features), device=x.device)
        self.norm_head(x, last_index, norm, eps, linear, last=last, logits=logits)
        best = logits.masked_fill_(logits.isnan(), -torch.inf).argmax(1)
        out.copy_(torch.where(rows >= 0, best, 0))
        return None

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
        largest: torch.Tensor | None = None,
    ) -> None:
        sampling.sample(logits, rows, positions, inputs, state, variant=variant, out=out)

    def advance(self, batch: Batch, view: StepView, tokens: torch.Tensor, peaks: Peaks | None = None) -> None:
        static, state = batch.static, batch.state
        if peaks is not None:
            pick(peaks, batch.rows, tokens)
        samples = torch.ones_like(view.seq_lens) if batch.decode else batch.samples
        live = (view.seq_lens > 0) & (samples != 0)
        emitted = state.emitted[: batch.num_seqs].copy_(torch.where(live, tokens, -1))
        (number,) = state.number.tolist()
        place = state.posted[1 + (number - 1) % (len(state.posted) - 1) if number else 0]
        place[0] = number
        place[1 : 1 + batch.num_seqs] = emitted
        columns = live.nonzero().squeeze(1)
        rows, tokens = batch.rows[columns].long(), tokens[columns]
        positions = view.seq_lens[columns]  # the new token stands right after the context
        state.last_token[rows] = tokens
        state.position[rows] = positions
        stop_ids = static.stop_ids[rows]
        counted = torch.arange(stop_ids.shape[1], device=rows.device) < static.num_stop_ids[rows].unsqueeze(1)
        stopped = ((stop_ids == tokens.unsqueeze(1)) & counted).any(1) & (
            positions >= static.min_position[rows]
        )
        state.active[rows] = (~stopped & (positions < static.last_position[rows])).int()
        counts = (static.flags[rows] & FLAG_PENALTIES) != 0
        rows, tokens = rows[counts], tokens[counts].long()
        state.output_counts[rows, tokens] = (
            (state.output_counts[rows, tokens].int() + 1).clamp(max=32767).short()
        )


def pick(peaks: Peaks, rows: torch.Tensor, out: torch.Tensor) -> None:
    """out[s] = the first token among the largest of row s, 0 where rows[s] is -1."""
    assert peaks.tokens is not None
    values = peaks.values.masked_fill(peaks.values.isnan(), -torch.inf)
    largest = values == values.amax(1, keepdim=True)
    first = peaks.tokens.masked_fill(~largest, torch.iinfo(torch.int32).max).amin(1)
    out.copy_(torch.where(rows >= 0, first, 0))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in float32 (Zhang and Sennrich, 2019)."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


_NARROW = 32
"""Up to this many rows the product is computed transposed, see `product`."""


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T; x [rows, in], weight [out, in], result [rows, out], perhaps not contiguous.

    With few rows BLAS streams the weights up to twice as fast when they are its left operand, and
    through its matrix kernel rather than its vector one: so transposed, and one row as two.
    """
    rows = x.shape[0]
    if rows > _NARROW or x.dtype != torch.float32 or x.is_cuda:
        return x @ weight.t()
    if rows == 1:
        x = F.pad(x, (0, 0, 0, 1))
    return (weight @ x.t()).t()[:rows]


_WIDENED = 1 << 19
"""Elements of an FP8 weight that are widened at a time: few enough to stay in the cache."""


def linear_product(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """x @ (weight * scale).T without the bias; x [rows, in], result [rows, out] in x's dtype.

    FP8 weights are multiplied as they are, in float32 or float64, and each output by its scale.
    """
    if linear.scale is None:
        return product(x, linear.weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(x.shape[0], linear.out_features)
    x, step = x.to(wide), max(1, _WIDENED // linear.in_features)
    scales = (linear.scale * _WIDEN_FACTOR).split(step)
    for weight, scale, part in zip(linear.weight.split(step), scales, out.split(step, 1), strict=True):
        part.copy_(product(x, widen(weight, wide)) * scale)
    return out


_WIDEN_FACTOR = 256.0


def widen(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Finite E4M3 numbers over 256, exactly: the bits of one are those of a float16 with another bias.

    Many times faster on a CPU than `weight.to(dtype)`.
    """
    bits = weight.view(torch.int8).to(torch.int16)  # repeats the sign in the upper byte
    bits = bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).to(dtype)


def apply(x: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
    """out = linear(x)."""
    if linear.bias is None:
        out.copy_(linear_product(x, linear))
    else:
        torch.add(linear_product(x, linear), linear.bias, out=out)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., 2021): x [T, heads, d], angles [T, 2, 1, d / 2]."""
    cos, sin = angles[:, 0], angles[:, 1]
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
