"""Where eager stops losing: steps with prompts on their graph against eagerly, by token count.

    python benchmarks/prefill_ladder.py [--shape llama-3.2-1b] [--tokens 4096]

Random weights, one to eight sequences. Times are medians of the trials that each key gets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))


def measure(shape: str, tokens: int) -> dict[str, Any]:
    """Capture the ladder of prompt steps and read their times."""
    from ostinato import LLM

    llm = LLM(
        model=shape,
        load_format="dummy",
        max_model_len=tokens + 1,
        max_num_seqs=8,
        max_num_batched_tokens=tokens,
        cudagraph_capture="startup",
        compilation_config={"max_cudagraph_prefill_tokens": tokens},
    )
    rows = [
        {
            "tokens": r.key.num_tokens,
            "seqs": r.key.num_seqs,
            "state": r.state.value,
            "eager_us": statistics.median(r.eager_us),
            "replay_us": statistics.median(r.replay_us),
            "note": r.note,
        }
        for r in llm.engine.plan.book.records()
        if r.key.kind.value == "mixed" and r.replay_us
    ]
    llm.close()
    return {"shape": shape, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    print(json.dumps(measure(args.shape, args.tokens), indent=1))
