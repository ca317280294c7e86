"""Every buffer that a step reads, and the only code that writes them from the host.

`StaticInputs` is written by the host, `StepState` by the step itself (and by the host when a
request joins). Both are views into one int32 tensor, `words`, so that everything that changed
lands with one scatter, which reads it from pinned memory. Floats are stored by their bits.

Not here: weights, the KV cache and the scratch arena, which complete the list of what a
captured graph may read (docs/graph-contract.md, line 1).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .types import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    GraphKey,
    Members,
    Request,
    Route,
    SamplerVariant,
    Schedule,
    ScheduledRow,
    SteadyRows,
    StepKind,
)

if TYPE_CHECKING:
    from .ops.cuda.edit import Editor

FLAG_PENALTIES = 1
FLAG_MASK = 2
FLAG_BIAS = 4
FLAG_LOGPROBS = 8

POST_CYCLE = 1 << 20
"""Rounds of the places for results, until steps are numbered from 1 again."""

_FLOAT, _BITS, _TWO_BITS = struct.Struct("<f"), struct.Struct("<i"), struct.Struct("<2i")
"""The bits of a float32, and of a 64-bit seed, as int32."""


@dataclass(frozen=True)
class BufferShapes:
    """Sizes of the static buffers; all fixed when the engine is built."""

    max_num_seqs: int
    max_num_tokens: int
    """Most tokens in one step."""
    max_blocks_per_seq: int
    block_size: int
    """Tokens in a KV block."""
    vocab_size: int

    @property
    def mask_words(self) -> int:
        return (self.vocab_size + 31) // 32


@dataclass(frozen=True)
class StaticInputs:
    """What the host writes. R = max_num_seqs, indexed by device row; int32 unless marked f32."""

    enabled: torch.Tensor
    """[R] 1: the row takes part in decode steps."""
    temperature: torch.Tensor
    """[R] f32; 0 is greedy."""
    top_p: torch.Tensor
    """[R] f32"""
    min_p: torch.Tensor
    """[R] f32"""
    top_k: torch.Tensor
    """[R] 0 keeps all."""
    seed: torch.Tensor
    """[R, 2] low and high 32 bits."""
    flags: torch.Tensor
    """[R] FLAG_* bits; what a flag does not announce is not read."""
    presence_penalty: torch.Tensor
    """[R] f32"""
    frequency_penalty: torch.Tensor
    """[R] f32"""
    repetition_penalty: torch.Tensor
    """[R] f32"""
    min_position: torch.Tensor
    """[R] stop ids are masked for tokens at positions below this."""
    last_position: torch.Tensor
    """[R] the row deactivates itself once the token at this position is sampled."""
    num_stop_ids: torch.Tensor
    """[R]"""
    stop_ids: torch.Tensor
    """[R, MAX_STOP_IDS] the first num_stop_ids count."""
    num_bias: torch.Tensor
    """[R]"""
    bias_ids: torch.Tensor
    """[R, MAX_LOGIT_BIAS] the first num_bias count; no id stands twice."""
    bias_values: torch.Tensor
    """[R, MAX_LOGIT_BIAS] f32"""
    mask: torch.Tensor
    """[R, ceil(vocab / 32)] bit v % 32 of word v // 32 set: token v is allowed. Read with FLAG_MASK."""
    block_table: torch.Tensor
    """[R, max_blocks_per_seq] KV block of each `block_size` tokens; block 0 is the guard block."""

    # The layout of a prefill or mixed step; a decode step reads none of these.
    tokens: torch.Tensor
    """[T] token ids; -1: the row's `StepState.last_token`."""
    token_positions: torch.Tensor
    """[T]"""
    token_rows: torch.Tensor
    """[T] device row; -1 is padding."""
    seq_rows: torch.Tensor
    """[R] device row of each sequence of the step; -1 is padding."""
    query_start: torch.Tensor
    """[R + 1] first token of each sequence; the padded tail repeats the real end."""
    seq_lens: torch.Tensor
    """[R] tokens in the cache once this step has run; 0 is padding."""
    samples: torch.Tensor
    """[R] 1: the sequence samples its next token in this step."""
    decode_rows: torch.Tensor
    """[R] 0, 1, 2, ...: `seq_rows` of a decode step. Never changes."""
    decode_query_start: torch.Tensor
    """[R + 1] 0, 1, 2, ...: `query_start` of a decode step. Never changes."""


