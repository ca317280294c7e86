"""`chain.cu` as far as it can be seen without a GPU: how layers are cut, what a launch is given, what it does not serve."""

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
from ostinato.ops import AttentionShape, LayerWeights, Linear, Scratch
from ostinato.ops.cuda import chain
from ostinato.ops.cuda.chain import ROWS, TEAM, TUNING, Chain, Sizes, layout, macros, tile_rows
from ostinato.ops.cuda.program import POINTERS
from ostinato.ops.triton import tune
from ostinato.ops.triton.tune import Kind, Problem, Table
from tests.stack import Model
from tests.unit.compiled import no_gpu_needed, struct_fields

GPU, BF16 = torch.device("cuda", 0), torch.bfloat16
MODELS = {
    "llama-3.2-1b": Sizes(2048, 2048, 3072, 8192),
    "qwen3-0.6b": Sizes(1024, 2048, 4096, 3072),
    "llama-3.1-8b": Sizes(4096, 4096, 6144, 14336),
}
TEAMS = (26, 30, 32, 33)
"""Of four blocks: what GPUs with some multiprocessors less have room for, an H200, and more"""


def model(sizes: Sizes = MODELS["llama-3.2-1b"], layers: int = 2, dtype: torch.dtype = BF16) -> Model:
    def make(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    a = AttentionShape(sizes.queries // 64, (sizes.qkv - sizes.queries) // 128, 64)
    made = tuple(
        LayerWeights(
            make(sizes.hidden), Linear(make(sizes.qkv, sizes.hidden)), None, None, Linear(make(sizes.hidden, sizes.queries)),
            make(sizes.hidden), Linear(make(2 * sizes.inner, sizes.hidden)), Linear(make(sizes.hidden, sizes.inner)),
        )
        for _ in range(layers)
    )  # fmt: skip
    table = make(512, sizes.hidden)
    return Model(table, made, make(sizes.hidden), Linear(table), torch.empty(64, 2, 32), a)


@pytest.mark.parametrize("teams", TEAMS)
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_tiles_cover_all_rows_and_fit(sizes: Sizes, teams: int) -> None:
    for size, owners, unit in (
        (sizes.hidden, teams, 8), (sizes.qkv, teams, 8), (2 * sizes.inner, teams * TEAM, 16),
    ):  # fmt: skip
        rows, units = tile_rows(size, owners, unit), size // unit
        tiles = owners * -(-units // (owners * (chain.MOST_TILE // unit)))
        begins = [tile * units // tiles * unit for tile in range(tiles + 1)]  # `Op::begin`
        assert begins[0] == 0
        assert begins[-1] == size
        assert all(0 < end - begin <= rows for begin, end in zip(begins, begins[1:], strict=False))
        assert rows <= chain.MOST_TILE
    for rows in TUNING:
        cut = layout(sizes, rows, teams)
        assert cut.stages > TUNING[rows].flight
        assert cut.shared_bytes <= TUNING[rows].shared_bytes
        assert TUNING[rows].shared_bytes + 2048 <= 227 << 10, "barriers and factors stand beside it"


def test_all_teams_of_an_h200_are_busy() -> None:
    cut = layout(MODELS["llama-3.2-1b"], 128, 30)
    assert (cut.narrow, cut.gate, cut.qkv) == (72, 144, 104)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden": 576}, "hidden_size 576 is no multiple of 512"),
        ({"inner": 1600}, "intermediate_size 1600 is no multiple of 512"),
        ({"hidden": 8192}, "hidden_size 8192 is more than 30 tiles"),
        ({"inner": 512}, "1024 rows of weights are too few for 120 tiles"),
    ],
)
def test_what_it_does_not_serve_it_says(change: dict[str, int], why: str) -> None:
    assert why in (chain.unsupported(model(replace(MODELS["llama-3.2-1b"], **change)), 30) or "")


def test_it_serves_bfloat16_only() -> None:
    assert chain.unsupported(model(), 30) is None
    assert "bfloat16" in (chain.unsupported(model(dtype=torch.float16), 30) or "")
    assert chain.unsupported(model(), 0) == "no cluster of blocks fits"


class FakeKernel:
    def __init__(self, macros: dict[str, int], options: dict[str, Any], fit: int) -> None:
        self.macros, self.options, self.handle = macros, options, 78
        self.launches: list[bytes] = []
        self._fit = fit

    def launch(self, params: bytes) -> None:
        self.launches.append(params)

    def clusters_at_once(self) -> int:
        return self._fit // int(self.options["cluster"])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeKernel]:
    """A GPU of 132 multiprocessors with room for 30 teams, that compiles anything."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: zeros(*size, **more))
    return no_gpu_needed(monkeypatch, chain, lambda macros, options: FakeKernel(macros, options, 30 * TEAM))


def scratch_of(m: Model, rows: int) -> Scratch:
    layer, word = m.layers[0], torch.empty(1)
    sizes = {
        "x": layer.output.out_features, "normed": layer.output.out_features, "qkv": layer.qkv.out_features,
        "attn": layer.output.in_features, "gate_up": 1, "act": layer.down.in_features,
    }  # fmt: skip
    rest = dict.fromkeys(set(Scratch.__dataclass_fields__) - set(sizes), word)
    return Scratch(**{name: torch.empty(rows, size, dtype=BF16) for name, size in sizes.items()}, **rest)


def test_as_many_teams_as_fit_share_the_work(made: list[FakeKernel]) -> None:
    Chain(GPU, model())
    seen = [(k.macros["TOK"], k.macros["TEAMS"] * k.macros["CLUSTERS"], k.options["grid"]) for k in made]
    assert seen == [(128, 32, 128), (128, 30, 120), (64, 30, 120)]
    assert [k.options["cluster"] for k in made] == [2 * TEAM] * 3


def test_a_launch_is_given_what_the_source_reads(made: list[FakeKernel]) -> None:
    """The C++ struct is read here, so that a field moved there cannot go unnoticed."""
    source = chain.SOURCE.read_text()
    names, numbers = struct_fields(source)
    maps = ["out_map", "gate_map", "down_map", "qkv_map", "attn_map", "act_map", "y_map", "slice_map"]
    assert numbers == ["rows", "ops", "eps", "unused[7]", *maps]
    m = model()
    kernel, s = Chain(GPU, m), scratch_of(m, 100)
    begun = kernel.run(0, s)
    assert (begun.weight is m.layers[1].input_norm, begun.scaled is s.normed, begun.sums) == (True, True, 30)
    assert kernel.run(1, s).weight is m.final_norm
    used = next(k for k in made if k.launches)
    first, second = used.launches
    assert len(first) == 128 + 8 * 128
    held = kernel.workspaces()
    expected = {
        "x": s.x, "y": s.normed, "act": s.act, "qkv": s.qkv, "out_bias": None, "qkv_bias": None,
        "mlp_norm": m.layers[0].mlp_norm, "next_norm": m.layers[1].input_norm, "squares": held["squares"], "words": held["words.128"],
    }  # fmt: skip
    assert list(expected) == names
    assert struct.unpack("<10Q", first[:80]) == tuple(
        0 if t is None else t.data_ptr() for t in expected.values()
    )
    assert struct.unpack("<2if", first[80:92]) == (100, 4, pytest.approx(1e-5))
    assert struct.unpack("<2i", second[80:88]) == (100, 3)
    assert POINTERS.pop(used.handle) == len(names)
    assert used.macros["TOK"] == 128
    listed = source[source.index("// Macros:") :].split("\n\n")[0]
    assert all(name in listed for name in used.macros)
    held["words.64"].fill_(7)
    kernel.reset()
    assert not any(held[f"words.{rows}"].any() for rows in ROWS)


def test_it_serves_its_own_model_where_it_may_be_worth_it(made: list[FakeKernel]) -> None:
    m = model()
    kernel = Chain(GPU, m)
    assert [rows for rows in (1, 32, 33, 64, 65, 128, 129) if kernel.serves(m, rows)] == [33, 64, 65, 128]
    assert not kernel.serves(model(), 64)


def test_a_model_that_it_does_not_serve_is_an_error(made: list[FakeKernel]) -> None:
    with pytest.raises(KernelError, match="hidden_size 576"):
        Chain(GPU, model(replace(MODELS["llama-3.2-1b"], hidden=576)))


def test_more_than_64_rows_go_through_it_unless_measured_otherwise() -> None:
    down = Linear(torch.empty(2048, 8192, dtype=BF16))
    assert Table(tiles=True)("chain", down, 65, BF16).kind is Kind.CHAIN
    assert Table(tiles=True)("chain", down, 64, BF16).kind is Kind.LIBRARY
    problem = Problem("chain", 2048, 8192, 128, BF16, False)
    assert {version.kind for version in tune.candidates(problem, tiles=True)} == {Kind.LIBRARY, Kind.CHAIN}
    table = Table(tiles=True)
    table.add(Table({problem: tune.LIBRARY}))
    assert table("chain", down, 65, BF16).kind is Kind.LIBRARY


@pytest.mark.parametrize("rows", TUNING)
@pytest.mark.parametrize("name", MODELS)
def test_it_compiles_without_spilling(name: str, rows: int, tmp_path: Path) -> None:
    """And products are not put one after the other for want of registers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    options = [f"-D{key}={value}" for key, value in macros(MODELS[name], rows, 30).items()]
    done = subprocess.run(
        [nvcc, "-arch=sm_90a", "-cubin", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", *options,
         str(chain.SOURCE), "-o", str(tmp_path / "chain.cubin")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert "Potential Performance Loss" not in done.stderr
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    blocks_beside = 65536 - int(registers) // 8 * 8 * chain.THREADS
    assert blocks_beside >= (128 * 128 if rows <= 64 else 0), "a block of attention finds room"


def test_the_rows_it_serves_are_known() -> None:
    assert set(ROWS) <= set(TUNING)
    assert all(rows in tune.BUCKETS for rows in ROWS)
