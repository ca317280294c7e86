"""Models that cannot be loaded: a clear error of ours, before any work starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
    ],
)
def test_a_config_that_cannot_be_served(
    folder: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(error, match=words):
        load(folder)


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
    with pytest.raises(KVCacheError, match="no room"):
        load(folder, num_gpu_blocks_override=1)


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
    with pytest.raises((ConfigError, ModelNotFoundError)):
        LLM("./no-such-shape", load_format="dummy")