@dataclass(frozen=True)
class StepState:
    """What a step reads and writes, by device row; the host writes it when a request joins."""

    active: torch.Tensor
    """[R] 1: the row decodes. A row that stops sets it to 0 itself."""
    last_token: torch.Tensor
    """[R] the token whose KV the next step computes."""
    position: torch.Tensor
    """[R] its position. The token sampled next has position + 1, which is its random counter."""
    emitted: torch.Tensor
    """[R] by column of the step: the token that the step sampled, -1 for none."""
    output_counts: torch.Tensor
    """[R, vocab] int16: how often each token was generated. Read with FLAG_PENALTIES."""
    prompt_mask: torch.Tensor
    """[R, ceil(vocab / 32)] bit set: the token occurs in the prompt. Read with FLAG_PENALTIES."""
    logprob_values: torch.Tensor
    """[R, 1 + MAX_LOGPROBS] f32 by column: the sampled token's, then the most likely in order."""
    logprob_ids: torch.Tensor
    """[R, 1 + MAX_LOGPROBS] the tokens they belong to."""
    logprob_rank: torch.Tensor
    """[R] rank of the sampled token, from 1."""
    number: torch.Tensor
    """[1] of the last step that somebody waits for, which adds one: from 1 to (P - 1) * POST_CYCLE, and then from 1
    again. While it is 0 nobody waits, and it stays 0."""
    posted: torch.Tensor
    """[P, 1 + R] in host memory, pinned beside a GPU: a step's number, then what it emitted. Step n writes to place
    1 + (n - 1) % (P - 1), one that nobody waits for to place 0. No step reads it."""


@dataclass(frozen=True)
class PromptLogprobsJob:
    """Prompt tokens whose candidates the host wants from a step."""

    column: int
    first_token: int
    """Index into the step's tokens; its logits predict the first target."""
    targets: tuple[int, ...]
    """The prompt tokens that follow, one for each token from `first_token` on."""


@dataclass(frozen=True)
class Batch:
    """One step's inputs: views at padded shapes into the static buffers.

    Besides weights, KV cache and scratch this is all that a forward pass reads. Device fields
    never say how much of them is real; `route` and `readback` are for the runner alone.
    """

    route: Route
    logprobs: bool
    """The host wants the sampled tokens' logprobs back."""
    prompt_logprobs: tuple[PromptLogprobsJob, ...]
    block_size: int
    static: StaticInputs
    state: StepState
    rows: torch.Tensor
    """[S] int32"""
    query_start: torch.Tensor
    """[S + 1] int32"""
    seq_lens: torch.Tensor
    """[S] int32; not read by a decode step, nor is any field below"""
    samples: torch.Tensor
    """[S] int32"""
    tokens: torch.Tensor
    """[T] int32"""
    token_positions: torch.Tensor
    """[T] int32"""
    token_rows: torch.Tensor
    """[T] int32"""

    @property
    def key(self) -> GraphKey:
        return self.route.key

    @property
    def decode(self) -> bool:
        return self.route.key.kind is StepKind.DECODE

    @property
    def num_seqs(self) -> int:
        return self.route.key.num_seqs

    @property
    def num_tokens(self) -> int:
        return self.route.key.num_tokens


