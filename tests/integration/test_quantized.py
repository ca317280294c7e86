"""Quantised models against transformers, which gets the same weights dequantised; and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ostinato import LLM
from ostinato.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.integration.test_families import compare
from tests.models import FAMILIES

Tiny = Callable[[str], tuple[Path, Any]]
Weights = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn


def load(folder: Path, **options: Any) -> LLM:
    defaults = {"skip_tokenizer_init": True, "strict": True, "max_num_batched_tokens": 32, "max_num_seqs": 4}
    return LLM(str(folder), **defaults | options)


def split(weight: torch.Tensor, per_tensor: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(E4M3, scale [out, 1] or [1])"""
    largest = weight.abs().amax().view(1) if per_tensor else weight.abs().amax(1, keepdim=True)
    return (weight / (largest / 448)).to(FP8), largest / 448


def rounded(weight: torch.Tensor, per_tensor: bool = False) -> torch.Tensor:
    """To FP8 and back."""
    narrow, scale = split(weight, per_tensor)
    return narrow.float() * scale


def with_weights(reference: Any, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a transformers model; its head is its own even where it was tied."""
    model = copy.deepcopy(reference)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(change(name, module.weight))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tiny: Tiny, name: str) -> None:
    folder, reference = tiny(name)
    llm = load(folder, quantization="fp8")
    model = llm.engine.program.model
    assert all(layer.qkv.weight.dtype is FP8 for layer in model.layers)
    assert model.head.weight.dtype is FP8
    assert llm.get_metrics()["memory_bytes"]["weights"] == model.nbytes
    compare(llm, with_weights(reference, lambda _, w: rounded(w)), torch.randint(3, 151, (40,)).tolist(), 16)


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    copied = tmp_path / "model"
    shutil.copytree(tiny("llama-bias")[0], copied)
    return copied


def store(
    folder: Path, change: Callable[[Weights], None], scheme: dict[str, Any] | None = None, **config: Any
) -> None:
    """Rewrite a checkpoint; `scheme` becomes its quantization_config."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    known = json.loads((folder / "config.json").read_text())
    if scheme is not None:
        known["quantization_config"] = scheme
    (folder / "config.json").write_text(json.dumps(known | config))


def narrow(weights: Weights, wanted: Callable[[str], bool], per_tensor: bool = False) -> None:
    """Store projections as FP8 with a scale beside them."""
    for name in [n for n in weights if n.endswith("_proj.weight") and wanted(n)]:
        weights[name], scale = split(weights[name], per_tensor)
        weights[name.replace(".weight", ".weight_scale")] = scale


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}


