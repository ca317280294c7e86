"""Engine options: what is refused, by name, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ostinato.config import EngineOptions, _device, available_memory, resolve
from ostinato.errors import ConfigError, UnknownOptionError
from ostinato.graphs.plan import CudaGraphMode


def config(**options: Any) -> Any:
    return resolve(
        EngineOptions.from_kwargs({"device": "cpu"} | options), model_dtype="bfloat16", model_positions=2048
    )


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_num_seq", "max_num_seqs"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("enforce_eagr", "enforce_eager"),
    ],
)
def test_an_unknown_option_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UnknownOptionError, match=f"{wrong}.*did you mean '{right}'"):
        EngineOptions.from_kwargs({wrong: 1})


def test_an_unknown_compilation_option() -> None:
    with pytest.raises(UnknownOptionError, match="cudagraph_capture_sizes"):
        config(compilation_config={"cudagraph_capture_size": [1]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"quantization": "int8"}, "quantization must be 'fp8' or None, got 'int8'"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"dtype": "float16"}, "float16.*CPU"),
        ({"device": "tpu"}, "device must be"),
        ({"max_model_len": 4096}, "at most 2048"),
        ({"max_model_len": 1}, "at least 2"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": 10.5}, "max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "less than max_num_seqs=64"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization"),
        ({"kv_cache_memory_bytes": -1}, "kv_cache_memory_bytes"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override"),
        ({"block_size": 12}, "power of two"),
        ({"block_size": 4}, "power of two"),
        ({"pipeline_depth": 4}, "pipeline_depth"),
        ({"pipeline_depth": 0}, "pipeline_depth"),
        ({"cudagraph_min_hits": 1}, "at least 2"),
        ({"on_capture_error": "ignore"}, "on_capture_error"),
        ({"load_format": "pt"}, "load_format"),
        ({"enable_cuda_graph": "yes"}, "enable_cuda_graph"),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, "PIECEWISE.*whole steps"),
        ({"compilation_config": {"cudagraph_mode": "SOME"}}, "NONE, FULL_DECODE_ONLY, FULL"),
        ({"compilation_config": {"cudagraph_capture_sizes": [0]}}, "cudagraph_capture_sizes"),
        ({"compilation_config": {"cudagraph_capture_sizes": []}}, "cudagraph_capture_sizes"),
        ({"cudagraph_memory_budget": 0}, "cudagraph_memory_budget"),
        ({"cudagraph_memory_budget": 2.5}, "give bytes as an integer"),
        ({"cudagraph_verify_every": -1}, "cudagraph_verify_every"),
        ({"cudagraph_capture": "eager"}, "'lazy', 'startup' or 'profile'"),
        ({"compilation_config": {"max_cudagraph_capture_size": 0}}, "max_cudagraph_capture_size"),
        ({"enforce_eager": True, "compilation_config": {"cudagraph_mode": "FULL"}}, "contradicts"),
        ({"tensor_parallel_size": "1"}, "tensor_parallel_size must be an integer, got '1'"),
        ({"model": 5}, "model must be a string or None, got 5"),
        ({"tokenizer": ["a"]}, "tokenizer must be"),
        ({"revision": 1}, "revision must be"),
        ({"quantization": 8}, "quantization must be"),
        ({"load_format": 1}, "load_format must be 'auto' or 'dummy'"),
        ({"dtype": 16}, "dtype must be"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"device": None}, "device must be 'auto', 'cuda' or 'cpu', got None"),
        ({"seed": "1"}, "seed must be an integer"),
        ({"seed": 2**63}, "seed must be at least"),
        ({"seed": True}, "seed must be an integer"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization must be a number"),
        ({"gpu_memory_utilization": 10**400}, "gpu_memory_utilization"),
        ({"kv_cache_memory_bytes": 1e9}, "kv_cache_memory_bytes must be an integer or None"),
        ({"max_num_seqs": 10**7}, "max_num_seqs must be at least 1 and at most 65536"),
        ({"max_num_seqs": "8"}, "max_num_seqs must be"),
        ({"max_num_batched_tokens": 2**22 + 1}, "max_num_batched_tokens must be .* at most 4194304"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False"),
        ({"skip_tokenizer_init": "no"}, "skip_tokenizer_init must be"),
        ({"strict": 1}, "strict must be"),
        ({"fail_on_fallback": None}, "fail_on_fallback must be"),
        ({"fail_on_mismatch": 0}, "fail_on_mismatch must be"),
        ({"cudagraph_verify": "yes"}, "cudagraph_verify must be"),
        ({"cudagraph_memory_budget": "1GB"}, "cudagraph_memory_budget must be an integer or a number"),
        ({"cudagraph_memory_budget": float("nan")}, "cudagraph_memory_budget"),
        ({"compilation_config": 5}, "compilation_config must be a mapping"),
        ({"compilation_config": None}, "compilation_config must be a mapping"),
        ({"compilation_config": {5: 1}}, "compilation_config: unknown option '5'"),
        ({"compilation_config": {"cudagraph_capture_sizes": 5}}, "cudagraph_capture_sizes must be a list"),
        ({"compilation_config": {"cudagraph_capture_sizes": "12"}}, "cudagraph_capture_sizes must be a list"),
        ({"compilation_config": {"cudagraph_capture_sizes": [1, "2"]}}, "cudagraph_capture_sizes must be"),
        (
            {"compilation_config": {"cudagraph_mode": 5}},
            "cudagraph_mode must be a string, a CudaGraphMode or",
        ),
        ({"compilation_config": {"cudagraph_mode": ""}}, "cudagraph_mode must be one of"),
        (
            {"compilation_config": {"max_cudagraph_prefill_tokens": "9"}},
            "max_cudagraph_prefill_tokens must be",
        ),
    ],
)
def test_a_bad_value_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="finds no GPU"):
        config(device="cuda")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_the_gpu_is_the_callers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number: a thread that helps to build an engine has a current GPU of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _device(name) == torch.device("cuda", 1)


def test_what_was_decided_and_by_whom() -> None:
    c = config(max_num_seqs=20, compilation_config={"max_cudagraph_capture_size": 12})
    assert (c.max_num_seqs, c.source["max_num_seqs"]) == (20, "user")
    assert (c.max_model_len, c.source["max_model_len"]) == (2048, "model")
    assert (c.block_size, c.source["block_size"]) == (16, "default")
    assert (c.dtype, c.source["dtype"]) == (torch.float32, "device")
    assert c.cudagraph_mode is CudaGraphMode.NONE
    assert c.capture_sizes == (1, 2, 4, 8, 12)
    with pytest.raises(AttributeError):
        c.max_num_seqs = 3


def test_options_are_checked_before_there_is_a_model() -> None:
    with pytest.raises(ConfigError, match="cudagraph_mode"):
        EngineOptions(model="/does/not/exist", compilation_config={"cudagraph_mode": "SOME"})


def test_paths_dtypes_and_foreign_numbers_become_plain() -> None:
    values = {
        "model": Path("m"),
        "dtype": torch.bfloat16,
        "max_num_seqs": np.int64(4),
        "gpu_memory_utilization": 1,
    }
    sizes = [np.int32(2), 1]
    options = EngineOptions.from_kwargs(values | {"compilation_config": {"cudagraph_capture_sizes": sizes}})
    sizes.clear()
    plain = (options.model, options.dtype, options.max_num_seqs, options.gpu_memory_utilization)
    assert repr(plain) == "('m', 'bfloat16', 4, 1.0)"
    assert repr(options.compilation_config["cudagraph_capture_sizes"]) == "(2, 1)"


def test_memory_is_what_the_machine_and_the_container_leave(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemFree: 1 kB\nMemAvailable:   600 kB\nHugePages_Total: 0\n")
    assert available_memory(meminfo, tmp_path) == 600 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7000\n")
    assert available_memory(meminfo, tmp_path) == 600 * 1024
    (tmp_path / "memory.max").write_text("10000\n")
    assert available_memory(meminfo, tmp_path) == 3000
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 2000\n")
    assert available_memory(meminfo, tmp_path) == 5000
    (tmp_path / "memory.current").write_text("70000\n")
    assert available_memory(meminfo, tmp_path) == 0


@pytest.mark.parametrize("known", [("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"), ("SC_PHYS_PAGES",), ()])
def test_memory_where_there_is_no_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: tuple[str, ...]
) -> None:
    pages = dict.fromkeys(known, 1 << 20) | {"SC_PAGE_SIZE": 4096}

    def sysconf(name: str) -> int:
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    monkeypatch.setattr("os.sysconf", sysconf)
    assert available_memory(tmp_path / "none", tmp_path) == (2 << 30 if len(known) == 1 else 4 << 30)
