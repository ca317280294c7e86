"""Llama 2 and 3, SmolLM2 and what else calls itself a Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .spec import ModelSpec, base_spec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    return base_spec(config, "LlamaForCausalLM", qkv_bias=bias, output_bias=bias)
