"""Every version of every product of a decode step, and decode attention, each in CUDA graphs of its own.

    python benchmarks/decode_ops.py [--shapes llama-3.2-1b,qwen3-0.6b] [--rows 1,8,16,32,64,128]
                                    [--contexts 256,1024] [--fp8] [--json FILE]

A product is launched over enough layers' weights that no cache holds them, back to back, dependently
where the GPU can. A figure is microseconds a launch, the least of a few replays. Ends in one line
of JSON; takes about a minute on an H200.
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

COLD_BYTES = 256 << 20
ATTENTION = [
    {"PROGRAMS": programs, "MIN_CHUNK": chunk, "DECODE_KEYS": keys}
    for programs, chunk, keys in (
        (8, 16, 16), (4, 16, 16), (16, 16, 16), (8, 32, 16), (8, 32, 32), (8, 64, 16), (8, 64, 32), (8, 64, 64),
    )
]  # fmt: skip


def products(name: str, rows: list[int], fp8: bool) -> list[dict[str, Any]]:
    """Times of all candidates of one model's products."""
    import torch

    from ostinato.models.quantize import Quantizer
    from ostinato.models.registry import spec_from_config
    from ostinato.models.shapes import SHAPES
    from ostinato.ops import Linear
    from ostinato.ops.triton import TritonOps
    from ostinato.ops.triton.compile import compile_ahead
    from ostinato.ops.triton.tune import BUCKETS, LIBRARY, Problem, bucket, candidates, time_launches

    spec, device = spec_from_config(SHAPES[name]), torch.device("cuda")
    hidden, a, inner = spec.hidden_size, spec.attention, spec.intermediate_size
    ops, quantizer, found = TritonOps(), Quantizer(device), []
    for op, columns, depth in (
        ("norm_linear", a.qkv_size, hidden),
        ("linear_add", hidden, a.q_size),
        ("norm_gate_up", inner, hidden),
        ("linear_add", hidden, inner),
        ("norm_head", spec.vocab_size, hidden),
    ):
        outputs = columns * (2 if op == "norm_gate_up" else 1)
        copies = max(4, COLD_BYTES // (outputs * depth * (1 if fp8 else 2)))
        weights = [
            torch.randn(outputs, depth, device=device, dtype=torch.bfloat16).mul_(0.02)
            for _ in range(1 if op == "norm_head" else copies)
        ]
        linears = [quantizer.linear("w", w, None) if fp8 else Linear(w) for w in weights]
        work = []
        for count in rows:
            problem = Problem(op, columns, depth, bucket(count) or BUCKETS[-1], torch.bfloat16, fp8)
            versions = candidates(problem, ops._products is not None) if bucket(count) else [LIBRARY]
            work.append((count, problem, versions, ops.launcher(problem, count)))
        with compile_ahead():
            for _, _, versions, launch in work:
                for version in versions:
                    launch(version, linears[0])
        torch.cuda.synchronize()
        for count, problem, versions, launch in work:
            times = {}
            for version in versions:
                launch(version, linears[0])
                times[str(version)] = round(time_launches(launch, version, linears, repeats=5), 2)
            best = min(times, key=lambda key: times[key])
            found.append(
                {
                    "shape": name, "op": op, "columns": columns, "depth": depth, "rows": count, "fp8": fp8,
                    "rule": str(versions[0]), "best": best, "gb_per_s": round(problem.weight_bytes / times[best] / 1e3),
                    "us": dict(sorted(times.items(), key=lambda item: item[1])),
                }
            )  # fmt: skip
            print(f"{name} {op} {columns}x{depth} rows {count}: {times[best]:.1f} us, {best}", flush=True)
            for key, us in sorted(times.items(), key=lambda item: item[1]):
                print(f"    {us:8.2f}  {key}{'  <- rule' if key == str(versions[0]) else ''}", flush=True)
    return found


def attention(name: str, count: int, context: int) -> dict[str, Any]:
    """Times of decode attention, every row at the same context, by how the work is cut."""
    import torch

    from ostinato.models.registry import spec_from_config
    from ostinato.models.shapes import SHAPES
    from ostinato.ops import Linear, StepView
    from ostinato.ops import triton as module
    from ostinato.ops.triton.compile import compile_ahead
    from ostinato.ops.triton.tune import LIBRARY, time_launches

    spec, device, block = spec_from_config(SHAPES[name]), torch.device("cuda"), 16
    shape, times = spec.attention, {}
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    caches = 8  # layers
    width = context // block + 1
    table = torch.randperm(count * width, device=device, dtype=torch.int32).view(count, width) + 1
    ids = torch.arange(count, device=device, dtype=torch.int32)
    positions = torch.full((count,), context - 1, device=device, dtype=torch.int32)
    slots = table[:, (context - 1) // block] * block + (context - 1) % block
    start = torch.arange(count + 1, device=device, dtype=torch.int32)
    view = StepView(ids, positions, slots, positions + 1, ids, start, ids, table, True)
    size = (2, count * width + 1, block, shape.kv_heads, shape.head_dim)
    layers = [torch.randn(size, device=device, dtype=torch.bfloat16).unbind(0) for _ in range(caches)]
    qkv = torch.randn(count, shape.qkv_size, device=device, dtype=torch.bfloat16)
    out = torch.empty(count, shape.q_size, device=device, dtype=torch.bfloat16)
    rope = torch.randn(context, 2, shape.head_dim // 2, device=device)
    norm = torch.ones(shape.head_dim, device=device, dtype=torch.bfloat16) if spec.qk_norm else None
    workspace = torch.empty(module.TritonOps().attention_words(shape, count), device=device)
    nothing = [Linear(torch.empty(0))] * caches
    kept = {key: getattr(module, key) for key in ATTENTION[0]}

    def run(choice: dict[str, int], timed: bool) -> None:
        for key, value in choice.items():
            setattr(module, key, value)
        ops, turn = module.TritonOps(), itertools.cycle(layers)
        ops._programs = choice["PROGRAMS"] * processors
        ops._attention = None  # the Triton version; benchmarks/attention.py has both

        def launch(*_: object) -> None:
            ops.rope_paged_attention(
                qkv, view, next(turn), rope, norm, norm, 1e-5, shape, workspace=workspace, out=out
            )

        launch()
        if timed:
            us = time_launches(launch, LIBRARY, nothing, repeats=5)
            times[", ".join(f"{key} {value}" for key, value in choice.items())] = round(us, 2)

    try:
        with compile_ahead():
            for choice in ATTENTION:
                run(choice, timed=False)
        for choice in ATTENTION:
            run(choice, timed=True)
    finally:
        for key, value in kept.items():
            setattr(module, key, value)
    best = min(times, key=lambda key: times[key])
    nbytes = 2 * 2 * count * context * shape.kv_size
    print(f"{name} attention rows {count} context {context}: {times[best]:.1f} us, {best}", flush=True)
    print("    " + ", ".join(f"{us:.1f}" for us in times.values()), flush=True)
    return {
        "shape": name, "op": "rope_paged_attention", "rows": count, "context": context, "best": best,
        "gb_per_s": round(nbytes / times[best] / 1e3), "us": dict(sorted(times.items(), key=lambda item: item[1])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="llama-3.2-1b,qwen3-0.6b")
    parser.add_argument("--rows", default="1,8,16,32,64,128")
    parser.add_argument("--contexts", default="256,1024")
    parser.add_argument("--fp8", action="store_true", help="FP8 weights instead of bfloat16")
    parser.add_argument("--no-attention", action="store_true", help="products only")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    import torch

    from benchmarks.environment import describe

    begun = time.perf_counter()
    rows = [int(part) for part in args.rows.split(",")]
    contexts = [int(part) for part in args.contexts.split(",")]
    result: dict[str, Any] = {"environment": describe(), "products": [], "attention": []}
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for name in args.shapes.split(","):
            result["products"] += products(name, rows, args.fp8)
            if not args.no_attention:
                for count, context in itertools.product(rows, contexts):
                    result["attention"].append(attention(name, count, context))
            torch.cuda.empty_cache()
    result["seconds"] = round(time.perf_counter() - begun, 1)
    line = json.dumps(result)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
