"""What the host changed, written to the device in one launch: `edit.cu`."""

from __future__ import annotations

import ctypes
import logging
import struct
from pathlib import Path

import torch

from ...errors import KernelError
from .program import _check, build, has_bindings

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("edit.cu")
THREADS = 256
_PARAMS = struct.Struct("<QQQii")


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
        from cuda.bindings import driver

        whole = torch.empty(0, device=device).device  # with its index
        kernel = build(SOURCE, "edit", {}, device=whole, grid=1, block=THREADS, shared_bytes=0, pdl=False)
        # A prompt's first token waits for this launch: nothing is made for it that can be kept.
        self._device, self._driver, self._function = whole.index, driver, kernel.function
        self._launch, self._raw, self._stream = driver.cuLaunchKernel, 0, driver.CUstream(0)
        self._params = ctypes.create_string_buffer(_PARAMS.size)
        self._slots = (ctypes.c_void_p * 1)(ctypes.addressof(self._params))
        self._arguments = ctypes.addressof(self._slots)

    @property
    def stream(self) -> int:
        """Where it has launched last."""
        return self._raw

    def __call__(self, to: torch.Tensor, index: int, values: int, count: int) -> None:
        """to[index[i]] = values[i], in stream order.

        Args:
            to: flat, int32 or int16.
            index: address of int64 [count] in pinned memory, no place twice; not to be changed meanwhile.
            values: address of int32 [count], likewise.
            count: at least 1.
        """
        raw = torch._C._cuda_getCurrentRawStream(self._device)
        if raw != self._raw:
            self._raw, self._stream = raw, self._driver.CUstream(raw)
        _PARAMS.pack_into(self._params, 0, to.data_ptr(), index, values, count, to.element_size() == 2)
        blocks = -(-count // THREADS)
        status = self._launch(
            self._function, blocks, 1, 1, THREADS, 1, 1, 0, self._stream, self._arguments, 0
        )
        _check(status, "launch")
