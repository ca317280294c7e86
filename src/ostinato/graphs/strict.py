"""A runner that checks on a CPU what it can of the graph contract, at every step.

A replayed graph reads whatever lies at the addresses it was captured with. So, before each
step: every tensor of the batch must lie where this key found it first, inside a registered
buffer; padding and scratch are poisoned; the previous results are clobbered. After it: the
guard block is untouched, and so is the state of every row that did not run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .. import sampling
from ..errors import StrictError
from ..inputs import Batch, StepBuffers
from ..kv_cache import GUARD_BLOCK
from ..types import GraphKey
from .results import Pending, ResultRing
from .runner import EagerRunner, StepProgram
from .scratch import poison

_FAR = 2**30
"""Padding value far out of range: using it as an index fails at once on a CPU."""


class StrictRunner:
    """Wraps the eager runner in checks; raises `StrictError` naming expected and actual."""

    def __init__(self, program: StepProgram, ring: ResultRing, buffers: StepBuffers) -> None:
        self.eager = EagerRunner(program, ring)
        self._program, self._buffers = program, buffers
        self._registered = {
            **buffers.tensors(),
            **program.model.tensors(),
            "kv_cache": program.cache.data,
            "arena": program.arena.data,
        }
        self._addresses = {name: t.data_ptr() for name, t in self._registered.items()}
        self._seen: dict[GraphKey, dict[str, tuple[int, tuple[int, ...]]]] = {}
        self._constants: dict[GraphKey, dict[str, object]] = {}

    @property
    def program(self) -> StepProgram:
        return self._program

    def run(self, batch: Batch) -> Pending:
        self.check_addresses(batch)
        self.poison(batch)
        idle = self._idle_rows(batch)
        before = self._row_state(idle)
        self.eager.ring.begin()
        with _NoHostReads(str(batch.key)):
            self._program(batch)
        self.check_results(batch, idle, before)
        return self.eager.deliver(batch)

    def again(self, batch: Batch) -> None:
        return None

    def poll(self) -> None:
        pass

    def rehearse(self, keys: Sequence[GraphKey]) -> None:
        pass

    def prepare(self, keys: Sequence[GraphKey]) -> None:
        pass

    def forget(self) -> None:
        self.eager.forget()

    def release(self) -> int:
        return 0

    def close(self) -> None:
        self.eager.close()

    def check_addresses(self, batch: Batch) -> None:
        """Contract lines 1, 9 and 10: known buffers, unmoved, and nothing but the key decides shapes."""
        for name, tensor in self._registered.items():
            if tensor.data_ptr() != self._addresses[name]:
                raise StrictError(
                    f"buffer {name!r} moved: expected {self._addresses[name]:#x}, found {tensor.data_ptr():#x}; "
                    "a captured graph would still read the old place"
                )
        found: dict[str, tuple[int, tuple[int, ...]]] = {}
        constants: dict[str, object] = {}
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                owner = next((n for n, t in self._registered.items() if _inside(value, t)), None)
                if owner is None:
                    raise StrictError(f"{batch.key}: batch.{name} lies in no registered buffer")
                found[name] = (value.data_ptr(), tuple(value.shape))
            elif name == "block_size":
                constants[name] = value
        first = self._seen.setdefault(batch.key, found)
        for name, place in found.items():
            if first[name] != place:
                raise StrictError(
                    f"{batch.key}: batch.{name} is {place}, the key's first step had {first[name]}"
                )
        if self._constants.setdefault(batch.key, constants) != constants:
            raise StrictError(f"{batch.key}: {constants} changed without being part of the key")

    def poison(self, batch: Batch) -> None:
        """Contract line 4: make whatever must not be read unusable."""
        poison(self._program, self._buffers)
        static = batch.static
        if batch.decode:
            for unread in (static.tokens, static.token_positions, static.token_rows):
                unread.fill_(_FAR)
            for unread in (static.seq_rows, static.query_start, static.seq_lens, static.samples):
                unread.fill_(_FAR)
        else:
            real = int(static.query_start[batch.num_seqs])
            static.tokens[real:] = _FAR
            static.token_positions[real:] = _FAR
            padding = static.seq_rows[: batch.num_seqs] < 0
            static.seq_lens[: batch.num_seqs][padding] = _FAR
            static.samples[: batch.num_seqs][padding] = 1
        for row in self._buffers.free_rows():
            # A row that nobody holds may contain anything: it must have no effect.
            static.block_table[row] = GUARD_BLOCK
            static.temperature[row] = torch.nan
            static.top_p[row] = torch.nan

    def check_results(self, batch: Batch, idle: list[int], before: list[torch.Tensor]) -> None:
        guard = self._program.cache.data[:, :, GUARD_BLOCK]
        if not bool(torch.isnan(guard).all()):
            raise StrictError(f"{batch.key}: a padded token was written to the guard block")
        for tensor, old in zip(self._row_state(idle), before, strict=True):
            if not torch.equal(tensor, old):
                raise StrictError(
                    f"{batch.key}: the step changed the state of rows that did not run ({idle})"
                )
        emitted = batch.state.emitted[: batch.num_seqs]
        vocab = self._program.model.spec.vocab_size
        if not bool(((emitted >= -1) & (emitted < vocab)).all()):
            raise StrictError(f"{batch.key}: emitted tokens out of range: {emitted.tolist()}")

    def _idle_rows(self, batch: Batch) -> list[int]:
        """Device rows whose state this step must leave alone."""
        static, state = batch.static, batch.state
        if batch.decode:
            awake = (static.enabled != 0) & (state.active != 0)
            awake[batch.num_seqs :] = False
            return (~awake).nonzero().squeeze(1).tolist()
        return sorted(set(range(len(state.active))) - set(batch.rows.tolist()))

    def _row_state(self, rows: list[int]) -> list[torch.Tensor]:
        state = self._buffers.state
        return [
            t[rows].clone() for t in (state.active, state.last_token, state.position, state.output_counts)
        ]


_HOST_READS = frozenset(
    getattr(torch.Tensor, name) for name in ("item", "__bool__", "__int__", "__float__", "__index__")
)
"""Not `tolist`, which the plain ops plan with on a CPU."""


class _NoHostReads(TorchFunctionMode):
    """Contract line 12: a step that looks at one of its values waits for the device, and no graph can do it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # The plain sampler skips on the host what nobody asked for; it is never captured.
        if func in _HOST_READS and sys._getframe(1).f_code.co_filename != sampling.__file__:
            raise StrictError(
                f"{self._where}: the step read a value on the host (.item(), int() or bool() of a tensor): expected "
                "device work only, as a captured graph repeats whatever the host decided then"
            )
        return func(*args, **(kwargs or {}))


def _inside(part: torch.Tensor, whole: torch.Tensor) -> bool:
    start, size = whole.data_ptr(), whole.numel() * whole.element_size()
    return start <= part.data_ptr() and part.data_ptr() + part.numel() * part.element_size() <= start + size
