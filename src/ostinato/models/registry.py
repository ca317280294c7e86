"""Architectures by the names that configs use. To add one, see docs/add-a-model.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError
from . import llama, mistral, qwen2, qwen3
from .spec import ModelSpec

FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelSpec]] = {
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": mistral.spec,
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen3ForCausalLM": qwen3.spec,
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a model from its `config.json`.

    Raises:
        UnsupportedModelError: unknown architecture, or a feature that is not implemented.
        CheckpointError: a field is missing or impossible.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not names:
        raise CheckpointError(f"config: no 'architectures'; known: {', '.join(FAMILIES)}")
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name](config)
    raise UnsupportedModelError(f"architecture {names[0]!r} is not supported; known: {', '.join(FAMILIES)}")
