"""GGUF files: the header, the weights, the names and the config equal independent readings."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf import GGUFReader, GGUFWriter
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ostinato.errors import CheckpointError, ModelError, ModelNotFoundError, UnsupportedModelError
from ostinato.models import gguf as ours
from ostinato.models import hub
from ostinato.models.checkpoint import Checkpoint, TensorInfo, open_checkpoint

HEADS, KV_HEADS, LAYERS = 4, 2, 2
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "vocab_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The layout that llama.cpp's conversion gives q and k: (half, pair) rows to (pair, half)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def _write(path: Path, arch: str, add: Callable[[GGUFWriter], None]) -> Path:
    writer = GGUFWriter(path, arch)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sizes(writer: GGUFWriter) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(20000.0)
    writer.add_vocab_size(96)


def _export(model: PreTrainedModel, path: Path, arch: str, kind: QType = QType.F32) -> Path:
    """A model as llama.cpp's converter would write it; names are the `gguf` package's."""
    arch_id = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(arch_id, LAYERS)

    def add(writer: GGUFWriter) -> None:
        _sizes(writer)
        for hf, tensor in model.state_dict().items():
            if hf == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            data = tensor.float().numpy()
            if arch == "llama" and "self_attn.q_proj" in hf:
                data = _permute(data, HEADS)
            if arch == "llama" and "self_attn.k_proj" in hf:
                data = _permute(data, KV_HEADS)
            name = names.get_name(hf, try_suffixes=(".weight", ".bias"))
            if data.ndim == 2 and kind != QType.F32:
                writer.add_tensor(
                    name, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind
                )
            else:
                writer.add_tensor(name, np.ascontiguousarray(data))

    return _write(path, arch, add)


def _tiny(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    if kind == "qwen3":
        changes["head_dim"] = 16
    model = cls(config(**SIZES, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a mix-up shows
            parameter.copy_(torch.randn_like(parameter))
    return model


# --- weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_weights_equal_the_original(arch: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = _tiny(arch, **changes)
    checkpoint = open_checkpoint(_export(model, tmp_path / "m.gguf", arch))
    expected = dict(model.state_dict())
    if changes["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    config = checkpoint.config
    assert config["architectures"] == [type(model).__name__]
    assert config["model_type"] == arch
    assert config["tie_word_embeddings"] == changes["tie_word_embeddings"]
    assert config["attention_bias"] == (arch == "qwen2" or changes.get("attention_bias", False))
    assert config["head_dim"] == 16
    assert config["rope_theta"] == 20000.0
    for name, value in SIZES.items():
        assert config[name] == pytest.approx(value), name


def test_weights_equal_what_transformers_reads(tmp_path: Path) -> None:
    path = _export(_tiny("llama", tie_word_embeddings=False), tmp_path / "m.gguf", "llama", QType.Q8_0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = LlamaForCausalLM.from_pretrained(
            tmp_path, gguf_file="m.gguf", dtype=torch.float32
        ).state_dict()
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rows_move_before_they_are_decoded(kind: str, tmp_path: Path) -> None:
    """q and k come out as the original's own quantisation: rows are quantised one by one."""
    model = _tiny("llama")
    checkpoint = open_checkpoint(_export(model, tmp_path / "m.gguf", "llama", QType[kind]))
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{part}.weight"
        packed = gguf.quants.quantize(model.state_dict()[name].numpy(), QType[kind])
        assert checkpoint.tensors[name].dtype == kind
        np.testing.assert_array_equal(
            checkpoint.read(name).numpy(), gguf.quants.dequantize(packed, QType[kind])
        )


