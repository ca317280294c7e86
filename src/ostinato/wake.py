"""Start the NVIDIA driver while Python still imports: a third of a second that the user need not wait for."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

_LIBRARY = "libcuda.so.1"


def wake_driver(device: str = "auto") -> threading.Thread | None:
    """Begin to make the context of the first GPU, which torch then finds, on a thread.

    Only for a process that will use the GPU and does not fork: a forked child cannot use what its parent began.
    Whatever goes wrong here is found again, and reported, by who uses the GPU. Imports nothing heavy.

    Args:
        device: as `EngineOptions.device`; "cpu" leaves the driver alone.

    Returns:
        The thread; None where there is no driver or no need.
    """
    if device == "cpu":
        return None
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    thread = threading.Thread(target=_wake, args=(cuda,), name="wake-driver", daemon=True)
    thread.start()
    return thread


def _wake(cuda: ctypes.CDLL) -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    calls: tuple[tuple[str, Callable[[], int]], ...] = (
        ("cuInit", lambda: cuda.cuInit(0)),
        ("cuDeviceGet", lambda: cuda.cuDeviceGet(ctypes.byref(device), 0)),
        ("cuDevicePrimaryCtxRetain", lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)),
    )
    for name, call in calls:
        status = call()
        if status:
            logger.debug("the driver was not woken early: %s says %d", name, status)
            return
