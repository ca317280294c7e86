"""What of decode attention in CUDA C++ can be seen without a GPU."""

from __future__ import annotations

import ctypes
import importlib
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.ops import AttentionShape, StepView
from ostinato.ops.cuda import attention
from ostinato.ops.cuda.attention import (
    BLOCKS,
    LONG,
    MOST,
    SPREAD,
    Block,
    DecodeAttention,
    block_of,
    cut,
    grid_of,
    macros,
    shared_bytes,
    splits_of,
    unsupported,
)
from ostinato.ops.cuda.fused import LOG2_E
from ostinato.ops.cuda.program import POINTERS

GPU = torch.device("cuda", 0)
LLAMA_1B = AttentionShape(32, 8, 64)
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 2048, 2049, 5000, 33000, 131072]
LENGTHS += [random.randint(1, 140000) for _ in range(200)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU, as far as anybody asks."""
    monkeypatch.delenv("OSTINATO_CUDA_ATTENTION", raising=False)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


class FakeKernel:
    """Remembers its launches."""

    handle = 7_000_001

    def __init__(self) -> None:
        self.launches: list[tuple[bytes, int]] = []

    def launch(self, params: bytes, *, grid: int) -> None:
        self.launches.append((params, grid))


@pytest.mark.parametrize("window", [0, 1, 16, 100, 5000])
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("least", [16, 32, 64, 128, 256])
def test_splits_hold_every_visible_token_once(splits: int, window: int, least: int) -> None:
    for length in LENGTHS:
        c = cut(length, splits, window, least)
        first = max(length - window, 0) if window else 0
        assert c.base % 16 == 0, length
        assert first - 16 < c.base <= first, length
        assert c.chunk % least == 0, length
        assert 1 <= c.count <= MOST, length
        assert c.base + c.count * c.chunk >= length, length
        if length:  # the last split has a token, and so has the first one behind what a window hides
            assert c.base + (c.count - 1) * c.chunk < length, length
            assert c.base + c.chunk > first, length
        if length - c.base <= LONG * MOST:
            assert c.chunk < LONG + least, length


@pytest.mark.parametrize("block", [Block(4, 1, 3, 3), Block(8, 2, 2, 2)])
def test_the_kernel_cuts_by_the_same_rule(tmp_path: Path, block: Block) -> None:
    """The C++ function itself, compiled for the host."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = attention.SOURCE.read_text()
    declared = source[source.index("struct Cut {") :].split("\n", 1)[0].split("//")[0]
    body = source[source.index("__device__ __forceinline__ Cut cut(") :]
    body = body[: body.index("\n}\n") + 3].replace("__device__ __forceinline__ ", "")
    program = (
        f"#include <algorithm>\nusing std::min; using std::max;\nconst int STEP = 16;\n{declared}\n{body}\n"
        'extern "C" void run(int n, int *out) { Cut c = cut(n);'
        " out[0] = c.first; out[1] = c.base; out[2] = c.chunk; out[3] = c.count; }\n"
    )
    file = tmp_path / "cut.cpp"
    file.write_text(program)
    for window, splits in ((0, 1), (0, 2), (0, 8), (100, 1), (100, 4)):
        library = tmp_path / f"cut{window}-{splits}.so"
        shape = AttentionShape(32, 8, 64, sliding_window=window or None)
        numbers = attention.macros(shape, 16, 8, False, block, splits, False)
        defines = [f"-D{key}={numbers[key]}" for key in ("WINDOW", "CHUNK", "LONG", "MOST", "SPLITS")]
        subprocess.run([compiler, "-shared", "-fPIC", *defines, str(file), "-o", str(library)], check=True)
        native = ctypes.CDLL(str(library))
        for length in LENGTHS:
            out = (ctypes.c_int * 4)()
            native.run(length, out)
            c = cut(length, splits, window, block.step)
            assert list(out)[1:] == [c.base, c.chunk, c.count], (length, splits, window)


@pytest.mark.parametrize("shape", [LLAMA_1B, AttentionShape(16, 8, 128), AttentionShape(71, 71, 64)])
def test_the_grid_follows_from_the_key(shape: AttentionShape) -> None:
    for rows in range(1, 300):
        grid = grid_of(rows, shape, 4096, 132)
        block = block_of(rows, shape, 132)
        assert grid.splits == splits_of(rows, shape, 132)
        assert grid.primary == rows * shape.kv_heads * grid.splits
        assert grid.primary % grid.splits == grid.helpers % grid.splits == 0  # whole clusters
        assert 1 <= grid.splits <= MOST
        assert grid.splits == 1 or grid.primary <= SPREAD[shape.head_dim] * 132
        helped = max(cut(n, grid.splits, 0, block.step).count for n in range(4097)) > grid.splits
        assert not helped or grid.helpers  # whoever has more splits than blocks finds help


def test_few_rows_have_many_warps_a_block() -> None:
    def warps(shape: AttentionShape, *rows: int) -> list[int]:
        return [block_of(n, shape, 132).warps for n in rows]

    assert warps(LLAMA_1B, 16, 33, 34, 66, 67, 132, 133, 1000) == [8, 4, 2, 2, 2, 2, 8, 8]
    assert warps(AttentionShape(16, 8, 128), 1, 49, 50, 132, 133, 1000) == [4, 4, 4, 4, 8, 8]


def test_few_rows_have_many_splits() -> None:
    assert [splits_of(rows, LLAMA_1B, 132) for rows in (1, 2, 4, 5, 8, 9, 256)] == [4, 4, 4, 2, 2, 1, 1]
    assert [splits_of(rows, AttentionShape(16, 8, 128), 132) for rows in (1, 4, 8, 16, 17)] == [4, 4, 4, 2, 1]


@pytest.mark.parametrize("head_dim", BLOCKS)
@pytest.mark.parametrize("group", range(1, 9))
def test_shared_memory_suffices(head_dim: int, group: int) -> None:
    """99 KiB, which Ada has; where blocks of products stand on a multiprocessor, there is room beside one."""
    shape = AttentionShape(group, 1, head_dim)
    for rows in range(1, 2000):
        block, splits = block_of(rows, shape, 132), splits_of(rows, shape, 132)
        needed = shared_bytes(macros(shape, 16, 64, True, block, splits, splits > 1))
        assert needed <= 99 << 10, (rows, block, splits)
        assert needed + 1024 <= 116 << 10


def test_a_window_needs_no_helpers() -> None:
    assert grid_of(256, AttentionShape(32, 8, 64), 1 << 17, 132).helpers
    assert not grid_of(256, AttentionShape(32, 8, 64, sliding_window=1000), 1 << 17, 132).helpers


@pytest.mark.parametrize(
    ("dtype", "shape", "why"),
    [
        (torch.float32, LLAMA_1B, "works in bfloat16"),
        (torch.bfloat16, AttentionShape(8, 8, 80), "head_dim is 80"),
        (torch.bfloat16, AttentionShape(71, 1, 64), "71 heads share 1 KV heads"),
        (torch.bfloat16, AttentionShape(9, 2, 64), "9 heads share 2 KV heads"),
    ],
)
def test_says_what_it_cannot_serve(dtype: torch.dtype, shape: AttentionShape, why: str) -> None:
    assert why in (unsupported(dtype, dtype, shape) or "")


def test_serves_what_it_is_for() -> None:
    for group in range(1, 9):
        for dim in (64, 128):
            assert unsupported(torch.bfloat16, torch.bfloat16, AttentionShape(2 * group, 2, dim)) is None


def arguments(rows: int = 3, shape: AttentionShape = LLAMA_1B, norm: bool = True) -> dict[str, Any]:
    """What the op takes, on the CPU."""

    def ints(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    def wide(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.bfloat16)

    view = StepView(
        ints(rows), ints(rows), ints(rows), ints(rows), ints(rows), ints(rows + 1), ints(rows), ints(5, 9), True
    )  # fmt: skip
    gain = wide(shape.head_dim) if norm else None
    return {
        "qkv": wide(rows, shape.qkv_size), "view": view,
        "cache": tuple(wide(4, 16, shape.kv_heads, shape.head_dim) for _ in range(2)),
        "rope": torch.zeros(8, 2, shape.head_dim // 2), "q_norm": gain,
        "k_norm": None if gain is None else gain.clone(), "eps": 1e-6, "shape": shape,
        "workspace": torch.zeros(1), "semaphores": ints(rows * shape.kv_heads),
        "out": wide(rows, shape.q_size),
    }  # fmt: skip


@pytest.mark.parametrize("norm", [True, False])
def test_parameters_come_in_the_order_of_the_struct(
    monkeypatch: pytest.MonkeyPatch, gpu: None, norm: bool
) -> None:
    """The C++ struct is read here, so that a field moved there cannot go unnoticed."""
    source = attention.SOURCE.read_text()
    body = source[source.index("struct Params {") :].split("\n", 1)[1].split("};")[0]
    lines = [line.split("//")[0].strip(" ;") for line in body.splitlines()]
    pointers = [n.strip(" *;") for line in lines if "*" in line for n in line[line.index("*") :].split(",")]
    numbers = [n.strip() for line in lines if "*" not in line for n in line.split(" ", 1)[1].split(",")]
    assert numbers == ["eps", "scale", "num_seqs", "primary", "blocks", "angles", "table_rows"]
    kernel = FakeKernel()
    made: list[dict[str, int]] = []

    def build(source: Path, name: str, macros: dict[str, int], **more: Any) -> FakeKernel:
        assert more["cluster"] == macros["SPLITS"]
        made.append(macros)
        return kernel

    monkeypatch.setattr(attention, "build", build)
    ours = DecodeAttention(GPU)
    given = arguments(norm=norm)
    assert ours.run(**given)
    assert ours.run(**given)
    assert len(made) == 1
    view = given["view"]
    expected = {
        "qkv": given["qkv"], "positions": view.positions, "slots": view.slots, "rope": given["rope"],
        "q_norm": given["q_norm"], "k_norm": given["k_norm"],
        "keys": given["cache"][0], "values": given["cache"][1], "table": view.block_table,
        "rows": view.rows, "lens": view.seq_lens, "parts": given["workspace"],
        "semaphores": given["semaphores"], "out": given["out"],
    }  # fmt: skip
    assert list(expected) == pointers
    (params, blocks), again = kernel.launches
    assert again == (params, blocks)
    addresses = struct.unpack(f"<{len(pointers)}Q", params[: 8 * len(pointers)])
    for name, address in zip(pointers, addresses, strict=True):
        assert address == (0 if expected[name] is None else expected[name].data_ptr()), name
    eps, scale, *counts = struct.unpack("<ffiiiii4x", params[8 * len(pointers) :])
    assert eps == pytest.approx(1e-6)
    assert scale == pytest.approx(64**-0.5 * LOG2_E)
    assert counts == [3, 3 * 8 * 4, 4, 8, 5]
    assert blocks == counts[1]
    assert len(params) % 8 == 0  # as the compiler pads it
    assert POINTERS.pop(kernel.handle) == len(pointers)
    assert made[0] == {
        "HD": 64, "GROUP": 4, "KVH": 8, "BLOCK_SIZE": 16, "WINDOW": 0, "TABLE_WIDTH": 9,
        "NORM": int(norm), "CHUNK": 256, "LONG": LONG, "MOST": MOST, "WARPS": 8,
        "TILES": 2, "PIECES": 2, "SPLITS": 4, "CLUSTER": 1, "BLOCKS": 2,
    }  # fmt: skip


def test_every_macro_is_given() -> None:
    source = attention.SOURCE.read_text()
    listed = source[source.index("// Macros:") :].split("\n\n")[0]
    for name in attention.macros(LLAMA_1B, 16, 8, True, Block(8, 2, 2, 2), 2, True):
        assert name in listed, name


def test_a_kernel_that_cannot_be_built_leaves_it_to_triton(
    monkeypatch: pytest.MonkeyPatch, gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def build(*args: Any, **more: Any) -> Any:
        tried.append(args)
        raise KernelError("libnvrtc.so is not there")

    monkeypatch.setattr(attention, "build", build)
    ours = DecodeAttention(GPU)
    assert not ours.run(**arguments())
    assert not ours.run(**arguments())
    assert len(tried) == 1
    assert caplog.text.count("libnvrtc.so is not there") == 1


def test_what_it_cannot_serve_is_not_even_compiled(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    monkeypatch.setattr(attention, "build", lambda *args, **more: pytest.fail("compiled"))
    assert not DecodeAttention(GPU).run(**arguments(shape=AttentionShape(8, 8, 80)))


def test_claim(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    found = importlib.machinery.ModuleSpec("cuda", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert DecodeAttention.claim(GPU) is not None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert DecodeAttention.claim(GPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert DecodeAttention.claim(GPU) is not None
    monkeypatch.setenv("OSTINATO_CUDA_ATTENTION", "0")
    assert DecodeAttention.claim(GPU) is None


def test_without_cuda_python_there_is_none(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    assert DecodeAttention.claim(GPU) is None
