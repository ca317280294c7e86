"""FP8 weights: rounding against a table of all numbers, odd rows, and the reference product."""

from __future__ import annotations

import pytest
import torch

from ostinato.errors import CheckpointError
from ostinato.models.decoder import random_decoder
from ostinato.models.quantize import FP8, Quantizer, quantize
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.ops import Linear, reference

CODES = torch.arange(256, dtype=torch.uint8)[(torch.arange(256) & 0x7F) != 0x7F]  # without the two NaNs


def e4m3(code: int) -> float:
    """What a byte means, written out: sign, 4 bits of exponent with bias 7, 3 of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


VALUES = [e4m3(int(c)) for c in CODES]


def nearest_even(value: float) -> float:
    """The closest E4M3 number; of two, the one with an even mantissa."""
    return min(zip(VALUES, CODES.tolist(), strict=True), key=lambda v: (abs(v[0] - value), v[1] & 1))[0]


def quantized(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.empty(source.shape, dtype=FP8)
    scale = torch.full((source.shape[0],), float("nan"))
    quantize(source, weight, scale)
    return weight, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding(dtype: torch.dtype) -> None:
    source = (torch.randn(5, 150) * torch.tensor([1e-3, 0.02, 1.0, 7.0, 300.0])[:, None]).to(dtype)
    weight, scale = quantized(source)
    assert torch.equal(scale, source.float().abs().amax(1) / 448)
    expected = [[nearest_even(v) for v in row] for row in (source.float() / scale[:, None]).tolist()]
    assert weight.double().tolist() == expected


def test_ties_go_to_even() -> None:
    # 448 makes the scale 1; every number halfway between two neighbours, and both signs
    levels = sorted(v for v in VALUES if v >= 0)
    ties = [(a + b) / 2 for a, b in zip(levels[1:-1], levels[2:], strict=True)]
    source = torch.tensor([[448.0, *ties, *(-t for t in ties)]])
    weight, scale = quantized(source)
    assert scale.tolist() == [1.0]
    assert weight[0].double().tolist() == [nearest_even(v) for v in source[0].tolist()]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.randn(11, 40)
    whole = quantized(source)
    monkeypatch.setattr("ostinato.models.quantize._CHUNK", 120)
    for a, b in zip(whole, quantized(source), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_rows_without_a_scale() -> None:
    source = torch.ones(3, 4)
    source[0], source[1] = 0.0, 1e-42
    weight, scale = quantized(source)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert (weight[:2].float() == 0).all()
    assert (weight[2].float() * scale[2] == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    quantizer = Quantizer(torch.device("cpu"))
    quantizer.linear("fine.weight", torch.randn(3, 4))
    quantizer.check("folder")
    source = torch.randn(3, 4)
    source[1, 2] = bad
    quantizer.linear("spoilt.weight", source)
    with pytest.raises(CheckpointError, match=r"^folder: NaN or infinity in spoilt\.weight; "):
        quantizer.check("folder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_widen_is_exact(dtype: torch.dtype) -> None:
    wide = reference.widen(CODES.view(FP8), dtype).double() * 256
    assert wide.tolist() == VALUES
    assert (wide.signbit() == (CODES > 127)).all()  # a negative zero stays one


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
)
def test_reference_product(
    rows: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ostinato.ops.reference._WIDENED", 1000)  # several chunks, the last one short
    weight, scale = quantized(torch.randn(97, 70))
    x, bias = torch.randn(rows, 70).to(dtype), torch.randn(97).to(dtype)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).t()
    out = torch.full((rows, 97), float("nan"), dtype=dtype)
    reference.apply(x, Linear(weight, None, scale), out)
    assert (out.double() - exact).abs().max() <= tolerance * exact.abs().max()
    reference.apply(x, Linear(weight, bias, scale), out)
    assert (out.double() - exact - bias.double()).abs().max() <= 2 * tolerance * exact.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_a_random_model_and_its_bytes(tied: bool) -> None:
    config = {**SHAPES["smollm2-135m"], "num_hidden_layers": 2, "vocab_size": 300}
    config["tie_word_embeddings"] = tied
    spec = spec_from_config(config)
    device = torch.device("cpu")
    wide = random_decoder(spec, dtype=torch.bfloat16, device=device, positions=64)
    narrow = random_decoder(spec, dtype=torch.bfloat16, device=device, positions=64, quantization="fp8")
    assert torch.equal(narrow.embedding, wide.embedding)
    pairs = [(wide.head, narrow.head)]
    for a, b in zip(wide.layers, narrow.layers, strict=True):
        assert torch.equal(a.input_norm, b.input_norm)
        pairs += [(a.qkv, b.qkv), (a.output, b.output), (a.gate_up, b.gate_up), (a.down, b.down)]
    for a, b in pairs:
        assert b.scale is not None
        assert b.weight.dtype is FP8
        back = b.weight.float() * b.scale[:, None]
        # half a step of the mantissa, or of the smallest numbers
        room = torch.maximum(a.weight.float().abs() / 16, b.scale[:, None] * 2**-10)
        assert ((back - a.weight.float()).abs() <= 1.001 * room).all()
    hidden, inner, vocab = 576, 1536, 300
    rows = 2 * (960 + hidden + 2 * inner + hidden) + vocab
    elements = 2 * hidden * (960 + hidden + 3 * inner) + vocab * hidden
    table, norms, rope = 2 * vocab * hidden, 2 * hidden * 5, 4 * 64 * 64
    assert narrow.nbytes == elements + 4 * rows + table + norms + rope
    assert narrow.step_bytes == elements + 4 * rows + norms
    assert wide.step_bytes == 2 * elements + norms
