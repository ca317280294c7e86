"""Qwen2 and Qwen2.5: a Llama with QKV bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .spec import ModelSpec, base_spec, refuse


def spec(config: Mapping[str, Any]) -> ModelSpec:
    refuse(config, "use_sliding_window", (False, None), "sliding window in some layers")
    return base_spec(config, "Qwen2ForCausalLM", qkv_bias=True)
