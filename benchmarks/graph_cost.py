"""What the decode ladder costs: capture and instantiate time, device memory, and what comes back.

    python benchmarks/graph_cost.py [--shape llama-3.2-1b] [--max-num-seqs 256]

Random weights. The greedy ladder is captured at the start, largest first, each key checked and
timed; memory is what `cudaMemGetInfo` says before and after.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))


def measure(shape: str, max_num_seqs: int = 256) -> dict[str, Any]:
    """Capture the ladder, report each key, release it."""
    import torch

    from ostinato import LLM

    begin = time.perf_counter()
    llm = LLM(
        model=shape,
        load_format="dummy",
        max_model_len=2048,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=1024,
        cudagraph_capture="startup",
        compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"},
    )
    seconds = time.perf_counter() - begin
    kept = llm.engine.plan.book.records()
    records = copy.deepcopy(kept)  # as of the first capture
    held = torch.cuda.mem_get_info()[0]
    returned = llm.release_graphs()
    after = torch.cuda.mem_get_info()[0]
    with llm.engine.device_context():  # other graphs of the same sizes, now that the first are gone
        llm.engine.runner.prepare([r.key for r in kept], progress=False)
    again = torch.cuda.mem_get_info()[0]
    result = {
        "shape": shape,
        "keys": len(records),
        "captured": sum(r.checks > 0 for r in records),
        "memory_bytes": {line.name: line.nbytes for line in llm.engine.memory},
        "mismatches": sum(r.mismatches for r in records),
        "capture_s": sum(r.capture_ms for r in records) / 1e3,
        "instantiate_s": sum(r.instantiate_ms for r in records) / 1e3,
        "verify_s": sum(r.verify_ms for r in records) / 1e3,
        "engine_s": seconds,
        "bytes": sum(r.nbytes for r in records),
        "returned_bytes": returned,
        "predicted_bytes": llm.engine.predicted_graph_bytes,
        "free_bytes_difference": after - held,
        # Destroyed executables leave their memory with the driver; captured again they take no more.
        "captured_again": sum(r.state.value == "captured" for r in kept),
        "bytes_more_when_captured_again": held - again,
        "startup_seconds": llm.engine.startup,
        "ladder": [
            {
                "key": str(r.key),
                "state": r.state.value,
                "nodes": r.nodes,
                "bytes": r.nbytes,
                "capture_ms": r.capture_ms,
                "instantiate_ms": r.instantiate_ms,
                "eager_us": statistics.median(r.eager_us) if r.eager_us else None,
                "replay_us": statistics.median(r.replay_us) if r.replay_us else None,
                "note": r.note,
            }
            for r in records
        ],
    }
    llm.close()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    args = parser.parse_args()
    print(json.dumps(measure(args.shape, args.max_num_seqs), indent=1))
