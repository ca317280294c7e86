"""ostinato: an LLM inference engine whose heart is CUDA graphs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import OstinatoError
from .types import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

if TYPE_CHECKING:
    from .llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "OstinatoError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "__version__",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":  # imports torch: only who needs it pays for it
        return import_module(".llm", __name__).LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
