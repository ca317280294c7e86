"""The draw in CUDA C++: `sample.cu`, when it can serve, and how it is launched.

For rows of logits in float32, on Hopper and later. What it must compute is said in `ostinato/sampling.py`; where it
cannot serve, the Triton kernels do.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import KernelError
from ...inputs import StaticInputs
from .program import POINTERS, Kernel, addresses, build, has_bindings

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("sample.cu")


class Way(NamedTuple):
    """How rows are shared out."""

    cluster: int
    """Blocks of a row."""
    threads: int
    """Of a block."""
    keep: bool
    """Whether a block keeps its logits in shared memory; else it reads them again."""

    def each(self, vocab: int) -> int:
        """Logits of a thread: `EACH` in `sample.cu`."""
        unit = 4 if self.keep else 8
        return -(-vocab // (self.cluster * self.threads * unit)) * unit


WAYS = {8: Way(16, 512, True), 32: Way(8, 512, True)}
"""By the most rows that each is for, as measured on an H200: as many threads as can be, as long as nearly all rows have room at once (30)."""
MANY = Way(2, 1024, False)
"""For more rows, or where those do not fit: 66 clusters find room on an H200."""
MOST_LOGITS = 32768
"""Of a block that keeps them: what its shared memory has room for."""
SHARED_BYTES = 49664
"""Of a block, besides its logits."""


class ClusterSampler:
    """Chooses tokens in one launch, a cluster of blocks for each row."""

    @classmethod
    def on(cls, device: torch.device) -> ClusterSampler | None:
        """One for a device; None where clusters or a compiler are missing, or OSTINATO_CLUSTER_SAMPLE=0."""
        if os.environ.get("OSTINATO_CLUSTER_SAMPLE") == "0" or not has_bindings():
            return None
        return cls(device) if torch.cuda.get_device_capability(device) >= (9, 0) else None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kernels: dict[int, dict[Way, Kernel]] = {}
        """By vocabulary; empty where one cannot be built."""

    def serves(self, vocab: int) -> bool:
        """Whether there are kernels for a vocabulary; the first call builds them and must not be captured."""
        if vocab not in self._kernels:
            self._kernels[vocab] = self._build(vocab)
        return bool(self._kernels[vocab])

    def run(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        inputs: StaticInputs,
        *,
        out: torch.Tensor,
        largest: torch.Tensor | None = None,
    ) -> bool:
        """Draw as `ostinato.sampling.sample` does with SAMPLE; False, and nothing done, where it cannot serve.

        Args:
            logits: [S, V] f32, contiguous, finished: what changes them has run.
            rows, positions, inputs, out: as in `ostinato.sampling.sample`.
            largest: [S, N] f32, contiguous: the largest logits of parts of each row, any cut, where it is known.
        """
        seqs, vocab = logits.shape
        if not self.serves(vocab) or logits.data_ptr() % 16:
            return False
        way = way_for(seqs, vocab)
        kernel = self._kernels[vocab][way]
        by_row = (inputs.temperature, inputs.min_p, inputs.top_p, inputs.top_k, inputs.seed)
        pointers = [logits, rows, positions, *by_row, out, largest]
        POINTERS[kernel.handle] = len(pointers)
        parts = 0 if largest is None else largest.shape[1]
        params = pack(pointers, inputs.seed.stride(0), parts, len(inputs.temperature))
        kernel.launch(params, seqs * way.cluster)
        return True

    def _build(self, vocab: int) -> dict[Way, Kernel]:
        found = {}
        for way in dict.fromkeys(way_for(seqs, vocab) for seqs in (*WAYS, max(WAYS) + 1)):
            each = way.each(vocab)
            kept = each * way.threads if way.keep else 4
            try:
                found[way] = build(
                    SOURCE, "sample",
                    {"VOCAB": vocab, "CLUSTER": way.cluster, "THREADS": way.threads, "EACH": each, "KEEP": way.keep},
                    device=self._device, grid=way.cluster, block=way.threads, cluster=way.cluster,
                    shared_bytes=4 * kept + SHARED_BYTES,
                )  # fmt: skip
            except KernelError as error:
                logger.info("tokens are drawn by the Triton kernels: %s", error)
                return {}
        return found


def pack(pointers: Sequence[torch.Tensor | None], seed_stride: int, parts: int, num_rows: int) -> bytes:
    """`struct Params`."""
    return addresses(pointers) + struct.pack("<3i4x", seed_stride, parts, num_rows)


def way_for(seqs: int, vocab: int) -> Way:
    """How so many rows are shared out."""
    for most, way in WAYS.items():
        if seqs <= most and way.each(vocab) * way.threads <= MOST_LOGITS:
            return way
    return MANY
