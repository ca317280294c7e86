"""Trials of the engine's keys, on scratch rows: no live request is read or written.

A captured graph reads fixed device rows, so a trial borrows them: it saves the static buffers,
lays out made-up sequences over KV blocks that no request ever gets, runs both ways with padding
and scratch poisoned, compares, and puts everything back, in stream order between two steps.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..inputs import Batch, StepBuffers
from ..kv_cache import GUARD_BLOCK
from ..types import (
    GraphKey,
    Request,
    Route,
    SamplerVariant,
    SamplingParams,
    Schedule,
    ScheduledRow,
    StepKind,
)
from .backend import GraphBackend
from .runner import StepProgram
from .verify import Observation, Trial, run_both

_CHOICES = 24
"""Sets of sampling parameters that made-up sequences choose from."""

SHARED_BLOCKS = 8
"""Scratch blocks that contexts are made of and no trial writes."""


class ScratchChecker:
    """The engine's `Checker`."""

    def __init__(
        self,
        program: StepProgram,
        buffers: StepBuffers,
        blocks: Sequence[int],
        backend: GraphBackend,
        save_area: torch.Tensor,
        seed: int = 0,
    ) -> None:
        """Nothing is saved or laid out yet.

        Args:
            program: the step.
            buffers: what it reads.
            blocks: KV blocks that the allocator never hands out.
            backend: the device.
            save_area: [2, len(buffers.words)] int32: what a trial found there, and what it began with.
            seed: of the made-up sequences.
        """
        self._program, self._buffers, self._backend = program, buffers, backend
        # A step writes no block that another row reads, so a fused kernel need not order the two.
        cut = len(blocks) - min(SHARED_BLOCKS, len(blocks) - 1)
        self._blocks, self._shared = tuple(blocks[:cut]), tuple(blocks[cut:])
        self._saved, self._start = save_area
        self._random = random.Random(seed)
        self._choices: dict[SamplerVariant, list[SamplingParams]] = {}
        size = buffers.shapes.block_size
        cache = program.cache.data
        if self._blocks:  # contexts that are numbers; the blocks are the last ones of the cache
            own = cache[:, :, self._blocks[0] :]
            own.copy_(torch.randn(own.shape[3:], device=cache.device).expand_as(own))
        self._max_rows = min(len(self._blocks), buffers.shapes.max_num_seqs)
        self._max_tokens = len(self._blocks) * size

    def sizes(self, key: GraphKey, rows: int) -> list[int]:
        """The size that was hit, then 1, then one less than padded."""
        wanted = dict.fromkeys((rows, 1, max(key.num_seqs - 1, 1)))
        most = min(self._max_rows, key.num_tokens)  # a sequence has a token at least
        return [size for size in wanted if size <= most] or [most]

    def trial(
        self, key: GraphKey, rows: int, eager: Callable[[], object], replay: Callable[[], object]
    ) -> Trial | None:
        rows = min(rows, key.num_seqs, key.num_tokens, self._max_rows)
        if not rows or (key.kind is not StepKind.DECODE and key.num_tokens > self._max_tokens):
            return None
        program = self._program
        with self._borrowed(key, rows) as (batch, used, put_back):
            cache, first = program.cache.data, self._blocks[0]

            def observe() -> Observation:
                return observe_step(program, batch, cache[:, :, first : first + used])

            return run_both(self._backend, eager, replay, observe, put_back)

    @contextlib.contextmanager
    def _borrowed(self, key: GraphKey, rows: int) -> Iterator[tuple[Batch, int, Callable[[], None]]]:
        """Made-up sequences in the static buffers; what was there returns at the end, in stream order.

        Yields the batch, how many scratch blocks it may write, and what makes the start again: with
        other values in the padding, so that whoever reads that does not get the same twice.
        """
        buffers, n = self._buffers, key.num_seqs
        penalties: list[torch.Tensor] = []
        if key.sampler is SamplerVariant.FULL:  # nobody else reads or writes them
            penalties = [buffers.state.output_counts, buffers.state.prompt_mask]
        self._saved.copy_(buffers.words)
        kept = [t[:n].clone() for t in penalties]
        mirrors = buffers.mirrors()
        try:
            batch, used, tokens = self._lay_out(key, rows)
            self._start.copy_(buffers.words)
            begun = [t[:n].clone() for t in penalties]

            spoil_padding(batch, rows, tokens, 0)

            def put_back() -> None:
                buffers.words.copy_(self._start)
                spoil_padding(batch, rows, tokens, 1)
                for tensor, old in zip(penalties, begun, strict=True):
                    tensor[:n].copy_(old)
                poison(self._program, buffers)

            poison(self._program, buffers)
            yield batch, used, put_back
        finally:
            buffers.words.copy_(self._saved)
            for tensor, old in zip(penalties, kept, strict=True):
                tensor[:n].copy_(old)
            buffers.state.emitted.fill_(-1)
            buffers.set_mirrors(mirrors)

    def run(self, key: GraphKey, rows: int, body: Callable[[], object]) -> None:
        """Do something while scratch sequences are laid out for a key."""
        with self._borrowed(key, min(rows, key.num_seqs, key.num_tokens, self._max_rows)):
            body()

    def warm_up(self, key: GraphKey) -> None:
        """Run a key eagerly on scratch rows, so that its kernels are loaded."""
        self.run(key, key.num_seqs, lambda: self._program(self._buffers.batch(Route(key, None))))

    def rehearse(self, keys: Sequence[GraphKey]) -> None:
        """One trial of each key, eagerly both times: loads what only trials use, and takes their memory.

        Without it the first trial between two steps would wait for kernels that copy and compare,
        and for the driver to hand out memory.
        """
        for key in keys:

            def run(key: GraphKey = key) -> None:
                self._program(self._buffers.batch(Route(key, None)))

            trial = self.trial(key, key.num_seqs, run, run)
            self._backend.wait()
            if trial is not None:
                trial.mismatches()

    def _lay_out(self, key: GraphKey, rows: int) -> tuple[Batch, int, int]:
        """Made-up sequences in device rows 0 ... rows - 1; every other row is idle and poisoned.

        Returns the batch, how many scratch blocks it may write, and how many tokens it computes.
        Contexts share blocks, again and again the same few, which nobody writes; the blocks that a
        sequence writes are its own.
        """
        buffers, rng = self._buffers, self._random
        size, vocab, longest = (
            buffers.shapes.block_size,
            buffers.shapes.vocab_size,
            buffers.shapes.max_blocks_per_seq,
        )
        static, state = buffers.static, buffers.state
        for t in (static.enabled, state.active, state.number):
            t.zero_()
        static.block_table.fill_(GUARD_BLOCK)
        for t in (static.temperature, static.top_p, static.min_p):
            t.fill_(torch.nan)
        buffers.set_mirrors((set(), set()))
        ids = tuple(rng.randrange(vocab) for _ in range(64))
        items: list[ScheduledRow] = []
        params = self._params(key.sampler)
        late_stops: list[int] = []
        used, tokens = 0, min(key.num_tokens, self._max_tokens)
        for row in range(rows):
            later = rows - row - 1  # each needs a token and a block of its own
            decode = key.kind is StepKind.DECODE or row % 3 == 2
            if decode:
                count = rng.randint(0, min(len(self._blocks), longest) - 1) if self._shared else 0
                shared = (self._shared * (count // max(len(self._shared), 1) + 1))[:count]
                blocks = (*shared, self._blocks[used])
                start, length = len(shared) * size + rng.randrange(size), 1
                used += 1
            else:
                room = min(tokens - later, (len(self._blocks) - used - later) * size, longest * size - 1)
                length = room if later == 0 else rng.randint(1, max(1, min(room, 2 * tokens // (later + 1))))
                blocks, start = self._blocks[used : used + -(-length // size)], 0
                used += len(blocks)
            tokens -= length
            end = start + length
            # Nobody asks a decode for its prompt but penalties, and a short one will do for them.
            prompt = ids[:end] if decode else (ids * (length // len(ids) + 1))[:length]
            request = Request(
                request_id="trial",
                prompt_id="trial",
                prompt_token_ids=prompt,
                params=params[row % len(params)],
                stop_token_ids=frozenset({0}),
                max_total_tokens=end + 8,
                seed=rng.getrandbits(60),
            )
            late_stops += [row] if request.params.min_tokens else []
            items.append(ScheduledRow(request, row, start, length, decode, True, True, 0, blocks, 0))
        kind = key.kind if key.kind is StepKind.DECODE else StepKind.MIXED
        batch = buffers.write(Schedule(0, kind, tuple(items), (), (), key.sampler), Route(key, None))
        decoding = torch.tensor([item.decode for item in items], dtype=torch.int32)
        # Stop ids may not come yet in these rows, whatever their position.
        static.min_position[torch.tensor(late_stops, dtype=torch.long, device=static.min_position.device)] = (
            2**30
        )
        for tensor, values in (
            (state.active, decoding),
            (state.last_token, torch.tensor([rng.randrange(vocab) for _ in items], dtype=torch.int32)),
            (state.position, torch.tensor([item.start for item in items], dtype=torch.int32)),
        ):
            tensor[:rows] = values.to(tensor.device)
        return batch, used, sum(item.length for item in items)

    def _params(self, variant: SamplerVariant) -> list[SamplingParams]:
        """Parameters to draw from: made once, since checking them takes longer than all else of a row."""
        found = self._choices.get(variant)
        if found is None:
            count = 1 if variant is SamplerVariant.GREEDY else _CHOICES
            found = self._choices[variant] = [self._draw(variant, i) for i in range(count)]
        return found

    def _draw(self, variant: SamplerVariant, number: int) -> SamplingParams:
        if variant is SamplerVariant.GREEDY:
            return SamplingParams(temperature=0.0)
        rng = self._random
        common: dict[str, Any] = {
            "temperature": rng.choice([0.0, 0.5, 1.0, 1.5]),
            "top_p": rng.uniform(0.1, 1.0),
        }
        common |= {"top_k": rng.choice([0, 1, 40]), "min_p": rng.choice([0.0, 0.05])}
        if variant is SamplerVariant.SAMPLE:
            return SamplingParams(**common)
        return SamplingParams(
            **common,
            # Rebuilding counts takes several times as long as all else of a row, so not all have any.
            presence_penalty=rng.uniform(-2, 2) if number % 4 == 0 else 0.0,
            repetition_penalty=rng.uniform(0.5, 2) if number % 4 == 0 else 1.0,
            logprobs=rng.choice([None, 5]),
            logit_bias={rng.randrange(self._buffers.shapes.vocab_size): rng.uniform(-5, 5)},
            min_tokens=rng.choice([0, 4]),
        )


def spoil_padding(batch: Batch, rows: int, tokens: int, value: int) -> None:
    """Fill whatever a step must not read of its inputs: legal numbers, but nobody's.

    Args:
        batch: the step's.
        rows: its real sequences.
        tokens: its real tokens; nothing in a decode step reads tokens from here.
        value: 0 or 1: which fill.
    """
    static, size = batch.static, batch.block_size
    if batch.decode:
        unread = (static.seq_rows, static.query_start, static.seq_lens, static.samples)
        for tensor in (static.tokens, static.token_positions, static.token_rows, *unread):
            tensor.fill_(value)
        return
    for tensor in (batch.tokens[tokens:], batch.token_positions[tokens:]):
        tensor.fill_(1 + value * (size - 2))
    batch.seq_lens[rows:].fill_(1 + value * size)
    batch.samples[rows:].fill_(1)


def poison(program: StepProgram, buffers: StepBuffers) -> None:
    """Spoil what a step must not read: scratch, the previous results, the guard block."""
    program.arena.data.fill_(0xFF)  # NaN in every float type, -1 in every integer type
    state = buffers.state
    for results in (state.emitted, state.logprob_ids, state.logprob_rank):
        results.fill_(-(2**30))
    state.logprob_values.fill_(torch.nan)
    state.posted[0, 1:].copy_(state.emitted, non_blocking=True)
    program.cache.data[:, :, GUARD_BLOCK] = torch.nan


def observe_step(program: StepProgram, batch: Batch, kv: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copies of what a step wrote: logits and tokens of live rows, state, KV, the guard block's health."""
    state, n = batch.state, batch.num_seqs
    scratch = program.arena.view(batch.num_tokens, n)
    live = scratch.seq_lens[:n] > 0
    found = {
        # Padded rows compute on whatever they find: only live ones are anybody's business.
        "tokens": torch.where(live, scratch.tokens[:n], 0),
        "emitted": state.emitted[:n].clone(),
        "posted": state.posted.to(state.emitted.device, non_blocking=True, copy=True),
        "active": state.active.clone(),
        "last_token": state.last_token.clone(),
        "position": state.position.clone(),
        "KV writes": kv.clone(),
        "guard block": program.cache.data[:, :, GUARD_BLOCK].clone(),
    }
    if program.keeps_logits(batch.key):  # else whatever an earlier step left there
        found = {"logits": torch.where(live.unsqueeze(1), scratch.logits[:n], 0.0), **found}
    if batch.key.sampler is SamplerVariant.FULL:
        found["penalty counts"] = state.output_counts[batch.rows.clamp(min=0).long()]
        found["logprobs"] = state.logprob_values[:n].clone()
        found["logprob ids"] = state.logprob_ids[:n].clone()
    return found
