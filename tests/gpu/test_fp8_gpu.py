"""FP8 weights on a GPU: products beside the plain ones, and a whole model on graphs against eager."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent))
import triton
import triton.language as tl
from test_engine_gpu import assert_equal_bit_for_bit, default_model, make_pair

from ostinato import LLM, SamplingParams
from ostinato.models import shapes
from ostinato.models.quantize import FP8, Quantizer
from ostinato.models.registry import spec_from_config
from ostinato.ops import AttentionShape, Linear
from ostinato.ops.cuda import fused
from ostinato.ops.cuda.rows import unsupported as unsupported_rows
from ostinato.ops.reference import linear_product
from ostinato.ops.triton.matmul import matmul_scaled, widen
from tests.accuracy import TINY, no_worse
from tests.rows_world import wide
from tests.whole_model import Case, many_rows, one_row

pytestmark = pytest.mark.gpu

ROWS = (1, 7, 17, 64, 130, 1000)
SHAPES = ((1536, 576), (2048, 2048), (2048, 8192), (70, 88))
"""(out, in)"""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def seed() -> int:
    value = int(torch.empty((), dtype=torch.int64).random_(2**31))
    torch.manual_seed(value)
    return value  # in every failing assertion's locals


def make(columns: int, depth: int, dtype: torch.dtype, bias: bool) -> Linear:
    device = torch.device("cuda")
    own = torch.randn(columns, device=device).to(dtype) if bias else None
    return Quantizer(device).linear("w", torch.randn(columns, depth, device=device) / depth**0.5, own)


def exact(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    assert linear.scale is not None
    product = x.double() @ (linear.weight.double() * linear.scale.double()[:, None]).t()
    return product if linear.bias is None else product + linear.bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_product(seed: int, rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, depth, device="cuda").to(dtype)
    linear = make(columns, depth, dtype, bias=True)
    scales = torch.rand(columns, device="cuda") + 0.5  # a neighbour's is another one
    linear = Linear(linear.weight, linear.bias, linear.scale * scales)
    expected, tiny = exact(x, linear), 1e-5 if dtype is torch.float32 else TINY
    plain = linear_product(x, linear) + linear.bias
    out = torch.full((rows, columns), float("nan"), device="cuda", dtype=dtype)
    matmul_scaled(x, linear, out)
    no_worse(out, plain, expected, tiny=tiny)
    again = torch.full_like(out, float("nan"))
    matmul_scaled(x, linear, again)
    assert torch.equal(out, again)
    before = torch.randn(rows, columns, device="cuda").to(dtype)
    residual = before.clone()
    matmul_scaled(x, linear, residual, add=True)
    no_worse(residual, before + plain, before + expected, tiny=tiny)
    unbiased = Linear(linear.weight, None, linear.scale)
    logits = torch.full((rows, columns), float("nan"), device="cuda")
    matmul_scaled(x, unbiased, logits)
    # tensor cores cut their sums off instead of rounding them
    wanted = exact(x, unbiased)
    no_worse(logits, wanted.float(), wanted, tiny=1e-5 if dtype is torch.float32 else 1e-4)


def test_a_row_does_not_depend_on_others(seed: int) -> None:
    """A padded row that is NaN stays alone, at every size of tile."""
    linear = make(2048, 2048, torch.bfloat16, bias=False)
    for rows in ROWS[1:]:
        x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
        clean, spoilt = (torch.empty(rows, 2048, device="cuda") for _ in range(2))
        matmul_scaled(x, linear, clean)
        x[rows // 2] = float("nan")
        matmul_scaled(x, linear, spoilt)
        assert spoilt[rows // 2].isnan().all()
        clean[rows // 2] = spoilt[rows // 2] = 0
        assert torch.equal(clean, spoilt)


@triton.jit
def widen_all(codes, out):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 256)
    tl.store(out + i, widen(tl.load(codes + i), out.dtype.element_ty, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_is_widened_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes[(codes & 0x7F) == 0x7F] = 0  # the two NaNs; no weight is one
    out = torch.empty(256, dtype=dtype, device="cuda")
    widen_all[(1,)](codes, out)
    assert out.tolist() == codes.view(FP8).float().tolist()


def test_nothing_is_allocated(seed: int) -> None:
    x, linear = torch.randn(130, 2048, device="cuda").bfloat16(), make(2048, 2048, torch.bfloat16, bias=False)
    out = torch.empty(130, 2048, device="cuda", dtype=torch.bfloat16)
    matmul_scaled(x, linear, out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    matmul_scaled(x, linear, out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mistral": {"sliding_window": 200},
    "together": {"qkv_bias": True, "qk_norm": True, "sliding_window": 200},
}
"""What stands beside the FP8 products of a layer"""


def family(name: str, seed: int) -> Case:
    """Two layers, telling weights; without the family's own part it would be Llama."""
    own = dict(FAMILIES[name])
    attention = AttentionShape(16, 4, 64, own.pop("sliding_window", None))
    spec = dataclasses.replace(
        spec_from_config({**shapes.SHAPES["smollm2-135m"], "num_hidden_layers": 2}),
        hidden_size=1024, intermediate_size=2048, vocab_size=4096, attention=attention,
        rope_inv_freq=tuple(10000.0 ** (-i / 32) for i in range(32)), **own,
    )  # fmt: skip
    return Case(spec, "fp8", 16, seed)


