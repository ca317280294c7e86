"""What the host changed, written to the device in one launch: `edit.cu`."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import torch

from ...errors import KernelError
from .program import build, has_bindings

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("edit.cu")
THREADS = 256


class Editor:
    """Scatters numbers that lie in pinned host memory."""

    @classmethod
    def on(cls, device: torch.device) -> Editor | None:
        """None where there is nothing to compile or launch it with."""
        if not has_bindings():
            return None
        try:
            return cls(device)
        except KernelError as error:
            logger.info("changes of the host's are copied and scattered: %s", error)
            return None

    def __init__(self, device: torch.device) -> None:
        """Raises: KernelError: it cannot be built."""
        whole = torch.empty(0, device=device).device  # with its index
        self._kernel = build(
            SOURCE, "edit", {}, device=whole, grid=1, block=THREADS, shared_bytes=0, pdl=False
        )

    def __call__(self, to: torch.Tensor, index: int, values: int, count: int) -> None:
        """to[index[i]] = values[i], in stream order.

        Args:
            to: flat, int32 or int16.
            index: address of int64 [count] in pinned memory, no place twice; not to be changed meanwhile.
            values: address of int32 [count], likewise.
            count: at least 1.
        """
        params = struct.pack("<QQQii", to.data_ptr(), index, values, count, to.element_size() == 2)
        self._kernel.launch(params, -(-count // THREADS))
