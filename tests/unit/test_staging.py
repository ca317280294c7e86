"""Uploading through staging buffers, here from host memory to host memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ostinato.models.checkpoint import open_checkpoint
from ostinato.models.decoder import load
from ostinato.models.registry import spec_from_config
from ostinato.models.staging import Uploader

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("shape", [(1,), (31,), (64,), (65,), (7, 1001), (0, 5)])
def test_every_byte_arrives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    source = torch.randint(-100, 100, shape).to(dtype)
    out = torch.full_like(source, 77)
    with Uploader(CPU, chunk=64, staged=True) as uploader:
        uploader.copy(out, source)
        assert torch.equal(out, source)
        uploader.copy(out, source * 2)  # the buffers again
        assert torch.equal(out, source * 2)


def test_other_types_and_layouts_are_converted() -> None:
    source = torch.randn(40, 50)
    with Uploader(CPU, chunk=64, staged=True) as uploader:
        narrow = torch.empty(40, 50, dtype=torch.bfloat16)
        uploader.copy(narrow, source)
        assert torch.equal(narrow, source.bfloat16())
        turned = torch.empty(50, 40)
        uploader.copy(turned, source.t())
        assert torch.equal(turned, source.t())


def test_a_slice_of_a_larger_tensor_is_filled_alone() -> None:
    out = torch.zeros(30, 20)
    source = torch.randn(10, 20)
    with Uploader(CPU, chunk=128, staged=True) as uploader:
        uploader.copy(out[10:20], source)
    assert torch.equal(out[10:20], source)
    assert not out[:10].any()
    assert not out[20:].any()


def test_what_was_made_for_inference_may_be_written(tmp_path: Path) -> None:
    save_file({"x": torch.randn(100, 100)}, tmp_path / "x.safetensors")
    from safetensors import safe_open

    with torch.inference_mode(), safe_open(str(tmp_path / "x.safetensors"), "pt") as file:
        out = torch.empty(100, 100)
        with Uploader(CPU, chunk=512, staged=True) as uploader:
            uploader.copy(out, file.get_tensor("x"))
        assert torch.equal(out, file.get_tensor("x"))


def test_an_error_of_a_thread_is_raised() -> None:
    with Uploader(CPU, chunk=64, staged=True) as uploader, pytest.raises(RuntimeError):
        uploader.copy(torch.empty(99), torch.empty(100))


def test_a_model_loaded_through_staging_is_the_same(
    tiny: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny("qwen3")[0])
    spec = spec_from_config(checkpoint.config)

    def tensors() -> dict[str, torch.Tensor]:
        return load(spec, checkpoint, dtype=torch.float32, device=CPU, positions=32).tensors()

    plain = tensors()
    used: list[int] = []

    class Staged(Uploader):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device, chunk=256, staged=True)

        def _piece(self, out: torch.Tensor, source: torch.Tensor) -> None:
            used.append(source.numel())
            super()._piece(out, source)

    monkeypatch.setattr("ostinato.models.decoder.Uploader", Staged)
    staged = tensors()
    assert used
    assert plain.keys() == staged.keys()
    assert all(torch.equal(plain[name], staged[name]) for name in plain)