@pytest.mark.parametrize(("scheme", "per_tensor"), [(COMPRESSED, False), (STATIC, True)])
def test_a_checkpoint_that_is_fp8_already(
    tiny: Tiny, folder: Path, scheme: dict[str, Any], per_tensor: bool
) -> None:
    def change(weights: Weights) -> None:
        narrow(weights, lambda _: True, per_tensor)
        weights["model.layers.0.self_attn.q_proj.input_scale"] = torch.ones(1)
        weights["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(1)

    store(folder, change, scheme)
    llm = load(folder)
    model = llm.engine.program.model
    assert model.layers[0].gate_up.weight.dtype is FP8
    assert model.head.scale is None
    reference = with_weights(
        tiny("llama-bias")[1], lambda name, w: w if name == "lm_head" else rounded(w, per_tensor)
    )
    compare(llm, reference, torch.randint(3, 151, (20,)).tolist(), 8)


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_a_checkpoint_that_is_fp8_in_part(tiny: Tiny, folder: Path, quantization: str | None) -> None:
    """Queries only: fused with keys and values they are dequantised, unless all shall be FP8."""
    store(folder, lambda weights: narrow(weights, lambda name: "q_proj" in name), COMPRESSED)
    llm = load(folder, quantization=quantization)
    assert (llm.engine.program.model.layers[0].qkv.scale is None) == (quantization is None)
    assert (llm.engine.program.model.head.scale is None) == (quantization is None)
    reference = with_weights(
        tiny("llama-bias")[1], lambda name, w: rounded(w) if quantization or "q_proj" in name else w
    )
    compare(llm, reference, torch.randint(3, 151, (20,)).tolist(), 8)


def drop_a_scale(weights: Weights) -> None:
    narrow(weights, lambda _: True)
    del weights["model.layers.1.mlp.down_proj.weight_scale"]


def misshape_a_scale(weights: Weights) -> None:
    narrow(weights, lambda _: True)
    weights["model.layers.1.mlp.down_proj.weight_scale"] = torch.ones(5, 1)


def spoil_a_weight(weights: Weights) -> None:
    narrow(weights, lambda _: True)
    weights["model.layers.1.mlp.down_proj.weight"].view(torch.uint8)[3, 4] = 0xFF


def spoil_a_scale(weights: Weights) -> None:
    narrow(weights, lambda _: True)
    weights["model.layers.1.mlp.down_proj.weight_scale"][2] = float("inf")


def block_scales(weights: Weights) -> None:
    narrow(weights, lambda _: True)
    for name in [n for n in weights if n.endswith(".weight_scale")]:
        weights[name + "_inv"] = weights.pop(name)


def narrow_embedding(weights: Weights) -> None:
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].to(FP8)


def integers(weights: Weights) -> None:
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones_like(
        weights["model.layers.1.mlp.up_proj.weight"], dtype=torch.int8
    )


@pytest.mark.parametrize(
    ("change", "scheme", "error", "words"),
    [
        (drop_a_scale, COMPRESSED, CheckpointError, r"down_proj\.weight is .* no .*down_proj\.weight_scale"),
        (misshape_a_scale, COMPRESSED, CheckpointError, r"down_proj\.weight_scale is \[5, 1\] F32; expected"),
        (spoil_a_weight, COMPRESSED, CheckpointError, r"NaN or infinity in .*1\.mlp\.down_proj\.weight;"),
        (spoil_a_scale, COMPRESSED, CheckpointError, r"NaN or infinity in .*1\.mlp\.down_proj\.weight;"),
        (block_scales, {"quant_method": "fp8"}, UnsupportedModelError, "each block.*quantization='fp8'"),
        (narrow_embedding, STATIC, UnsupportedModelError, "embed_tokens.weight is stored as F8_E4M3"),
        (integers, None, UnsupportedModelError, r"up_proj\.weight is stored as I8"),
        (dict.copy, {"quant_method": "gptq"}, UnsupportedModelError, "quant_method='gptq' is not"),
        (
            dict.copy,
            COMPRESSED | {"format": "pack-quantized"},
            UnsupportedModelError,
            "'compressed-tensors' with format='pack-quantized' is not",
        ),
        (
            dict.copy,
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            UnsupportedModelError,
            "each block",
        ),
    ],
)
def test_what_is_refused(
    folder: Path,
    change: Callable[[Weights], None],
    scheme: dict[str, Any] | None,
    error: type[Exception],
    words: str,
) -> None:
    store(folder, change, scheme)
    with pytest.raises(error, match=words):
        load(folder)


def test_a_weight_that_is_not_finite(folder: Path) -> None:
    def spoil(weights: Weights) -> None:
        weights["model.layers.2.self_attn.k_proj.weight"][3, 5] = float("nan")

    store(folder, spoil)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in model\.layers\.2\.self_attn\.k_proj"):
        load(folder, quantization="fp8")


def test_a_scale_that_nothing_explains(folder: Path) -> None:
    store(folder, lambda w: w.update({"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected tensors: .*q_proj\.weight_scale"):
        load(folder)


@pytest.mark.parametrize("value", ["int4", "FP8", 8, True])
def test_other_quantizations(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"quantization must be 'fp8' or None, got {value!r}"):
        LLM(quantization=value)
