"""Is the host seen? One decode step through `LLM.generate` against the bare replay of its graph.

    python benchmarks/step_overhead.py [--shape llama-3.2-1b]

Random weights, batch 1, 128 tokens of prompt, 256 of output, greedy: a point of `ostinato bench step`,
with what each key cost to capture.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

PROMPT, OUTPUT = 128, 256


def measure(shape: str, repeats: int = 5) -> dict[str, Any]:
    """Both figures and their ratio, in one process."""
    from ostinato import LLM
    from ostinato.bench import step

    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    args = parser.parse_args(["--shape", shape, "--num-iters", str(repeats), "--output-len", str(OUTPUT)])
    llm = LLM(
        model=shape,
        load_format="dummy",
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    point = step.measure(llm, args, batch=1, context=PROMPT + OUTPUT // 2, ceiling=None)
    metrics = llm.get_metrics()
    result = {
        "shape": shape,
        "time_to_first_token_ms": point["time_to_first_token_ms"],
        "step_us": point["time_per_output_token_us"],
        "bare_replay_us": point["back_to_back_us"],
        "ratio": point["time_per_output_token_us"] / point["back_to_back_us"],
        "weight_bytes": metrics["memory_bytes"]["weights"],
        "graph_steps": metrics["graph_steps"],
        "eager_steps": metrics["eager_steps"],
        "keys": {
            str(r.key): {
                "nodes": r.nodes,
                "bytes": r.nbytes,
                "capture_ms": r.capture_ms,
                "instantiate_ms": r.instantiate_ms,
                "eager_us": r.eager_us,
                "replay_us": r.replay_us,
                "mismatches": r.mismatches,
            }
            for r in llm.engine.plan.book.records()
        },
        "startup_seconds": metrics["startup_seconds"],
    }
    llm.close()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    print(json.dumps(measure(parser.parse_args().shape), indent=2))
