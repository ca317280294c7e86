"""Engine options: what is refused, by name, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ostinato.config import EngineOptions, resolve
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
        ({"quantization": "fp8"}, "quantization='fp8'"),
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
    ],
)
def test_a_bad_value_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="finds no GPU"):
        config(device="cuda")


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
