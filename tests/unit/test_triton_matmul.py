"""Products with FP8 weights: in Triton's interpreter against float64, and compiled for an H100."""

from __future__ import annotations

import os
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent))
from compiled import Compiled, assembled, compile_launches, compiled_here
from test_triton_ops import _interpreter_loops  # noqa: F401 (a fixture)

from ostinato.models.quantize import FP8, Quantizer
from ostinato.ops import Linear
from ostinato.ops.reference import ReferenceOps, apply
from ostinato.ops.triton import TritonOps
from ostinato.ops.triton import matmul as module
from ostinato.ops.triton.matmul import config, matmul_scaled
from tests.accuracy import no_worse

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers this on a GPU")
# Triton's interpreter multiplies no bfloat16.
DTYPES = (torch.float32, torch.float16)


def fp8(columns: int, depth: int, dtype: torch.dtype, bias: bool) -> Linear:
    own = torch.randn(columns).to(dtype) if bias else None
    return Quantizer(torch.device("cpu")).linear("w", torch.randn(columns, depth) / depth**0.5, own)


def exact(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    assert linear.scale is not None
    product = x.double() @ (linear.weight.double() * linear.scale.double()[:, None]).t()
    return product if linear.bias is None else product + linear.bias.double()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 70, 40), (17, 33, 72), (70, 131, 96), (140, 64, 64)]
)
def test_against_float64(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    x, tiny = (
        torch.randn(rows, depth).to(dtype),
        1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps / 2,
    )

    def check(actual: torch.Tensor, before: torch.Tensor | float = 0) -> None:
        plain = torch.empty(rows, columns, dtype=dtype)
        apply(x, linear, plain)
        no_worse(actual, before + plain, before + exact(x, linear), tiny=tiny)

    for bias in (False, True):
        linear = fp8(columns, depth, dtype, bias)
        out = torch.full((rows, columns), float("nan"), dtype=dtype)
        matmul_scaled(x, linear, out)
        check(out)
        residual = torch.randn(rows, columns).to(dtype)
        before = residual.clone()
        matmul_scaled(x, linear, residual, add=True)
        check(residual, before)
        logits = torch.full((rows, columns), float("nan"))
        matmul_scaled(x, linear, logits)
        torch.testing.assert_close(logits.double(), exact(x, linear), rtol=1e-5, atol=1e-5)


@interpreted
def test_a_row_that_is_nan_spoils_no_other() -> None:
    x, linear = torch.randn(5, 40, dtype=torch.float16), fp8(30, 40, torch.float16, bias=False)
    clean, spoilt = torch.empty(5, 30), torch.empty(5, 30)
    matmul_scaled(x, linear, clean)
    x[2] = float("nan")
    matmul_scaled(x, linear, spoilt)
    others = [0, 1, 3, 4]
    assert torch.equal(clean[others], spoilt[others])
    assert spoilt[2].isnan().all()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_ops(dtype: torch.dtype) -> None:
    """Each op with FP8 weights beside the reference."""
    tokens, hidden, inner, vocab, eps = 6, 72, 40, 90, 1e-5
    x, act, norm = (torch.randn(*size).to(dtype) for size in ((tokens, hidden), (tokens, inner), (hidden,)))
    qkv, down = fp8(50, hidden, dtype, bias=True), fp8(hidden, inner, dtype, bias=True)
    up, head = fp8(2 * inner, hidden, dtype, bias=False), fp8(vocab, hidden, dtype, bias=False)
    index = torch.tensor([5, 0], dtype=torch.int32)
    results: list[dict[str, torch.Tensor]] = []
    for ops, kind in ((TritonOps(), dtype), (ReferenceOps(), dtype), (ReferenceOps(), torch.float64)):
        x, act, norm = (t.to(kind) for t in (x, act, norm))
        qkv, down = (replace(linear, bias=linear.bias.to(kind)) for linear in (qkv, down))  # type: ignore[union-attr]

        def poison(*size: int, dtype: torch.dtype = kind) -> torch.Tensor:
            return torch.full(size, float("nan"), dtype=dtype)

        made = {"qkv": poison(tokens, 50), "x": x.clone(), "act": poison(tokens, inner)}
        made["logits"] = poison(2, vocab, dtype=torch.float32)
        normed = poison(tokens, hidden)
        ops.norm_linear(x, norm, eps, qkv, normed=normed, out=made["qkv"])
        ops.linear_add(act, down, residual=made["x"])
        gate_up = poison(tokens, 2 * inner)
        ops.norm_gate_up(x, norm, eps, up, normed=normed, gate_up=gate_up, out=made["act"])
        ops.norm_head(x, index, norm, eps, head, last=poison(2, hidden), logits=made["logits"])
        results.append(made)
    for name, actual in results[0].items():
        plain, best = results[1][name], results[2][name]
        no_worse(
            actual,
            plain,
            best,
            what=name,
            tiny=1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps / 2,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_configurations(dtype: torch.dtype) -> None:
    """They fit a multiprocessor's shared memory, and every shape has one."""
    for rows in (*range(1, 300, 7), 1024, 8192):
        for columns in (8, 576, 1536, 2048, 16384, 128256):
            for depth in (40, 576, 2048, 14336):
                c = config(rows, columns, depth, dtype)
                assert c.rows >= 16
                assert c.rows * c.depth * c.columns > 0
                tile = c.rows * c.depth * dtype.itemsize + c.columns * c.depth
                assert c.stages * tile <= 160 * 1024, c


@pytest.mark.parametrize(
    ("text", "to_float"),
    [
        (module._TO_BFLOAT16.value, lambda half: struct.unpack("<f", struct.pack("<I", half << 16))[0]),
        (module._TO_FLOAT16.value, lambda half: struct.unpack("<e", struct.pack("<H", half))[0]),
    ],
)
def test_the_assembly_widens_every_byte(text: str, to_float: object) -> None:
    """Its integer instructions, interpreted here; the last one multiplies exactly."""
    assert callable(to_float)
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(FP8).double().tolist()
    finite = [code for code in codes.tolist() if code & 0x7F != 0x7F]
    for start in range(0, 254, 4):
        four = [finite[(start + i) % 254] for i in range(4)]
        registers = run_ptx(text, sum(code << 8 * i for i, code in enumerate(four)))
        factor, halves = to_float(registers["factor"] & 0xFFFF), []
        for name in ("$0", "$1"):
            halves += [registers[name] & 0xFFFF, registers[name] >> 16]
        assert [to_float(half) * factor for half in halves] == [expected[code] for code in four]
    assert registers["zero"] == 0x80008000  # adding -0.0 keeps the sign of a zero


def run_ptx(text: str, word: int) -> dict[str, int]:
    """Registers after the instructions on 32-bit words; the products at the end are left out."""
    registers = {"$2": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in re.findall(r"^(?!\.reg)(\w.*);$", text, re.MULTILINE):
        name, operands = line.split(maxsplit=1)
        target, *sources = (part.strip() for part in operands.split(","))
        numbers = [value(source) for source in sources]
        if name == "mov.b32":
            result = numbers[0]
        elif name == "prmt.b32":
            both = numbers[0] | numbers[1] << 32
            result = sum((both >> 8 * (numbers[2] >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
        elif name == "shr.b32":
            result = numbers[0] >> numbers[1]
        elif name == "and.b32":
            result = numbers[0] & numbers[1]
        elif name == "lop3.b32":
            assert numbers[3] == (0xF0 & 0xCC) | 0xAA  # (a & b) | c
            result = (numbers[0] & numbers[1]) | numbers[2]
        else:
            assert name.startswith("fma.rn.")
            assert sources == [target, "factor", "zero"]
            continue
        registers[target] = result
    return registers


SHAPES = ((576, 1536), (2048, 2048), (16384, 2048), (2048, 8192))
"""(out, in)"""
ROWS = (1, 20, 64, 130)


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """No register spills, loads are asynchronous, and large tiles use warp-group products."""
    found = compiled_here(__file__, tmp_path)
    assert len(found) > 8, found


def compile_kernels(ptxas: str) -> None:
    """Replace launches by compilation; print what became of each kernel."""

    def look(made: Compiled) -> None:
        registers, spills = assembled(made.ptx, ptxas)
        ptx, c = made.ptx, made.constexprs
        shape = [c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"]]
        kinds = [n for n in ("wgmma.mma_async", "mma.sync", "cp.async.cg") if n in ptx]
        kind = made.signature["x"]
        print(shape, c["DEPTH"], kind, made.options, registers, made.metadata.shared, kinds)
        assert not spills[0], spills
        if kind == "*fp32":
            return
        assert "cp.async.cg" in ptx, shape
        assert ("wgmma" in ptx) == (shape[0] >= 64), shape
        assert "e4m3" not in ptx, "the slow conversion"

    compile_launches(look, aligned=("columns",))
    for columns, depth in SHAPES:
        for rows in ROWS:
            weight = torch.zeros(columns, depth, dtype=FP8)
            linear = Linear(weight, None, torch.zeros(columns))
            x = torch.zeros(rows, depth, dtype=torch.bfloat16)
            matmul_scaled(x, linear, torch.zeros(rows, columns, dtype=torch.bfloat16))
    bias = Linear(weight, torch.zeros(columns, dtype=torch.bfloat16), torch.zeros(columns))
    matmul_scaled(x, bias, torch.zeros(rows, columns, dtype=torch.bfloat16), add=True)
    matmul_scaled(x, linear, torch.zeros(rows, columns))
    for dtype in (torch.float16, torch.float32):
        matmul_scaled(x.to(dtype), linear, torch.zeros(rows, columns, dtype=dtype))


if __name__ == "__main__":
    compile_kernels(sys.argv[1])
