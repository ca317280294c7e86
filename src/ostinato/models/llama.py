"""Llama 2 and 3, SmolLM2 and what else calls itself a Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .spec import ModelSpec, base_spec, flag


def spec(config: Mapping[str, Any]) -> ModelSpec:
    bias = flag(config, "attention_bias")
    return base_spec(config, "LlamaForCausalLM", qkv_bias=bias, output_bias=bias)
