"""GGUF files as checkpoints: header, Hugging Face names and config, dequantised weights.

The header is read here rather than by `gguf.GGUFReader`, which builds one numpy array for each
of a vocabulary's strings (seconds at start-up) and trusts every length it finds; a test holds
the two equal. Quantised blocks are decoded by the `gguf` package, the commonest types by faster
code that a test holds equal to it, bit for bit.

Little-endian files of version 2 and 3. No I-quants, no split files. torch is imported only
when a tensor is read.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UnsupportedModelError
from .checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ..tokenizer import Tokenizer

__all__ = ["GGUFCheckpoint", "GGUFFile", "GGUFTensor", "read_header"]

NATIVE_TYPES = ("F32", "F16", "BF16")
QUANTISED_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

_MAX_DIMS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type to `struct` format."""
_STRING, _ARRAY = 8, 9
_PART = 1 << 18
"""Elements that one thread decodes at a time: the intermediates stay in its cache."""
_INLINE = 16
"""Parts that are decoded in less time than threads take to start."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in the file."""

    name: str
    """GGUF's own name."""
    shape: tuple[int, ...]
    """PyTorch's order: rows first."""
    type: str
    offset: int
    """Bytes from the start of the file."""
    nbytes: int
    row_bytes: int
    """Bytes of one row (the last dimension)."""


@dataclass(frozen=True)
class GGUFFile:
    """A header: everything but the weights."""

    path: Path
    metadata: Mapping[str, Any]
    """Strings, numbers, bools, and lists of them."""
    tensors: Mapping[str, GGUFTensor]
    """By GGUF name."""


# --- the header ------------------------------------------------------------------------


class _Cursor:
    """Reads the header front to back; running over the end of the file is a `CheckpointError`."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a whole GGUF file: {what} (at byte {self.at} of {self.size})"
        )

    def unpack(self, fmt: str, count: int = 1) -> tuple[Any, ...]:
        full = f"<{count}{fmt}"
        end = self.at + count * struct.calcsize("<" + fmt)
        if end > self.size:
            raise self.fail("the header ends early")
        values = struct.unpack_from(full, self.data, self.at)
        self.at = end
        return values

    def u32(self) -> int:
        return int(self.unpack("I")[0])

    def u64(self) -> int:
        return int(self.unpack("Q")[0])

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        # Inlined: a vocabulary has 150,000 of these.
        data, at, size = self.data, self.at, self.size
        length = struct.Struct("<Q").unpack_from
        out = []
        for _ in range(count):
            end = at + 8
            if end <= size:
                end += length(data, at)[0]
            if end > size:
                self.at = at
                raise self.fail("a string runs over the end")
            out.append(data[at + 8 : end].decode("utf-8", "replace"))
            at = end
        self.at = at
        return out

    def value(self) -> Any:
        kind = self.u32()
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.u32(), self.u64()
            if item == _STRING:
                return self.strings(count)
            if item in _SCALARS:
                if count > self.size:  # before struct sees a count beyond its own limits
                    raise self.fail(f"an array claims {count} elements")
                return list(self.unpack(_SCALARS[item], count))
            raise self.fail(f"array element type {item} is unknown")
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        raise self.fail(f"value type {kind} is unknown")


def read_header(path: Path) -> GGUFFile:
    """Metadata and tensor places of a GGUF file, checked against the file's size.

    Raises:
        CheckpointError: damaged: it ends early, or a length, type or place is impossible.
        UnsupportedModelError: a version, byte order or tensor type that is not read.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise CheckpointError(f"{path} is not a GGUF file: it has only {path.stat().st_size} bytes")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    with data:
        return _parse(_Cursor(data, path))


