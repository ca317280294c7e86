"""What a step produced, on its way to the host.

On a GPU tokens are posted: behind a step a kernel of one block writes them to pinned host memory. What
only some steps bring, candidates of tokens, is copied. An event behind it says that all has arrived.
"""

from __future__ import annotations

import weakref

import torch

from ..errors import StrictError
from ..inputs import Batch, StepBuffers
from ..ops.cuda.post import poster
from ..types import Logprob, StepResult, TokenLogprobs


class Pending:
    """A step's tokens on their way to the host."""

    def __init__(
        self, slot: _RingSlot, columns: int, logprobs: bool, prompt: dict[int, list[TokenLogprobs]]
    ) -> None:
        self._slot, self._columns, self._logprobs, self._prompt = slot, columns, logprobs, prompt
        self._ticket = slot.ticket

    def result(self) -> StepResult:
        """Wait for the step and read what it produced.

        Raises:
            StrictError: a later step has overwritten it: more were in flight than the ring has slots for.
        """
        slot, n = self._slot, self._columns
        if slot.ticket != self._ticket:
            raise StrictError(
                f"a later step was given the result slot of this one before it was read: expected "
                f"user {self._ticket} of the slot, found {slot.ticket}; the pipeline is deeper than the ring"
            )
        if slot.arrived is not None:
            slot.arrived.synchronize()
        tokens = slot.tokens[:n].tolist()
        chosen: dict[int, tuple[Logprob, TokenLogprobs]] = {}
        if self._logprobs:
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

    def __init__(self, buffers: StepBuffers) -> None:
        state, pin = buffers.state, buffers.device.type == "cuda"

        def like(t: torch.Tensor) -> torch.Tensor:
            return torch.zeros(t.shape, dtype=t.dtype, pin_memory=pin)

        self.tokens = like(state.emitted)
        self.values = like(state.logprob_values)
        self.ids = like(state.logprob_ids)
        self.rank = like(state.logprob_rank)
        self.address = self.tokens.data_ptr()
        self.arrived = torch.cuda.Event() if pin else None
        self.ticket = 0
        """Steps that have used the slot."""


class ResultRing:
    """As many result slots as there can be steps in flight, and one more."""

    def __init__(self, buffers: StepBuffers, depth: int, stream: torch.cuda.Stream | None = None) -> None:
        """Nothing is under way.

        Args:
            buffers: what holds results on the device.
            depth: most steps in flight.
            stream: where all steps run; None: whichever is current. Knowing it makes sending cheaper.
        """
        self._slots = [_RingSlot(buffers) for _ in range(depth + 1)]
        self._turn = 0
        self._stream = stream
        self._emitted = buffers.state.emitted.data_ptr()
        self._post = None if stream is None else poster(stream)
        if stream is not None:
            # torch does not know of what is posted, and would give the slots' memory away under it.
            weakref.finalize(self, stream.synchronize).atexit = False

    def send(self, batch: Batch, prompt: dict[int, list[TokenLogprobs]]) -> Pending:
        """Send a step's results home, in stream order behind the step."""
        slot = self._slots[self._turn]
        slot.ticket += 1
        self._turn = (self._turn + 1) % len(self._slots)
        state, n = batch.state, batch.num_seqs
        if self._post is not None:
            self._post(self._emitted, slot.address, n)
        else:
            slot.tokens[:n].copy_(state.emitted[:n], non_blocking=True)
        if batch.logprobs:
            slot.values[:n].copy_(state.logprob_values[:n], non_blocking=True)
            slot.ids[:n].copy_(state.logprob_ids[:n], non_blocking=True)
            slot.rank[:n].copy_(state.logprob_rank[:n], non_blocking=True)
        if slot.arrived is not None:
            slot.arrived.record(self._stream)
        return Pending(slot, n, batch.logprobs, prompt)
