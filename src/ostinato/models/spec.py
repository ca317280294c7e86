"""What a decoder-only transformer is, as numbers: everything the decoder needs from a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..ops import AttentionShape
from ..sampling import MAX_VOCAB
from ..types import real, shown, whole


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of one model. Families build it from a Hugging Face config."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    attention: AttentionShape
    norm_eps: float
    max_positions: int
    """Context that the model was made for, in tokens."""
    rope_inv_freq: tuple[float, ...]
    """[head_dim / 2] radians a position, scaling applied"""
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    qk_norm: bool = False
    """RMS norm over each query and key head."""

    @property
    def num_parameters(self) -> int:
        """Weights, the tied head counted once."""
        h, a = self.hidden_size, self.attention
        layer = h * (a.qkv_size + a.q_size + 3 * self.intermediate_size + 2)
        layer += a.qkv_size * self.qkv_bias + h * self.output_bias + 2 * a.head_dim * self.qk_norm
        return self.num_layers * layer + self.vocab_size * h * (2 - self.tied_embeddings) + h


MAX_POSITIONS = 2**27
MAX_LAYERS = 4096
MAX_HEAD_DIM = 4096
_MAX_SIZE = 2**27
"""Far above every width and count of a real model."""


def require(config: Mapping[str, Any], name: str, kind: type = int, most: int = _MAX_SIZE) -> Any:
    """A config field that must be there, be a `kind`, be positive, and if it is an int at most `most`."""
    value = config.get(name)
    try:
        number = whole(value) if kind is int else real(value)
    except TypeError:
        number = math.nan
    if not 0 < number < math.inf:
        found = f"is {shown(value)}" if name in config else "is missing"
        raise CheckpointError(f"config: {name} {found}; expected a positive {kind.__name__}")
    if kind is int and number > most:
        raise CheckpointError(f"config: {name} is {shown(value)}; at most {most} makes sense")
    return number


def optional(config: Mapping[str, Any], name: str, kind: type = int, default: Any = None) -> Any:
    """As `require`, or the default where the field is null or missing."""
    return default if config.get(name) is None else require(config, name, kind)


def flag(config: Mapping[str, Any], name: str) -> bool:
    """True or false; null or missing is false."""
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"config: {name} is {shown(value)}; expected true or false")
    return bool(value)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object inside the config; empty where it is null or missing."""
    value = config.get(name)
    if not isinstance(value, Mapping | None):
        raise CheckpointError(f"config: {name} is {shown(value)}; expected an object")
    return value or {}


def refuse(config: Mapping[str, Any], name: str, allowed: tuple[Any, ...], what: str) -> None:
    """Refuse a feature by name, instead of computing something else in silence."""
    if config.get(name) not in allowed:
        raise UnsupportedModelError(f"config: {name}={shown(config[name])} ({what}) is not supported")


def base_spec(
    config: Mapping[str, Any], architecture: str, *, sliding_window: int | None = None, **features: Any
) -> ModelSpec:
    """The part of the config that all families share.

    Args:
        config: as in `config.json`.
        architecture: name that the registry knows it by.
        sliding_window: tokens that a token sees, itself included; None: all before it.
        **features: fields of `ModelSpec`, which differ by family.

    Raises:
        CheckpointError: a field is missing or impossible.
        UnsupportedModelError: the config asks for something that is not implemented.
    """
    refuse(config, "hidden_act", ("silu", "swish", None), "activation")
    refuse(config, "mlp_bias", (False, None), "bias in the MLP")
    refuse(config, "pretraining_tp", (1, 0, None), "sliced weights")
    hidden, heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    kv_heads = optional(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    head_dim = optional(config, "head_dim", default=hidden // heads)
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise CheckpointError(
            f"config: head_dim={head_dim}; rotary embeddings need an even one from 2 to {MAX_HEAD_DIM}"
        )
    if require(config, "vocab_size") > MAX_VOCAB:
        raise UnsupportedModelError(
            f"config: vocab_size={config['vocab_size']}; the samplers take at most {MAX_VOCAB}"
        )
    return ModelSpec(
        architecture=architecture,
        vocab_size=require(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=require(config, "intermediate_size"),
        num_layers=require(config, "num_hidden_layers", most=MAX_LAYERS),
        attention=AttentionShape(heads, kv_heads, head_dim, sliding_window),
        norm_eps=require(config, "rms_norm_eps", float),
        max_positions=require(config, "max_position_embeddings", most=MAX_POSITIONS),
        rope_inv_freq=rope_frequencies(config, head_dim),
        tied_embeddings=flag(config, "tie_word_embeddings"),
        **features,
    )


def rope_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Inverse frequencies of the rotary embedding, [head_dim / 2], scaling applied.

    Types: none, "linear" (Chen et al., 2023) and "llama3" (Llama 3.1's, which stretches long
    wavelengths by `factor`, leaves short ones, and blends between). Transformers 5 keeps the
    same fields under `rope_parameters`. A GGUF file supplies factors one by one.
    """
    scaling = {**section(config, "rope_parameters"), **section(config, "rope_scaling")}
    theta = optional(scaling, "rope_theta", float, optional(config, "rope_theta", float, 10000.0))
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"config: partial_rotary_factor={shown(partial)} is not supported")
    # float32, as every implementation computes it: the angles at far positions show the difference
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq: list[float] = (1.0 / (theta**exponents)).tolist()
    if not all(map(math.isfinite, inv_freq)):
        raise CheckpointError(f"config: rope_theta={theta} is too small for float32")
    factors = config.get("rope_freq_factors")
    if factors is not None:
        if len(factors) != len(inv_freq):
            raise CheckpointError(f"config: {len(factors)} rope_freq_factors for {len(inv_freq)} frequencies")
        if not all(0 < factor < math.inf for factor in factors):
            raise CheckpointError("config: rope_freq_factors must be positive numbers")
        return tuple(f / factor for f, factor in zip(inv_freq, factors, strict=True))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return tuple(inv_freq)
    if kind == "linear":
        return tuple(f / require(scaling, "factor", float) for f in inv_freq)
    if kind == "llama3":
        factor = require(scaling, "factor", float)
        low = require(scaling, "low_freq_factor", float)
        high = require(scaling, "high_freq_factor", float)
        original = require(scaling, "original_max_position_embeddings")
        if high <= low:
            raise CheckpointError(f"config: high_freq_factor is {high}, not above low_freq_factor={low}")
        result = []
        for f in inv_freq:
            wavelength = 2 * math.pi / f
            if wavelength < original / high:
                result.append(f)
            elif wavelength > original / low:
                result.append(f / factor)
            else:
                blend = (original / wavelength - low) / (high - low)
                result.append((1 - blend) * f / factor + blend * f)
        return tuple(result)
    raise UnsupportedModelError(
        f"config: rope_scaling of type {shown(kind)} is not supported; known: default, linear, llama3"
    )
