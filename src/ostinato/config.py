"""Options: what a user may say, checked and resolved once into one frozen config.

Names follow vLLM. An unknown option is an error that names the nearest known one. Values that
depend on the model or the machine are filled in by `resolve`, which also records where each
value came from.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from .errors import ConfigError
from .graphs.plan import DEFAULT_MAX_TOKENS, CudaGraphMode, default_capture_sizes
from .types import check_names, real, shown, whole

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}

_COMPILATION: Mapping[str, Any] = {
    "cudagraph_mode": str | CudaGraphMode | None,
    "cudagraph_capture_sizes": Sequence[int] | None,
    "max_cudagraph_capture_size": int | None,
    "max_cudagraph_prefill_tokens": int | None,
}
"""Keys of `compilation_config`, and what their values are."""

MAX_NUM_SEQS = 65_536
MAX_NUM_BATCHED_TOKENS = 2**22
MAX_MODEL_LEN = 2**27

_BOUNDS: Mapping[str, tuple[int, int]] = {
    "seed": (-(2**63), 2**63 - 1),
    "kv_cache_memory_bytes": (1, 2**62),
    "num_gpu_blocks_override": (1, 2**31 - 1),
    "max_model_len": (2, MAX_MODEL_LEN),
    "max_num_seqs": (1, MAX_NUM_SEQS),
    "max_num_batched_tokens": (1, MAX_NUM_BATCHED_TOKENS),
    "cudagraph_min_hits": (2, 2**31 - 1),
    "cudagraph_verify_every": (0, 2**31 - 1),
    "pipeline_depth": (1, 3),
    "max_cudagraph_capture_size": (1, 2**31 - 1),
    "max_cudagraph_prefill_tokens": (1, 2**31 - 1),
}
"""Least and most that an option can be, where it is given."""


@dataclass(frozen=True)
class EngineOptions:
    """What the user may set; None means "decide for me".

    Making one checks all that can be checked without the model and the machine: types, by the
    annotations below, and ranges. `resolve` checks the rest.

    Raises:
        ConfigError: a value that cannot work; the message names the option.
    """

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
    """A name, or a `torch.dtype`. "auto": the model's own on a GPU (bfloat16 where it is wider), float32 on a CPU."""
    quantization: Literal["fp8"] | None = None
    """"fp8": projections and head as E4M3 with one scale for each output channel, quantised at load;
    activations keep `dtype`. None: weights as the checkpoint stores them, dequantised if it is GGUF."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    seed: int | None = 0
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
    """Longest prompt plus output, at most `MAX_MODEL_LEN`; None: the model's, or what fits the KV cache."""
    max_num_seqs: int | None = None
    """Most sequences in one step, at most `MAX_NUM_SEQS`; None: 256 on a GPU, 32 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step, at most `MAX_NUM_BATCHED_TOKENS`; None: 8192 on a GPU, 1024 on a CPU."""
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
    debug_graphs: bool = False
    """Run every step op by op at its padded shape, with a profiler range and a log line for each op."""
    pipeline_depth: int | None = None
    """Steps in flight before the first one's tokens are read, 1 to 3; None: 2 on a GPU, 1 on a CPU."""
    strict: bool = False
    """Check the graph contract at every step (CPU): slow, for tests."""

    @classmethod
    def from_kwargs(cls, values: Mapping[str, Any], where: str = "LLM") -> EngineOptions:
        check_names(values, (f.name for f in fields(cls)), where)
        return cls(**values)

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        check_names(self.compilation_config, _COMPILATION, "compilation_config")
        compilation = {k: _typed(k, v, _COMPILATION[k]) for k, v in self.compilation_config.items()}
        object.__setattr__(self, "compilation_config", compilation)
        values = {name: getattr(self, name) for name in _kinds()} | compilation
        for name, (low, high) in _BOUNDS.items():
            if (value := values.get(name)) is not None and not low <= value <= high:
                raise ConfigError(f"{name} must be at least {low} and at most {high}, got {shown(value)}")
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size={shown(self.tensor_parallel_size)} is not supported yet; use 1"
            )
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.block_size & (self.block_size - 1) or not 8 <= self.block_size <= 256:
            raise ConfigError(
                f"block_size must be a power of two from 8 to 256, got {shown(self.block_size)}"
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        budget = self.cudagraph_memory_budget
        if not budget > 0:
            raise ConfigError(
                f"cudagraph_memory_budget must be positive bytes or a share in (0, 1], got {shown(budget)}"
            )
        if isinstance(budget, float) and budget > 1.0:
            raise ConfigError(
                f"cudagraph_memory_budget={budget} is a float above 1: give bytes as an integer"
            )
        sizes = compilation.get("cudagraph_capture_sizes")
        if sizes is not None and (not sizes or min(sizes) < 1):
            raise ConfigError(
                f"cudagraph_capture_sizes must be a list of positive batch sizes, got {shown(sizes)}"
            )
        _graph_mode(self)


@dataclass(frozen=True)
class EngineConfig:
    """Options after resolution: every value decided, nothing left to guess."""

    dtype: torch.dtype
    quantization: Literal["fp8"] | None
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
    debug_graphs: bool
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
    dtype = _dtype(options.dtype, model_dtype, on_gpu)
    source["dtype"] = "user" if "dtype" in given else "model" if on_gpu else "device"

    length = pick("max_model_len", model_positions, "model")
    if length > model_positions:
        raise ConfigError(
            f"max_model_len={length} is more than the {model_positions} positions that the model was made for; "
            f"use at most {model_positions}"
        )
    if length < 2:
        raise ConfigError(f"the model was made for {length} position; a prompt token and a new one need 2")
    seqs = pick("max_num_seqs", 256 if on_gpu else 32)
    tokens = pick("max_num_batched_tokens", max(8192 if on_gpu else 1024, seqs))
    if tokens < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} is less than max_num_seqs={seqs}: a decode step would not fit; "
            "raise the first or lower the second"
        )
    if options.strict and on_gpu:
        raise ConfigError("strict=True checks the contract on a CPU; use device='cpu' with it")
    mode = _graph_mode(options)
    if not (on_gpu or graphs_anywhere):
        mode = CudaGraphMode.NONE  # the same program runs everywhere; `explain` says why
    sizes = _capture_sizes(options.compilation_config, seqs)
    prefill = options.compilation_config.get("max_cudagraph_prefill_tokens")
    for name, key in (("cudagraph_mode", "cudagraph_mode"), ("capture_sizes", "cudagraph_capture_sizes")):
        source[name] = "user" if key in options.compilation_config else "default"
    if source["capture_sizes"] == "default" and "max_cudagraph_capture_size" in options.compilation_config:
        source["capture_sizes"] = "user"
    source["max_prefill_tokens"] = "default" if prefill is None else "user"
    return EngineConfig(
        dtype=dtype,
        quantization=pick("quantization", None),
        device=device,
        seed=pick("seed", 0),
        gpu_memory_utilization=pick("gpu_memory_utilization", 0.92),
        kv_cache_memory_bytes=pick("kv_cache_memory_bytes", None),
        num_blocks_override=pick("num_gpu_blocks_override", None),
        block_size=pick("block_size", 16),
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
        debug_graphs=pick("debug_graphs", False),
        pipeline_depth=pick("pipeline_depth", 2 if on_gpu else 1),
        strict=pick("strict", False),
        source=source,
    )


