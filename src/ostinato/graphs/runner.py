"""Runners: what executes a batch. The eager one defines correct.

A `StepProgram` is the step itself, the same for every runner: prepare, model, sample,
advance. A runner decides how it is launched, and brings its tokens back through a `ResultRing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .. import sampling
from ..inputs import Batch, PromptLogprobsJob
from ..kv_cache import KVCache
from ..models.decoder import Decoder
from ..ops import AttentionShape, OpSet, Scratch, squares_words
from ..types import GraphKey, Logprob, SamplerVariant, StepKind, TokenLogprobs
from .keys import KeyRecord
from .results import Pending, ResultRing


class Arena:
    """The one allocation that holds every intermediate of a step (contract line 7).

    Sized for the largest step, handed out as views that start at the same addresses whatever
    the shape. Contents mean nothing between steps.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_seqs: int,
        hidden: int,
        intermediate: int,
        vocab: int,
        attention: AttentionShape,
        ops: OpSet,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        f32, i32 = torch.float32, torch.int32
        by_token = {
            "x": (hidden, dtype),
            "normed": (hidden, dtype),
            "qkv": (attention.qkv_size, dtype),
            "attn": (attention.q_size, dtype),
            "gate_up": (2 * intermediate, dtype),
            "act": (intermediate, dtype),
            "ids": (0, i32),
            "positions": (0, i32),
            "slots": (0, i32),
        }
        by_seq = {
            "last": (hidden, dtype),
            "logits": (vocab, f32),
            "tokens": (0, i32),
            "next_positions": (0, i32),
            "seq_lens": (0, i32),
            "last_index": (0, i32),
        }
        flat = {
            "squares": (squares_words(max_tokens, hidden), f32),
            "attention": (ops.attention_words(attention, max_seqs), f32),
            "sampler": (ops.sampler_words(max_seqs, vocab), i32),
        }
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for group, count in ((by_token, max_tokens), (by_seq, max_seqs)):
            for name, (width, kind) in group.items():
                layout[name] = ((count, width) if width else (count,), kind)
        for name, (words, kind) in flat.items():
            layout[name] = ((words,), kind)
        sizes = {name: int(np.prod(shape)) * kind.itemsize for name, (shape, kind) in layout.items()}
        self.data = torch.zeros(
            sum((n + 255) // 256 * 256 for n in sizes.values()), dtype=torch.uint8, device=device
        )
        self._full: dict[str, torch.Tensor] = {}
        start = 0
        for name, (shape, kind) in layout.items():
            self._full[name] = self.data[start : start + sizes[name]].view(kind).view(shape)
            start += (sizes[name] + 255) // 256 * 256
        self._by_token, self._by_seq, self._flat = tuple(by_token), tuple(by_seq), tuple(flat)
        self._views: dict[tuple[int, int], Scratch] = {}

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def view(self, num_tokens: int, num_seqs: int) -> Scratch:
        """The scratch of a step at padded shapes."""
        found = self._views.get((num_tokens, num_seqs))
        if found is None:
            full = self._full
            parts = {name: full[name][:num_tokens] for name in self._by_token}
            parts |= {name: full[name][:num_seqs] for name in self._by_seq}
            found = Scratch(**parts, **{name: full[name] for name in self._flat})
            self._views[num_tokens, num_seqs] = found
        return found


@dataclass(frozen=True)
class StepProgram:
    """The step: everything that it reads besides the batch is a field here."""

    model: Decoder
    cache: KVCache
    arena: Arena
    ops: OpSet

    def __call__(self, batch: Batch) -> None:
        """Run a batch. Results land in `batch.state`; on a GPU nothing is allocated or awaited."""
        ops, scratch = self.ops, self.arena.view(batch.num_tokens, batch.num_seqs)
        fuses, greedy = self.fuses(batch.key), not self.keeps_logits(batch.key)
        view = ops.prepare(batch, scratch, None if fuses else self.model)
        if fuses:
            caches = [self.cache.layer(index) for index in range(len(self.model.layers))]
            peaks = ops.fused(self.model, view, caches, scratch, greedy=greedy)
        else:
            peaks = self.model.forward(view, self.cache, scratch, ops, greedy=greedy)
        # A sampled token stands right after its context, so its position is the context's length.
        if not greedy:
            ops.sample(
                scratch.logits,
                view.rows,
                view.seq_lens,
                batch.static,
                batch.state,
                variant=batch.key.sampler,
                workspace=scratch.sampler,
                out=scratch.tokens,
                largest=peaks.values if peaks else None,
            )
        ops.advance(batch, view, scratch.tokens, peaks if greedy else None)

    def fuses(self, key: GraphKey) -> bool:
        """Whether the op set does this step's model in one go."""
        return key.kind is StepKind.DECODE and self.ops.fuses(self.model, key.num_seqs)

    def keeps_logits(self, key: GraphKey) -> bool:
        """Whether a step leaves logits in the arena: greedy ones find the best token without, where the op set can."""
        if key.sampler is not SamplerVariant.GREEDY:
            return True
        return not (
            self.fuses(key) or self.ops.picks(self.model.head, key.num_seqs, self.model.embedding.dtype)
        )

    def prompt_logprobs(self, batch: Batch) -> dict[int, list[TokenLogprobs]]:
        """Candidates at prompt positions, from the hidden states that the step left in the arena.

        Runs after the step, outside any graph; waits for the device.
        """
        scratch = self.arena.view(batch.num_tokens, batch.num_seqs)
        return {job.column: self._prompt_job(job, scratch) for job in batch.prompt_logprobs}

    def _prompt_job(self, job: PromptLogprobsJob, scratch: Scratch) -> list[TokenLogprobs]:
        model, device = self.model, scratch.x.device
        room = self.arena.view(1, self.arena._full["logits"].shape[0])
        found: list[TokenLogprobs] = []
        for begin in range(0, len(job.targets), room.logits.shape[0]):
            targets = torch.tensor(
                job.targets[begin : begin + room.logits.shape[0]], dtype=torch.int32, device=device
            )
            n = len(targets)
            first = job.first_token + begin
            index = torch.arange(first, first + n, dtype=torch.int32, device=device)
            logits = room.logits[:n]
            self.ops.norm_head(
                scratch.x,
                index,
                model.final_norm,
                model.spec.norm_eps,
                model.head,
                last=room.last[:n],
                logits=logits,
            )
            values, ids, rank = (t.tolist() for t in sampling.prompt_logprobs(logits, targets))
            found.extend(_candidates(*row) for row in zip(values, ids, rank, strict=True))
        return found


def _candidates(values: list[float], ids: list[int], rank: int) -> TokenLogprobs:
    """The target first, then the most likely tokens in order."""
    result = {ids[0]: Logprob(values[0], rank)}
    for place, (token, value) in enumerate(zip(ids[1:], values[1:], strict=True), 1):
        result.setdefault(token, Logprob(value, place))
    return result


@dataclass(frozen=True, slots=True)
class Again:
    """What launches a batch once more, for as long as that is all there is to do for a step."""

    record: KeyRecord[GraphKey]
    """Of the graph that is replayed, while it is trusted."""
    ring: ResultRing
    """Where the results come from, while it is `counted`."""
    launch: Callable[[], Pending]


class Runner(Protocol):
    """Executes batches in the order they come."""

    @property
    def program(self) -> StepProgram:
        """The step that it launches."""
        ...

    def run(self, batch: Batch) -> Pending:
        """Launch a step; does not wait for it."""
        ...

    def again(self, batch: Batch) -> Again | None:
        """How to launch a batch that was launched last once more; None if it takes a `poll` and a `run`."""
        ...

    def poll(self) -> None:
        """Read what arrived since the last step; never waits."""
        ...

    def rehearse(self, keys: Sequence[GraphKey]) -> None:
        """Load what only checks of graphs use."""
        ...

    def prepare(self, keys: Sequence[GraphKey]) -> None:
        """Capture keys before there is traffic."""
        ...

    def forget(self) -> None:
        """A step failed, and nobody knows how far it came: no result is waited for any more."""
        ...

    def release(self) -> int:
        """Free all graphs; returns their bytes."""
        ...

    def close(self) -> None:
        """Wait for what is in flight and free what the runner holds."""
        ...


class EagerRunner:
    """Launches every op of a step by itself. What it computes is correct by definition."""

    def __init__(self, program: StepProgram, ring: ResultRing) -> None:
        self._program, self.ring = program, ring

    @property
    def program(self) -> StepProgram:
        return self._program

    def run(self, batch: Batch) -> Pending:
        self.ring.begin()
        self._program(batch)
        return self.deliver(batch)

    def again(self, batch: Batch) -> None:
        return None

    def poll(self) -> None:
        pass

    def rehearse(self, keys: Sequence[GraphKey]) -> None:
        pass

    def prepare(self, keys: Sequence[GraphKey]) -> None:
        pass

    def forget(self) -> None:
        self.ring.forget()

    def release(self) -> int:
        return 0

    def deliver(self, batch: Batch) -> Pending:
        """Send home the results of a step that was just launched."""
        prompt = self._program.prompt_logprobs(batch) if batch.prompt_logprobs else {}
        return self.ring.send(batch, prompt)

    def close(self) -> None:
        if self._program.arena.data.is_cuda:
            torch.cuda.synchronize()
