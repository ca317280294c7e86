"""The one-launch draw from the host's side: which cluster serves what, what is passed, and what happens without it."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.ops.cuda import sample
from ostinato.ops.cuda.program import POINTERS
from ostinato.ops.cuda.sample import ClusterSampler

CPU = torch.device("cpu")


class FakeKernel:
    def __init__(self, macros: dict[str, int], options: dict[str, Any]) -> None:
        self.macros, self.options = macros, options
        self.handle = 4711 + macros["CLUSTER"]
        self.launches: list[tuple[bytes, int]] = []

    def launch(self, params: bytes, grid: int) -> None:
        self.launches.append((params, grid))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[FakeKernel]:
    kernels: list[FakeKernel] = []

    def build(_source: Any, name: str, macros: dict[str, int], **options: Any) -> FakeKernel:
        assert name == "sample"
        kernels.append(FakeKernel(macros, options))
        return kernels[-1]

    monkeypatch.setattr(sample, "build", build)
    return kernels


def arguments(seqs: int, vocab: int) -> tuple[list[torch.Tensor], Any, torch.Tensor]:
    rows = torch.arange(seqs, dtype=torch.int32)
    names = ("temperature", "min_p", "top_p", "top_k")
    inputs = SimpleNamespace(**{name: torch.zeros(seqs) for name in names})
    inputs.seed = torch.zeros(seqs, 3, dtype=torch.int32)[:, :2]  # rows further apart than two words
    return [torch.zeros(seqs, vocab), rows, rows.clone()], inputs, torch.empty_like(rows)


@pytest.mark.parametrize(("seqs", "cluster"), [(1, 16), (8, 16), (9, 8), (32, 8), (33, 2), (256, 2)])
def test_few_rows_get_the_larger_cluster(built: list[FakeKernel], seqs: int, cluster: int) -> None:
    (logits, rows, positions), inputs, out = arguments(seqs, 1000)
    assert ClusterSampler(CPU).run(logits, rows, positions, inputs, out=out)
    (kernel,) = (k for k in built if k.launches)
    assert kernel.macros["CLUSTER"] == kernel.options["cluster"] == cluster
    ((params, grid),) = kernel.launches
    assert grid == seqs * cluster
    tensors = (
        logits,
        rows,
        positions,
        inputs.temperature,
        inputs.min_p,
        inputs.top_p,
        inputs.top_k,
        inputs.seed,
        out,
    )
    assert params == struct.pack("<10Q3i4x", *(t.data_ptr() for t in tensors), 0, 3, 0, seqs)
    assert POINTERS[kernel.handle] == 10, "what an audit reads as addresses"


@pytest.mark.parametrize(("seqs", "parts"), [(1, 132), (1, 513), (2, 264)])
def test_the_largest_logits_of_parts_are_passed_on(built: list[FakeKernel], seqs: int, parts: int) -> None:
    (logits, rows, positions), inputs, out = arguments(seqs, 1000)
    largest = torch.zeros(seqs, parts)
    assert ClusterSampler(CPU).run(logits, rows, positions, inputs, out=out, largest=largest)
    (kernel,) = (k for k in built if k.launches)
    pointer, _, count, _ = struct.unpack("<Q3i4x", kernel.launches[0][0][-24:])
    assert (pointer, count) == (largest.data_ptr(), parts)


@pytest.mark.parametrize("vocab", [1, 32, 49152, 50257, 128256, 151936, 262144, 262145, 524287])
def test_the_row_fits(built: list[FakeKernel], vocab: int) -> None:
    """The macros keep what `sample.cu` asserts, up to the largest vocabulary."""
    (logits, rows, positions), inputs, out = arguments(1, vocab)
    assert ClusterSampler(CPU).run(logits, rows, positions, inputs, out=out)
    assert {k.macros["CLUSTER"] for k in built} == ({2, 8, 16} if vocab <= 262144 else {2, 16})
    for kernel in built:
        m, slice_ = kernel.macros, kernel.macros["THREADS"] * kernel.macros["EACH"]
        assert m["CLUSTER"] * slice_ >= vocab
        assert m["EACH"] % 4 == 0
        assert slice_ <= 2**19, "sums of a block in 32 bits"
        assert not m["KEEP"] or m["EACH"] <= 64
        assert kernel.options["shared_bytes"] <= 227 * 1024
        assert kernel.options["block"] == m["THREADS"]


def test_kernels_are_built_once_for_a_vocabulary(built: list[FakeKernel]) -> None:
    sampler = ClusterSampler(CPU)
    for seqs in (1, 20, 3):
        (logits, rows, positions), inputs, out = arguments(seqs, 1000)
        assert sampler.run(logits, rows, positions, inputs, out=out)
    assert len(built) == 3


def test_without_a_compiler_others_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def broken(*_args: Any, **_options: Any) -> None:
        tries.append(1)
        raise KernelError("no compiler")

    monkeypatch.setattr(sample, "build", broken)
    sampler = ClusterSampler(CPU)
    (logits, rows, positions), inputs, out = arguments(1, 1000)
    assert not sampler.run(logits, rows, positions, inputs, out=out)
    assert not sampler.run(logits, rows, positions, inputs, out=out)
    assert len(tries) == 1, "asked once"


def test_logits_that_loads_of_four_cannot_read_are_left_to_others(built: list[FakeKernel]) -> None:
    (_, rows, positions), inputs, out = arguments(1, 1000)
    logits = torch.zeros(1001)[1:].view(1, 1000)
    assert not ClusterSampler(CPU).run(logits, rows, positions, inputs, out=out)
    assert not any(k.launches for k in built)


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTINATO_CLUSTER_SAMPLE", "0")
    assert ClusterSampler.on(torch.device("cuda", 0)) is None
