"""The KV cache's tensors. Which request owns which block is `kv_blocks.py`'s business.

One tensor [num_layers, 2, num_blocks, block_size, kv_heads, head_dim]; a slot is
`block * block_size + offset`. Block 0 is the guard block: no request owns it, padded table
entries point to it, and checks fill it with poison (docs/graph-contract.md, line 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from .kv_blocks import GUARD_BLOCK

__all__ = ["GUARD_BLOCK", "KVCache"]


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, `[num_layers, 2, num_blocks, block_size, kv_heads, head_dim]`."""

    data: torch.Tensor

    @staticmethod
    def bytes_per_block(
        layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes that one block takes over all layers, keys and values."""
        return layers * 2 * block_size * kv_heads * head_dim * dtype.itemsize

    @classmethod
    def allocate(
        cls,
        *,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """Zeroed blocks: what was never written must still be a number."""
        shape = (layers, 2, num_blocks, block_size, kv_heads, head_dim)
        if device.type == "cpu":
            # Zero pages straight from the system: 1 GiB costs nothing until it is used.
            count = math.prod(shape) * dtype.itemsize
            return cls(torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(shape))
        return cls(torch.zeros(shape, dtype=dtype, device=device))

    @property
    def num_blocks(self) -> int:
        return self.data.shape[2]

    @property
    def block_size(self) -> int:
        return self.data.shape[3]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of a layer, each [num_blocks, block_size, kv_heads, head_dim]."""
        pair = self.data[index]
        return pair[0], pair[1]
