"""How long does a missing key hold up running requests? Times between tokens while keys are captured.

    python benchmarks/capture_stall.py [--shape llama-3.2-1b]

Batch sizes 1 to 12 join one by one, so that new keys are met, captured and checked under way.
For each key: the longest time between two commits around its capture, over its eager step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))


def measure(shape: str = "llama-3.2-1b") -> dict[str, Any]:
    """The trace, and the worst gap for each state that a step was in."""
    import torch

    from ostinato import LLM, SamplingParams

    llm = LLM(
        model=shape, load_format="dummy", max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )  # fmt: skip
    engine = llm.engine
    routes: list[Any] = []
    route = engine.plan.route

    def recording(schedule: Any) -> Any:
        routes.append(route(schedule))
        return routes[-1]

    def round_of(count: int) -> list[dict[str, Any]]:
        """Requests join every 12 steps; each step's wall time, key and reason."""
        generator = torch.Generator().manual_seed(count)
        trace = []
        for number in range(count):
            prompt = torch.randint(0, engine.spec.vocab_size, (32,), generator=generator).tolist()
            engine.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
            for _ in range(12):
                begin = time.perf_counter()
                engine.step()
                last = routes[-1]
                trace.append(
                    {
                        "ms": (time.perf_counter() - begin) * 1e3,
                        "running": number + 1,
                        "key": str(last.key),
                        "reason": last.reason.value if last.reason else "graph",
                        "capture": last.capture,
                    }
                )
        engine.abort(list(engine.outputs._prompts))
        while engine.has_unfinished:
            engine.step()
        return trace

    engine.plan.route = recording
    warm = LLM(model=shape, load_format="dummy", max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=512,
               enforce_eager=True, enable_prefix_caching=False)  # fmt: skip
    for count in range(1, 13):  # compiles and loads every kernel, which is not what is measured here
        prompts = [[1] * 32] * count
        warm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    warm.close()
    del warm
    trace = round_of(12)
    by_reason: dict[str, list[float]] = {}
    for entry in trace:
        name = "capture" if entry["capture"] else entry["reason"]
        by_reason.setdefault(name, []).append(entry["ms"])
    eager = statistics.median(
        statistics.median(r.eager_us) / 1e3 for r in engine.plan.book.captured if r.eager_us
    )
    result = {
        "shape": shape,
        "eager_step_ms": eager,
        "steps": {name: len(ms) for name, ms in by_reason.items()},
        "median_ms": {name: statistics.median(ms) for name, ms in by_reason.items()},
        "worst_ms": {name: max(ms) for name, ms in by_reason.items()},
        "worst_over_eager": {name: max(ms) / eager for name, ms in by_reason.items()},
        "trace": trace,
    }
    llm.close()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--trace", action="store_true", help="print every step")
    args = parser.parse_args()
    found = measure(args.shape)
    if not args.trace:
        found.pop("trace")
    print(json.dumps(found, indent=1))
