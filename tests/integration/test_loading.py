"""Models that cannot be loaded: a clear error of ours, before any work starts."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ostinato import LLM, SamplingParams
from ostinato.errors import (
    CheckpointError,
    ConfigError,
    KVCacheError,
    ModelNotFoundError,
    TokenizerError,
    UnknownOptionError,
    UnsupportedModelError,
)

Tiny = Callable[[str], tuple[Path, Any]]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny("llama2")[0], copy)
    return copy


def load(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"skip_tokenizer_init": True, "strict": True, "max_num_seqs": 4} | options)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "DROP"}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_an_unknown_option_before_anything_is_read() -> None:
    with pytest.raises(UnknownOptionError, match="max_model_len"):
        LLM("/does/not/exist", max_modellen=5)


def test_an_unknown_architecture_lists_the_known_ones(folder: Path) -> None:
    edit_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(
        UnsupportedModelError, match=r"'MambaForCausalLM'.*LlamaForCausalLM.*Qwen3ForCausalLM"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act='gelu'"),
        ({"mlp_bias": True}, UnsupportedModelError, "mlp_bias"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            UnsupportedModelError,
            "'yarn'.*linear, llama3",
        ),
        ({"hidden_size": "DROP"}, CheckpointError, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, CheckpointError, "num_hidden_layers is 0"),
        ({"num_attention_heads": "six"}, CheckpointError, "num_attention_heads is 'six'"),
        ({"num_key_value_heads": 4}, CheckpointError, "no multiple"),
        ({"rms_norm_eps": -1.0}, CheckpointError, "rms_norm_eps"),
        ({"architectures": []}, CheckpointError, "architectures"),
        ({"architectures": [["x"]]}, CheckpointError, "architectures"),
        ({"architectures": 5}, CheckpointError, "architectures"),
        (
            {"architectures": ["NewForCausalLM", "LlamaForCausalLM"]},
            UnsupportedModelError,
            "'NewForCausalLM'",
        ),
        ({"num_key_value_heads": "two"}, CheckpointError, "num_key_value_heads is 'two'"),
        ({"num_key_value_heads": 2.0}, CheckpointError, "num_key_value_heads is 2.0"),
        ({"num_key_value_heads": 0}, CheckpointError, "num_key_value_heads is 0"),
        ({"head_dim": "x"}, CheckpointError, "head_dim is 'x'"),
        ({"head_dim": -8}, CheckpointError, "head_dim is -8"),
        ({"head_dim": 8.0}, CheckpointError, "head_dim is 8.0"),
        ({"head_dim": None, "hidden_size": 2}, CheckpointError, "head_dim=0"),
        ({"rope_scaling": 5}, CheckpointError, "rope_scaling is 5; expected an object"),
        ({"rope_parameters": "linear"}, CheckpointError, "rope_parameters is 'linear'"),
        ({"rope_parameters": {"rope_theta": "x"}}, CheckpointError, "rope_theta is 'x'"),
        ({"rope_parameters": None, "rope_theta": -5}, CheckpointError, "rope_theta is -5"),
        ({"rope_parameters": None, "rope_theta": 0}, CheckpointError, "rope_theta is 0"),
        ({"rope_parameters": None, "rope_theta": math.nan}, CheckpointError, "rope_theta is nan"),
        ({"rope_parameters": None, "rope_theta": 10**400}, CheckpointError, "rope_theta is 1000"),
        (
            {"max_position_embeddings": 10**12},
            CheckpointError,
            "max_position_embeddings is 1000000000000; at most",
        ),
        ({"num_hidden_layers": 10**6}, CheckpointError, "num_hidden_layers is 1000000; at most"),
        ({"hidden_size": 10**12}, CheckpointError, "hidden_size is"),
        ({"tie_word_embeddings": "false"}, CheckpointError, "tie_word_embeddings is 'false'"),
        ({"rope_parameters": None, "rope_theta": 1e-300}, CheckpointError, "rope_theta=1e-300 is too small"),
        ({"head_dim": 7}, CheckpointError, "head_dim=7; rotary"),
        ({"head_dim": 10**6}, CheckpointError, "head_dim=1000000"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 64,
                }
            },
            CheckpointError,
            "high_freq_factor is 4.0, not above",
        ),
        ({"max_position_embeddings": 1}, ConfigError, "1 position"),
        *(
            (
                {"architectures": ["MistralForCausalLM"], "sliding_window": w},
                CheckpointError,
                "sliding_window is",
            )
            for w in ("x", 0, -4, True)
        ),
    ],
)
def test_a_config_that_cannot_be_served(
    folder: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(error, match=words):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    deny(monkeypatch, io, "open", folder / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: permission denied"):
        load(folder)


@pytest.mark.parametrize(("call", "at"), [("stat", "config.json"), ("listdir", ".")])
def test_a_folder_that_may_not_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: str
) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    deny(monkeypatch, os, call, folder / at)
    with pytest.raises(CheckpointError, match=f"{folder}.* cannot be read: permission denied"):
        load(folder)


def test_a_missing_file_is_not_called_unreadable(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(folder)


def deny(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, path: Path) -> None:
    """Make one path unreadable: file modes mean nothing to root, as which tests may run."""
    real = getattr(module, name)

    def denied(target: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(target, int) and Path(target) == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        return real(target, *args, **options)

    monkeypatch.setattr(module, name, denied)


def test_a_sliding_window_in_some_layers_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny("qwen2")[0], copy)
    edit_config(copy, use_sliding_window=True)
    with pytest.raises(UnsupportedModelError, match="use_sliding_window"):
        load(copy)


def test_a_config_that_contradicts_its_weights(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is \[88, 48\], the config says \[96, 48\]"):
        load(folder)


def test_missing_and_extra_tensors_are_named(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
        del weights["model.layers.1.mlp.up_proj.weight"]

    edit_weights(folder, change)
    with pytest.raises(
        CheckpointError, match=r"missing tensors: model.layers.1.mlp.up_proj.weight\. unexpected.*q_proj.bias"
    ):
        load(folder)


def test_a_truncated_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


def test_more_kv_than_memory(folder: Path) -> None:
    with pytest.raises(KVCacheError, match="lower kv_cache_memory_bytes"):
        load(folder, kv_cache_memory_bytes=1 << 50)


def test_a_length_that_the_cache_cannot_hold(folder: Path) -> None:
    with pytest.raises(KVCacheError, match="max_model_len=144 or less"):
        load(folder, max_model_len=200, num_gpu_blocks_override=10)
    assert load(folder, num_gpu_blocks_override=10).engine.config.max_model_len == 144


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_gpu_blocks_override": 1}, "allows 1 block of .*; raise num_gpu_blocks_override to 2 or more"),
        ({"kv_cache_memory_bytes": 10}, r"allows 0 blocks of .*; raise kv_cache_memory_bytes to \d+ or more"),
        ({"max_model_len": 64, "num_gpu_blocks_override": 3}, "or raise num_gpu_blocks_override$"),
        ({"num_gpu_blocks_override": 1 << 30}, "left: lower num_gpu_blocks_override$"),
    ],
    ids=str,
)
def test_a_cache_of_the_wrong_size_names_what_was_given(
    folder: Path, options: dict[str, int], words: str
) -> None:
    with pytest.raises(KVCacheError, match=words) as caught:
        load(folder, **options)
    assert "machine" not in str(caught.value)
    if found := re.search(r"raise (\w+) to (\d+) or more", str(caught.value)):
        assert load(folder, **{found[1]: int(found[2])}).engine.config.max_model_len == 16


def test_text_without_a_tokenizer(folder: Path) -> None:
    with pytest.raises(TokenizerError):
        LLM(str(folder))
    with pytest.raises(TokenizerError, match="no tokenizer"):
        load(folder).chat([{"role": "user", "content": "hi"}])


def test_random_weights_by_shape_name() -> None:
    llm = LLM("smollm2-135m", load_format="dummy", max_model_len=64, max_num_seqs=2)
    (output,) = llm.generate(
        [[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True), use_tqdm=False
    )
    assert len(output.outputs[0].token_ids) == 3
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        LLM("./no-such-shape", load_format="dummy")


@pytest.mark.parametrize("model", [None, "default", "SmolLM2-135M-Instruct", "smollm2", "SmolLM2-1350M"])
def test_random_weights_need_a_shape_or_a_config(model: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="shape.*llama-2-7b.*did you mean 'smollm2-135m'") as caught:
        LLM(model, load_format="dummy")
    assert "gguf" not in str(caught.value)


def test_random_weights_for_a_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"needs a shape .*x\.gguf is a file$"):
        LLM(str(tmp_path / "x.gguf"), load_format="dummy")


@pytest.mark.parametrize("name", ["owner/name", "name"])
def test_random_weights_for_a_config(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(folder, load_format="dummy").engine.spec.num_layers > 0
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert LLM(name, load_format="dummy", max_num_seqs=2).engine.spec.num_layers > 0
