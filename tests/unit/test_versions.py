"""What `OpSet.versions` says that a step runs, against what a step launches; and how `survey` sums it up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from ostinato.errors import KernelError
from ostinato.graphs import survey
from ostinato.graphs.labels import LabelledOps
from ostinato.graphs.report import GraphReport, KernelUse, explain
from ostinato.graphs.survey import _kernel_uses
from ostinato.kv_cache import KVCache
from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.ops import NextNorm, Scratch, StepView, squares_words
from ostinato.ops import triton as triton_ops
from ostinato.ops.cuda import sample
from ostinato.ops.cuda.attention import DecodeAttention
from ostinato.ops.triton import TritonOps, tune
from ostinato.ops.triton.tune import LIBRARY, Table, problem_of

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SIZES = (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 200)
IN_STEPS = {
    "attend": "attend.cu: QKV and attention in one kernel",
    "chain": "chain.cu: one kernel between two attentions",
    "fused": "decode.cu: the whole model in one kernel",
    "rows": "rows.cu: the whole model in one kernel",
}


def small_model(quantization: str | None = None) -> Decoder:
    sizes = {"num_hidden_layers": 3, "vocab_size": 256, "intermediate_size": 128, "hidden_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    spec = spec_from_config({**SHAPES["llama-3.2-1b"], **sizes, **heads})
    return random_decoder(spec, dtype=BF16, device=CPU, positions=64, quantization=quantization)


class Launches(TritonOps):
    """Launches nothing: notes what it would, (kernel, for whom) as `versions` calls it."""

    def __init__(self, model: Decoder, table: Table, monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
        """gpu: "hopper", "ampere" or "old"."""
        super().__init__(table)
        self.seen: list[str] = []

        def notes(text: str, result: Any = None) -> Callable[..., Any]:
            return lambda *_, **__: (self.seen.append(text), result)[1]

        def version_of(place: int) -> Callable[..., None]:
            def run(*given: Any, **_: Any) -> None:
                kind = triton_ops.SOURCES[given[place].kind]
                self.seen.append(f"{kind}: {given[place]}")

            return run

        attends, workspace = Grid(notes("Triton")), triton_ops.decode.Workspace
        fakes = {
            "pointwise": SimpleNamespace(**{name: Grid(lambda *_, **__: None) for name in POINTWISE}),
            "decode": SimpleNamespace(multiply=version_of(0), attention=attends, Workspace=workspace),
            "attention": SimpleNamespace(varlen=attends),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(triton_ops, name, fake)
        monkeypatch.setattr(triton_ops, "matmul_scaled", notes("Triton: tiles for FP8 weights"))
        monkeypatch.setattr(torch, "mm", notes("library (cuBLAS)"))
        monkeypatch.setattr(torch.Tensor, "addmm_", notes("library (cuBLAS)"))
        self._wide_mm = True
        if gpu == "hopper":
            self._products = cast(Any, SimpleNamespace(run=version_of(1), blocks=lambda *_: 2))
            self._whole, self._fused = model, cast(Any, SimpleNamespace(run=notes(IN_STEPS["fused"])))

            def kernel(name: str, least: int, most: int, result: Any = None) -> Any:
                def serves(stack: Decoder, rows: int) -> bool:
                    return stack is model and least <= rows <= most

                return SimpleNamespace(serves=serves, run=notes(IN_STEPS[name], result))

            if model.head.scale is None:
                begun = NextNorm(model.final_norm, model.final_norm, model.final_norm)
                self._rows, self._attend = kernel("rows", 1, 8), kernel("attend", 17, 32)
                self._chain = kernel("chain", 33, 128, begun)
        if gpu != "old":
            properties = SimpleNamespace(multi_processor_count=132)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
            self._attention = DecodeAttention(CPU)
            found = SimpleNamespace(handle=80, launch=notes("attention.cu"))
            monkeypatch.setattr(self._attention, "_kernel", lambda macros: found)


POINTWISE = ("embed", "embed_norm", "rms_norm", "silu_mul", "add_bias", "rope_kv_write", "matmul_float32")


class Grid:
    """Stands in for a Triton kernel."""

    def __init__(self, launch: Callable[..., None]) -> None:
        self._launch = launch

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch


def scratch_of(model: Decoder, rows: int) -> Scratch:
    a, hidden, inner = model.attention, model.spec.hidden_size, model.spec.intermediate_size

    def make(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    def ints() -> torch.Tensor:
        return torch.zeros(rows, dtype=torch.int32)

    words = make(1 << 16, dtype=torch.float32)
    return Scratch(
        make(rows, hidden), make(rows, hidden), make(rows, a.qkv_size), make(rows, a.q_size),
        make(rows, 2 * inner), make(rows, inner), make(squares_words(rows, hidden), dtype=torch.float32),
        make(rows, hidden), make(rows, model.spec.vocab_size, dtype=torch.float32),
        *(ints() for _ in range(7)), words, words,
    )  # fmt: skip


def launched(ops: Launches, model: Decoder, rows: int, decode: bool, greedy: bool) -> set[tuple[str, str]]:
    """(op, kernel) of what a step launches, as `StepProgram` goes."""
    s = scratch_of(model, rows)
    start, table = torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(rows, 4, dtype=torch.int32)
    view = StepView(s.ids, s.positions, s.slots, s.seq_lens, s.last_index, start, s.ids, table, decode)
    cache = KVCache.allocate(
        layers=3, num_blocks=4, block_size=16, kv_heads=1, head_dim=64, dtype=BF16, device=CPU
    )
    labelled = LabelledOps(ops, count=lambda: len(ops.seen))
    ops.seen.clear()
    if decode and ops.fuses(model, rows):
        labelled.ops.fused(model, view, [cache.layer(i) for i in range(3)], s, greedy=True)
    else:
        model.forward(view, cache, s, labelled.ops, greedy=greedy)
    names = (label.op.replace("best_token", "norm_head") for label in labelled.labels(len(ops.seen)))
    return set(zip(names, ops.seen, strict=True))


TABLES = {
    "rules": lambda model: {},
    # Then a norm is not begun where QKV and attention could be one kernel, but in front of the first layer.
    "down by the library": lambda model: {problem_of("linear_add", model.layers[0].down, 32, BF16): LIBRARY},
    "neither attend nor chain": lambda model: {
        problem_of("attend", model.layers[0].qkv, 32, BF16): LIBRARY,
        problem_of("chain", model.layers[0].down, 128, BF16): LIBRARY,
    },
    "chain from 33 rows": lambda model: {
        problem_of("chain", model.layers[0].down, 64, BF16): tune.Version(tune.Kind.CHAIN, True, 64)
    },
    "head by the library": lambda model: {problem_of("norm_head", model.head, 16, BF16): LIBRARY},
}


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prompts"])
@pytest.mark.parametrize(
    ("gpu", "quantization", "chosen"),
    [*(("hopper", None, chosen) for chosen in TABLES), ("hopper", "fp8", "rules"), ("ampere", None, "rules"),
     ("ampere", "fp8", "rules"), ("old", None, "rules")],
)  # fmt: skip
def test_what_is_said_is_what_a_step_launches(
    gpu: str, quantization: str | None, chosen: str, decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(quantization)
    ops = Launches(model, Table(TABLES[chosen](model), tiles=gpu == "hopper"), monkeypatch, gpu)
    for rows in SIZES:
        lines = ops.versions(model, rows, decode=decode)
        assert [line.op for line in lines[-3:]] == ["best_token", "sample", "prepare, embed, advance"]
        said = {(line.op, line.version) for line in lines[:-3]}
        for greedy in {False, ops.picks(model.head, rows, model.embedding.dtype)}:
            assert launched(ops, model, rows, decode, greedy) == said, (rows, greedy)
        best = lines[-3].version
        assert ("without logits" in best) == (
            (decode and ops.fuses(model, rows)) or ops.picks(model.head, rows, model.embedding.dtype)
        )


def test_every_kind_of_kernel_was_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    ops = Launches(model, Table(tiles=True), monkeypatch, "hopper")

    def kernels(rows: int, decode: bool = True) -> set[str]:
        return {line.version.split(":")[0] for line in ops.versions(model, rows, decode=decode)}

    assert kernels(1) == {"decode.cu", "Triton"}
    assert kernels(8) == {"rows.cu", "Triton"}
    assert kernels(9) == {"attention.cu", "linear.cu", "Triton"}
    assert kernels(20) == {"attend.cu", "linear.cu", "Triton"}
    assert kernels(128) == {"chain.cu", "attention.cu", "linear.cu", "Triton"}
    assert kernels(129) == {"library (cuBLAS)", "attention.cu", "Triton"}
    assert kernels(20, decode=False) == {"linear.cu", "Triton"}


def test_who_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KernelError("no clusters")

    model, ops = small_model(), TritonOps()

    def drawn() -> str:
        (line,) = (v for v in ops.versions(model, 4, decode=True) if v.op == "sample")
        return line.version

    assert drawn() == "Triton"
    monkeypatch.setattr(sample, "build", lambda *_, **__: SimpleNamespace(handle=81))
    ops._sampler = sample.ClusterSampler(CPU)
    assert drawn().startswith("sample.cu")
    monkeypatch.setattr(sample, "build", broken)
    ops._sampler = sample.ClusterSampler(CPU)
    assert drawn() == "Triton"


def uses_of(ops: TritonOps, model: Decoder, seqs: int = 200, tokens: int = 1000) -> tuple[KernelUse, ...]:
    config = SimpleNamespace(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    program = SimpleNamespace(ops=ops, model=model)
    return _kernel_uses(cast(Any, SimpleNamespace(config=config, program=program)))


def test_an_op_set_is_asked_once() -> None:
    class Engine(SimpleNamespace):
        __hash__ = object.__hash__

    asked = []

    class Ops(TritonOps):
        def versions(self, *given: Any, **how: Any) -> Any:
            asked.append(given)
            return super().versions(*given, **how)

    config = SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=8)
    engine = cast(Any, Engine(config=config, program=SimpleNamespace(ops=Ops(), model=small_model())))
    first, times = survey._uses_of(engine), len(asked)
    assert first == _kernel_uses(engine)
    assert survey._uses_of(engine) is first
    assert len(asked) == 2 * times == 2 * 12


def test_the_list_has_every_kernel_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    measured = {problem_of("linear_add", model.layers[0].down, 64, BF16): LIBRARY}
    table = Table(measured, tiles=True)
    ops = Launches(model, table, monkeypatch, "hopper")
    uses = uses_of(ops, model)
    shown = [(u.name, u.kernel.split(":")[0], u.decode, u.prompts) for u in uses]
    for expected in (
        ("fused", "decode.cu", ((1, 1),), ()),
        ("fused", "rows.cu", ((2, 8),), ()),
        ("attend", "attend.cu", ((17, 32),), ()),
        ("rope_paged_attention", "attention.cu", ((9, 16), (33, 200)), ()),
        ("rope_paged_attention", "Triton", (), ((1, 1000),)),
        ("chain", "chain.cu", ((65, 128),), ((65, 128),)),
        ("linear_add 64x128", "library (cuBLAS)", ((33, 64),), ((33, 64),)),
        ("linear_add 64x128", "library (cuBLAS)", ((129, 200),), ((129, 1000),)),
        ("norm_head 256x64", "library (cuBLAS)", ((129, 200),), ((129, 1000),)),
    ):
        assert expected in shown
    why = {u.name: u.why for u in uses if u.decode == ((33, 64),) or u.decode == ((129, 200),)}
    assert why["norm_gate_up 128x64"] == "by rule: more than 128 rows"
    assert "measured" in {u.why for u in uses if u.name == "linear_add 64x128"}
    assert [u.op for u in uses if u.op in ("fused", "attend", "chain", "sample")] == [
        "fused", "fused", "attend", "chain", "sample",
    ]  # fmt: skip


def test_each_step_is_listed_as_the_op_set_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what `--batch` prints, in the order of the step."""
    model = small_model()
    ops = Launches(model, Table(tiles=True), monkeypatch, "hopper")
    report = GraphReport("m", "gpu", "now", "NONE", 200, kernels=uses_of(ops, model))
    whole = explain(report)
    for rows in SIZES:
        said = ops.versions(model, rows, decode=True)
        text = explain(report, rows)
        begin = text.index("its kernels, by op:\n")
        listed = [line.strip() for line in text[begin:].split("\n\n")[0].splitlines()[1:]]
        expected = [
            f"{v.op} {v.shape}".rstrip() + f": {v.version}" + (f" ({v.why})" if v.why else "") for v in said
        ]
        assert listed == expected
        assert all(v.version in whole for v in said)
    assert len(report.kernels) == whole.split("kernels, by rows")[1].split("\n\n")[0].count("\n") - 2
    assert GraphReport.from_json(report.to_json()) == report
