"""Hugging Face folders: what is read equals what was saved, and damage is always named."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ostinato.errors import (
    CheckpointError,
    ModelError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedModelError,
)
from ostinato.models.checkpoint import TensorInfo, open_checkpoint


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=64, max_position_embeddings=128, tie_word_embeddings=False,
        )
    ).to(torch.bfloat16)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small, whole folder to damage."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(
        {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)},
        tmp_path / "model.safetensors",
    )
    return tmp_path


@pytest.mark.parametrize("shard", ["1GB", "8KB"], ids=["one file", "shards"])
def test_equals_what_transformers_saved(model: LlamaForCausalLM, tmp_path: Path, shard: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "8KB")
    checkpoint = open_checkpoint(tmp_path)
    expected = model.state_dict()
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.tensors[name] == TensorInfo(tuple(tensor.shape), "BF16")
        read = checkpoint.read(name)
        assert read.dtype == torch.bfloat16
        assert torch.equal(read, tensor)
    assert checkpoint.config["hidden_size"] == 32
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.generation_config["eos_token_id"] == 2


def test_without_generation_config(folder: Path) -> None:
    assert open_checkpoint(folder).generation_config == {}


def test_without_index_all_files_count(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    save_file({"c": torch.zeros(2)}, folder / "part-2.safetensors")
    assert set(open_checkpoint(folder).tensors) == {"a", "b", "c"}
    save_file({"a": torch.zeros(2)}, folder / "part-3.safetensors")
    with pytest.raises(CheckpointError, match=r"part-3\.safetensors.*'a' is in another file"):
        open_checkpoint(folder)


def test_model_safetensors_alone_counts(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "consolidated.safetensors")
    assert open_checkpoint(folder).tensors["a"].shape == (3, 4)


def test_unknown_tensor(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        open_checkpoint(folder).read("c")


def test_missing_things(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        open_checkpoint(folder / "nothing")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        open_checkpoint(folder).load_tokenizer()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        open_checkpoint(folder)
    (folder / "w.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pass .*w\.gguf"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_never_loaded(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnsupportedModelError, match="never loaded"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": }', "[" * 100_000, b"\xff\xfe\x00"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_bad_json(folder: Path, file: str, text: str | bytes) -> None:
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "no weight_map"),
        ({}, "no weight_map"),
        ({"a": "gone.safetensors"}, "1 of 1 weight files are missing, first gone.safetensors"),
        ({"a": "model.safetensors", "z": "model.safetensors"}, "no tensor 'z'"),
        ({"a": "../model.safetensors"}, "expected the name"),
        ({"a": "model.bin"}, "expected the name"),
        ({"a": 3}, "expected the name"),
    ],
)
def test_bad_index(folder: Path, weight_map: Any, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def _open_and_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def test_cut_anywhere(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(folder)


def test_header_that_lies(folder: Path) -> None:
    file = folder / "model.safetensors"

    def write(header: dict[str, Any] | bytes, data: bytes = bytes(64), length: int | None = None) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    good = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    write({"a": good})
    _open_and_read(folder)
    lies: list[dict[str, Any]] = [
        {"shape": [4, 5]}, {"shape": [2**62, 2**62]}, {"shape": [-1]}, {"data_offsets": [0, 640]},
        {"data_offsets": [64, 0]}, {"data_offsets": [8, 72]}, {"dtype": "F31"}, {"dtype": "F64"}, {"shape": None},
    ]  # fmt: skip
    for lie in lies:
        write({"a": good | lie})
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
    write({"a": good}, length=2**63)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    write(b"\xff" * 40)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


def test_changed_header_bytes(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(1)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(header)] = rng.randrange(256)
        file.write_bytes(data)
        message = str(folder)
        try:
            _open_and_read(folder)
        except ModelError as error:  # and nothing else
            message = str(error)
        assert str(folder) in message


def test_file_that_shrinks_to_a_folder(folder: Path) -> None:
    shutil.rmtree(folder / "model.safetensors", ignore_errors=True)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
