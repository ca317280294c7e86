"""Mistral: a Llama with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .spec import ModelSpec, base_spec, optional


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return base_spec(config, "MistralForCausalLM", sliding_window=optional(config, "sliding_window"))
