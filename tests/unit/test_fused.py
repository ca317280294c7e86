"""What of the one-kernel decode step can be seen without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato.errors import KernelError
from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.ops.cuda import fused, program, rows
from ostinato.ops.cuda.fused import FusedDecode, ring_stages, unsupported

SMALL = {"num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 256, "hidden_size": 128}


def model(dtype: torch.dtype = torch.bfloat16, quantization: str | None = None, **changes: Any) -> Decoder:
    config = {
        **SHAPES["llama-3.2-1b"],
        **SMALL,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **changes,
    }
    return random_decoder(
        spec_from_config(config), dtype=dtype, device=torch.device("cpu"), positions=64, quantization=quantization
    )  # fmt: skip


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_serves_dense_models(quantization: str | None) -> None:
    assert unsupported(model(quantization=quantization)) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": torch.float32}, "bfloat16"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"vocab_size": 520}, "vocab_size 520 is no multiple of 16"),
        ({"intermediate_size": 240}, "intermediate_size 240 is no multiple of 32"),
        ({"hidden_size": 144}, "hidden_size 144 is no multiple of 32"),
        ({"hidden_size": 160, "quantization": "fp8"}, "hidden_size 160 is no multiple of 64"),
    ],
)
def test_says_what_it_cannot_serve(changes: dict[str, Any], why: str) -> None:
    found = unsupported(model(**changes))
    assert found is not None
    assert why in found


def changed(part: Any, **fields: Any) -> Any:
    return dataclasses.replace(part, **fields)


def first_layer(m: Decoder, **fields: Any) -> Decoder:
    return changed(m, layers=(changed(m.layers[0], **fields), *m.layers[1:]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: changed(m, final_norm=m.final_norm.float()), "norms are torch.float32"),
        (lambda m: first_layer(m, mlp_norm=m.layers[0].mlp_norm.half()), "norms are torch.float16"),
        (
            lambda m: first_layer(m, qkv=changed(m.layers[0].qkv, bias=torch.zeros(m.layers[0].qkv.out_features))),
            "biases are torch.float32",
        ),
        (lambda m: changed(m, rope=m.rope.bfloat16()), "angles are torch.bfloat16"),
        (
            lambda m: first_layer(m, qkv=changed(m.layers[0].qkv, bias=m.layers[0].qkv.weight[:, 0].clone())),
            "only some layers",
        ),
        (
            lambda m: first_layer(m, down=changed(m.layers[0].down, bias=m.layers[0].down.weight[:, 0].clone())),
            "the MLP or the head has a bias",
        ),
    ],
)  # fmt: skip
def test_looks_at_every_tensor(change: Callable[[Decoder], Decoder], why: str) -> None:
    assert why in (unsupported(change(model())) or "")


def test_a_row_that_leaves_no_room_for_weights_is_refused() -> None:
    """The head's rows and a chunk of 22 slices take what there is, so three chunks must still fit."""
    found = unsupported(model(intermediate_size=32 * 22 * 140))
    assert found is not None
    assert "shared memory" in found


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_ring_has_as_many_chunks_as_the_source_says(shape: str, fp8: bool) -> None:
    """The C++ sizes are read and computed here, so that a change there cannot go unnoticed."""
    spec = spec_from_config(SHAPES[shape])
    a = spec.attention
    sizes = (spec.hidden_size, a.q_size, spec.intermediate_size)
    numbers = fused.tuning(*sizes, fp8=fp8)
    numbers |= {"HID": spec.hidden_size, "QSIZE": a.q_size, "INTER": spec.intermediate_size, "HD": a.head_dim}
    numbers |= {
        "FP8": fp8,
        "WARPS": fused.WARPS,
        "CHUNK": fused.fewest_in_split(a.heads, a.head_dim),
        "LONGEST": fused.longest_in_split(a.head_dim),
        "PLACES": fused.PLACES,
        "GROUP": a.heads // a.kv_heads,
        "TOGETHER": fused.TOGETHER,
        "GATED_TOGETHER": fused.gated_together(sizes[0], sizes[2], 132, numbers["MOST_SLICES"], fp8=fp8),
    }
    names: dict[str, Any] = {
        **numbers,
        "cmax": max,
        "cmin": min,
        "cdiv": lambda a, b: -(-a // b),
        "HELD": fused.HELD,
        "sizeof": lambda size: size,
        "W": 1 if fp8 else 2,
    }
    names["divisor"] = lambda n, most: next(d for d in range(most, 0, -1) if n % d == 0)
    text = program.source_text(fused.SOURCE).replace("(int)", "").replace("/", "//")
    wanted = (
        "NW",
        "SW",
        "chunk_of",
        "each_of",
        "turns_of",
        "batch_of",
        "room_of",
        "halves_of",
        "apart",
        "stride_of",
        "STAGE",
        "X_ROOM",
        "X_WARP",
        "X_BYTES",
        "RED",
        "ATT",
        "COLS",
        "FIXED",
    )
    for name in (*wanted, "STAGES"):
        found = re.search(rf"constexpr int {name}(?: = (.*?);|\(int (\w+)\) {{ return (.*?); }})", text)
        assert found is not None, name
        value, argument, body = found.groups()
        source = f"lambda {argument}: {_python(body)}" if argument else value
        names[name] = eval(source, names)
    together = max(numbers["TOGETHER"], numbers["GATED_TOGETHER"])
    assert (
        ring_stages(*sizes, a.head_dim, a.heads // a.kv_heads, fp8=fp8, together=together) == names["STAGES"]
    )
    assert names["STAGES"] > numbers["FLIGHT"]


def test_three_tiles_of_gate_and_up_are_added_at_once_where_a_block_has_no_more() -> None:
    assert fused.gated_together(1024, 3072, 132, 22, fp8=False) == 3  # Qwen3-0.6B
    assert fused.gated_together(1024, 3072, 200, 22, fp8=False) == 2  # two
    assert fused.gated_together(1024, 6144, 132, 22, fp8=False) == 2  # six
    assert fused.gated_together(2048, 3072, 132, 22, fp8=False) == 2  # more than its warps can hold


def test_fp8_rows_without_whole_chunks_keep_large_ones() -> None:
    assert fused.tuning(2048, 2048, 8192, fp8=True) == fused.TUNING[True]
    assert fused.tuning(2560, 4096, 9728, fp8=True) == fused.UNEVEN
    assert fused.tuning(2560, 4096, 9728, fp8=False) == fused.TUNING[False]


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("light", [False, True])
def test_inputs_are_asked_for_at_a_time_where_layers_are_light(
    monkeypatch: pytest.MonkeyPatch, quantization: str | None, light: bool
) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    m = model(quantization=quantization)
    w = m.layers[0]
    size = sum(linear.weight.nbytes for linear in (w.qkv, w.output, w.gate_up, w.down))
    monkeypatch.setattr(fused, "LIGHT", size + light)
    macros = FusedDecode(torch.device("cuda", 0))._macros(m, 16, 4)
    assert (macros["ASK"] > 0) is light
    assert (macros["PACE"] == fused.LIGHT_PACE) is (light and quantization is None)


def _python(body: str) -> str:
    """A C++ conditional as Python's."""
    found = re.fullmatch(r"(.*) \? (.*) : (.*)", body)
    return "({1}) if ({0}) else ({2})".format(*found.groups()) if found else body


def test_weights_of_two_kinds_are_refused() -> None:
    wide, narrow = model(), model(quantization="fp8")
    assert "only some" in (unsupported(dataclasses.replace(wide, head=narrow.head)) or "")


def test_one_engine_has_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    first = FusedDecode.claim(torch.device("cuda", 0))
    assert first is not None
    assert FusedDecode.claim(torch.device("cuda", 0)) is None
    other = FusedDecode.claim(torch.device("cuda", 1))
    assert other is not None
    del first
    assert FusedDecode.claim(torch.device("cuda", 0)) is not None


def test_pointers_come_in_the_order_of_the_struct() -> None:
    """The C++ struct is read here, so that a field moved there cannot go unnoticed."""
    source = fused.SOURCE.read_text()
    body = source[source.index("struct Layer {") : source.index("struct Params {")]
    declared = [
        name.strip(" *;")
        for line in body.splitlines()
        if "*" in line
        for name in line[line.index("*") :].split(",")
    ]
    m = model(quantization="fp8", architectures=["Qwen2ForCausalLM"], rope_scaling=None)
    caches = [(torch.zeros(1), torch.zeros(1)) for _ in m.layers]
    pointers = list(fused._layer_pointers(m, caches))
    assert len(pointers) == len(declared) * len(m.layers)
    w = m.layers[0]
    expected = {
        "input_norm": w.input_norm, "q_norm": w.q_norm, "k_norm": w.k_norm, "mlp_norm": w.mlp_norm,
        "qkv": w.qkv.weight, "output": w.output.weight, "gate_up": w.gate_up.weight, "down": w.down.weight,
        "qkv_bias": w.qkv.bias, "output_bias": w.output.bias,
        "qkv_scale": w.qkv.scale, "output_scale": w.output.scale,
        "gate_up_scale": w.gate_up.scale, "down_scale": w.down.scale,
        "keys": caches[0][0], "values": caches[0][1],
    }  # fmt: skip
    assert list(expected) == declared
    for name, pointer in zip(declared, pointers, strict=False):
        assert pointer is expected[name], name


def test_blocks_without_a_tile_of_the_head_never_have_the_best_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small vocabulary leaves some none: a zero from them would beat logits that are all negative."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(fused, "build", lambda *args, **more: None)
    ops, m = FusedDecode(torch.device("cpu")), model()
    macros = ops._macros(m, 16, 4)
    bound = ops._bound[tuple(macros.items())] = ops._bind(m, macros)
    best = bound.cells["best"]
    assert torch.equal(best, torch.full_like(best, -torch.inf))
    best.fill_(1.0)
    bound.cells["steps"].fill_(7)
    ops.reset()
    assert torch.equal(best, torch.full_like(best, -torch.inf))
    assert not bound.cells["steps"].any()


@pytest.mark.parametrize("blocks", [32, 33])
@pytest.mark.parametrize("greedy", [True, False])
def test_each_step_is_counted_once(monkeypatch: pytest.MonkeyPatch, blocks: int, greedy: bool) -> None:
    """By `decode` where each of its blocks has tiles of the MLP and of the head, 32 here; by `finish` otherwise."""
    launched: list[tuple[str, bool]] = []

    class Fake:
        handle = 0

        def __init__(self, _source: Any, name: str, macros: dict[str, int], **_options: Any) -> None:
            self.seen = name, bool(macros["COUNTS"])

        def launch(self, _params: bytes) -> None:
            launched.append(self.seen)

    properties = SimpleNamespace(multi_processor_count=blocks)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(fused, "build", Fake)
    monkeypatch.setattr(fused, "POINTERS", {})
    m, one = model(), torch.zeros(1, dtype=torch.int32)
    names = ("ids", "positions", "slots", "rows", "seq_lens")
    view: Any = SimpleNamespace(**dict.fromkeys(names, one), block_table=torch.zeros(1, 4, dtype=torch.int32))
    scratch: Any = SimpleNamespace(logits=torch.zeros(1, 512), tokens=one)
    caches = [(torch.zeros(2, 16, 1, 64), torch.zeros(2, 16, 1, 64)) for _ in m.layers]
    FusedDecode(torch.device("cpu")).run(m, view, caches, scratch, greedy=greedy)
    counts = [("decode", True)] if blocks == 32 else [("finish", False)]
    assert [step for step in launched if step[1] == (step[0] == "decode")] == counts
    assert (("finish", blocks == 32) in launched) == (greedy or blocks == 33)


def test_a_hopper_gpu_without_cuda_python_goes_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_ops = pytest.importorskip("ostinato.ops.triton")
    monkeypatch.delenv("OSTINATO_FUSED", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    assert not triton_ops._has_fused(torch.device("cuda", 0))


# --- when it cannot be built ---------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU says of itself."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def ops_with_the_kernel() -> Any:
    ops = pytest.importorskip("ostinato.ops.triton").TritonOps()
    ops._fused = FusedDecode.claim(torch.device("cpu"))
    assert ops._fused is not None
    return ops


def test_a_kernel_that_cannot_be_built_leaves_the_ops(
    hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Decided when the model is loaded, so that no capture and no eager step can differ."""

    def broken(*args: Any, **more: Any) -> None:
        raise KernelError("decode.cu does not compile for sm_90a: the ring does not fit")

    monkeypatch.setattr(fused, "build", broken)
    ops, m = ops_with_the_kernel(), model()
    with caplog.at_level(logging.WARNING):
        ops.load(m, 16, 4, 8)
    (record,) = caplog.records
    assert "OSTINATO_FUSED=0" in record.getMessage()
    assert "the ring does not fit" in record.getMessage()
    assert not ops.fuses(m, 1)
    assert not ops.workspaces()
    assert FusedDecode.claim(torch.device("cpu")) is not None, "another engine may have it"


def test_a_model_fuses_once_it_is_loaded(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fused, rows):
        monkeypatch.setattr(module, "build", lambda *args, **more: SimpleNamespace(handle=1))
    ops, m = ops_with_the_kernel(), model()
    assert not ops.fuses(m, 1), "nothing is compiled in the middle of a step"
    ops.load(m, 16, 4, 8)
    assert all(ops.fuses(m, seqs) for seqs in (1, 2, 8))
    assert not ops.fuses(m, 9)
    assert not ops.fuses(model(), 1)
    assert {name.split(".")[0] for name in ops.workspaces()} == {"fused", "rows"}
    words = ops.workspaces()["rows.words"]
    assert (words == -1).all()
    words.zero_()
    ops.reset()
    assert (words == -1).all(), "nobody takes what a failed step left for results"
    said = [ops.versions(m, seqs, decode=True)[0] for seqs in (1, 2, 8)]
    assert [line.op for line in said] == ["fused"] * 3
    assert [line.version.split(":")[0] for line in said] == ["decode.cu", "rows.cu", "rows.cu"]
    assert not any(line.shape or line.why for line in said)


def test_an_engine_for_one_sequence_does_without_the_kernel_of_a_few(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    for module in (fused, rows):
        monkeypatch.setattr(
            module, "build", lambda source, *args, **more: built.append(source) or SimpleNamespace(handle=1)
        )
    ops, m = ops_with_the_kernel(), model()
    ops.load(m, 16, 4, 1)
    assert ops.fuses(m, 1)
    assert not ops.fuses(m, 2)
    assert set(built) == {fused.SOURCE}


def test_few_rows_go_op_by_op_where_only_their_kernel_cannot_be_built(
    hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **more: Any) -> None:
        raise KernelError("rows.cu does not compile")

    monkeypatch.setattr(fused, "build", lambda *args, **more: SimpleNamespace(handle=1))
    monkeypatch.setattr(rows, "build", broken)
    ops, m = ops_with_the_kernel(), model()
    with caplog.at_level(logging.WARNING):
        ops.load(m, 16, 4, 8)
    (record,) = caplog.records
    assert "OSTINATO_FUSED_ROWS=0" in record.getMessage()
    assert ops.fuses(m, 1)
    assert not ops.fuses(m, 2)


@pytest.mark.parametrize(("block_size", "served"), [(16, True), (48, True), (8, False)])
def test_few_rows_need_blocks_of_whole_groups_of_tokens(
    hopper: None, monkeypatch: pytest.MonkeyPatch, block_size: int, served: bool
) -> None:
    for module in (fused, rows):
        monkeypatch.setattr(module, "build", lambda *args, **more: SimpleNamespace(handle=1))
    ops, m = ops_with_the_kernel(), model()
    ops.load(m, block_size, 4, 8)
    assert ops.fuses(m, 8) == served


def test_a_model_that_it_does_not_know_leaves_it_to_others(hopper: None) -> None:
    ops, m = ops_with_the_kernel(), model(dtype=torch.float32)
    ops.load(m, 16, 4, 8)
    assert not ops.fuses(m, 1)
    assert FusedDecode.claim(torch.device("cpu")) is not None


class Cuda:
    """What of CUDA's bindings `program` uses, with a count of what was compiled and loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled = self.loaded = self.destroyed = 0
        self.log = b""
        success = 0
        nvrtc = SimpleNamespace(
            nvrtcVersion=lambda: (success, 13, 0),
            nvrtcCreateProgram=lambda *args: (success, "program"),
            nvrtcCompileProgram=self._compile,
            nvrtcResult=SimpleNamespace(NVRTC_SUCCESS=0),
            nvrtcGetProgramLogSize=lambda p: (success, len(self.log)),
            nvrtcGetProgramLog=lambda p, room: (success,),
            nvrtcGetCUBINSize=lambda p: (success, 4),
            nvrtcGetCUBIN=lambda p, room: (success,),
            nvrtcDestroyProgram=self._destroy,
        )
        driver = SimpleNamespace(
            cuModuleLoadData=self._load, cuModuleGetFunction=lambda module, name: (success, (module, name))
        )
        bindings, package = ModuleType("cuda.bindings"), ModuleType("cuda")
        bindings.nvrtc, bindings.driver = nvrtc, driver  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cuda", package)
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
        monkeypatch.setattr(program, "Kernel", lambda function, **sizes: function)
        program._module.cache_clear()

    def _compile(self, handle: Any, count: int, options: list[bytes]) -> tuple[int]:
        self.compiled += 1
        return (1 if self.log else 0,)

    def _destroy(self, handle: Any) -> tuple[int]:
        self.destroyed += 1
        return (0,)

    def _load(self, binary: bytes) -> tuple[int, str]:
        self.loaded += 1
        return (0, f"module {self.loaded}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("OSTINATO_CACHE", str(tmp_path / "cache"))
    yield Cuda(monkeypatch)
    program._module.cache_clear()


def build(name: str = "decode", device: int = 0, **macros: int) -> Any:
    return program.build(
        fused.SOURCE, name, macros, device=torch.device("cuda", device), block=1, shared_bytes=0, grid=1
    )


def test_engines_of_a_model_share_one_module(cuda: Cuda) -> None:
    """Modules are never unloaded, so a process that makes engines must not load one for each."""
    assert build("decode", HID=64)[0] == build("finish", HID=64)[0] == build("decode", HID=64)[0]
    assert (cuda.compiled, cuda.loaded, cuda.destroyed) == (1, 1, 1)
    assert build("decode", HID=128)[0] != build("decode", HID=64)[0]
    assert build("decode", device=1, HID=64)[0] != build("decode", HID=64)[0]
    assert cuda.loaded == 3


def test_gpus_of_two_kinds_get_their_own_code(cuda: Cuda) -> None:
    assert [program.arch(torch.device("cuda", i)) for i in (0, 1)] == ["sm_90a", "sm_91a"]


def test_a_binary_is_kept(cuda: Cuda, tmp_path: Path) -> None:
    build(HID=64)
    program._module.cache_clear()
    build(HID=64)
    assert (cuda.compiled, cuda.loaded) == (1, 2)
    assert [path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()] == [".cubin"]


@pytest.mark.parametrize("step", ["mkdir", "write_bytes", "replace"])
def test_a_cache_that_cannot_be_written_only_costs_time(
    cuda: Cuda, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = getattr(Path, step)

    def broken(self: Path, *args: Any, **more: Any) -> None:
        if step == "write_bytes":
            real(self, b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, step, broken)
    with caplog.at_level(logging.WARNING):
        build("decode", HID=64)
        build("finish", HID=64)
    assert cuda.loaded == 1
    assert [record.message for record in caplog.records if "no space left" in record.message] == [
        caplog.records[0].message
    ]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_compiler_that_fails_or_is_not_there_is_a_kernel_error(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.log = b"the ring does not fit"
    with pytest.raises(KernelError, match="does not compile for sm_90a"):
        build(HID=64)
    assert cuda.destroyed == 1
    cuda.log = b""

    def missing() -> None:
        raise RuntimeError("libnvrtc cannot be found")

    nvrtc = sys.modules["cuda.bindings"].nvrtc
    nvrtc.nvrtcVersion = missing
    with pytest.raises(KernelError, match="libnvrtc cannot be found"):
        build(HID=64)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match="cuda"):
        build(HID=64)


def test_programs_are_compiled_apart(cuda: Cuda) -> None:
    """Several at once, each once, and only what this thread asks for of the sources that are named."""
    both, elsewhere = threading.Barrier(2), []
    compile_one = cuda._compile

    def together(*args: Any) -> tuple[int]:
        both.wait(10)  # breaks where one is compiled after the other
        return compile_one(*args)

    nvrtc = sys.modules["cuda.bindings"].nvrtc
    nvrtc.nvrtcCompileProgram = together
    with program.compile_apart([fused.SOURCE], threads=2):
        for width in (64, 128, 64):
            with pytest.raises(KernelError, match="decode: it is being compiled"):
                build(HID=width)
    assert (cuda.compiled, cuda.loaded) == (2, 0)
    nvrtc.nvrtcCompileProgram = compile_one
    assert build(HID=64) != build(HID=128)
    assert (cuda.compiled, cuda.loaded) == (2, 2)
    with program.compile_apart([rows.SOURCE], threads=2):
        build(HID=256)
    with program.compile_apart([fused.SOURCE], threads=2):
        other = threading.Thread(target=lambda: elsewhere.append(build(HID=512)))
        other.start()
        other.join()
    assert len(elsewhere) == 1
    assert cuda.loaded == 4


def test_what_does_not_compile_apart_says_so_when_it_is_used(cuda: Cuda) -> None:
    cuda.log = b"the ring does not fit"
    with program.compile_apart([fused.SOURCE], threads=1), pytest.raises(KernelError, match="being compiled"):
        build(HID=64)
    with pytest.raises(KernelError, match="does not compile for sm_90a"):
        build(HID=64)


def test_ops_ask_the_gpu_that_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_ops = pytest.importorskip("ostinato.ops.triton")
    asked: list[tuple[str, int | None]] = []

    def answer(name: str, value: Any) -> Callable[[torch.device], Any]:
        def of(device: torch.device) -> Any:
            asked.append((name, torch.device(device).index))
            return value

        return of

    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.delenv("OSTINATO_FUSED", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", answer("capability", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", answer("properties", properties))
    monkeypatch.setattr(triton_ops, "_mm_widens", answer("widens", True))
    for device, index in ((torch.device("cuda", 1), 1), (torch.device("cuda"), 2), (None, 2)):
        asked.clear()
        ops = triton_ops.TritonOps(device=device)
        assert {name for name, _ in asked} == {"capability", "properties", "widens"}
        assert {found for _, found in asked} == {index}
        assert ops._device == torch.device("cuda", index)
        assert ops._fused is None or ops._fused._device == ops._device
        del ops