class StepBuffers:
    """Owns the static buffers and writes into them what a schedule changes.

    Every tensor is allocated here, once; addresses never change. Edits of a step are staged in
    a ring as deep as the steps in flight, so that no staging buffer is rewritten while its copy
    may still be under way.
    """

    def __init__(self, shapes: BufferShapes, device: torch.device, depth: int) -> None:
        """Allocate everything, zeroed.

        Args:
            shapes: sizes of the buffers.
            device: where steps run.
            depth: most steps in flight; the staging ring and the places for results have one more.
        """
        self.shapes = shapes
        self.device = device
        seqs, tokens, i32, f32 = shapes.max_num_seqs, shapes.max_num_tokens, torch.int32, torch.float32
        per_row: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "enabled": ((), i32),
            "temperature": ((), f32),
            "top_p": ((), f32),
            "min_p": ((), f32),
            "top_k": ((), i32),
            "seed": ((2,), i32),
            "flags": ((), i32),
            "presence_penalty": ((), f32),
            "frequency_penalty": ((), f32),
            "repetition_penalty": ((), f32),
            "min_position": ((), i32),
            "last_position": ((), i32),
            "num_stop_ids": ((), i32),
            "stop_ids": ((MAX_STOP_IDS,), i32),
            "num_bias": ((), i32),
            "bias_ids": ((MAX_LOGIT_BIAS,), i32),
            "bias_values": ((MAX_LOGIT_BIAS,), f32),
            "mask": ((shapes.mask_words,), i32),
            "block_table": ((shapes.max_blocks_per_seq,), i32),
        }
        state_rows = dict.fromkeys(("active", "last_token", "position"), ((), i32))
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            **{name: ((seqs, *shape), dtype) for name, (shape, dtype) in (per_row | state_rows).items()},
            "tokens": ((tokens,), i32),
            "token_positions": ((tokens,), i32),
            "token_rows": ((tokens,), i32),
            "seq_rows": ((seqs,), i32),
            "query_start": ((seqs + 1,), i32),
            "seq_lens": ((seqs,), i32),
            "samples": ((seqs,), i32),
            "number": ((1,), i32),
        }
        self._offset: dict[str, int] = {}
        self._width: dict[str, int] = {}
        end = 0
        for name, (shape, _) in layout.items():
            self._offset[name], self._width[name] = end, int(np.prod(shape[1:], initial=1))
            end += (int(np.prod(shape)) + 31) // 32 * 32  # 128-byte alignment, for vector loads
        self.words = torch.zeros(end, dtype=i32, device=device)
        views = {}
        for name, (shape, dtype) in layout.items():
            start = self._offset[name]
            views[name] = self.words[start : start + int(np.prod(shape))].view(dtype).view(shape)

        def zeros(*shape: int, dtype: torch.dtype = i32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.state = StepState(
            **{name: views.pop(name) for name in (*state_rows, "number")},
            emitted=zeros(seqs),
            output_counts=zeros(seqs, shapes.vocab_size, dtype=torch.int16),
            prompt_mask=zeros(seqs, shapes.mask_words),
            logprob_values=zeros(seqs, 1 + MAX_LOGPROBS, dtype=f32),
            logprob_ids=zeros(seqs, 1 + MAX_LOGPROBS),
            logprob_rank=zeros(seqs),
            # Places for the steps in flight, one more, and place 0.
            posted=torch.zeros((depth + 2, 1 + seqs), dtype=i32, pin_memory=device.type == "cuda"),
        )
        self.static = StaticInputs(
            **views,
            decode_rows=torch.arange(seqs, dtype=i32, device=device),
            decode_query_start=torch.arange(seqs + 1, dtype=i32, device=device),
        )
        self._row_tensors = [
            *(getattr(self.static, name) for name in per_row),
            *(getattr(self.state, name) for name in (*state_rows, "output_counts", "prompt_mask")),
        ]
        self._enabled: set[int] = set()
        self._held: set[int] = set()
        self._members: Members | None = None
        """Whose rows the last write brought up to date, where the next one may find the same."""
        self._views: dict[GraphKey, tuple[torch.Tensor, ...]] = {}
        self._places: dict[GraphKey, np.ndarray] = {}
        """Words of the tokens and sequences of a step with prompts."""
        self._last_batch: Batch | None = None
        editor = _editor(device)
        self._ring = [_Staging(device, editor) for _ in range(depth + 1)]
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all static buffers on the device."""
        return sum(
            t.numel() * t.element_size() for t in self.tensors().values() if t.device == self.words.device
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every buffer by name; the views into `words` are covered by it."""
        own = (vars(self.state) | vars(self.static)).items()
        covered = self.words.untyped_storage().data_ptr()
        return {"words": self.words} | {n: t for n, t in own if t.untyped_storage().data_ptr() != covered}

    def free_rows(self) -> list[int]:
        """Device rows that no request holds."""
        return sorted(set(range(self.shapes.max_num_seqs)) - self._held)

    def write(self, schedule: Schedule, route: Route) -> Batch:
        """Bring the device buffers up to date for a schedule; only what changed travels.

        Args:
            schedule: what runs.
            route: the padded shape at which it runs; at least as large as the schedule.

        Returns:
            The batch at the route's padded shape.
        """
        rows, steady = schedule.rows, schedule.rows if isinstance(schedule.rows, SteadyRows) else None
        if steady is not None and steady.members is self._members:
            if steady.grown:
                self._grow(steady)
            return self.batch(route, steady.members.logprobs)
        self._members = None if steady is None else steady.members
        if schedule.moves:
            self._move(schedule.moves)
        edits = _Edits(self._offset, self._width)
        for row in schedule.leaves:
            self._disable(edits, row)
            self._held.discard(row)
        for item in rows:
            if item.joins:
                self._join(edits, item)
            if item.new_blocks:
                edits.put("block_table", item.row, item.new_blocks, column=item.num_blocks_before)
            if (item.request.bad_word_ids or item.request.grammar) and item.request.host_dependent:
                edits.put("mask", item.row, self._mask(item.request))
        decoding = {item.row for item in rows if item.decode}
        for row in decoding - self._enabled:
            edits.set("enabled", row, 1)
        if schedule.kind is StepKind.DECODE:
            for row in self._enabled - decoding:
                edits.set("enabled", row, 0)
            self._enabled = decoding
        else:
            self._enabled |= decoding
            self._lay_out(edits, schedule, route.key)
        self._apply(edits)
        jobs = _prompt_jobs(schedule) if schedule.needs_prompt_logprobs else ()
        # Logprobs are of the full sampler: the others need not look.
        full = schedule.sampler is SamplerVariant.FULL
        logprobs = full and any(r.samples and r.request.params.logprobs is not None for r in rows)
        return self.batch(route, logprobs, jobs)

    def _grow(self, steady: SteadyRows) -> None:
        """New blocks, where nothing else changed."""
        edits = _Edits(self._offset, self._width)
        for item in map(steady.row, steady.grown):
            edits.put("block_table", item.row, item.new_blocks, column=item.num_blocks_before)
        self._apply(edits)

    def _apply(self, edits: _Edits) -> None:
        """Send edits to the device, from the next slot of the ring."""
        if edits:
            staging = self._ring[self._turn]
            self._turn = (self._turn + 1) % len(self._ring)
            staging.apply(edits.scatters(self.words))

    def batch(
        self, route: Route, logprobs: bool = False, prompt_logprobs: tuple[PromptLogprobsJob, ...] = ()
    ) -> Batch:
        """The batch of a route over whatever the buffers hold: the same views for the same key."""
        last = self._last_batch
        if last is not None and last.route is route and last.logprobs == logprobs and not prompt_logprobs:
            return last
        views = self._views.get(route.key)
        if views is None:
            views = self._views[route.key] = self._cut(route.key)
        batch = Batch(
            route, logprobs, prompt_logprobs, self.shapes.block_size, self.static, self.state, *views
        )
        self._last_batch = None if prompt_logprobs else batch
        return batch

    def mirrors(self) -> tuple[set[int], set[int]]:
        """What the host remembers of the device rows; for whoever borrows them and puts them back."""
        return set(self._enabled), set(self._held)

    def set_mirrors(self, mirrors: tuple[set[int], set[int]]) -> None:
        """Undo what happened since `mirrors()`, once the device buffers are restored."""
        self._enabled, self._held = set(mirrors[0]), set(mirrors[1])
        self._members = None

    def _cut(self, key: GraphKey) -> tuple[torch.Tensor, ...]:
        s, seqs, tokens = self.static, key.num_seqs, key.num_tokens
        decode = key.kind is StepKind.DECODE
        rows, starts = (s.decode_rows, s.decode_query_start) if decode else (s.seq_rows, s.query_start)
        by_seq = (rows[:seqs], starts[: seqs + 1], s.seq_lens[:seqs], s.samples[:seqs])
        return (*by_seq, s.tokens[:tokens], s.token_positions[:tokens], s.token_rows[:tokens])

    def _disable(self, edits: _Edits, row: int) -> None:
        edits.set("active", row, 0)
        edits.set("enabled", row, 0)
        self._enabled.discard(row)

    def _join(self, edits: _Edits, item: ScheduledRow) -> None:
        """Write every field of a row."""
        request, row = item.request, item.row
        params, prompt = request.params, len(request.prompt_token_ids)
        self._disable(edits, row)
        self._held.add(row)
        masked = params.allowed_token_ids is not None or bool(request.bad_word_ids)
        masked = masked or request.grammar is not None
        flags = FLAG_PENALTIES * params.has_penalties + FLAG_MASK * masked
        flags += FLAG_BIAS * bool(params.logit_bias) + FLAG_LOGPROBS * (params.logprobs is not None)
        edits.set("flags", row, flags)
        for name in ("temperature", "top_p", "min_p"):
            edits.set_float(name, row, getattr(params, name))
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
            edits.set_float(name, row, getattr(params, name))
        edits.set("top_k", row, max(params.top_k, 0))
        seed = request.seed & 0xFFFFFFFFFFFFFFFF
        edits.put("seed", row, _TWO_BITS.unpack(seed.to_bytes(8, "little")))
        edits.set("min_position", row, prompt + params.min_tokens)
        edits.set("last_position", row, request.max_total_tokens - 1)
        edits.set("num_stop_ids", row, len(request.stop_token_ids))
        edits.put("stop_ids", row, sorted(request.stop_token_ids))
        if params.logit_bias:
            edits.set("num_bias", row, len(params.logit_bias))
            edits.put("bias_ids", row, list(params.logit_bias))
            edits.put(
                "bias_values", row, np.array(list(params.logit_bias.values()), np.float32).view(np.int32)
            )
        if masked and not request.host_dependent:
            edits.put("mask", row, self._mask(request))
        if params.has_penalties:
            self._rebuild_counts(edits, request, row)

    def _mask(self, request: Request) -> np.ndarray:
        """Bits of the tokens that may come next, [mask_words] int32."""
        allowed = request.params.allowed_token_ids
        bits = np.full(self.shapes.mask_words * 32, allowed is None)
        if allowed is not None:
            bits[list(allowed)] = True
        bits[list(request.banned_next())] = False
        words = np.packbits(bits, bitorder="little").view(np.int32)
        if request.grammar is not None:
            grammar = np.empty_like(words)
            request.grammar.fill(grammar)
            words &= grammar
        return words

    def _rebuild_counts(self, edits: _Edits, request: Request, row: int) -> None:
        """Penalty state from the history; the host's work grows with the history, not with the vocabulary."""
        state, shapes = self.state, self.shapes
        state.prompt_mask[row].zero_()
        ids = np.unique(np.asarray(request.prompt_token_ids, np.int64))
        words, place = np.unique(ids >> 5, return_inverse=True)
        bits = np.zeros(len(words), np.uint32)
        np.bitwise_or.at(bits, place, np.uint32(1) << (ids & 31).astype(np.uint32))
        edits.also(state.prompt_mask, row * shapes.mask_words + words, bits.view(np.int32))
        state.output_counts[row].zero_()
        if request.output_token_ids:
            ids, often = np.unique(np.asarray(request.output_token_ids, np.int64), return_counts=True)
            edits.also(state.output_counts, row * shapes.vocab_size + ids, np.minimum(often, 32767))

    def _lay_out(self, edits: _Edits, schedule: Schedule, key: GraphKey) -> None:
        """Tokens and sequences of a prefill or mixed step, padding included."""
        places = self._places.get(key)
        if places is None:
            places = self._places[key] = self._laid_out(key)
        split, end = 3 * key.num_tokens, 3 * (key.num_tokens + key.num_seqs)
        values = np.zeros(len(places), np.int32)
        tokens, seqs, starts = values[:split].reshape(3, -1), values[split:end].reshape(3, -1), values[end:]
        tokens[2], seqs[0] = -1, -1
        at = 0
        for column, item in enumerate(schedule.rows):
            end = at + item.length
            if item.decode:
                tokens[0, at] = -1
            else:
                tokens[0, at:end] = item.request.token_ids(item.start, item.start + item.length)
            tokens[1, at:end] = np.arange(item.start, item.start + item.length)
            tokens[2, at:end] = item.row
            seqs[:, column] = item.row, item.start + item.length, item.samples
            starts[column] = at
            at = end
        starts[len(schedule.rows) :] = at
        edits.put_at(places, values)

    def _laid_out(self, key: GraphKey) -> np.ndarray:
        """Words that `_lay_out` writes, in its order."""
        by_token, by_seq = ("tokens", "token_positions", "token_rows"), ("seq_rows", "seq_lens", "samples")
        sizes = [(name, key.num_tokens) for name in by_token] + [(name, key.num_seqs) for name in by_seq]
        sizes.append(("query_start", key.num_seqs + 1))
        return np.concatenate([self._offset[name] + np.arange(size) for name, size in sizes])

    def _move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Move whole rows on the device, in stream order: no source is also a target."""
        pairs = torch.tensor(moves, pin_memory=self.device.type == "cuda")
        # Not from pageable memory: that copy would wait for every step in flight.
        source, target = pairs.to(self.device, non_blocking=True).unbind(1)
        for tensor in self._row_tensors:
            tensor[target] = tensor[source]
        self.state.active[source] = 0
        self.static.enabled[source] = 0
        for a, b in moves:
            for rows in (self._enabled, self._held):
                # The target's last tenant may still stand there: it takes over the source's place, whichever.
                rows.discard(b)
                if a in rows:
                    rows.remove(a)
                    rows.add(b)


class _Edits:
    """Words to change, by field and row. A later edit of a single word replaces an earlier one."""

    def __init__(self, offset: dict[str, int], width: dict[str, int]) -> None:
        self._offset, self._width = offset, width
        self._single: dict[int, int] = {}
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._others: list[tuple[torch.Tensor, np.ndarray, np.ndarray]] = []

    def __bool__(self) -> bool:
        return bool(self._single or self._runs or self._others)

    def set(self, name: str, row: int, value: int) -> None:
        self._single[self._offset[name] + row * self._width[name]] = value

    def set_float(self, name: str, row: int, value: float) -> None:
        self.set(name, row, _BITS.unpack(_FLOAT.pack(value))[0])

    def put(self, name: str, row: int, values: Sequence[int] | np.ndarray, column: int = 0) -> None:
        """Consecutive words from (row, column) of a field on."""
        if len(values):
            start = self._offset[name] + row * self._width[name] + column
            self.put_at(np.arange(start, start + len(values)), np.asarray(values, np.int32))

    def put_at(self, index: np.ndarray, values: np.ndarray) -> None:
        """Words by their place; none stands twice."""
        self._runs.append((index, values))

    def also(self, tensor: torch.Tensor, index: np.ndarray, values: np.ndarray) -> None:
        """Elements of a tensor that is not part of `words`, by flat index; no index stands twice."""
        self._others.append((tensor.view(-1), index.astype(np.int64), values.astype(np.int32)))

    def scatters(self, words: torch.Tensor) -> list[tuple[torch.Tensor, np.ndarray, np.ndarray]]:
        """(flat tensor, int64 indices, int32 values) of all edits."""
        own = [(words, *self._arrays())] if self._single or self._runs else []
        return own + self._others

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of the edits of `words`; no index stands twice."""
        index = [np.fromiter(self._single.keys(), np.int64, len(self._single))]
        value = [np.fromiter(self._single.values(), np.int32, len(self._single))]
        for places, values in self._runs:
            index.append(places)
            value.append(values)
        return np.concatenate(index), np.concatenate(value)


class _Staging:
    """One slot of the staging ring: host memory that a copy may still be reading."""

    def __init__(self, device: torch.device, editor: Editor | None = None) -> None:
        self._device, self._editor = device, editor
        self._host = torch.empty(0, dtype=torch.uint8)
        self._bytes = self._host.numpy()
        self._copied: Any = None
        """What to wait for before the host memory is written again."""

    def apply(self, scatters: Sequence[tuple[torch.Tensor, np.ndarray, np.ndarray]]) -> None:
        """tensor[index] = value for each, in stream order."""
        if self._device.type == "cpu":
            for tensor, index, value in scatters:
                tensor[torch.from_numpy(index)] = torch.from_numpy(value).to(tensor.dtype)
            return
        if self._copied is not None:
            self._copied.synchronize()  # long past: the ring is deeper than the steps in flight
        total = sum(len(index) for _, index, _ in scatters)
        if self._host.numel() < 12 * total:
            self._host = self._room(max(24 * total, 1 << 16))
            self._bytes = self._host.numpy()
        split = 8 * total
        indices, values = self._bytes[:split].view(np.int64), self._bytes[split : 12 * total].view(np.int32)
        at = 0
        for _, index, value in scatters:
            indices[at : at + len(index)] = index
            values[at : at + len(index)] = value
            at += len(index)
        self._copied = self._send([(tensor, len(index)) for tensor, index, _ in scatters], total)

    def _room(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def _send(self, targets: Sequence[tuple[torch.Tensor, int]], total: int) -> Any:
        """Start the scatters; an event that passes when the host memory has been read."""
        if self._editor is not None:
            index = self._host.data_ptr()
            values = index + 8 * total
            for tensor, count in targets:
                self._editor(tensor, index, values, count)
                index, values = index + 8 * count, values + 4 * count
            read = self._copied
            if read is None or not read.on(self._editor.stream):
                from .graphs.driver import Event

                return Event(torch.cuda.current_stream(self._device))  # it is recorded there
            read.record()
            return read
        packed = self._host[: 12 * total].to(self._device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        scatter(packed, targets, total)
        return copied


def _editor(device: torch.device) -> Editor | None:
    if device.type != "cuda":
        return None
    from .ops.cuda.edit import Editor

    return Editor.on(device)


def scatter(packed: torch.Tensor, targets: Sequence[tuple[torch.Tensor, int]], total: int) -> None:
    """Write what a staging slot holds, [12 * total] bytes: all indices, then all values, target by target."""
    index, value = packed[: 8 * total].view(torch.int64), packed[8 * total :].view(torch.int32)
    at = 0
    for tensor, count in targets:
        tensor.index_copy_(0, index[at : at + count], value[at : at + count].to(tensor.dtype))
        at += count


def _prompt_jobs(schedule: Schedule) -> tuple[PromptLogprobsJob, ...]:
    jobs = []
    first = 0
    for column, item in enumerate(schedule.rows):
        prompt = item.request.prompt_token_ids
        if item.request.params.prompt_logprobs is not None and not item.decode:
            targets = prompt[item.start + 1 : item.start + item.length + 1]
            if targets:
                jobs.append(PromptLogprobsJob(column, first, tuple(targets)))
        first += item.length
    return tuple(jobs)
