"""The source of `rows.cu` itself, all its blocks, run on the CPU by `host_grid.h`, against the plain reference.

What this cannot show: the memory model, speed, and whether a GPU's fragments are as its manual says.
tests/gpu does that.
"""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.ops.cuda import rows
from ostinato.ops.reference import ReferenceOps
from tests.rows_world import BLOCK, World, check, run_plain, telling, untouched, wide
from tests.unit.on_host import compiled, launches, needs_compiler, portable

CPU = torch.device("cpu")

pytestmark = needs_compiler


def model_of(qk_norm: bool, **changes: Any) -> Decoder:
    config = {**SHAPES["qwen3-0.6b" if qk_norm else "llama-3.2-1b"], **changes}
    model = random_decoder(spec_from_config(config), dtype=torch.bfloat16, device=CPU, positions=6000)
    assert rows.unsupported(model, BLOCK) is None
    return model


TINY = {"vocab_size": 160, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "lengths", "grid", "tuning"),
    [
        (TINY, [1, 40, 0, 17], 9, {}),
        # Down keeps two slices at a time; long contexts in splits, one has several passes.
        (TINY | {"intermediate_size": 1056, "hidden_size": 288}, [700, 300], 13, {"MOST_KEPT": 2, "CHUNK": 128}),
        (TINY | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "qk": True}, [5, 150, 33, 0, 16, 15, 1, 2], 8, {"MOST_SLICES": 2}),
    ],
)  # fmt: skip
def test_against_the_reference(tmp_path: Path, changes: dict[str, Any], lengths: list[int], grid: int, tuning: dict[str, int]) -> None:  # fmt: skip
    seed = random.SystemRandom().randrange(2**31)
    changes = dict(changes)
    model = telling(model_of(changes.pop("qk", False), **changes), seed)
    ours, before = (World(model, lengths, seed, torch.bfloat16, ReferenceOps(), "cpu") for _ in range(2))
    plain, exact = (
        run_plain(which, lengths, seed, dtype, device="cpu")
        for which, dtype in ((model, torch.bfloat16), (wide(model), torch.float32))
    )
    numbers = rows.macros(model, BLOCK, ours.view.block_table.shape[1], grid) | tuning
    text = portable(rows.SOURCE) + launches(rows="Params decode_rows(*p)")
    library = compiled(tmp_path, "rows", ["host_grid.h"], text, numbers)
    kept = rows.workspace(numbers, CPU)
    results = []
    for attempt in range(3):
        ours.arena.data.fill_(0xFF)
        pointers = list(
            rows._pointers(
                model, ours.view, ours.caches(), kept, None if attempt == 2 else ours.scratch.logits
            )
        )
        params = rows.pack(pointers, model, len(lengths), grid)
        assert len(params) == library.bytes_of_rows()
        assert library.run_rows(ctypes.create_string_buffer(params, len(params)), seed + attempt)
        assert (kept["steps"] == attempt + 1).all()
        assert (kept["words"][(attempt + 1) % 2] == -1).all(), "the next step's words are empty"
        results.append(ours.scratch.logits.clone())
        best = kept["best"].argmax(0)[: len(lengths)]
        tokens = kept["best_at"].gather(0, best.unsqueeze(0))[0]
        assert torch.equal(tokens.long(), results[0].argmax(1))
    assert torch.equal(results[0], results[1])
    assert results[2].isnan().all()
    ours.scratch.logits.copy_(results[0])
    check(ours, plain, exact, lengths)
    assert untouched(ours, before)
