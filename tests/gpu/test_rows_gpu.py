"""The one-kernel decode step of a few sequences beside the same model op by op, in bfloat16 and in float32."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ostinato.models.decoder import random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.ops.cuda import rows
from ostinato.ops.cuda.rows import RowsDecode
from ostinato.ops.reference import ReferenceOps
from tests.rows_world import BLOCK, World, check, run_plain, telling, untouched, wide
from tests.whole_model import length as any_length

pytestmark = pytest.mark.gpu
WIDTH = 320
MIXED = [256, 1, 17, 0, 600, 1300, 33, 128]
CASES: list[tuple[str, dict[str, Any], list[list[int]]]] = [
    ("llama-3.2-1b", {"num_hidden_layers": 3}, [[256] * 8, MIXED, [5000, 300, 0, 64], [700, 2500], [0] * 8]),
    ("qwen3-0.6b", {"num_hidden_layers": 3}, [MIXED, [5000, 300]]),
    ("llama-3.1-8b", {"num_hidden_layers": 2}, [MIXED]),
    ("smollm2-135m", {"num_hidden_layers": 3}, [MIXED, [2049, 1025, 513, 257, 258], [300, 5000]]),
    (
        "llama-3.2-1b",
        {"num_hidden_layers": 3, "sliding_window": 200, "architectures": ["MistralForCausalLM"], "rope_scaling": None},
        [[256, 1, 201, 0, 600, 1300, 33, 128]],
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def decode() -> RowsDecode:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    return RowsDecode(torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture
def seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_(2**31))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{len(case[1])}")
def test_equals_the_ops(
    decode: RowsDecode, seed: int, case: tuple[str, dict[str, Any], list[list[int]]]
) -> None:
    """The same bits 300 times, poisoned before each; a row's KV slot is written, and no other."""
    name, changes, sets = case
    spec = spec_from_config({**SHAPES[name], **changes})
    model = telling(
        random_decoder(spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=6000), seed
    )
    assert rows.unsupported(model, BLOCK) is None
    exact, rng = wide(model), random.Random(seed)
    for lengths in (*sets, [any_length(rng) for _ in range(rng.randint(2, 8))]):
        assert decode.serves(model, len(lengths))
        ours, before = (
            World(model, lengths, seed, torch.bfloat16, ReferenceOps(), width=WIDTH) for _ in range(2)
        )
        plain, best = (
            run_plain(which, lengths, seed, dtype, width=WIDTH)
            for which, dtype in ((model, torch.bfloat16), (exact, torch.float32))
        )
        first = None
        for _ in range(300):
            ours.arena.data.fill_(0xFF)
            decode.run(model, ours.view, ours.caches(), ours.scratch, greedy=False)
            if first is None:
                first = ours.scratch.logits.clone()
            assert torch.equal(ours.scratch.logits, first), lengths
        assert first is not None
        check(ours, plain, best, lengths)
        assert untouched(ours, before), lengths
        ours.arena.data.fill_(0xFF)
        decode.run(model, ours.view, ours.caches(), ours.scratch, greedy=True)
        assert torch.equal(ours.scratch.tokens.long(), first.argmax(1))
    del model, exact
    torch.cuda.empty_cache()


def test_neighbours_change_no_bit(decode: RowsDecode, seed: int) -> None:
    spec = spec_from_config({**SHAPES["llama-3.2-1b"], "num_hidden_layers": 2})
    model = random_decoder(spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=6000)
    world = World(model, MIXED, seed, torch.bfloat16, ReferenceOps(), width=WIDTH)
    decode.run(model, world.view, world.caches(), world.scratch, greedy=False)
    all_rows = world.scratch.logits.clone()
    for name in ("seq_lens", "ids", "positions"):
        getattr(world.view, name)[1:] = 0
    world.view.slots[1:] = world.view.rows[1:] = -1
    decode.run(model, world.view, world.caches(), world.scratch, greedy=False)
    assert torch.equal(world.scratch.logits[0], all_rows[0])


def test_logits_that_are_no_numbers_are_never_the_best(decode: RowsDecode, seed: int) -> None:
    spec = spec_from_config({**SHAPES["llama-3.2-1b"], "num_hidden_layers": 2, "tie_word_embeddings": False})
    model = random_decoder(spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=6000)
    model.head.weight[: spec.vocab_size // 3] = torch.nan  # the first that every thread sees, too
    world = World(model, MIXED, seed, torch.bfloat16, ReferenceOps(), width=WIDTH)
    decode.run(model, world.view, world.caches(), world.scratch, greedy=False)
    expected = world.scratch.logits.nan_to_num(nan=-torch.inf).argmax(1)
    decode.run(model, world.view, world.caches(), world.scratch, greedy=True)
    assert torch.equal(world.scratch.tokens.long(), expected)


def test_a_graph_replays_the_same(decode: RowsDecode, seed: int) -> None:
    spec = spec_from_config({**SHAPES["llama-3.2-1b"], "num_hidden_layers": 2})
    model = random_decoder(spec, dtype=torch.bfloat16, device=torch.device("cuda"), positions=6000)
    world = World(model, MIXED, seed, torch.bfloat16, ReferenceOps(), width=WIDTH)
    decode.run(model, world.view, world.caches(), world.scratch, greedy=False)
    expected = world.scratch.logits.clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        decode.run(model, world.view, world.caches(), world.scratch, greedy=False)
    for _ in range(200):
        world.scratch.logits.zero_()
        graph.replay()
        assert torch.equal(world.scratch.logits, expected)
