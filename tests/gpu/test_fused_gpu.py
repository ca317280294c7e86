"""The one-kernel decode step against the same model op by op, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ostinato.graphs.runner import Arena
from ostinato.kv_cache import KVCache
from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.models.spec import ModelSpec
from ostinato.ops import Scratch, StepView
from ostinato.ops.cuda.fused import FusedDecode, unsupported
from ostinato.ops.triton import TritonOps
from tests.rows_world import wide

pytestmark = pytest.mark.gpu
POSITIONS, BLOCK, TABLE = 6000, 16, 400


def spec_of(shape: str, **changes: Any) -> ModelSpec:
    return spec_from_config({**SHAPES[shape], "num_hidden_layers": 3, **changes})


CASES = {
    "llama-3.2-1b": {},
    "qwen3-0.6b": {},
    "smollm2-135m": {},
    "llama-2-7b": {"num_hidden_layers": 2},
    "llama-3.1-8b": {"num_hidden_layers": 2},
}


@pytest.fixture
def seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_(2**31))


class World:
    """One sequence of a given length, its cache filled with random numbers."""

    def __init__(self, model: Decoder, length: int, seed: int, dtype: torch.dtype) -> None:
        spec = model.spec
        rng = torch.Generator(device="cuda").manual_seed(seed)
        self.cache = KVCache.allocate(
            layers=spec.num_layers, num_blocks=TABLE, block_size=BLOCK, kv_heads=spec.attention.kv_heads,
            head_dim=spec.attention.head_dim, dtype=dtype, device=torch.device("cuda"),
        )  # fmt: skip
        noise = torch.randn(self.cache.data.shape, device="cuda", generator=rng).bfloat16()
        self.cache.data.copy_(noise)
        self.ops = TritonOps()
        self.arena = Arena(
            max_tokens=1, max_seqs=1, hidden=spec.hidden_size, intermediate=spec.intermediate_size,
            vocab=spec.vocab_size, attention=spec.attention, ops=self.ops, dtype=dtype, device=torch.device("cuda"),
        )  # fmt: skip
        blocks = torch.randperm(TABLE, device="cuda", generator=rng).int()
        at = max(length - 1, 0)

        def one(value: int) -> torch.Tensor:
            return torch.tensor([value], dtype=torch.int32, device="cuda")

        token = int(torch.randint(spec.vocab_size, (), device="cuda", generator=rng))
        self.view = StepView(
            ids=one(token), positions=one(at), seq_lens=one(length), last_index=one(0), rows=one(0 if length else -1),
            slots=one(int(blocks[at // BLOCK]) * BLOCK + at % BLOCK if length else -1),
            query_start=torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
            block_table=blocks.view(1, -1), decode=True,
        )  # fmt: skip

    @property
    def scratch(self) -> Scratch:
        return self.arena.view(1, 1)

    def caches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [self.cache.layer(i) for i in range(self.cache.data.shape[0])]


@pytest.fixture(scope="module")
def fused() -> FusedDecode:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    return FusedDecode(torch.device("cuda"))


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert not actual.isnan().any()
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, float(error)


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("shape", list(CASES))
def test_equals_the_ops(fused: FusedDecode, seed: int, shape: str, quantization: str | None) -> None:
    spec = spec_of(shape, **CASES[shape])
    model = random_decoder(
        spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS, seed=seed % 1000, quantization=quantization
    )  # fmt: skip
    assert unsupported(model) is None
    exact = wide(model)
    # One piece, its edge, pieces that the reader merges, pieces that the last of them merges.
    lengths = (
        (1, 100, 256, 257, 513, 1025, 2049, 5000)
        if shape in ("llama-3.2-1b", "qwen3-0.6b")
        else (1, 600, 1700)
    )
    for length in lengths:
        ours, theirs = (
            World(model, length, seed + length, dtype) for dtype in (torch.bfloat16, torch.float32)
        )
        theirs.ops._fused = None
        exact.forward(theirs.view, theirs.cache, theirs.scratch, theirs.ops)
        results = []
        for _ in range(2):
            ours.arena.data.fill_(0xFF)
            fused.run(model, ours.view, ours.caches(), ours.scratch, greedy=False)
            results.append(ours.scratch.logits.clone())
        assert torch.equal(*results), length
        near(results[0], theirs.scratch.logits, 0.04)
        at = int(ours.view.slots[0])
        for (mine, my_values), (other, their_values) in zip(ours.caches(), theirs.caches(), strict=True):
            near(mine.flatten(0, 1)[at], other.flatten(0, 1)[at], 0.04)
            near(my_values.flatten(0, 1)[at], their_values.flatten(0, 1)[at], 0.04)
        untouched = torch.ones(TABLE * BLOCK, dtype=torch.bool, device="cuda")
        untouched[at] = False
        before = World(model, length, seed + length, torch.bfloat16)
        for (mine, _), (old, _) in zip(ours.caches(), before.caches(), strict=True):
            assert torch.equal(mine.flatten(0, 1)[untouched], old.flatten(0, 1)[untouched])
        fused.run(model, ours.view, ours.caches(), ours.scratch, greedy=True)
        assert int(ours.scratch.tokens[0]) == int(results[0][0].argmax()), length
    assert all(bound.decode.spilled_bytes == 0 for bound in fused._bound.values())
    del model, exact
    torch.cuda.empty_cache()


@pytest.mark.parametrize("changes", [{"sliding_window": 200, "architectures": ["MistralForCausalLM"]}, {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}])  # fmt: skip
def test_window_and_bias(fused: FusedDecode, seed: int, changes: dict[str, Any]) -> None:
    spec = spec_of("llama-3.2-1b", rope_scaling=None, **changes)
    model = random_decoder(spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS)
    for length in (150, 201, 1000):
        ours, theirs = (World(model, length, seed, dtype) for dtype in (torch.bfloat16, torch.float32))
        theirs.ops._fused = None
        wide(model).forward(theirs.view, theirs.cache, theirs.scratch, theirs.ops)
        fused.run(model, ours.view, ours.caches(), ours.scratch, greedy=False)
        near(ours.scratch.logits, theirs.scratch.logits, 0.04)


def test_a_row_that_is_not_live_writes_no_kv(fused: FusedDecode, seed: int) -> None:
    model = random_decoder(
        spec_of("llama-3.2-1b"), dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS
    )
    world = World(model, 0, seed, torch.bfloat16)
    before = world.cache.data.clone()
    for _ in range(50):
        fused.run(model, world.view, world.caches(), world.scratch, greedy=True)
    assert torch.equal(before, world.cache.data)
    live = World(model, 300, seed, torch.bfloat16)
    fused.run(model, live.view, live.caches(), live.scratch, greedy=False)
    assert not live.scratch.logits.isnan().any()


def test_semaphores_are_zero_behind_every_step(fused: FusedDecode, seed: int) -> None:
    """Of contexts that the last split merges, whatever number of splits they have."""
    model = random_decoder(
        spec_of("llama-3.2-1b"), dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS
    )
    for length in (1281, 5000, 1600, 4096):
        world = World(model, length, seed, torch.bfloat16)
        for _ in range(20):
            fused.run(model, world.view, world.caches(), world.scratch, greedy=False)
        assert not any(bound.cells["semaphores"].any() for bound in fused._bound.values()), length


def test_capture_allocates_nothing_and_replays_the_same(fused: FusedDecode, seed: int) -> None:
    model = random_decoder(
        spec_of("llama-3.2-1b"), dtype=torch.bfloat16, device=torch.device("cuda"), positions=POSITIONS
    )
    world = World(model, 777, seed, torch.bfloat16)

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
    world = World(model, 257, seed, torch.bfloat16)
    logits = world.scratch.logits

    def run() -> None:
        fused.run(model, world.view, world.caches(), world.scratch, greedy=False)

    run()
    expected, kept = logits.clone(), world.cache.data.clone()
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
    assert torch.equal(world.cache.data, kept)
    graph.reset()
