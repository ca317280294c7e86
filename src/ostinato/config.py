"""Options: what a user may say, checked and resolved once into one frozen config.

Names follow vLLM. An unknown option is an error that names the nearest known one. Values that
depend on the model or the machine are filled in by `resolve`, which also records where each
value came from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from .errors import ConfigError, UnknownOptionError
from .graphs.plan import DEFAULT_MAX_TOKENS, CudaGraphMode, default_capture_sizes

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}

_COMPILATION = (
    "cudagraph_mode",
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "max_cudagraph_prefill_tokens",
)


@dataclass(frozen=True)
class EngineOptions:
    """What the user may set; None means "decide for me". Checked by `resolve`."""

    model: str | None = None
    """Folder, `.gguf` file or hub id; None: SmolLM2-135M-Instruct."""
    tokenizer: str | None = None
    """Folder or file to take the tokenizer from; None: the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    load_format: Literal["auto", "dummy"] = "auto"
    """"dummy": random weights; `model` is then a name in `ostinato.models.shapes` or a folder."""
    skip_tokenizer_init: bool = False
    """Load no tokenizer: prompts are token ids, and outputs have no text."""
    dtype: str = "auto"
    """"auto": the model's own on a GPU (bfloat16 where it is wider), float32 on a CPU."""
    quantization: str | None = None
    device: str = "auto"
    """"cuda", "cpu" or "auto"."""
    seed: int = 0
    """Seeds requests that bring no seed of their own."""
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.92
    """Share of the GPU's memory that the engine may use in total."""
    kv_cache_memory_bytes: int | None = None
    """KV cache size; None: what `gpu_memory_utilization` leaves, or up to 1 GiB on a CPU."""
    num_gpu_blocks_override: int | None = None
    """KV blocks, whatever memory would allow."""
    block_size: int = 16
    """Tokens in a KV block."""
    max_model_len: int | None = None
    """Longest prompt plus output; None: the model's, or what fits the KV cache."""
    max_num_seqs: int | None = None
    """Most sequences in one step; None: 256 on a GPU, 32 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; None: 8192 on a GPU, 1024 on a CPU."""
    enable_prefix_caching: bool = True
    enable_cuda_graph: bool = True
    enforce_eager: bool = False
    """No graphs: the opposite of `enable_cuda_graph`."""
    compilation_config: Mapping[str, Any] = field(default_factory=dict)
    """`cudagraph_mode`, `cudagraph_capture_sizes`, `max_cudagraph_capture_size` as in vLLM, and
    `max_cudagraph_prefill_tokens`: steps with more prompt tokens run eagerly."""
    cudagraph_capture: Literal["lazy", "startup", "profile"] = "lazy"
    """When to capture: as traffic asks for keys, the whole ladder at the start, or at the start what
    the last run's traffic used."""
    cudagraph_min_hits: int = 2
    """A key is captured at this hit; the ones before it run eagerly at the padded size."""
    cudagraph_memory_budget: int | float = 256 << 20
    """Most device memory for executables: bytes, or a share of the GPU's memory if it is a float."""
    cudagraph_verify: bool = True
    """Compare each graph with eager on scratch rows before it serves, and time both."""
    cudagraph_verify_every: int = 0
    """Run one live replay in this many both ways and compare; 0: none."""
    fail_on_mismatch: bool = False
    """Raise `MismatchError` where a graph differs from eager, instead of quarantining its key."""
    on_capture_error: Literal["eager", "raise"] = "eager"
    fail_on_fallback: bool = False
    """Raise `FallbackError` on a step that has no graph; the steps before capture excepted."""
    pipeline_depth: int | None = None
    """Steps in flight before the first one's tokens are read, 1 to 3; None: 2 on a GPU, 1 on a CPU."""
    strict: bool = False
    """Check the graph contract at every step (CPU): slow, for tests."""

    @classmethod
    def from_kwargs(cls, values: Mapping[str, Any], where: str = "LLM") -> EngineOptions:
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise UnknownOptionError(name, known, where)
        return cls(**values)


@dataclass(frozen=True)
class EngineConfig:
    """Options after resolution: every value decided, nothing left to guess."""

    dtype: torch.dtype
    device: torch.device
    seed: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    num_blocks_override: int | None
    block_size: int
    max_model_len: int
    """Before the KV cache is sized; the engine lowers it if it was not asked for."""
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    cudagraph_mode: CudaGraphMode
    capture_sizes: tuple[int, ...]
    """Decode batch sizes that may have a graph, ascending."""
    max_prefill_tokens: int
    """Steps with more tokens than this have no graph unless they are pure decodes."""
    cudagraph_capture: Literal["lazy", "startup", "profile"]
    cudagraph_min_hits: int
    cudagraph_memory_budget: int
    """Bytes"""
    cudagraph_verify: bool
    cudagraph_verify_every: int
    fail_on_mismatch: bool
    on_capture_error: Literal["eager", "raise"]
    fail_on_fallback: bool
    pipeline_depth: int
    strict: bool
    source: Mapping[str, str]
    """Where each value came from: "user", "default", "model" or "device"."""

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_model_len // self.block_size)

    def with_max_model_len(self, length: int) -> EngineConfig:
        return replace(self, max_model_len=length, source={**self.source, "max_model_len": "KV cache"})


