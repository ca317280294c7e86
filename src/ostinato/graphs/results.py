"""What a step produced, on its way to the host.

A step posts its tokens itself, to a place in host memory that its number says (`StepState.posted`). What
only some steps bring, candidates of tokens, is copied behind it. An event behind both says that all has arrived.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import StrictError
from ..inputs import POST_CYCLE, Batch, StepBuffers
from ..types import Logprob, StepResult, TokenLogprobs
from .driver import Event
from .keys import KeyRecord

NO_PROMPTS: Mapping[int, list[TokenLogprobs]] = {}
NO_LOGPROBS: Mapping[int, tuple[Logprob, TokenLogprobs]] = {}


class Pending:
    """A step's tokens on their way to the host, and the memory where they arrive: pinned where there is a GPU.

    Steps take turns; each serves again once it was read.
    """

    __slots__ = (
        "_ids",
        "_posted",
        "_prompt",
        "_rank",
        "_values",
        "_wait",
        "arrived",
        "batch",
        "mark",
        "number",
    )

    def __init__(self, buffers: StepBuffers, place: int, stream: torch.cuda.Stream | None) -> None:
        state, pin = buffers.state, buffers.device.type == "cuda"

        def like(t: torch.Tensor) -> torch.Tensor:
            return torch.zeros(t.shape, dtype=t.dtype, pin_memory=pin)

        self.number = 0
        """Of the step that it is for."""
        self.batch: Batch | None = None
        """What that step runs, until it is read."""
        self._posted = state.posted[place].numpy().data
        self._values = like(state.logprob_values)
        self._ids = like(state.logprob_ids)
        self._rank = like(state.logprob_rank)
        self._prompt = NO_PROMPTS
        self.arrived = Event(stream) if pin and stream is not None else None
        """The point where it is all there."""
        self.mark: Callable[[], tuple[Any]] = self.arrived.mark if self.arrived else _done
        self._wait: Callable[[], object] = self.arrived.wait if self.arrived else _done

    def bring(self, batch: Batch, prompt: Mapping[int, list[TokenLogprobs]]) -> None:
        """Start copying what is not posted."""
        self._prompt = prompt
        if batch.logprobs:
            state, n = batch.state, batch.num_seqs
            self._values[:n].copy_(state.logprob_values[:n], non_blocking=True)
            self._ids[:n].copy_(state.logprob_ids[:n], non_blocking=True)
            self._rank[:n].copy_(state.logprob_rank[:n], non_blocking=True)

    def result(self) -> StepResult:
        """Wait for the step and read what it produced; once.

        Raises:
            StrictError: what was posted is another step's.
        """
        batch, posted = self.batch, self._posted
        assert batch is not None, "nothing is under way"
        self.batch = None
        self._wait()
        if posted[0] != self.number:
            raise StrictError(
                f"expected the tokens of step {self.number}, found those of step {posted[0]}: it did not post, or "
                "was launched without the ring's knowledge"
            )
        n = batch.route.key.num_seqs
        tokens = posted[1 : 1 + n].tolist()
        if not batch.logprobs:
            return StepResult(tokens, NO_LOGPROBS, self._prompt if batch.prompt_logprobs else NO_PROMPTS)
        chosen: dict[int, tuple[Logprob, TokenLogprobs]] = {}
        values, ids = self._values[:n].tolist(), self._ids[:n].tolist()
        for column, (v, i, rank) in enumerate(zip(values, ids, self._rank[:n].tolist(), strict=True)):
            top = {
                token: Logprob(value, k) for k, (token, value) in enumerate(zip(i[1:], v[1:], strict=True), 1)
            }
            chosen[column] = (Logprob(v[0], rank), top)
        return StepResult(tokens, chosen, self._prompt if batch.prompt_logprobs else NO_PROMPTS)


def _done() -> tuple[int]:
    """A step on a CPU has run when its launch returns."""
    return (0,)


class ResultRing:
    """As many result slots as there can be steps in flight, and one more."""

    __slots__ = ("__weakref__", "_last", "_number", "_slots", "_top", "counted")

    def __init__(self, buffers: StepBuffers, stream: torch.cuda.Stream | None = None) -> None:
        """Nothing is under way.

        Args:
            buffers: what a step posts to, and what holds the rest of its results.
            stream: where all steps run; None on a CPU.
        """
        places = len(buffers.state.posted) - 1
        self._slots = [Pending(buffers, 1 + (place - 1) % places, stream) for place in range(places)]
        """By number modulo how many they are."""
        self._top, self._last = places * POST_CYCLE, 0
        """The highest number, which 1 follows, and that of the last step that was sent."""
        self._number = buffers.state.number
        self.counted = False
        """The device's number is the last step's."""
        if stream is not None:
            # torch does not know of what is posted, and would give the slots' memory away under it.
            weakref.finalize(self, stream.synchronize).atexit = False

    def begin(self) -> None:
        """Whatever is launched next and then sent is a step."""
        if not self.counted:  # the first one, or the one before failed on the way
            self._number.fill_(self._last or self._top)
        self.counted = False

    def pause(self) -> None:
        """What is launched until `begin` is no step that anybody waits for."""
        self._number.zero_()
        self.counted = False

    def forget(self) -> None:
        """Nobody will read what is under way."""
        self.pause()
        for slot in self._slots:
            slot.batch = None

    def send(self, batch: Batch, prompt: Mapping[int, list[TokenLogprobs]] = NO_PROMPTS) -> Pending:
        """Send home the results of the step that was launched since `begin`, in stream order behind it.

        Raises:
            StrictError: more are in flight than the ring has slots for.
        """
        number, slots = self._last % self._top + 1, self._slots
        slot = slots[number % len(slots)]
        if slot.batch is not None:
            raise StrictError(_TOO_DEEP)
        slot.number, slot.batch = number, batch
        slot.bring(batch, prompt)
        if slot.arrived is not None:
            slot.arrived.record()
        self._last, self.counted = number, True
        return slot

    def again(self, launch: Callable[[], object], batch: Batch, record: KeyRecord[Any]) -> Pending:
        """`begin`, a replay, and `send` in one, behind a step that was `counted`.

        Args:
            launch: replays a graph, on the stream that all steps run on.
            batch: what it runs; nothing of it but tokens is wanted.
            record: the graph's, which counts replays.

        Raises:
            StrictError: more are in flight than the ring has slots for.
        """
        number, slots = self._last % self._top + 1, self._slots
        slot = slots[number % len(slots)]
        if slot.batch is not None:
            raise StrictError(_TOO_DEEP)
        self.counted = False
        launch()
        record.replays += 1
        slot.number, slot.batch = number, batch
        if slot.mark()[0] and slot.arrived is not None:
            slot.arrived.record()
        self._last, self.counted = number, True
        return slot


_TOO_DEEP = "a step was given the result slot of another one that was not read yet; the pipeline is deeper than the ring"
