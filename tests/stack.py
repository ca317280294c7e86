"""A model of nothing but what `ostinato.ops.Stack` asks for, for tests of kernels that run several layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostinato.ops import AttentionShape, LayerWeights, Linear


@dataclass(frozen=True)
class Model:
    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Linear
    rope: torch.Tensor
    attention: AttentionShape
    norm_eps: float = 1e-5
