"""Shared fixtures. Without a GPU, Triton kernels run in its interpreter."""

from __future__ import annotations

import os

# Tiny models gain nothing from threads, and lose ten times where a core is busy with something else.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.models import tiny

__all__ = ["tiny"]

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: run scripts/gpu-check on a machine with one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
