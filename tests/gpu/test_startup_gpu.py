"""What a start does on a GPU: uploading weights, compiling ahead."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ostinato.cli import main
from ostinato.models.staging import CHUNK_BYTES, Uploader

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mapped_file_arrives_whole_and_in_stream_order(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(40 * CHUNK_BYTES // dtype.itemsize + 13).to(dtype)  # more pieces than buffers
    save_file({"x": x}, tmp_path / "x.safetensors")
    device = torch.device("cuda")
    with safe_open(str(tmp_path / "x.safetensors"), "pt") as file, torch.inference_mode():
        out = torch.empty_like(x, device=device)
        twice = torch.empty_like(x, device=device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), Uploader(device) as uploader:
            uploader.copy(out, file.get_tensor("x"))
            torch.add(out, out, out=twice)  # launched behind it, without waiting
            uploader.copy(out, file.get_tensor("x"))
        torch.cuda.synchronize()
    assert torch.equal(out.cpu(), x)
    assert torch.equal(twice.cpu(), x + x)


def test_kernels_compiled_ahead_run_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from ostinato.ops.triton.bandwidth import read_sum
    from ostinato.ops.triton.compile import compile_ahead

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    names: list[str] = []

    def listen(**_: Any) -> None:
        names.append(threading.current_thread().name)

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    x = torch.rand(1 << 16, device="cuda")
    outs = [torch.full((4,), -1.0, device="cuda") for _ in range(3)]
    sizes = (512, 1024, 256)

    def launch() -> None:
        for size, out in zip(sizes, outs, strict=True):
            read_sum[(4,)](x, out, BLOCK=size, TIMES=3)

    with compile_ahead():
        launch()
    torch.cuda.synchronize()
    assert all((out == -1).all() for out in outs)  # nothing ran
    assert len(names) == 3
    assert threading.current_thread().name not in names
    launch()
    assert len(names) == 3  # nothing was left to compile
    for size, out in zip(sizes, outs, strict=True):
        assert torch.allclose(out, x[: 4 * 3 * size].view(4, -1).sum(1), rtol=1e-4)


def test_a_warm_start_is_faster_than_a_cold_one(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert main(["bench", "startup", "--shape", "smollm2-135m", "--num-iters", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    cold, warm = found["runs"]
    assert cold["engine"]["device"] == "cuda"
    assert warm["stages"]["warm-up"] < cold["stages"]["warm-up"]
    assert warm["first_token_seconds"] < cold["first_token_seconds"]
