"""Qwen3 (dense): a norm over each query and key head instead of QKV bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .spec import ModelSpec, base_spec, flag, refuse


def spec(config: Mapping[str, Any]) -> ModelSpec:
    refuse(config, "use_sliding_window", (False, None), "sliding window in some layers")
    bias = flag(config, "attention_bias")
    # Qwen3's heads are 128 wide whatever the hidden size, also where a config leaves that out.
    config = {"head_dim": 128} | dict(config)
    return base_spec(config, "Qwen3ForCausalLM", qk_norm=True, qkv_bias=bias, output_bias=bias)
