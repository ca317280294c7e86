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


def require(config: Mapping[str, Any], name: str, kind: type = int) -> Any:
    """A config field that must be there, be a `kind`, and be positive."""
    value = config.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:  # type: ignore[operator]
        found = "is missing" if name not in config else f"is {value!r}"
        raise CheckpointError(f"config: {name} {found}; expected a positive {kind.__name__}")
    return value


def refuse(config: Mapping[str, Any], name: str, allowed: tuple[Any, ...], what: str) -> None:
    """Refuse a feature by name, instead of computing something else in silence."""
    if config.get(name) not in allowed:
        raise UnsupportedModelError(f"config: {name}={config[name]!r} ({what}) is not supported")


def base_spec(config: Mapping[str, Any], architecture: str, **features: Any) -> ModelSpec:
    """The part of the config that all families share.

    Args:
        config: as in `config.json`.
        architecture: name that the registry knows it by.
        **features: fields of `ModelSpec` and `sliding_window`, which differ by family.

    Raises:
        CheckpointError: a field is missing or impossible.
        UnsupportedModelError: the config asks for something that is not implemented.
    """
    refuse(config, "hidden_act", ("silu", "swish", None), "activation")
    refuse(config, "mlp_bias", (False, None), "bias in the MLP")
    refuse(config, "pretraining_tp", (1, 0, None), "sliced weights")
    hidden, heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"config: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    head_dim = config.get("head_dim") or hidden // heads
    if head_dim % 2:
        raise CheckpointError(f"config: head_dim={head_dim} is odd; rotary embeddings need an even one")
    max_positions = require(config, "max_position_embeddings")
    if require(config, "vocab_size") > MAX_VOCAB:
        raise UnsupportedModelError(
            f"config: vocab_size={config['vocab_size']}; the samplers take at most {MAX_VOCAB}"
        )
    window = features.pop("sliding_window", None)
    return ModelSpec(
        architecture=architecture,
        vocab_size=require(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=require(config, "intermediate_size"),
        num_layers=require(config, "num_hidden_layers"),
        attention=AttentionShape(heads, kv_heads, head_dim, window),
        norm_eps=require(config, "rms_norm_eps", float),
        max_positions=max_positions,
        rope_inv_freq=rope_frequencies(config, head_dim),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        **features,
    )


def rope_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Inverse frequencies of the rotary embedding, [head_dim / 2], scaling applied.

    Types: none, "linear" (Chen et al., 2023) and "llama3" (Llama 3.1's, which stretches long
    wavelengths by `factor`, leaves short ones, and blends between). Transformers 5 keeps the
    same fields under `rope_parameters`. A GGUF file supplies factors one by one.
    """
    scaling = dict(config.get("rope_parameters") or {}) | dict(config.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"config: partial_rotary_factor={partial!r} is not supported")
    # float32, as every implementation computes it: the angles at far positions show the difference
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq: list[float] = (1.0 / (theta**exponents)).tolist()
    factors = config.get("rope_freq_factors")
    if factors is not None:
        if len(factors) != len(inv_freq):
            raise CheckpointError(f"config: {len(factors)} rope_freq_factors for {len(inv_freq)} frequencies")
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
        f"config: rope_scaling of type {kind!r} is not supported; known: default, linear, llama3"
    )
