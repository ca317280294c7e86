"""What of the one-kernel decode step can be seen without a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.ops.cuda import fused
from ostinato.ops.cuda.fused import FusedDecode, unsupported

SMALL = {"num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 256, "hidden_size": 128}


def model(dtype: torch.dtype = torch.bfloat16, quantization: str | None = None, **changes: Any) -> Decoder:
    config = {
        **SHAPES["llama-3.2-1b"],
        **SMALL,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **changes,
    }
    return random_decoder(
        spec_from_config(config), dtype=dtype, device=torch.device("cpu"), positions=64, quantization=quantization
    )  # fmt: skip


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_serves_dense_models(quantization: str | None) -> None:
    assert unsupported(model(quantization=quantization)) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": torch.float32}, "bfloat16"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"vocab_size": 520}, "vocab_size 520 is no multiple of 16"),
        ({"intermediate_size": 240}, "intermediate_size 240 is no multiple of 32"),
        ({"hidden_size": 144}, "hidden_size 144 is no multiple of 32"),
        ({"hidden_size": 160, "quantization": "fp8"}, "hidden_size 160 is no multiple of 64"),
    ],
)
def test_says_what_it_cannot_serve(changes: dict[str, Any], why: str) -> None:
    found = unsupported(model(**changes))
    assert found is not None
    assert why in found


def test_weights_of_two_kinds_are_refused() -> None:
    wide, narrow = model(), model(quantization="fp8")
    assert "only some" in (unsupported(dataclasses.replace(wide, head=narrow.head)) or "")


def test_one_engine_has_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    first = FusedDecode.claim(torch.device("cuda", 0))
    assert first is not None
    assert FusedDecode.claim(torch.device("cuda", 0)) is None
    other = FusedDecode.claim(torch.device("cuda", 1))
    assert other is not None
    del first
    assert FusedDecode.claim(torch.device("cuda", 0)) is not None


def test_pointers_come_in_the_order_of_the_struct() -> None:
    """The C++ struct is read here, so that a field moved there cannot go unnoticed."""
    source = fused.SOURCE.read_text()
    body = source[source.index("struct Layer {") : source.index("struct Params {")]
    declared = [
        name.strip(" *;")
        for line in body.splitlines()
        if "*" in line
        for name in line[line.index("*") :].split(",")
    ]
    m = model(quantization="fp8", architectures=["Qwen2ForCausalLM"], rope_scaling=None)
    caches = [(torch.zeros(1), torch.zeros(1)) for _ in m.layers]
    pointers = list(fused._layer_pointers(m, caches))
    assert len(pointers) == len(declared) * len(m.layers)
    w = m.layers[0]
    expected = {
        "input_norm": w.input_norm, "q_norm": w.q_norm, "k_norm": w.k_norm, "mlp_norm": w.mlp_norm,
        "qkv": w.qkv.weight, "output": w.output.weight, "gate_up": w.gate_up.weight, "down": w.down.weight,
        "qkv_bias": w.qkv.bias, "output_bias": w.output.bias,
        "qkv_scale": w.qkv.scale, "output_scale": w.output.scale,
        "gate_up_scale": w.gate_up.scale, "down_scale": w.down.scale,
        "keys": caches[0][0], "values": caches[0][1],
    }  # fmt: skip
    assert list(expected) == declared
    for name, pointer in zip(declared, pointers, strict=False):
        assert pointer is expected[name], name


def test_blocks_without_a_tile_of_the_head_never_have_the_best_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small vocabulary leaves some none: a zero from them would beat logits that are all negative."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(fused, "build", lambda *args, **more: None)
    ops, m = FusedDecode(torch.device("cpu")), model()
    macros = ops._macros(m, 16, 4)
    bound = ops._bound[tuple(macros.items())] = ops._bind(m, macros)
    best = bound.cells["best"]
    assert torch.equal(best, torch.full_like(best, -torch.inf))
    best.fill_(1.0)
    bound.cells["steps"].fill_(7)
    ops.reset()
    assert torch.equal(best, torch.full_like(best, -torch.inf))
    assert not bound.cells["steps"].any()


def test_a_hopper_gpu_without_cuda_python_goes_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_ops = pytest.importorskip("ostinato.ops.triton")
    monkeypatch.delenv("OSTINATO_FUSED", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    assert not triton_ops._has_fused()
