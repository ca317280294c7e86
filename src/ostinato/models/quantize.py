"""FP8 weights: made from wider ones, or read from checkpoints that already hold them.

A weight is E4M3 (`torch.float8_e4m3fn`) with one float32 scale for each output channel:
w = weight * scale. Only projections and the head are kept so; look-up tables, norms and biases
stay in the model's dtype, and so do all activations. Knows nothing of how a product with such a
weight is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..ops import Linear
from ..types import shown
from .checkpoint import Checkpoint
from .spec import section

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest E4M3 number."""

_CHUNK = 1 << 22
"""Elements that are quantised at a time, so that the float32 copy stays small."""
_UNDERSTOOD = ("fp8", "fbgemm_fp8", "compressed-tensors")
_FLOATS = ("F64", "F32", "F16", "BF16")
_PLAIN_INTEGERS = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


def quantize(source: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Quantise rows: scale = absmax / 448, weight = source / scale rounded to nearest, ties to even.

    A row of zeros (or of numbers too small for a float32 scale) becomes zeros with scale 1; a row
    with a NaN or an infinity gets a scale that is not finite.

    Args:
        source: [out, in], floating point, on the device of the results.
        weight: [out, in] float8_e4m3fn, written.
        scale: [out] float32, written.
    """
    rows = max(1, _CHUNK // source.shape[1])
    parts = (source.split(rows), weight.split(rows), scale.split(rows))
    for wide, narrow, factor in zip(*parts, strict=True):
        value = wide.float()
        largest = value.abs().amax(1) / LARGEST
        # `<` is false for a NaN, which therefore stays one.
        factor.copy_(torch.where(largest < torch.finfo(torch.float32).tiny, 1.0, largest))
        narrow.copy_(value / factor.unsqueeze(1))


@dataclass(frozen=True)
class Part:
    """Rows of a map, as they come."""

    name: str
    weight: torch.Tensor
    """[rows, in], on any device; float8_e4m3fn where there is a scale, else wider"""
    scale: torch.Tensor | None = None
    """[rows] float32"""


@dataclass(frozen=True)
class StoredScales:
    """The FP8 weights of a checkpoint."""

    scales: Mapping[str, str]
    """Weight name to the name of its scale."""
    companions: frozenset[str]
    """Names of all tensors that only describe the quantisation, unused ones included: activations
    and the KV cache are not quantised."""

    def dequantized(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        """A tensor in a floating point type that holds it exactly, or in float32 if it is FP8."""
        tensor = checkpoint.read(name)
        if name not in self.scales:
            return tensor
        return tensor.float() * self._scale(checkpoint, name, tensor.shape[0]).unsqueeze(1)

    def part(self, checkpoint: Checkpoint, name: str) -> Part:
        """A tensor as it is stored."""
        weight = checkpoint.read(name)
        scale = self._scale(checkpoint, name, weight.shape[0]) if name in self.scales else None
        return Part(name, weight, scale)

    def _scale(self, checkpoint: Checkpoint, name: str, rows: int) -> torch.Tensor:
        """[rows] float32: a scale for the whole tensor counts for each row."""
        return checkpoint.read(self.scales[name]).float().flatten().expand(rows)


def stored_scales(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> StoredScales:
    """Find the FP8 weights of a checkpoint; nothing is read.

    Understood are E4M3 weights with one scale each or one for each output channel, as written by
    compressed-tensors, FBGEMM and others: the weights are used as they are, and activations stay
    as wide as the model's dtype.

    Args:
        checkpoint: an open checkpoint.
        expected: shapes of the model's tensors by name.

    Raises:
        UnsupportedModelError: quantised in another way.
        CheckpointError: a scale is missing or misshapen.
    """
    advice = "load the model that it was made from, with quantization='fp8' if fewer bytes are wanted"
    config = section(checkpoint.config, "quantization_config")
    method, layout = config.get("quant_method"), config.get("format")
    if config and (
        method not in _UNDERSTOOD or layout not in (None, "float-quantized", "naive-quantized", "dense")
    ):
        what = f"quant_method={shown(method)}" + (f" with format={shown(layout)}" if layout else "")
        raise UnsupportedModelError(f"config: quantization_config: {what} is not supported; {advice}")
    found = checkpoint.tensors
    blocks = config.get("weight_block_size") or next(
        (n for n in found if n.endswith(".weight_scale_inv")), None
    )
    if blocks:
        raise UnsupportedModelError(
            f"{checkpoint.path}: FP8 weights with a scale for each block ({shown(blocks)}) are not supported; {advice}"
        )
    scales: dict[str, str] = {}
    for name, shape in expected.items():
        kind = found[name].dtype if name in found else "F32"  # a missing one is reported later
        if kind in _PLAIN_INTEGERS or (kind.startswith("F8_") and kind != "F8_E4M3"):
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name} is stored as {kind}, which is not supported; {advice}"
            )
        if kind != "F8_E4M3":
            continue
        scale = name.removesuffix(".weight") + ".weight_scale"
        if len(shape) != 2 or name == "model.embed_tokens.weight":
            raise UnsupportedModelError(
                f"{checkpoint.path}: {name} is stored as {kind}; only projections may be; {advice}"
            )
        if scale not in found:
            raise CheckpointError(f"{checkpoint.path}: {name} is stored as {kind}, but there is no {scale}")
        size = found[scale].shape
        if found[scale].dtype not in _FLOATS or [n for n in size if n != 1] not in ([], [shape[0]]):
            raise CheckpointError(
                f"{checkpoint.path}: {scale} is {list(size)} {found[scale].dtype}; expected one number, or "
                f"{shape[0]}: one for each output channel"
            )
        scales[name] = scale
    endings = (".weight_scale", ".input_scale", ".output_scale", ".k_scale", ".v_scale")
    companions = frozenset(n for n in found if config and n.endswith(endings)) | frozenset(scales.values())
    return StoredScales(scales, companions)


class Quantizer:
    """Makes FP8 weights on a device, tensor by tensor; whether all were finite is asked once, at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._finite: dict[str, torch.Tensor] = {}

    def linear(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """An FP8 map from one wide weight [out, in]."""
        return self.stacked([Part(name, weight)], (weight.shape[0], weight.shape[1]), bias)

    def stacked(
        self, parts: Iterable[Part], shape: tuple[int, int], bias: torch.Tensor | None = None
    ) -> Linear:
        """An FP8 map from parts stacked along the outputs; `shape` is (out, in) of the whole.

        Only one part need be there at a time.
        """
        weight = torch.empty(shape, dtype=FP8, device=self._device)
        scale = torch.empty(shape[0], dtype=torch.float32, device=self._device)
        start = 0
        for part in parts:
            own = slice(start, start + part.weight.shape[0])
            start = own.stop
            if part.scale is None:
                quantize(part.weight.to(self._device, non_blocking=True), weight[own], scale[own])
                finite = scale[own].isfinite().all()
            else:
                weight[own].copy_(part.weight, non_blocking=True)
                scale[own].copy_(part.scale, non_blocking=True)
                nan = (weight[own].view(torch.uint8) & 0x7F == 0x7F).any()
                finite = scale[own].isfinite().all() & ~nan
            self._finite[part.name] = finite
        return Linear(weight, bias, scale)

    def check(self, where: object) -> None:
        """Refuse what was not finite.

        Raises:
            CheckpointError: names the tensors (the first few).
        """
        if not self._finite:
            return
        finite = torch.stack(list(self._finite.values())).tolist()
        bad = [name for name, fine in zip(self._finite, finite, strict=True) if not fine]
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise CheckpointError(
                f"{where}: NaN or infinity in {', '.join(bad[:5])}{more}; such weights cannot be quantised"
            )
