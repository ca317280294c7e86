"""What a step produced, on its way to the host.

A step posts its tokens itself, to a place in host memory that its number says (`StepState.posted`). What
only some steps bring, candidates of tokens, is copied behind it. An event behind both says that all has arrived.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch

from ..errors import StrictError
from ..inputs import POST_CYCLE, Batch, StepBuffers
from ..types import Logprob, StepResult, TokenLogprobs
from .driver import Event

NO_PROMPTS: Mapping[int, list[TokenLogprobs]] = {}


class Pending:
    """A step's tokens on their way to the host."""

    def __init__(self, slot: _RingSlot, batch: Batch, prompt: Mapping[int, list[TokenLogprobs]]) -> None:
        self._slot, self._number, self._batch, self._prompt = slot, slot.number, batch, prompt

    def result(self) -> StepResult:
        """Wait for the step and read what it produced.

        Raises:
            StrictError: a later step has overwritten it, as more were in flight than the ring has slots for; or
                what was posted is another step's.
        """
        slot, number, batch = self._slot, self._number, self._batch
        if slot.number != number:
            raise StrictError(
                f"a later step was given the result slot of this one before it was read: expected "
                f"step {number}, found {slot.number}; the pipeline is deeper than the ring"
            )
        if slot.arrived is not None:
            slot.arrived.wait()
        n, posted = batch.num_seqs, slot.posted
        if posted[0] != number:
            raise StrictError(
                f"expected the tokens of step {number}, found those of step {posted[0]}: it did not post, or was "
                "launched without the ring's knowledge"
            )
        tokens = posted[1 : 1 + n].tolist()
        chosen: dict[int, tuple[Logprob, TokenLogprobs]] = {}
        if batch.logprobs:
            values, ids = slot.values[:n].tolist(), slot.ids[:n].tolist()
            for column, (v, i, rank) in enumerate(zip(values, ids, slot.rank[:n].tolist(), strict=True)):
                top = {
                    token: Logprob(value, k)
                    for k, (token, value) in enumerate(zip(i[1:], v[1:], strict=True), 1)
                }
                chosen[column] = (Logprob(v[0], rank), top)
        return StepResult(tokens, chosen, self._prompt)


class _RingSlot:
    """Host memory for one step's results; pinned where there is a GPU."""

    def __init__(self, buffers: StepBuffers, place: int, stream: torch.cuda.Stream | None) -> None:
        state, pin = buffers.state, buffers.device.type == "cuda"

        def like(t: torch.Tensor) -> torch.Tensor:
            return torch.zeros(t.shape, dtype=t.dtype, pin_memory=pin)

        self.posted = state.posted[place].numpy().data
        self.values = like(state.logprob_values)
        self.ids = like(state.logprob_ids)
        self.rank = like(state.logprob_rank)
        self.arrived = Event(stream) if pin and stream is not None else None
        self.number = 0
        """Of the last step that was given the slot."""


class ResultRing:
    """As many result slots as there can be steps in flight, and one more."""

    def __init__(self, buffers: StepBuffers, stream: torch.cuda.Stream | None = None) -> None:
        """Nothing is under way.

        Args:
            buffers: what a step posts to, and what holds the rest of its results.
            stream: where all steps run; None on a CPU.
        """
        places = len(buffers.state.posted) - 1
        self._slots = [_RingSlot(buffers, 1 + place, stream) for place in range(places)]
        self._cycle, self._last = places * POST_CYCLE, 0
        self._number = buffers.state.number
        self._counted = False
        """The device's number is that of the last step that was sent."""
        if stream is not None:
            # torch does not know of what is posted, and would give the slots' memory away under it.
            weakref.finalize(self, stream.synchronize).atexit = False

    def begin(self) -> None:
        """Whatever is launched next and then sent is a step."""
        if not self._counted:  # the first one, or the one before failed on the way
            self._number.fill_(self._last or self._cycle)
        self._counted = False

    def pause(self) -> None:
        """What is launched until `begin` is no step that anybody waits for."""
        self._number.zero_()
        self._counted = False

    def send(self, batch: Batch, prompt: Mapping[int, list[TokenLogprobs]] = NO_PROMPTS) -> Pending:
        """Send home the results of the step that was launched since `begin`, in stream order behind it."""
        number = self._last = self._last % self._cycle + 1
        slots = self._slots
        slot = slots[(number - 1) % len(slots)]
        slot.number = number
        if batch.logprobs:
            state, n = batch.state, batch.num_seqs
            slot.values[:n].copy_(state.logprob_values[:n], non_blocking=True)
            slot.ids[:n].copy_(state.logprob_ids[:n], non_blocking=True)
            slot.rank[:n].copy_(state.logprob_rank[:n], non_blocking=True)
        if slot.arrived is not None:
            slot.arrived.record()
        self._counted = True
        return Pending(slot, batch, prompt)