def resolve(
    options: EngineOptions, *, model_dtype: str | None, model_positions: int, graphs_anywhere: bool = False
) -> EngineConfig:
    """Check the options and fill in what depends on the model and the machine.

    Args:
        options: the user's.
        model_dtype: `torch_dtype` or `dtype` of the model's config, if it names one.
        model_positions: context that the model was made for, in tokens.
        graphs_anywhere: graphs do not need a GPU, since something else than CUDA makes them.

    Raises:
        ConfigError: a value that cannot work; the message says what to change.
    """
    source: dict[str, str] = {}
    given = {f.name for f in fields(options) if getattr(options, f.name) != _default(f)}

    def pick(name: str, default: Any, origin: str = "default") -> Any:
        value = getattr(options, name)
        source[name] = "user" if name in given else origin
        return default if value is None else value

    device = _device(options.device)
    source["device"] = "user" if "device" in given else "device"
    on_gpu = device.type == "cuda"
    if options.tensor_parallel_size != 1:
        raise ConfigError(f"tensor_parallel_size={options.tensor_parallel_size} is not supported yet; use 1")
    if options.quantization is not None:
        raise ConfigError(
            f"quantization={options.quantization!r} is not supported yet; leave it None "
            "(quantised GGUF files load without it, and are dequantised)"
        )
    dtype = _dtype(options.dtype, model_dtype, on_gpu)
    source["dtype"] = "user" if "dtype" in given else "model" if on_gpu else "device"

    block_size = _positive("block_size", pick("block_size", 16))
    if block_size & (block_size - 1) or not 8 <= block_size <= 256:
        raise ConfigError(f"block_size must be a power of two from 8 to 256, got {block_size}")
    length = _positive("max_model_len", pick("max_model_len", model_positions, "model"))
    if length > model_positions:
        raise ConfigError(
            f"max_model_len={length} is more than the {model_positions} positions that the model was made for; "
            f"use at most {model_positions}"
        )
    if length < 2:
        raise ConfigError(
            f"max_model_len must be at least 2 (one prompt token and one new one), got {length}"
        )
    seqs = _positive("max_num_seqs", pick("max_num_seqs", 256 if on_gpu else 32))
    tokens = pick("max_num_batched_tokens", max(8192 if on_gpu else 1024, seqs))
    _positive("max_num_batched_tokens", tokens)
    if tokens < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} is less than max_num_seqs={seqs}: a decode step would not fit; "
            "raise the first or lower the second"
        )
    share = options.gpu_memory_utilization
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {share}")
    for name in ("kv_cache_memory_bytes", "num_gpu_blocks_override"):
        if getattr(options, name) is not None:
            _positive(name, getattr(options, name))
    depth = _positive("pipeline_depth", pick("pipeline_depth", 2 if on_gpu else 1))
    if depth > 3:
        raise ConfigError(f"pipeline_depth must be 1, 2 or 3, got {depth}")
    if options.load_format not in ("auto", "dummy"):
        raise ConfigError(f"load_format must be 'auto' or 'dummy', got {options.load_format!r}")
    if _positive("cudagraph_min_hits", options.cudagraph_min_hits) < 2:
        raise ConfigError(
            "cudagraph_min_hits must be at least 2: a key's first hit runs eagerly and loads its kernels"
        )
    if options.on_capture_error not in ("eager", "raise"):
        raise ConfigError(f"on_capture_error must be 'eager' or 'raise', got {options.on_capture_error!r}")
    if options.strict and on_gpu:
        raise ConfigError("strict=True checks the contract on a CPU; use device='cpu' with it")
    if options.cudagraph_capture not in ("lazy", "startup", "profile"):
        raise ConfigError(
            f"cudagraph_capture must be 'lazy', 'startup' or 'profile', got {options.cudagraph_capture!r}"
        )
    every = options.cudagraph_verify_every
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ConfigError(f"cudagraph_verify_every must be a whole number, 0 for never, got {every!r}")
    mode, sizes = _graphs(options, seqs, on_gpu or graphs_anywhere)
    prefill = options.compilation_config.get("max_cudagraph_prefill_tokens")
    if prefill is not None:
        _positive("max_cudagraph_prefill_tokens", prefill)
    for name, key in (("cudagraph_mode", "cudagraph_mode"), ("capture_sizes", "cudagraph_capture_sizes")):
        source[name] = "user" if key in options.compilation_config else "default"
    if source["capture_sizes"] == "default" and "max_cudagraph_capture_size" in options.compilation_config:
        source["capture_sizes"] = "user"
    source["max_prefill_tokens"] = "default" if prefill is None else "user"
    return EngineConfig(
        dtype=dtype,
        device=device,
        seed=pick("seed", 0),
        gpu_memory_utilization=pick("gpu_memory_utilization", 0.92),
        kv_cache_memory_bytes=pick("kv_cache_memory_bytes", None),
        num_blocks_override=pick("num_gpu_blocks_override", None),
        block_size=block_size,
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        enable_prefix_caching=pick("enable_prefix_caching", True),
        cudagraph_mode=mode,
        capture_sizes=sizes,
        max_prefill_tokens=min(prefill or DEFAULT_MAX_TOKENS, tokens),
        cudagraph_capture=pick("cudagraph_capture", "lazy"),
        cudagraph_memory_budget=_budget(pick("cudagraph_memory_budget", 256 << 20), on_gpu),
        cudagraph_verify=pick("cudagraph_verify", True),
        cudagraph_verify_every=pick("cudagraph_verify_every", 0),
        fail_on_mismatch=pick("fail_on_mismatch", False),
        cudagraph_min_hits=pick("cudagraph_min_hits", 2),
        on_capture_error=pick("on_capture_error", "eager"),
        fail_on_fallback=pick("fail_on_fallback", False),
        pipeline_depth=depth,
        strict=pick("strict", False),
        source=source,
    )


