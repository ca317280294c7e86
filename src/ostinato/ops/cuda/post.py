"""Tokens to the host: `post.cu`, and how it is launched behind every step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from ...errors import KernelError
from .program import build

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("post.cu")


def poster(stream: torch.cuda.Stream) -> Callable[[int, int, int], None] | None:
    """Launches it on a stream, by address of tokens and place and by number; None where it cannot be built."""
    try:
        kernel = build(
            SOURCE, "post", {}, device=stream.device, grid=1, block=128, shared_bytes=0, pdl=False
        )  # fmt: skip
    except KernelError as error:
        logger.info("tokens are copied home: %s", error)
        return None
    return kernel.launcher(stream, "<QQi4x")
