"""The source of `sample.cu` itself, all its blocks, run on the CPU by `host_grid.h`, against the plain sampler.

What this cannot show: the memory model and speed. tests/gpu does that.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ostinato.ops.cuda import sample
from ostinato.sampling import philox_uniform

from .on_host import compiled, launches, needs_compiler, portable
from .test_sampling import assert_is_draw, make_inputs, reference_probabilities, row_params, run
from .test_triton_sampling import shapes_of_rows

pytestmark = needs_compiler


def built(folder: Path, seqs: int, numbers: dict[str, int]) -> ctypes.CDLL:
    warps, grid = numbers["THREADS"] // 32, seqs * numbers["CLUSTER"]
    extra = {"WARPS": warps, "GRID": grid, "HOST_THREADS": numbers["THREADS"]}
    text = portable(sample.SOURCE) + launches(draw="Params sample(*p)")
    headers = ["host_grid.h", "host_cluster.h"]
    return compiled(folder, "sample", headers, text, numbers | extra, "-ffp-contract=off")


def drawn(
    library: ctypes.CDLL,
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    inputs: SimpleNamespace,
    largest: torch.Tensor | None,
    seed: int,
) -> list[int]:
    out = torch.full((len(rows),), -9, dtype=torch.int32)
    by_row = [inputs.temperature, inputs.min_p, inputs.top_p, inputs.top_k, inputs.seed]
    numbers = (inputs.seed.stride(0), 0 if largest is None else largest.shape[1], len(inputs.temperature))
    params = sample.pack([logits, rows, positions, *by_row, out, largest], *numbers)
    assert len(params) == library.bytes_of_draw()
    assert library.run_draw(ctypes.create_string_buffer(params, len(params)), seed)
    return out.tolist()


FILTERS = {
    "temperature": {},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 7},
    "all": {"top_p": 0.95, "top_k": 300, "min_p": 0.001},
    "hot": {"temperature": 1e5, "top_p": 0.5, "top_k": 900},
    "cold": {"temperature": 0.01, "top_p": 0.99},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize(
    ("vocab", "cluster", "threads", "keep"), [(4096, 4, 128, 1), (4001, 2, 256, 0), (24000, 4, 128, 0), (1001, 4, 128, 1)]
)  # fmt: skip
def test_against_the_plain_sampler(tmp_path: Path, vocab: int, cluster: int, threads: int, keep: int) -> None:
    g = torch.Generator().manual_seed(torch.seed() % 2**31)
    print("initial seed", g.initial_seed())
    logits = torch.stack(list(shapes_of_rows(vocab, g).values()))
    logits = torch.cat([logits, logits[-1:]])
    n = len(logits)
    each = sample.Way(cluster, threads, bool(keep)).each(vocab)
    numbers = {"VOCAB": vocab, "CLUSTER": cluster, "THREADS": threads, "EACH": each, "KEEP": keep}
    library = built(tmp_path, n, numbers)
    for name, changes in FILTERS.items():
        inputs = make_inputs(n, vocab, **({"temperature": 0.8} | changes))
        inputs.seed[:] = torch.randint(-(2**31), 2**31, (n, 2), generator=g)
        rows = torch.randperm(n, generator=g).to(torch.int32)
        rows[-1] = -1
        positions = torch.arange(n, dtype=torch.int32)
        expected = run(logits, inputs, rows=rows, positions=positions)
        plain = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        parts = torch.stack([plain[:, part::5].amax(1) for part in range(5)], 1)
        uniforms = philox_uniform(inputs.seed[rows.long()], positions).tolist()
        for largest in (None, parts):
            tokens = drawn(library, logits, rows, positions, inputs, largest, n)
            different = [s for s in range(n) if tokens[s] != expected[s]]
            assert len(different) <= 1, (name, different)
            for s in different:  # the last bit of exp
                p = reference_probabilities(logits[s], **row_params(inputs, int(rows[s])))
                assert_is_draw(tokens[s], p, uniforms[s])
