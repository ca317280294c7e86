"""Looking inside a step: `debug_graphs=True`.

Nobody can print or profile inside a captured region. This op set runs the same step at the same
padded shapes op by op, names each op and layer to the profiler, and logs what it wrote.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch.profiler import record_function

from ..ops import OpSet

logger = logging.getLogger(__name__)

_RESULTS = ("out", "residual", "logits")
"""Keyword arguments that an op writes its result to."""


class DebugOps:
    """An op set around another: a profiler range and a log line for each op. It waits for the device."""

    def __init__(self, ops: OpSet) -> None:
        self._inner = ops
        self._layer = -1

    @property
    def ops(self) -> OpSet:
        """This object, as the type that steps take."""
        return cast(OpSet, self)

    def load(self, *args: Any) -> None:
        """Nothing: no step is fused."""

    def fuses(self, *args: Any) -> bool:
        """Never: what is to be looked at is each op by itself."""
        return False

    def chain(self, *args: Any) -> None:
        """Nothing, for the same reason."""

    def attend(self, *args: Any) -> bool:
        """Never, for the same reason."""
        return False

    def picks(self, *args: Any) -> bool:
        """Never: logits are to be looked at, too."""
        return False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if (
            not callable(found)
            or name.endswith("_words")
            or name in ("tune", "versions", "reset", "workspaces")
        ):
            return found

        def op(*args: Any, **kwargs: Any) -> Any:
            if name == "prepare":
                self._layer = -1
                logger.info("step %s", args[0].key)
            elif name == "norm_linear":
                self._layer += 1
            where = (
                name
                if name in ("prepare", "embed", "norm_head", "sample", "advance")
                else f"layer {self._layer} {name}"
            )
            with record_function(where):
                result = found(*args, **kwargs)
            for result_name in _RESULTS:
                if result_name in kwargs:
                    logger.info("  %s: %s %s", where, result_name, describe(kwargs[result_name]))
            return result

        return op


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype, range and how many values are no numbers."""
    shape = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    values = tensor.detach().double().flatten()
    finite = values[torch.isfinite(values)]
    if not len(finite):
        return f"{shape}, no finite value"
    odd = f", {len(values) - len(finite)} not finite" if len(finite) < len(values) else ""
    return f"{shape}, {finite.min().item():.4g} to {finite.max().item():.4g}{odd}"
