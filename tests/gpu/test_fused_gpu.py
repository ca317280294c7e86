"""The one-kernel decode step beside the same model op by op, in bfloat16 and in float32."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.models.spec import ModelSpec
from ostinato.ops.cuda.fused import FusedDecode, unsupported
from ostinato.ops.reference import ReferenceOps
from tests.rows_world import World, check, run_plain, telling, untouched, wide
from tests.whole_model import length as any_length

pytestmark = pytest.mark.gpu
POSITIONS, WIDTH = 6000, 1040


def spec_of(shape: str, **changes: Any) -> ModelSpec:
    return spec_from_config({**SHAPES[shape], "num_hidden_layers": 3, **changes})


CASES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {},
    "qwen3-0.6b": {},
    "smollm2-135m": {},
    "llama-2-7b": {"num_hidden_layers": 2},
    "llama-3.1-8b": {"num_hidden_layers": 2},
    # As wide as models of 13 billion weights: of slices of the output projection some warps have fewer than others.
    "forty-heads": {"num_hidden_layers": 2, "num_attention_heads": 40, "hidden_size": 5120, "intermediate_size": 6912, "vocab_size": 4096},
}  # fmt: skip
LENGTHS = (1, 33, 100, 256, 257, 513, 600, 1025, 1300, 1700, 2048, 2049, 5000)
"""One piece, its edge, pieces that the reader merges, pieces that all blocks merge; of each model."""


@pytest.fixture
def seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_(2**31))


def world_of(model: Decoder, length: int, seed: int) -> World:
    """One sequence of a given length."""
    return World(model, [length], seed, torch.bfloat16, ReferenceOps(), width=WIDTH)


def compare(fused: FusedDecode, model: Decoder, exact: Decoder, length: int, seed: int) -> None:
    """A step is as exact as the plain ops, has the same bits twice, writes its own slot, and finds the best token."""
    ours = world_of(model, length, seed)
    plain, best = (
        run_plain(which, [length], seed, dtype, width=WIDTH)
        for which, dtype in ((model, torch.bfloat16), (exact, torch.float32))
    )
    results = []
    for _ in range(2):
        ours.arena.data.fill_(0xFF)
        fused.run(model, ours.view, ours.caches(), ours.scratch, greedy=False)
        results.append(ours.scratch.logits.clone())
    assert torch.equal(*results), length
    check(ours, plain, best, length)
    assert untouched(ours, world_of(model, length, seed)), length
    fused.run(model, ours.view, ours.caches(), ours.scratch, greedy=True)
    assert int(ours.scratch.tokens[0]) == int(results[0][0].argmax()), length


@pytest.fixture(scope="module")
def fused() -> FusedDecode:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    return FusedDecode(torch.device("cuda"))


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("shape", list(CASES))
def test_equals_the_ops(fused: FusedDecode, seed: int, shape: str, quantization: str | None) -> None:
    spec = spec_of("llama-3.1-8b" if shape == "forty-heads" else shape, **CASES[shape])
    model = telling(
        random_decoder(
            spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS, seed=seed % 1000, quantization=quantization
        ),
        seed,
    )  # fmt: skip
    assert unsupported(model) is None
    exact, rng = wide(model), random.Random(seed)
    for length in (*LENGTHS, any_length(rng), any_length(rng)):
        compare(fused, model, exact, length, seed + length)
    assert all(bound.decode.spilled_bytes == 0 for bound in fused._bound.values())
    del model, exact
    torch.cuda.empty_cache()


@pytest.mark.parametrize("changes", [{"sliding_window": 200, "architectures": ["MistralForCausalLM"]}, {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}])  # fmt: skip
def test_window_and_bias(fused: FusedDecode, seed: int, changes: dict[str, Any]) -> None:
    spec = spec_of("llama-3.2-1b", rope_scaling=None, **changes)
    model = telling(
        random_decoder(spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS), seed
    )
    exact = wide(model)
    for length in (150, 200, 201, 257, 1000):
        compare(fused, model, exact, length, seed + length)


def test_a_row_that_is_not_live_writes_no_kv(fused: FusedDecode, seed: int) -> None:
    model = random_decoder(
        spec_of("llama-3.2-1b"), dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS
    )
    world = world_of(model, 0, seed)
    before = world.cache.data.clone().view(torch.int16)
    for _ in range(50):
        fused.run(model, world.view, world.caches(), world.scratch, greedy=True)
    assert torch.equal(before, world.cache.data.view(torch.int16))
    live = world_of(model, 300, seed)
    fused.run(model, live.view, live.caches(), live.scratch, greedy=False)
    assert not live.scratch.logits.isnan().any()


def test_logits_that_are_no_numbers_are_never_the_best(fused: FusedDecode, seed: int) -> None:
    spec = spec_of("llama-3.2-1b", tie_word_embeddings=False)
    model = random_decoder(spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS)
    model.head.weight[: spec.vocab_size // 3] = torch.nan  # the first that every thread sees, too
    world = world_of(model, 300, seed)
    fused.run(model, world.view, world.caches(), world.scratch, greedy=False)
    expected = world.scratch.logits.nan_to_num(nan=-torch.inf).argmax(1)
    fused.run(model, world.view, world.caches(), world.scratch, greedy=True)
    assert torch.equal(world.scratch.tokens.long(), expected)


GROUPS = {
    # Query heads of a KV head: as many as columns of a product, fewer, more than eight. Of other shapes with few KV heads or none but those.
    "one": {"num_attention_heads": 32, "num_key_value_heads": 32},
    "two of 128": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "three": {"num_attention_heads": 9, "num_key_value_heads": 3},
    "four of 128": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "seven of 128": {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128},
    "eight": {"num_attention_heads": 32, "num_key_value_heads": 4},
    "nine": {"num_attention_heads": 18, "num_key_value_heads": 2},
    "sixteen": {"num_attention_heads": 32, "num_key_value_heads": 2},
}
FAR = (512, 513, 1024, 1025, 2047, 2048, 2049, 2300, 4095, 4096, 4097, 6001, 8191, 8192, 8193, 16_384, 16_500)
"""Contexts whose splits all blocks merge, of one more or fewer tokens than whole splits"""


@pytest.mark.parametrize("group", list(GROUPS))
def test_far_contexts(fused: FusedDecode, seed: int, group: str) -> None:
    spec = spec_of(
        "llama-3.2-1b", num_hidden_layers=2, hidden_size=1024, intermediate_size=2048, vocab_size=4096,
        **{"head_dim": 64, **GROUPS[group]},
    )  # fmt: skip
    model = telling(
        random_decoder(spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=FAR[-1]), seed
    )
    exact = wide(model)
    for length in FAR:
        compare(fused, model, exact, length, seed + length)
    assert all(bound.decode.spilled_bytes == 0 for bound in fused._bound.values())


def test_far_contexts_have_the_same_bits_every_time(fused: FusedDecode, seed: int) -> None:
    """Behind shorter and longer ones."""
    model = random_decoder(
        spec_of("llama-3.2-1b"), dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS
    )
    worlds, first = [world_of(model, length, seed) for length in (1281, 5000, 300, 1600, 4096)], []
    for turn in range(20):
        for i, world in enumerate(worlds):
            fused.run(model, world.view, world.caches(), world.scratch, greedy=False)
            first += [world.scratch.logits.clone()] if turn == 0 else []
            assert torch.equal(world.scratch.logits, first[i]), (turn, i)


def test_capture_allocates_nothing_and_replays_the_same(fused: FusedDecode, seed: int) -> None:
    model = random_decoder(
        spec_of("llama-3.2-1b"), dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS
    )
    world = world_of(model, 777, seed)

    def run() -> None:
        fused.run(model, world.view, world.caches(), world.scratch, greedy=False)

    run()
    expected = world.scratch.logits.clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    taken = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.cuda.graph(graph, stream=stream):
        run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - taken <= 2  # capture_begin's own
    for _ in range(200):
        world.scratch.logits.zero_()
        graph.replay()
        assert torch.equal(world.scratch.logits, expected)


@pytest.mark.parametrize(
    ("shape", "quantization", "steps"),
    [
        ("qwen3-0.6b", None, 10_000),
        ("qwen3-0.6b", "fp8", 10_000),
        ("llama-3.2-1b", None, 4_000),
        ("llama-3.2-1b", "fp8", 6_000),
    ],
)
def test_thousands_of_steps_have_the_same_bits(
    fused: FusedDecode, seed: int, shape: str, quantization: str | None, steps: int
) -> None:
    """All layers, every other step behind other traffic: what happens once in thousands of steps is seen here."""
    model = random_decoder(
        spec_from_config(SHAPES[shape]), dtype=torch.bfloat16, device=torch.device("cuda"),
        positions=POSITIONS, seed=seed % 1000, quantization=quantization,
    )  # fmt: skip
    world = world_of(model, 257, seed)
    logits = world.scratch.logits

    def run() -> None:
        fused.run(model, world.view, world.caches(), world.scratch, greedy=False)

    run()
    expected, kept = logits.clone(), world.cache.data.clone().view(torch.int16)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    traffic = torch.zeros(1 << 25, device="cuda")
    for step in range(steps):
        if step % 2:
            traffic.add_(1.0)  # the L2 cache has none of the model then
        logits.zero_()
        graph.replay()
        differing += (logits != expected).any()
    assert int(differing) == 0, f"{int(differing)} of {steps} steps"
    assert torch.equal(world.cache.data.view(torch.int16), kept)
    graph.reset()