def _parse(cursor: _Cursor) -> GGUFFile:
    path = cursor.path
    if (magic := cursor.data[:4]) != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    cursor.at = 4
    version = cursor.u32()
    if version not in (2, 3):
        hint = " (byte order swapped)" if version & 0xFFFF == 0 else ""
        raise UnsupportedModelError(f"{path}: GGUF version {version}{hint}, expected 2 or 3, little-endian")
    num_tensors, num_keys = cursor.u64(), cursor.u64()
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value()
    places = []
    for _ in range(num_tensors):
        name, num_dims = cursor.string(), cursor.u32()
        if num_dims > _MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} claims {num_dims} dimensions")
        dims = cursor.unpack("Q", num_dims)
        places.append((name, tuple(int(d) for d in reversed(dims)), cursor.u32(), cursor.u64()))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail(f"alignment {alignment!r} is not a power of two")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            f"{path} is one of {metadata['split.count']} parts; merge them with llama.cpp's `llama-gguf-split --merge`"
        )
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in places:
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} appears twice")
        tensors[name] = _place(cursor, name, shape, type_id, offset, start, alignment)
    _check_ranges(cursor, tensors)
    return GGUFFile(path, metadata, tensors)


def _place(
    cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int, offset: int, start: int, alignment: int
) -> GGUFTensor:
    """One tensor's place; block sizes are the `gguf` package's."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError:
        raise UnsupportedModelError(
            f"{cursor.path}: tensor {name!r} has the unknown type {type_id}"
        ) from None
    if kind.name not in NATIVE_TYPES + QUANTISED_TYPES:
        raise UnsupportedModelError(
            f"{cursor.path}: tensor {name!r} has type {kind.name}, which is not supported; "
            f"use a file with {', '.join(NATIVE_TYPES + QUANTISED_TYPES)}"
        )
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or 0 in shape or shape[-1] % block:
        raise cursor.fail(
            f"tensor {name!r} has shape {shape}, rows of {kind.name} hold whole blocks of {block}"
        )
    if offset % alignment:
        raise cursor.fail(f"tensor {name!r} is at offset {offset}, not a multiple of {alignment}")
    row_bytes = shape[-1] // block * block_bytes
    rows = 1
    for dim in shape[:-1]:
        rows *= dim
    return GGUFTensor(name, shape, kind.name, start + offset, rows * row_bytes, row_bytes)


def _check_ranges(cursor: _Cursor, tensors: Mapping[str, GGUFTensor]) -> None:
    before = None
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        end = tensor.offset + tensor.nbytes
        if end > cursor.size:
            raise CheckpointError(
                f"{cursor.path} is cut short: tensor {tensor.name!r} {tensor.shape} {tensor.type} ends at byte "
                f"{end}, the file at {cursor.size}; download it again"
            )
        if before is not None and tensor.offset < before.offset + before.nbytes:
            raise CheckpointError(f"{cursor.path}: tensors {before.name!r} and {tensor.name!r} overlap")
        before = tensor


# --- names -----------------------------------------------------------------------------

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"


def hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name that is not known stays as it is."""
    if match := _BLOCK_NAME.fullmatch(name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER[part]}.{kind}" if part in _LAYER else name
    part, _, kind = name.rpartition(".")
    return f"{_TOP[part]}.{kind}" if part in _TOP and kind in ("weight", "bias") else name


# --- config ----------------------------------------------------------------------------

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "mistral3": ("Ministral3ForCausalLM", "ministral3"),
}
_PERMUTED = ("llama",)
"""Architectures whose q and k rows GGUF stores pairwise interleaved, for its own rotary kernel."""