@pytest.mark.parametrize("count", [1, 3, 20, 150])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decode_step_of_each_family(name: str, count: int) -> None:
    """Whole steps beside the plain ops: one row in `decode.cu` and op by op, more op by op."""
    seed = random.SystemRandom().randrange(2**31)
    case = family(name, seed)
    print(seed)  # shown when it fails
    model = case.model()
    exact = wide(model)
    held = None
    if torch.cuda.get_device_capability()[0] == 9:
        held = fused.FusedDecode(torch.device("cuda", 0))  # no op set claims another
        assert fused.unsupported(model) is None
        assert unsupported_rows(model, case.block) == "weights are quantised"
        if count == 1:
            assert len(list(one_row(case, model, exact, held, 6))) == 6
    for turn in range(2):
        again = dataclasses.replace(case, seed=seed + turn)
        assert list(many_rows(again, model, exact, (count,))) == [f"{count} rows"]
    del held


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[LLM, LLM]]:
    """A small random model."""
    options: dict[str, Any] = {"load_format": "dummy", "quantization": "fp8", "max_num_seqs": 40}
    options |= {"max_model_len": 512, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 1 << 30}
    with make_pair(partial(LLM, "smollm2-135m", enable_prefix_caching=False, **options)) as made:
        yield made


@pytest.mark.parametrize("sampler", ["greedy", "sample"])
@pytest.mark.parametrize("batch", [1, 3, 17, 40])
def test_graph_and_eager_are_equal_bit_for_bit(pair: Any, batch: int, sampler: str) -> None:
    assert_equal_bit_for_bit(pair, batch, sampler)
    records = pair[0].engine.plan.book.captured
    assert all(r.trusted and not r.mismatches for r in records), records


def test_memory(pair: Any) -> None:
    model = pair[0].engine.program.model
    assert pair[0].get_metrics()["memory_bytes"]["weights"] == model.nbytes
    wide = 2 * pair[0].engine.spec.num_parameters
    table = model.embedding.numel() * 2
    assert 0.49 * wide < model.nbytes - table - model.rope.numel() * 4 < 0.52 * wide


def test_loading_holds_one_copy() -> None:
    """The most that loading takes at once is the model and a few of its tensors."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    llm = LLM("llama-3.2-1b", load_format="dummy", quantization="fp8", max_model_len=256, max_num_seqs=1,
              max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 24, enforce_eager=True)  # fmt: skip
    try:
        largest = llm.engine.program.model.embedding.numel() * 2
        assert torch.cuda.max_memory_allocated() - before < llm.engine.program.model.nbytes + largest
    finally:
        llm.close()


def test_text_of_the_default_model() -> None:
    llm = LLM(default_model(), quantization="fp8", max_model_len=256, max_num_seqs=2)
    try:
        (output,) = llm.generate(
            ["The capital of France is"],
            SamplingParams(temperature=0.0, max_tokens=30),
            use_tqdm=False,
        )
        assert "Paris" in output.outputs[0].text
    finally:
        llm.close()
