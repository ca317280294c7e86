"""Decode attention, CUDA C++ and Triton side by side, each in CUDA graphs of its own, over cold caches.

    python benchmarks/attention.py [--shapes llama-3.2-1b,qwen3-0.6b] [--rows 2,8,16,32,64,128,256]
                                   [--contexts 256,1000,4000] [--ragged] [--json FILE]

Every row has the same context, or with --ragged contexts spread evenly up to twice that. Launches go
round enough layers' caches that the L2 cache cannot hold them. A figure is microseconds a launch, the least of a
few replays; GB/s counts keys and values once. `error` is how far the two are apart, relative to their size.
Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

COLD_BYTES = 512 << 20
MOST_LAYERS = 256
BLOCK = 16


def measure(name: str, count: int, context: int, ragged: bool) -> dict[str, Any]:
    """Times of both versions at one number of rows."""
    import torch

    from ostinato.models.registry import spec_from_config
    from ostinato.models.shapes import SHAPES
    from ostinato.ops import Linear, StepView
    from ostinato.ops.triton import TritonOps
    from ostinato.ops.triton.tune import LIBRARY, time_launches

    spec, device = spec_from_config(SHAPES[name]), torch.device("cuda")
    shape = spec.attention
    lens = torch.full((count,), context, dtype=torch.int32)
    if ragged:
        lens = torch.linspace(1, 2 * context, count).round().int()[torch.randperm(count)]
    longest = int(lens.max())
    width = longest // BLOCK + 1
    nbytes = 2 * 2 * int(lens.sum()) * shape.kv_size
    layers = max(2, min(MOST_LAYERS, -(-COLD_BYTES // nbytes)))
    size = (2, count * width + 1, BLOCK, shape.kv_heads, shape.head_dim)
    caches = [torch.randn(size, device=device, dtype=torch.bfloat16).unbind(0) for _ in range(layers)]
    table = torch.randperm(count * width, device=device).int().view(count, width) + 1
    ids = torch.arange(count, device=device, dtype=torch.int32)
    positions = lens.to(device) - 1
    blocks = table.gather(1, (positions // BLOCK).long().unsqueeze(1)).squeeze(1)
    slots = blocks * BLOCK + positions % BLOCK
    start = torch.arange(count + 1, device=device, dtype=torch.int32)
    view = StepView(ids, positions, slots, positions + 1, ids, start, ids, table, True)
    qkv = torch.randn(count, shape.qkv_size, device=device, dtype=torch.bfloat16)
    rope = torch.randn(longest, 2, shape.head_dim // 2, device=device)
    norm = torch.ones(shape.head_dim, device=device, dtype=torch.bfloat16) if spec.qk_norm else None
    workspace = torch.empty(TritonOps().attention_words(shape, count), device=device)
    out = torch.empty(count, shape.q_size, device=device, dtype=torch.bfloat16)
    nothing = [Linear(torch.empty(0))] * layers
    times, results = {}, {}
    for version in ("cuda", "triton"):
        ops, turn = TritonOps(), itertools.cycle(caches)
        if version == "triton":
            ops._attention = None
        elif ops._attention is None:
            raise SystemExit("the CUDA version needs compute capability 8.0 and the package cuda-python")

        def launch(*_: object, ops: TritonOps = ops, turn: Any = turn) -> None:
            ops.rope_paged_attention(
                qkv, view, next(turn), rope, norm, norm, 1e-5, shape, workspace=workspace, out=out
            )

        launch()
        if version == "cuda" and not ops._attention._kernels:
            raise SystemExit(f"the CUDA version does not serve {name}")
        results[version] = out.double()
        times[version] = round(time_launches(launch, LIBRARY, nothing, repeats=7), 2)
    error = float((results["cuda"] - results["triton"]).norm() / results["triton"].norm())
    speed = {version: round(nbytes / us / 1e3) for version, us in times.items()}
    print(
        f"{name:14} rows {count:4} context {context:6}{' ragged' if ragged else ''}: "
        + ", ".join(f"{version} {times[version]:8.2f} us {speed[version]:5} GB/s" for version in times)
        + f", error {error:.1e}, {layers} layers of {nbytes / 1e6:.1f} MB",
        flush=True,
    )
    return {
        "shape": name, "rows": count, "context": context, "ragged": ragged, "layers": layers, "bytes": nbytes,
        "us": times, "gb_per_s": speed, "error": error,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="llama-3.2-1b,qwen3-0.6b")
    parser.add_argument("--rows", default="2,8,16,32,64,128,256")
    parser.add_argument("--contexts", default="256,1000,4000")
    parser.add_argument("--ragged", action="store_true", help="contexts from 1 to twice the given one")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    import torch

    from benchmarks.environment import describe

    begun = time.perf_counter()
    found = []
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for name in args.shapes.split(","):
            for rows, context in itertools.product(args.rows.split(","), args.contexts.split(",")):
                found.append(measure(name, int(rows), int(context), args.ragged))
                torch.cuda.empty_cache()
    result = {"environment": describe(), "attention": found, "seconds": round(time.perf_counter() - begun, 1)}
    line = json.dumps(result)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
