"""`attend.cu` as far as it can be seen without a GPU: how it is cut, what a launch is given, what it does not serve."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ostinato.errors import KernelError
from ostinato.ops import AttentionShape, LayerWeights, Linear, NextNorm, StepView
from ostinato.ops.cuda import attend, linear
from ostinato.ops.cuda.attend import BLOCKS, ROWS, SHARED_BYTES, Attend, Layout, layout, macros, shared_bytes
from ostinato.ops.cuda.program import POINTERS
from ostinato.ops.triton import tune
from ostinato.ops.triton.tune import Kind, Problem, Table
from tests.stack import Model
from tests.unit.compiled import no_gpu_needed, struct_fields

GPU, BF16 = torch.device("cuda", 0), torch.bfloat16
MODELS = {
    "llama-3.2-1b": (2048, AttentionShape(32, 8, 64)),
    "qwen3-0.6b": (1024, AttentionShape(16, 8, 128)),
    "small": (1024, AttentionShape(16, 8, 64)),
    "window": (1024, AttentionShape(8, 4, 128, sliding_window=100)),
}


def model(
    hidden: int = 2048, shape: AttentionShape = MODELS["llama-3.2-1b"][1], dtype: torch.dtype = BF16
) -> Model:
    def make(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    norms = (make(shape.head_dim), make(shape.head_dim)) if shape.head_dim == 128 else (None, None)
    layer = LayerWeights(
        make(hidden), Linear(make(shape.qkv_size, hidden), make(shape.qkv_size)), *norms,
        Linear(make(hidden, shape.q_size), make(hidden)), make(hidden), Linear(make(1024, hidden)), Linear(make(hidden, 512)),
    )  # fmt: skip
    table = make(512, hidden)
    return Model(
        table, (layer,), make(hidden), Linear(table), torch.empty(64, 2, shape.head_dim // 2), shape, 1e-5
    )


@pytest.mark.parametrize(("hidden", "shape"), MODELS.values(), ids=MODELS)
def test_all_weights_are_shared_out_and_fit(hidden: int, shape: AttentionShape) -> None:
    cut = layout(shape, hidden)
    assert cut is not None
    of_head = (shape.heads // shape.kv_heads + 2) * shape.head_dim
    assert cut.tiles * 64 * cut.chunks * 64 * BLOCKS == of_head * hidden
    assert cut.tiles % cut.groups == 0
    assert shared_bytes(shape, cut) <= SHARED_BYTES
    # Beside a block of a product, with its barriers and what the driver takes; two of its own do not fit.
    assert SHARED_BYTES + 1024 + linear.SHARED_BYTES + 2048 <= 228 << 10 < 2 * (SHARED_BYTES + 1024)


def test_what_is_known_to_be_good() -> None:
    assert layout(*reversed(MODELS["llama-3.2-1b"])) == Layout(3, 4, 3, 4)
    assert layout(*reversed(MODELS["qwen3-0.6b"])) == Layout(4, 2, 2, 3)


@pytest.mark.parametrize(
    ("hidden", "shape", "why"),
    [
        (4096, AttentionShape(32, 8, 128), "4 heads of 4096 inputs do not fit"),
        (2048, AttentionShape(32, 32, 64), "32 KV heads have more than 132 blocks"),
        (576, AttentionShape(9, 3, 64), "do not fit"),
    ],
)
def test_what_it_does_not_serve_it_says(hidden: int, shape: AttentionShape, why: str) -> None:
    assert why in (attend.unsupported(model(hidden, shape), 132) or "")


def test_it_serves_bfloat16_only() -> None:
    assert attend.unsupported(model(), 132) is None
    assert "bfloat16" in (attend.unsupported(model(dtype=torch.float16), 132) or "")


class FakeKernel:
    handle = 79

    def __init__(self, macros: dict[str, int], options: dict[str, Any]) -> None:
        self.macros, self.options = macros, options
        self.launches: list[bytes] = []

    def launch(self, params: bytes) -> None:
        self.launches.append(params)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeKernel]:
    """A GPU of 132 multiprocessors that compiles anything."""
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *what, device=None, **more: full(*what, **more))
    return no_gpu_needed(monkeypatch, attend, FakeKernel)


def test_a_launch_is_given_what_the_source_reads(made: list[FakeKernel]) -> None:
    """The C++ struct is read here, so that a field moved there cannot go unnoticed."""
    source = attend.SOURCE.read_text()
    names, numbers = struct_fields(source)
    assert numbers == [
        "eps", "scale", "num_seqs", "sums", "blocks", "angles", "table_rows", "pad[7]", "weight_map", "x_map",
    ]  # fmt: skip
    m = model(1024, MODELS["qwen3-0.6b"][1])
    kernel, rows = Attend(GPU, m, 16, 9), 20
    ints = [torch.empty(rows, dtype=torch.int32) for _ in range(7)]
    view = StepView(*ints, torch.empty(rows + 3, 9, dtype=torch.int32), True)
    cache = torch.empty(40, 16, 8, 128, dtype=BF16), torch.empty(40, 16, 8, 128, dtype=BF16)
    begun = NextNorm(m.layers[0].input_norm, torch.empty(rows, 1024, dtype=BF16), torch.empty(16 * rows))
    workspace, semaphores, out = torch.empty(1), torch.empty(1), torch.empty(rows, 2048, dtype=BF16)
    kernel.run(m.layers[0], begun, view, cache, workspace=workspace, semaphores=semaphores, out=out)
    kernel.run(
        m.layers[0], replace(begun, sums=30), view, cache, workspace=workspace, semaphores=semaphores, out=out
    )
    (used,) = made
    first, second = used.launches
    held = kernel.workspaces()
    expected = {
        "bias": m.layers[0].qkv.bias, "squares": begun.squares, "positions": view.positions, "slots": view.slots,
        "rope": m.rope, "q_norm": m.layers[0].q_norm, "k_norm": m.layers[0].k_norm, "keys": cache[0],
        "values": cache[1], "table": view.block_table, "rows": view.rows, "lens": view.seq_lens, "out": out,
        "cells": held["cells"], "tokens": held["tokens"], "parts": workspace, "semaphores": semaphores,
    }  # fmt: skip
    assert list(expected) == names
    count = len(names)
    assert struct.unpack(f"<{count}Q", first[: 8 * count]) == tuple(
        0 if t is None else t.data_ptr() for t in expected.values()
    )
    at = 8 * count
    scale = m.attention.scale * 1.4426950408889634
    assert struct.unpack("<2f5i", first[at : at + 28]) == (
        pytest.approx(1e-5), pytest.approx(scale), rows, 16, 40, 64, rows + 3,
    )  # fmt: skip
    assert struct.unpack("<i", second[at + 12 : at + 16]) == (30,)
    assert len(first) == 192 + 2 * 128
    assert POINTERS.pop(used.handle) == count
    assert used.options["grid"] == 8 * BLOCKS
    listed = source[source.index("// Macros:") :].split("\n\n")[0]
    assert all(name in listed for name in used.macros)
    held["cells"].fill_(7)
    kernel.reset()
    assert all((words == -1).all() for words in held.values())


def test_it_serves_its_own_model_where_it_may_be_worth_it(made: list[FakeKernel]) -> None:
    m = model()
    kernel = Attend(GPU, m, 16, 9)
    assert [rows for rows in (1, 16, 17, 32, 33, 64) if kernel.serves(m, rows)] == [17, 32]
    assert not kernel.serves(model(), 32)


def test_a_model_that_it_does_not_serve_is_an_error(made: list[FakeKernel]) -> None:
    with pytest.raises(KernelError, match="do not fit"):
        Attend(GPU, model(4096, AttentionShape(32, 8, 128)), 16, 9)


def test_it_is_taken_unless_measured_otherwise() -> None:
    qkv = Linear(torch.empty(3072, 2048, dtype=BF16))
    problem = Problem("attend", 3072, 2048, ROWS, BF16, False)
    assert Table(tiles=True)("attend", qkv, 17, BF16).kind is Kind.ATTEND
    assert {version.kind for version in tune.candidates(problem, tiles=True)} == {Kind.LIBRARY, Kind.ATTEND}
    assert Table({problem: tune.LIBRARY}, tiles=True)("attend", qkv, 17, BF16).kind is Kind.LIBRARY
    assert ROWS in tune.BUCKETS


@pytest.mark.parametrize("name", MODELS)
def test_it_compiles_without_spilling(name: str, tmp_path: Path) -> None:
    """And products are not put one after the other for want of registers, and both languages count the same bytes."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    hidden, shape = MODELS[name]
    cut = layout(shape, hidden)
    assert cut is not None
    source = tmp_path / "attend.cu"
    source.write_text(
        f"{attend.SOURCE.read_text()}\n"
        f'static_assert(SHARED == {shared_bytes(shape, cut)} && THREADS == {cut.threads}, "as in Python");\n'
        'static_assert(sizeof(Params) == 448, "as in Python");\n'
    )
    numbers = macros(shape, hidden, 16, 17, name == "qwen3-0.6b", cut)
    options = [f"-D{key}={value}" for key, value in numbers.items()]
    done = subprocess.run(
        [nvcc, "-arch=sm_90a", "-cubin", "-std=c++17", "-Xptxas", "-v", *options, f"-I{attend.SOURCE.parent}",
         str(source), "-o", str(tmp_path / "attend.cubin")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert "Potential Performance Loss" not in done.stderr
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    beside = 65536 - -(-int(registers) // 8) * 8 * cut.threads
    assert beside >= 224 * 72, "a block of a product finds room"