def _default(f: Any) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")
    return value


def _budget(value: int | float, on_gpu: bool) -> int:
    """Bytes of a budget given in bytes or as a share of the GPU's memory."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(
            f"cudagraph_memory_budget must be positive bytes or a share in (0, 1], got {value!r}"
        )
    if isinstance(value, int):
        return value
    if value > 1.0:
        raise ConfigError(f"cudagraph_memory_budget={value} is a float above 1: give bytes as an integer")
    return int(value * torch.cuda.mem_get_info()[1]) if on_gpu else 256 << 20


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cuda", "cpu"):
        raise ConfigError(f"device must be 'auto', 'cuda' or 'cpu', got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device='cuda', but torch finds no GPU; use device='auto' or install a CUDA build of torch"
        )
    return torch.device(name)


def _dtype(name: str, model_dtype: str | None, on_gpu: bool) -> torch.dtype:
    if name == "auto":
        if not on_gpu:
            return torch.float32
        own = DTYPES.get(str(model_dtype).removeprefix("torch."), torch.bfloat16)
        return torch.bfloat16 if own is torch.float32 else own
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {name!r}")
    dtype = DTYPES[name]
    if not on_gpu and dtype is torch.float16:
        raise ConfigError("dtype='float16' is not supported on a CPU; use 'float32' or 'bfloat16'")
    return dtype


def _graphs(options: EngineOptions, max_seqs: int, possible: bool) -> tuple[CudaGraphMode, tuple[int, ...]]:
    given = dict(options.compilation_config)
    for name in given:
        if name not in _COMPILATION:
            raise UnknownOptionError(name, _COMPILATION, "compilation_config")
    for flag in ("enable_cuda_graph", "enforce_eager"):
        if not isinstance(getattr(options, flag), bool):
            raise ConfigError(f"{flag} must be True or False, got {getattr(options, flag)!r}")
    wanted = given.get("cudagraph_mode")
    try:
        mode = CudaGraphMode(getattr(wanted, "value", wanted) or "FULL")
    except ValueError:
        if wanted in ("PIECEWISE", "FULL_AND_PIECEWISE"):
            raise ConfigError(
                f"cudagraph_mode={wanted!r} is refused: ostinato captures whole steps; use 'FULL' or 'FULL_DECODE_ONLY'"
            ) from None
        known = ", ".join(m.value for m in CudaGraphMode)
        raise ConfigError(f"cudagraph_mode must be one of {known}, got {wanted!r}") from None
    if options.enforce_eager or not options.enable_cuda_graph:
        if wanted not in (None, "NONE"):
            raise ConfigError(
                f"cudagraph_mode={wanted!r} contradicts enforce_eager=True; drop one of the two"
            )
        mode = CudaGraphMode.NONE
    if not possible:
        mode = CudaGraphMode.NONE  # the same program runs everywhere; `explain` says why
    return mode, _capture_sizes(given, max_seqs)


def _capture_sizes(given: Mapping[str, Any], max_seqs: int) -> tuple[int, ...]:
    limit = given.get("max_cudagraph_capture_size")
    if limit is not None:
        _positive("max_cudagraph_capture_size", limit)
    sizes: Sequence[int] | None = given.get("cudagraph_capture_sizes")
    if sizes is None:
        return default_capture_sizes(min(max_seqs, limit or max_seqs))
    if isinstance(sizes, (str, bytes)) or not sizes:
        raise ConfigError(f"cudagraph_capture_sizes must be a list of batch sizes, got {sizes!r}")
    for size in sizes:
        _positive("cudagraph_capture_sizes", size)
    unused = sorted(size for size in sizes if size > max_seqs)
    # A size above the largest batch still serves the batches below it, at the largest batch's size.
    kept = {min(size, max_seqs) for size in sizes if limit is None or size <= limit}
    if unused:
        logger.warning(
            "cudagraph_capture_sizes %s are above max_num_seqs=%d and become %d", unused, max_seqs, max_seqs
        )
    return tuple(sorted(kept))


def available_memory() -> int:
    """Bytes of main memory that can still be taken."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
