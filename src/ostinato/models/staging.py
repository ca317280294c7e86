"""Weights from memory-mapped files to a device: several pieces at a time, through pinned memory.

A copy out of a map straight to a GPU is done by one thread of the driver, page by page. Here a few
threads fill pinned buffers, whose copies to the device then run by themselves. Copies are launched
on the stream that was current when the uploader was made, so whatever is launched on it after
`copy` has returned sees the data.
"""

from __future__ import annotations

import os
import queue
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import torch

CHUNK_BYTES = 4 << 20
_MOST_THREADS = 8


class Uploader:
    """Copies host tensors to a device; a context manager, since it holds threads and pinned memory."""

    def __init__(self, device: torch.device, *, chunk: int = CHUNK_BYTES, staged: bool | None = None) -> None:
        """Nothing is allocated before the first large copy.

        Args:
            device: where tensors go.
            chunk: bytes of a piece.
            staged: through buffers and threads; None: where the device is a GPU.
        """
        self._staged = device.type == "cuda" if staged is None else staged
        self._on_gpu = device.type == "cuda"
        self._chunk = chunk
        self._stream = torch.cuda.current_stream(device) if self._on_gpu else None
        self._pool: ThreadPoolExecutor | None = None
        self._free: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event | None]] = queue.SimpleQueue()

    def __enter__(self) -> Uploader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def copy(self, out: torch.Tensor, source: torch.Tensor) -> None:
        """out = source, converted to its type; `source` may be reused once this has returned.

        Args:
            out: contiguous, on the device.
            source: of the same shape, on the host.
        """
        plain = out.dtype == source.dtype and source.is_contiguous() and source.numel() > 0
        if not (self._staged and plain and source.nbytes > self._chunk):
            out.copy_(source)
            return
        pool = self._pool or self._start()
        theirs, ours = (t.view(-1).view(torch.uint8) for t in (out, source))
        starts = range(0, ours.numel(), self._chunk)
        jobs = [
            pool.submit(self._piece, theirs[at : at + self._chunk], ours[at : at + self._chunk])
            for at in starts
        ]
        for job in jobs:
            job.result()

    def _start(self) -> ThreadPoolExecutor:
        threads = min(os.cpu_count() or 1, _MOST_THREADS)
        buffers = torch.empty(2 * threads, self._chunk, dtype=torch.uint8, pin_memory=self._on_gpu)
        for buffer in buffers:
            self._free.put((buffer, torch.cuda.Event() if self._on_gpu else None))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weights")
        return self._pool

    def _piece(self, out: torch.Tensor, source: torch.Tensor) -> None:
        """One chunk, by way of a buffer whose last copy has left it."""
        buffer, sent = self._free.get()
        try:
            if sent is not None:
                sent.synchronize()  # an event that was never recorded has passed
            count = source.numel()
            buffer.numpy()[:count] = source.numpy()  # numpy lets go of the interpreter's lock
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                out.copy_(buffer[:count], non_blocking=True)
                if sent is not None:
                    sent.record(self._stream)
        finally:
            self._free.put((buffer, sent))
