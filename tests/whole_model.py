"""Random models and steps of any shape that the kernels accept, each way of running a step against the plain ops."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ostinato.errors import KernelError
from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.models.spec import ModelSpec
from ostinato.ops import AttentionShape, LayerWeights, Linear
from ostinato.ops.cuda import chain, fused, rows
from ostinato.ops.triton import TritonOps
from ostinato.ops.triton.tune import Kind, Version, problem_of
from tests.rows_world import World, check, run_plain, telling, untouched
from tests.stack import Model

LONGEST = 5120
HEADS = (
    (9, 3), (14, 2), (6, 2), (12, 4), (15, 5), (24, 8), (5, 1), (32, 8), (16, 8), (40, 8), (20, 4), (25, 5), (8, 8), (3, 3),
    (28, 4), (27, 9), (26, 2), (7, 7), (16, 2), (19, 19), (30, 6), (33, 3), (10, 2), (13, 13), (4, 2), (1, 1), (2, 1), (17, 17),
)  # fmt: skip
HIDDEN = (320, 576, 640, 896, 960, 1024, 1152, 1280, 1536, 1600, 2048, 2304, 2560, 3072, 4096, 5120)


@dataclass(frozen=True)
class Case:
    spec: ModelSpec
    quantization: str | None
    block: int
    """Tokens of a KV block"""
    seed: int

    def model(self) -> Decoder:
        made = random_decoder(
            self.spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=LONGEST + 1,
            seed=self.seed % 1000, quantization=self.quantization,
        )  # fmt: skip
        return telling(made, self.seed)


def draw(seed: int) -> Case:
    """A model of two layers that the one kernel for one row accepts; all of it follows from the seed."""
    rng = random.Random(seed)
    while True:
        quantization = "fp8" if rng.random() < 0.3 else None
        heads, kv_heads = rng.choice(HEADS)
        window = rng.choice((None, None, None, 1, 17, 200, 255, 1000, 2049))
        attention = AttentionShape(heads, kv_heads, rng.choice((64, 128)), window)
        hidden = rng.choice(HIDDEN) if rng.random() < 0.7 else 64 * rng.randint(1, 48)
        inner = 32 * rng.randint(1, 200)
        if rng.random() < 0.3:  # what `chain.cu` takes, more likely
            hidden, inner = 512 * rng.randint(2, 8), 512 * rng.randint(4, 20)
        spec = dataclasses.replace(
            spec_from_config({**SHAPES["smollm2-135m"], "num_hidden_layers": 2}),
            hidden_size=hidden, intermediate_size=inner, vocab_size=16 * rng.randint(1, 1200), attention=attention,
            rope_inv_freq=tuple(10000.0 ** (-2 * i / attention.head_dim) for i in range(attention.head_dim // 2)),
            tied_embeddings=rng.random() < 0.5, qkv_bias=rng.random() < 0.3, output_bias=rng.random() < 0.2, qk_norm=rng.random() < 0.3,
        )  # fmt: skip
        case = Case(spec, quantization, rng.choice((16, 16, 16, 32, 48, 64, 8, 5)), seed)
        if attention.q_size <= 5120 and fused.unsupported(shapes(case)) is None:
            return case


def shapes(case: Case) -> Model:
    """One layer of the model, without numbers."""
    spec, a, fp8 = case.spec, case.spec.attention, case.quantization is not None

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def linear(out: int, inner: int, bias: bool = False) -> Linear:
        weight = empty(out, inner, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
        return Linear(weight, empty(out) if bias else None, empty(out, dtype=torch.float32) if fp8 else None)

    hidden, inner, norm = (
        spec.hidden_size,
        spec.intermediate_size,
        empty(a.head_dim) if spec.qk_norm else None,
    )
    layer = LayerWeights(
        empty(hidden), linear(a.qkv_size, hidden, spec.qkv_bias), norm, norm, linear(hidden, a.q_size, spec.output_bias),
        empty(hidden), linear(2 * inner, hidden), linear(hidden, inner),
    )  # fmt: skip
    table = empty(spec.vocab_size, hidden)
    return Model(
        table,
        (layer,),
        empty(hidden),
        linear(spec.vocab_size, hidden),
        empty(2, 2, 1, dtype=torch.float32),
        a,
    )


def length(rng: random.Random, longest: int = LONGEST) -> int:
    """Of a context: around where something may begin, or anything."""
    kind = rng.random()
    if kind < 0.15:
        return rng.randint(1, 20)
    if kind < 0.5:
        unit = rng.choice((16, 32, 64, 128, 256, 512, 1024))
        return max(
            1, min(longest, unit * rng.randint(1, max(1, min(longest, 2304) // unit)) + rng.randint(-1, 1))
        )
    return rng.randint(1, rng.choice((256, 600, 2048, longest)))


def one_row(
    case: Case, model: Decoder, exact: Decoder, kernel: fused.FusedDecode, count: int
) -> Iterator[str]:
    """`count` contexts through `decode.cu`; what has been tried."""
    rng = random.Random(case.seed + 1)
    for _ in range(count):
        lengths = [length(rng)]
        step(case, model, exact, lengths, kernel, rng.randrange(2**31))
        yield f"fused {lengths}"


def few_rows(
    case: Case, model: Decoder, exact: Decoder, kernel: rows.RowsDecode, count: int
) -> Iterator[str]:
    """`count` steps of two to eight rows through `rows.cu`."""
    rng = random.Random(case.seed + 2)
    for _ in range(count):
        most = max(n for n in range(1, 9) if kernel.serves(model, n))
        lengths = [0 if rng.random() < 0.1 else length(rng) for _ in range(rng.randint(min(2, most), most))]
        step(case, model, exact, lengths, kernel, rng.randrange(2**31))
        yield f"rows {lengths}"


def step(
    case: Case, model: Decoder, exact: Decoder, lengths: list[int], kernel: fused.FusedDecode | rows.RowsDecode, seed: int
) -> None:  # fmt: skip
    """One step through one of the kernels for a whole model: results, what else it writes, the best tokens."""
    more = {"block": case.block, "width": -(-LONGEST // case.block)}
    ops = run_plain(model, lengths, seed, torch.bfloat16, **more)
    best = run_plain(exact, lengths, seed, torch.float32, **more)
    ours, before = (World(model, lengths, seed, torch.bfloat16, ops.ops, **more) for _ in range(2))
    ours.arena.data.fill_(0xFF)
    kernel.run(model, ours.view, ours.caches(), ours.scratch, greedy=False)
    check(ours, ops, best, lengths)
    assert untouched(ours, before), lengths
    logits = ours.scratch.logits.clone()
    kernel.run(model, ours.view, ours.caches(), ours.scratch, greedy=True)
    live = ours.view.seq_lens > 0
    assert torch.equal(ours.scratch.tokens.long()[live], logits.argmax(1)[live]), lengths


def many_rows(case: Case, model: Decoder, exact: Decoder, counts: tuple[int, ...]) -> Iterator[str]:
    """Steps of so many rows op by op, and where it can be with `chain.cu`."""
    rng, ops = random.Random(case.seed + 3), TritonOps()
    assert ops._fused is None, "somebody else holds it"
    try:
        whole = chain.Chain(torch.device("cuda", torch.cuda.current_device()), model)
        for size in chain.ROWS:
            problem = problem_of("chain", model.layers[0].down, size, torch.bfloat16)
            ops._table.decided[problem] = Version(Kind.CHAIN, True, size)
    except KernelError:
        whole = None
    a = case.spec.attention
    # The plain ops pad all contexts to the longest: a gibibyte each of keys and of values in float32.
    room = (1 << 28) // (a.kv_heads * a.head_dim)
    for count in counts:
        lengths = [0 if rng.random() < 0.05 else length(rng, 600) for _ in range(count - 1)] + [length(rng)]
        if count > chain.ROWS[-1]:
            lengths = [min(n, room // count) for n in lengths]
        seed, more = rng.randrange(2**31), {"block": case.block, "width": -(-LONGEST // case.block)}
        plain = run_plain(model, lengths, seed, torch.bfloat16, **more)
        best = run_plain(exact, lengths, seed, torch.float32, **more)
        for ops._chain in (None, whole) if whole is not None and whole.serves(model, count) else (None,):
            ours, before = (World(model, lengths, seed, torch.bfloat16, ops, **more) for _ in range(2))
            ours.arena.data.fill_(0xFF)
            model.forward(ours.view, ours.cache, ours.scratch, ops)
            check(ours, plain, best, (lengths, ops._chain is not None))
            assert untouched(ours, before), lengths
            yield f"{count} rows" + (" chained" if ops._chain is not None else "")