def _default(f: Any) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


@cache
def _kinds() -> dict[str, Any]:
    """What each option's annotation says."""
    return get_type_hints(EngineOptions)


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    NoneType: "None",
    Mapping: "a mapping",
    Sequence: "a list of integers",
    CudaGraphMode: "a CudaGraphMode",
}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` if it is what an annotation says; numbers, paths and dtypes become Python's plain types."""
    try:
        return _fit(value, kind)
    except TypeError:
        choices = _words(kind)
        text = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
        raise ConfigError(f"{name} must be {text}, got {shown(value)}") from None


def _words(kind: Any) -> list[str]:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words: list[str] = []
    for member in members:
        origin = get_origin(member)
        words += map(repr, get_args(member)) if origin is Literal else [_WORDS[origin or member]]
    return words


def _fit(value: Any, kind: Any) -> Any:
    """The same, with a TypeError where it does not fit."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for member in members:
            with suppress(TypeError):
                return _fit(value, member)
    elif origin is Literal:
        if isinstance(value, str) and value in members:
            return value
    elif origin is Sequence:
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            return tuple(_fit(item, members[0]) for item in value)
    elif kind is int:
        return whole(value)
    elif kind is float:
        return real(value)
    else:
        if kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if kind is str and isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        if isinstance(value, origin or kind):
            return value
    raise TypeError(kind)


def _budget(value: int | float, on_gpu: bool) -> int:
    """Bytes of a budget given in bytes or as a share of the GPU's memory."""
    if isinstance(value, int):
        return value
    return int(value * torch.cuda.mem_get_info()[1]) if on_gpu else 256 << 20


def _device(name: str) -> torch.device:
    """The CPU, or the caller's current GPU by its number: other threads have a current one of their own."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "device='cuda', but torch finds no GPU; use device='auto' or install a CUDA build of torch"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _dtype(name: str, model_dtype: str | None, on_gpu: bool) -> torch.dtype:
    if name == "auto":
        if not on_gpu:
            return torch.float32
        own = DTYPES.get(str(model_dtype).removeprefix("torch."), torch.bfloat16)
        return torch.bfloat16 if own is torch.float32 else own
    dtype = DTYPES[name]
    if not on_gpu and dtype is torch.float16:
        raise ConfigError("dtype='float16' is not supported on a CPU; use 'float32' or 'bfloat16'")
    return dtype


def _graph_mode(options: EngineOptions) -> CudaGraphMode:
    """The mode that the options ask for."""
    wanted = options.compilation_config.get("cudagraph_mode")
    try:
        mode = CudaGraphMode("FULL" if wanted is None else wanted)
    except ValueError:
        if wanted in ("PIECEWISE", "FULL_AND_PIECEWISE"):
            raise ConfigError(
                f"cudagraph_mode={wanted!r} is refused: ostinato captures whole steps; use 'FULL' or 'FULL_DECODE_ONLY'"
            ) from None
        known = ", ".join(m.value for m in CudaGraphMode)
        raise ConfigError(f"cudagraph_mode must be one of {known}, got {shown(wanted)}") from None
    if options.enforce_eager or not options.enable_cuda_graph:
        if wanted is not None and mode is not CudaGraphMode.NONE:
            raise ConfigError(
                f"cudagraph_mode={wanted!r} contradicts enforce_eager=True; drop one of the two"
            )
        return CudaGraphMode.NONE
    return mode


def _capture_sizes(given: Mapping[str, Any], max_seqs: int) -> tuple[int, ...]:
    limit = given.get("max_cudagraph_capture_size")
    sizes: Sequence[int] | None = given.get("cudagraph_capture_sizes")
    if sizes is None:
        return default_capture_sizes(min(max_seqs, limit or max_seqs))
    unused = sorted(size for size in sizes if size > max_seqs)
    # A size above the largest batch still serves the batches below it, at the largest batch's size.
    kept = {min(size, max_seqs) for size in sizes if limit is None or size <= limit}
    if unused:
        logger.warning(
            "cudagraph_capture_sizes %s are above max_num_seqs=%d and become %d", unused, max_seqs, max_seqs
        )
    return tuple(sorted(kept))


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that can still be taken, within the container's limit if there is one."""
    return int(min(_machine_memory(meminfo), _cgroup_memory(cgroup)))


def _machine_memory(meminfo: Path) -> int:
    with suppress(OSError, KeyError, ValueError):
        return _table(meminfo)["MemAvailable:"] * 1024  # unlike free pages, it counts caches
    # macOS knows only how much there is in total: half of that is a guess.
    for pages, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        with suppress(OSError, ValueError, AttributeError):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages) // share
    return 4 << 30


def _cgroup_memory(cgroup: Path) -> float:
    """What a cgroup (v2) still allows; inf without a limit."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return math.inf
    with suppress(OSError, KeyError, ValueError):
        used -= _table(cgroup / "memory.stat")["inactive_file"]  # cached files make room
    return max(limit - used, 0)


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines()) if words[1:]}
