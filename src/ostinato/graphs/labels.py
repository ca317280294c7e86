"""Which op, in which layer, launched each node of a graph.

`LabelledOps` stands in for an `OpSet` during one capture and counts the graph's nodes before
and after every op. Nothing of it exists in a step that is not being labelled.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from ..errors import GraphError
from ..ops import OpSet
from .inspect import Count, node_counter

_OUTSIDE = frozenset({"prepare", "fused", "embed", "norm_head", "best_token", "sample", "advance"})
"""Ops that belong to no layer."""


class Label(NamedTuple):
    """What launched a node."""

    op: str
    """Name of the op; empty for a node that no op launched."""
    layer: int | None
    """From 0; None outside the layers."""


class LabelledOps:
    """An op set that notes which nodes each op adds to the graph being captured.

    One object serves one capture: make it before the capture begins, pass `ops` to the step in
    place of the op set, and read `labels` when the capture has ended. A layer is known by its
    attention (`attend` where that did it): what follows the n-th, up to the next `norm_linear` or `attend`, is layer n - 1.
    """

    def __init__(self, ops: OpSet, count: Count | None = None) -> None:
        """Wrap an op set.

        Args:
            ops: what does the work.
            count: nodes captured so far; by default those of torch's current stream.
        """
        self._inner = ops
        self._count = count or node_counter(torch.cuda.current_stream().cuda_stream)
        self._labels: list[Label] = []
        self._attention_calls = 0
        self._layer: int | None = None

    @property
    def ops(self) -> OpSet:
        """This object, as the type that steps take."""
        return cast(OpSet, self)

    def labels(self, total: int) -> list[Label]:
        """Labels by node index.

        Args:
            total: nodes of the finished graph.

        Raises:
            GraphError: ops added more nodes than the graph has.
        """
        if len(self._labels) > total:
            raise GraphError(f"ops launched {len(self._labels)} nodes, the graph has {total}")
        return self._labels + [Label("", None)] * (total - len(self._labels))

    def __getattr__(self, name: str) -> Any:
        # Only for names that are not found here: the ops, each wrapped at its first call.
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def op(*args: Any, **kwargs: Any) -> Any:
            self._note(self._count(), Label("", None))
            label = Label(name, self._layer_of(name))
            result = found(*args, **kwargs)
            self._note(self._count(), label)
            self._attention_calls += name == "rope_paged_attention" or (name == "attend" and bool(result))
            return result

        self.__dict__[name] = op
        return op

    def _note(self, count: int, label: Label) -> None:
        """Give a label to the nodes that came since the last one."""
        self._labels.extend([label] * (count - len(self._labels)))

    def _layer_of(self, name: str) -> int | None:
        if name in _OUTSIDE:
            return None
        if name in ("attend", "norm_linear", "rope_paged_attention"):
            self._layer = self._attention_calls
        return self._layer