class _Metadata:
    """Typed look-ups; a value of the wrong kind is a `CheckpointError` naming file and key."""

    def __init__(self, file: GGUFFile) -> None:
        self.path, self.values = file.path, file.metadata
        arch = file.metadata.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise CheckpointError(
                f"{self.path}: metadata has no general.architecture; is it a language model?"
            )
        self.arch = arch

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """`{arch}.{key}`, or `key` itself if it starts with a dot."""
        full = key[1:] if key.startswith(".") else f"{self.arch}.{key}"
        value = self.values.get(full, default)
        if value is default:
            return default
        # Some converters write a list, one number a layer; equal ones are one number.
        if isinstance(value, list) and kind in (int, float) and value and len(set(value)) == 1:
            value = value[0]
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(
                f"{self.path}: metadata {full} must be {kind.__name__}, found {str(value)[:80]}"
            )
        return value

    def need(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata {self.arch}.{key} is missing")
        return value


def _config(file: GGUFFile) -> dict[str, Any]:
    """config.json's keys out of the metadata; `rope_freq_factors` is added by the caller."""
    meta = _Metadata(file)
    name, model_type = _ARCHITECTURES.get(meta.arch, (meta.arch, meta.arch))
    config: dict[str, Any] = {"architectures": [name], "model_type": model_type}
    if meta.arch not in _ARCHITECTURES:
        return config  # the registry refuses it by name; its metadata need not have these keys
    hidden, heads = meta.need("embedding_length", int), meta.need("attention.head_count", int)
    if heads <= 0 or hidden <= 0:
        raise CheckpointError(
            f"{file.path}: embedding_length {hidden} and head_count {heads} must be positive"
        )
    head_dim = meta.get("attention.key_length", int, hidden // heads)
    if meta.get("attention.value_length", int, head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path}: attention keys and values have different lengths")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    config |= {
        "hidden_size": hidden,
        "num_hidden_layers": meta.need("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": meta.need("feed_forward_length", int),
        "vocab_size": embedding.shape[0],
        "rms_norm_eps": meta.get("attention.layer_norm_rms_epsilon", float, 1e-5),
        "rope_theta": meta.get("rope.freq_base", float, 10000.0),
        "max_position_embeddings": meta.need("context_length", int),
        "rope_scaling": _rope_scaling(meta),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "sliding_window": meta.get("attention.sliding_window", int),
        "bos_token_id": meta.get(".tokenizer.ggml.bos_token_id", int),
        "eos_token_id": meta.get(".tokenizer.ggml.eos_token_id", int),
        "dtype": _dtype(file),
    }
    rotary = meta.get("rope.dimension_count", int, head_dim)
    if rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    if (experts := meta.get("expert_count", int, 0)) > 0:
        config["num_local_experts"] = experts
    return config


def _rope_scaling(meta: _Metadata) -> dict[str, Any] | None:
    kind = meta.get("rope.scaling.type", str, "none")
    factor = meta.get("rope.scaling.factor", float) or meta.get("rope.scale_linear", float)
    if kind == "none" and factor is not None and meta.get("rope.scaling.type", str) is None:
        kind = "linear"  # files older than rope.scaling.type
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    scaling: dict[str, Any] = {"rope_type": kind}
    if factor is not None:
        scaling["factor"] = factor
    original = meta.get("rope.scaling.original_context_length", int)
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _dtype(file: GGUFFile) -> str:
    """The type that most weights are meant to be computed in."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
    largest = max(sizes, key=lambda kind: sizes[kind], default="F32")
    # The supported families were trained in bfloat16, and float16 overflows in some of them.
    return {"F32": "float32", "F16": "float16"}.get(largest, "bfloat16")


def _generation_config(file: GGUFFile) -> dict[str, Any]:
    """End-of-sequence ids: end of text, of turn and of message, whichever the file names."""
    eos = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(i for i in eos if isinstance(i, int)))
    return {"eos_token_id": ids} if len(ids) > 1 else {"eos_token_id": ids[0]} if ids else {}


# --- the checkpoint --------------------------------------------------------------------


class GGUFCheckpoint(Checkpoint):
    """A .gguf file, read as if it were a Hugging Face folder."""

    def __init__(self, path: Path) -> None:
        file = read_header(path)
        self.path = path
        self._file = file
        self._data: mmap.mmap | None = None
        config = _config(file)
        if _ROPE_FREQS in file.tensors:
            config["rope_freq_factors"] = self._load(file.tensors[_ROPE_FREQS]).float().tolist()
        self.config = config
        self.generation_config = _generation_config(file)
        self._places = {hf_name(t.name): t for t in file.tensors.values() if t.name != _ROPE_FREQS}
        self.tensors = {name: TensorInfo(t.shape, t.type) for name, t in self._places.items()}
        self._rows_permuted = config["model_type"] in _PERMUTED

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's own key-value pairs."""
        return self._file.metadata

    def read(self, name: str) -> torch.Tensor:
        self._info(name)
        place = self._places[name]
        heads = self._interleaved_heads(place.name)
        if heads and (place.shape[0] % (2 * heads)):
            raise CheckpointError(f"{self.path}: {place.name} has {place.shape[0]} rows for {heads} heads")
        return self._load(place, heads)

    def load_tokenizer(self) -> Tokenizer:
        from ..tokenizer import Tokenizer

        return Tokenizer.from_gguf(self._file.metadata, str(self.path))

    def _interleaved_heads(self, name: str) -> int:
        if not self._rows_permuted:
            return 0
        if re.fullmatch(r"blk\.\d+\.attn_q\.(weight|bias)", name):
            return int(self.config["num_attention_heads"])
        if re.fullmatch(r"blk\.\d+\.attn_k\.(weight|bias)", name):
            return int(self.config["num_key_value_heads"])
        return 0

    def _load(self, place: GGUFTensor, heads: int = 0) -> torch.Tensor:
        """Dequantised where necessary; with `heads`, rows go from (pair, half) to (half, pair) order."""
        import torch

        try:
            if self._data is None:
                with self.path.open("rb") as file:
                    # A private copy-on-write map: torch wants memory that it could write to.
                    self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            raw = torch.frombuffer(self._data, dtype=torch.uint8, count=place.nbytes, offset=place.offset)
        except (OSError, ValueError) as error:  # the file changed since it was opened
            raise CheckpointError(f"{self.path}: {place.name} cannot be read: {error}") from error
        if heads:
            # One row is one unit in memory, so it moves before it is decoded.
            unit = place.row_bytes if len(place.shape) > 1 else place.row_bytes // place.shape[0]
            raw = raw.view(heads, -1, 2, unit).transpose(1, 2).reshape(-1)
        if place.type in NATIVE_TYPES:
            native = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[place.type]
            return raw.view(native).view(place.shape)
        return dequantise(raw, place.type).view(place.shape)


# --- quantised blocks ------------------------------------------------------------------


def dequantise(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """Whole blocks of a quantised type, uint8 [bytes], to float32 [elements].

    numpy on a few threads of our own: torch's would wait for each other at every small
    operation, which on a busy machine takes many times as long.
    """
    import gguf
    import numpy as np
    import torch

    qtype = gguf.GGMLQuantizationType[kind]
    elements, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    blocks = raw.view(-1, block_bytes).numpy()
    out = np.empty((len(blocks), elements), np.float32)
    fast = _FAST.get(kind)
    step = _PART // elements

    def decode(start: int) -> None:
        part = slice(start, start + step)
        # Damaged scales are for the model to show, not for numpy to warn about.
        with np.errstate(all="ignore"):
            if fast is not None:
                fast(blocks[part], out[part])
            else:
                # One long row: the library loops in Python over every 16 rows.
                out[part] = gguf.quants.dequantize(blocks[part].reshape(1, -1), qtype).reshape(-1, elements)

    starts = range(0, len(blocks), step)
    if len(starts) <= _INLINE:
        for start in starts:
            decode(start)
    else:
        # numpy lets go of the interpreter lock while it computes.
        with ThreadPoolExecutor() as pool:
            list(pool.map(decode, starts))
    return torch.from_numpy(out).view(-1)


def _half(blocks: NDArray[np.uint8], at: int) -> NDArray[np.float32]:
    """The float16 at byte `at` of each block, as float32 [blocks, 1]."""
    import numpy as np

    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _q8_0(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Block of 32: scale f16, 32 int8."""
    import numpy as np

    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _q4_0(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Block of 32: scale f16, 16 bytes with element i low and i + 16 high; zero is 8."""
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Block of 32: scale f16, minimum f16, 16 bytes with element i low and i + 16 high."""
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _nibbles(packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


_FAST: dict[str, Callable[[Any, Any], None]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
