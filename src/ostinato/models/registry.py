"""Architectures by the names that configs use. To add one, see docs/add-a-model.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError
from ..types import shown
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
    known = ", ".join(FAMILIES)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"config: 'architectures' is {shown(names)}; expected a list of names; known: {known}"
        )
    if names[0] not in FAMILIES:  # the first is what the weights are
        raise UnsupportedModelError(f"architecture {names[0]!r} is not supported; known: {known}")
    return FAMILIES[names[0]](config)
