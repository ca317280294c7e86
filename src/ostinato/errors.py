"""Every exception ostinato raises on purpose. Catch `OstinatoError` to catch them all.

Messages say what was expected, what was found, and what to change. Errors caused by a
caller's value are also `ValueError`, a missing file is also `FileNotFoundError`, so that
code written against other engines keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "EngineDeadError",
    "FallbackError",
    "GraphError",
    "KVCacheError",
    "KernelError",
    "MismatchError",
    "ModelError",
    "ModelNotFoundError",
    "OstinatoError",
    "RequestError",
    "SamplingParamsError",
    "StrictError",
    "TokenizerError",
    "UnknownOptionError",
    "UnsupportedModelError",
    "suggest",
]


class OstinatoError(Exception):
    """Base of every error that ostinato raises on purpose."""


class ConfigError(OstinatoError, ValueError):
    """An engine option has a value that cannot work."""


class UnknownOptionError(ConfigError, TypeError):
    """An option that does not exist; the message names the nearest one that does."""

    def __init__(self, name: str, known: Iterable[str], where: str) -> None:
        super().__init__(f"{where}: unknown option {name!r}{suggest(name, known)}")
        self.name = name


class KVCacheError(ConfigError):
    """The KV cache that was asked for does not fit, or is too small for one sequence."""


class SamplingParamsError(OstinatoError, ValueError):
    """A field of `SamplingParams` is out of range or not supported."""


class RequestError(OstinatoError, ValueError):
    """One prompt cannot be run. In a batch only that request is refused."""


class ModelError(OstinatoError):
    """A model cannot be loaded."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No model at that folder, file or hub id."""


class UnsupportedModelError(ModelError, ValueError):
    """The architecture, or a feature that its config asks for, is not implemented."""


class CheckpointError(ModelError, ValueError):
    """A weights file is damaged, or contradicts the config: missing, extra or misshapen."""


class TokenizerError(ModelError, ValueError):
    """The tokenizer or the chat template is missing or cannot be used."""


class GraphError(OstinatoError):
    """Base of errors about CUDA graphs."""


class CaptureError(GraphError):
    """A graph could not be captured and `on_capture_error="raise"` was set."""


class FallbackError(GraphError):
    """A step had no graph and `fail_on_fallback=True` was set."""


class MismatchError(GraphError):
    """A graph and the eager step differed and `fail_on_mismatch=True` was set."""


class StrictError(GraphError):
    """A line of the graph contract was broken (see docs/graph-contract.md)."""


class KernelError(OstinatoError):
    """A kernel does not compile, load or launch on this GPU."""


class EngineDeadError(OstinatoError):
    """The engine failed earlier and cannot run further steps; make a new one."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the list of known names."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(options)}"
