"""Graphs for a model of your own: `ostinato.graphs` without the engine.

    python examples/graph_cache.py          (needs an NVIDIA GPU)

The function reads and writes static tensors only, and what it launches depends on its key alone.
A request of any size is padded to the next key; the padding is computed and ignored.
"""

from __future__ import annotations

import torch

from ostinato.graphs.cache import GraphCache

SIZES = (1, 2, 4, 8, 16, 32, 64)


def run(device: torch.device) -> None:
    first, second = (torch.randn(512, 512, device=device) / 23 for _ in range(2))
    # Everything that changes between calls lives in these, made once and never moved.
    x = torch.zeros(64, 512, device=device)
    hidden = torch.zeros(64, 512, device=device)
    y = torch.zeros(64, 512, device=device)

    def classify(batch: int) -> None:
        torch.mm(x[:batch], first, out=hidden[:batch])
        hidden[:batch].relu_()
        torch.mm(hidden[:batch], second, out=y[:batch])

    cache = GraphCache(classify, {"x": x, "hidden": hidden, "y": y}, budget=64 << 20, verify=True)
    for step in range(200):
        rows = torch.randn(1 + step % 50, 512, device=device)
        n = len(rows)
        x[:n].copy_(rows)
        cache(next(size for size in SIZES if size >= n))
        expected = (rows @ first).relu() @ second
        assert torch.allclose(y[:n], expected, atol=1e-3), f"step {step}"
    for record in cache.book.records():
        print(
            f"{record.key:3} {record.state.value:9} hits {record.hits:3} replays {record.replays:3} "
            f"nodes {record.nodes} checks {record.checks} mismatches {record.mismatches}"
        )


def main() -> None:
    # All of it on one stream: a graph's stream would not wait for what another one is still making.
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        run(torch.device("cuda"))


if __name__ == "__main__":
    main()
