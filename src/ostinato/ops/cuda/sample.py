"""The draw in CUDA C++: `sample.cu`, when it can serve, and how it is launched.

For rows of logits in float32, on Hopper and later. What it must compute is said in `ostinato/sampling.py`; where it
cannot serve, the Triton kernels do.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

import torch

from ...errors import KernelError
from ...inputs import StaticInputs
from .program import POINTERS, Kernel, addresses, build, has_bindings

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("sample.cu")
THREADS = 512
CLUSTERS = (8, 16)
"""Blocks of a row. 16 are faster, as long as the rows' blocks find room side by side."""
FEW_SEQS = 8
"""Sequences up to which it is 16; measured on an H200."""
MOST_LOGITS = 32768
"""Of a block: what its shared memory has room for."""


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
        self._kernels: dict[int, dict[int, Kernel]] = {}
        """By vocabulary, then by cluster; empty where it cannot be built."""

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

        The first call for a vocabulary builds its kernels and must not be captured.

        Args:
            logits: [S, V] f32, contiguous, finished: what changes them has run.
            rows, positions, inputs, out: as in `ostinato.sampling.sample`.
            largest: [S, N] f32, contiguous: the largest logits of parts of each row, any cut, where it is known.
        """
        seqs, vocab = logits.shape
        kernels = self._kernels.get(vocab)
        if kernels is None:
            kernels = self._kernels[vocab] = self._build(vocab)
        if not kernels or logits.data_ptr() % 16:
            return False
        cluster = max(kernels) if seqs <= FEW_SEQS else min(kernels)
        by_row = (inputs.temperature, inputs.min_p, inputs.top_p, inputs.top_k, inputs.seed)
        if largest is not None and largest.shape[1] > THREADS:
            largest = None
        kernel, pointers = kernels[cluster], [logits, rows, positions, *by_row, out, largest]
        POINTERS[kernel.handle] = len(pointers)
        numbers = struct.pack("<ii", inputs.seed.stride(0), 0 if largest is None else largest.shape[1])
        kernel.launch(addresses(pointers) + numbers, seqs * cluster)
        return True

    def _build(self, vocab: int) -> dict[int, Kernel]:
        found = {}
        for cluster in CLUSTERS:
            each = -(-vocab // (cluster * THREADS * 4)) * 4
            if each * THREADS > MOST_LOGITS:
                continue
            try:
                found[cluster] = build(
                    SOURCE, "sample",
                    {"VOCAB": vocab, "CLUSTER": cluster, "THREADS": THREADS, "EACH": each},
                    device=self._device, grid=cluster, block=THREADS, cluster=cluster,
                    shared_bytes=4 * each * THREADS + 24 * THREADS + 16384,
                )  # fmt: skip
            except KernelError as error:
                logger.info("tokens are drawn by the Triton kernels: %s", error)
                return {}
        return found