@pytest.mark.parametrize("kind", ours.QUANTISED_TYPES)
@pytest.mark.parametrize("rows", [1, 3, 1500])
def test_dequantised_equals_gguf(kind: str, rows: int) -> None:
    """Random bytes: every code, scale, infinity and NaN, in one part and in several."""
    elements, block_bytes = gguf.GGML_QUANT_SIZES[QType[kind]]
    blocks = np.random.default_rng(0).integers(0, 256, (rows, 512 // elements * block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, QType[kind]).reshape(-1)
    found = ours.dequantise(torch.from_numpy(blocks).view(-1), kind)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_native_types_stay(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(4, 64).to(dtype)
    raw = values.view(torch.int16).numpy().view(np.uint8) if dtype == torch.bfloat16 else values.numpy()

    def add(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_tensor("token_embd.weight", raw, raw_dtype=QType[kind])

    checkpoint = open_checkpoint(_write(tmp_path / "m.gguf", "llama", add))
    read = checkpoint.read("model.embed_tokens.weight")
    assert checkpoint.tensors["model.embed_tokens.weight"] == TensorInfo((4, 64), kind)
    assert read.dtype == dtype
    assert torch.equal(read, values)
    assert checkpoint.config["dtype"] == str(dtype).removeprefix("torch.")


def test_unsupported_type_is_named(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_tensor("token_embd.weight", np.zeros((4, 36), np.uint8), raw_dtype=QType.IQ4_NL)

    with pytest.raises(UnsupportedModelError, match=r"token_embd\.weight.*IQ4_NL"):
        open_checkpoint(_write(tmp_path / "m.gguf", "llama", add))


def test_unknown_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_export(_tiny("llama"), tmp_path / "m.gguf", "llama"))
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        checkpoint.read("x")


def test_file_removed_after_opening(tmp_path: Path) -> None:
    path = _export(_tiny("llama"), tmp_path / "m.gguf", "llama")
    checkpoint = open_checkpoint(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("model.norm.weight")


# --- config ----------------------------------------------------------------------------


def _config_of(tmp_path: Path, add: Callable[[GGUFWriter], None], arch: str = "llama") -> Checkpoint:
    def everything(writer: GGUFWriter) -> None:
        add(writer)
        writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))

    return open_checkpoint(_write(tmp_path / "m.gguf", arch, everything))


def test_llama3_rope_factors(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_tensor("rope_freqs.weight", np.array([1, 2, 8.5, 32], np.float32))

    checkpoint = _config_of(tmp_path, add)
    assert checkpoint.config["rope_freq_factors"] == [1.0, 2.0, 8.5, 32.0]
    assert set(checkpoint.tensors) == {"model.embed_tokens.weight"}


def test_rope_scaling(tmp_path: Path) -> None:
    def linear(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    def none(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)

    assert _config_of(tmp_path, linear).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert _config_of(tmp_path, yarn).config["rope_scaling"] == {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    assert _config_of(tmp_path, none).config["rope_scaling"] is None
    assert _config_of(tmp_path, _sizes).config["rope_scaling"] is None


def test_further_keys(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_key_length(32)
        writer.add_value_length(32)
        writer.add_rope_dimension_count(16)
        writer.add_sliding_window(48)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(7)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 2)

    checkpoint = _config_of(tmp_path, add)
    expected = {
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "sliding_window": 48,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: checkpoint.config[key] for key in expected} == expected
    assert checkpoint.generation_config == {"eos_token_id": [2, 7]}


def test_one_number_a_layer(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_array("llama.attention.key_length", [16, 16])

    assert _config_of(tmp_path, add).config["head_dim"] == 16


def test_unknown_architecture_keeps_its_name(tmp_path: Path) -> None:
    assert _config_of(tmp_path, lambda _: None, "mamba").config == {
        "architectures": ["mamba"],
        "model_type": "mamba",
    }


def test_missing_and_wrong_metadata(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"llama\.embedding_length is missing"):
        _config_of(tmp_path, lambda _: None)

    def wrong(writer: GGUFWriter) -> None:
        writer.add_string("llama.embedding_length", "many")

    with pytest.raises(CheckpointError, match=r"llama\.embedding_length must be int, found many"):
        _config_of(tmp_path, wrong)

    def split(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_uint16("split.count", 3)

    with pytest.raises(UnsupportedModelError, match="merge"):
        _config_of(tmp_path, split)


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((60, 64), np.float32))

    with pytest.raises(CheckpointError, match="60 rows for 4 heads"):
        _config_of(tmp_path, add).read("model.layers.0.self_attn.q_proj.weight")


# --- the header ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file with every kind of value."""

    def add(writer: GGUFWriter) -> None:
        _sizes(writer)
        writer.add_custom_alignment(64)
        for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -300), ("uint32", 2**32 - 1),
                            ("int32", -5), ("uint64", 2**63), ("int64", -(2**62)), ("float32", 0.1),
                            ("float64", 0.1), ("bool", True), ("string", "größe 🎉")):  # fmt: skip
            getattr(writer, f"add_{kind}")(f"x.{kind}", value)
        writer.add_array("x.strings", ["", "a", "日本"])
        writer.add_array("x.floats", [0.5, -1.0])
        writer.add_array("x.ints", [1, -2, 3])
        writer.add_array("x.bools", [True, False])
        writer.add_tensor("token_embd.weight", np.ones((8, 64), np.float32))
        writer.add_tensor("blk.0.attn_norm.weight", np.ones(7, np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.ones((64, 64), np.float16))
        writer.add_tensor("blk.0.attn_k.weight", np.zeros((4, 36), np.uint8), raw_dtype=QType.Q4_0)
        writer.add_tensor("three.d", np.zeros((2, 3, 32), np.float32))

    return _write(tmp_path_factory.mktemp("rich") / "rich.gguf", "llama", add)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic) else value


def test_header_equals_gguf_reader(rich: Path) -> None:
    theirs, mine = GGUFReader(rich), ours.read_header(rich)
    fields = {k: _plain(f.contents()) for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert dict(mine.metadata) == fields
    assert mine.metadata["x.string"] == "größe 🎉"
    assert [t.name for t in theirs.tensors] == list(mine.tensors)
    for tensor in theirs.tensors:
        found = mine.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.type, found.offset, found.nbytes) == (
            tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes,
        )  # fmt: skip


def _attempt(path: Path) -> None:
    """Open and read everything; only the errors made for it may come out, and they name the file."""
    message = path.name
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except ModelError as error:
        message = str(error)
    assert path.name in message


def test_cut_anywhere(rich: Path, tmp_path: Path) -> None:
    whole, path = rich.read_bytes(), tmp_path / "cut.gguf"
    header_end = min(t.offset for t in ours.read_header(rich).tensors.values())
    for end in [*range(0, header_end, 2), *range(header_end, len(whole), 197), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_checkpoint(path)


def test_changed_header_bytes(rich: Path, tmp_path: Path) -> None:
    whole, path = rich.read_bytes(), tmp_path / "flip.gguf"
    header_end = min(t.offset for t in ours.read_header(rich).tensors.values())
    rng = random.Random(2)
    for place in range(0, header_end, 2):
        data = bytearray(whole)
        data[place] = (data[place] + rng.choice([1, 7, 128, 255])) % 256
        path.write_bytes(data)
        _attempt(path)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(2, 5)):
            data[rng.randrange(header_end)] = rng.choice([0, 1, 8, 9, 127, 128, 255])
        path.write_bytes(data)
        _attempt(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"PK\3\4" + bytes(100), "starts with"),
        (b"GGUF" + bytes(3) + b"\3" + bytes(40), "byte order"),
        (b"GGUF\1\0\0\0" + bytes(40), "version 1"),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, "ends early|runs over the end"),
        (b"GGUF\3\0\0\0" + bytes(16), "general.architecture"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


# --- the default model -----------------------------------------------------------------


@pytest.fixture(scope="module")
def default() -> Checkpoint:
    try:
        path = hub.resolve(None)
    except ModelNotFoundError as error:
        pytest.skip(f"the default model is not available: {error}")
    return open_checkpoint(path)


def test_default_model_config(default: Checkpoint) -> None:
    expected = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152,
        "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True, "attention_bias": False,
        "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    assert {key: default.config[key] for key in expected} == expected


def test_default_model_shapes_are_the_configs(default: Checkpoint) -> None:
    config = LlamaConfig(
        **{k: v for k, v in default.config.items() if k not in ("architectures", "model_type", "dtype")}
    )
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    assert {name: info.shape for name, info in default.tensors.items()} == expected


def test_default_model_weights(default: Checkpoint) -> None:
    """Plausible numbers in the right shape for one tensor of each type."""
    for name in ("model.embed_tokens.weight", "model.layers.29.self_attn.k_proj.weight", "model.norm.weight"):
        tensor = default.read(name)
        assert tuple(tensor.shape) == default.tensors[name].shape
        tensor = tensor[:1000]
        assert tensor.isfinite().all()
        assert 0.01 < tensor.std() < 20


@pytest.mark.slow
def test_default_model_speaks(default: Checkpoint) -> None:
    """Weights, layout, config and tokenizer together: transformers' model with what was read answers sensibly."""
    config = LlamaConfig(
        **{k: v for k, v in default.config.items() if k not in ("architectures", "model_type", "dtype")}
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: default.read(name) for name in default.tensors}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not weights
    tokenizer = default.load_tokenizer()
    ids = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    answer = tokenizer.encode("The capital of France is Paris.<|im_end|>")
    # One pass: each of the answer's tokens must be the most likely one after those before it.
    with torch.inference_mode():
        logits = model(torch.tensor([ids + answer])).logits[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == answer
