"""How long does a missing key hold up running requests? Times between tokens while keys are captured.

    python benchmarks/capture_stall.py [--shape llama-3.2-1b]

Batch sizes 1 to 12 join one by one, so that new keys are met, captured and checked under way.
For each key: the longest time between two commits around its capture, over its eager step. For each
step that took more than twice an eager one: what the host did in it, and what was loaded or allocated.
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
                stages.clear()
                taken = device_memory()
                begin = time.perf_counter()
                engine.step()
                spent = time.perf_counter() - begin
                last = routes[-1]
                trace.append(
                    {
                        "ms": spent * 1e3,
                        "running": number + 1,
                        "key": str(last.key),
                        "reason": last.reason.value if last.reason else "graph",
                        "capture": last.capture,
                        "stages_ms": dict(stages.ms),
                        "taken": {name: now - taken[name] for name, now in device_memory().items()},
                    }
                )
        engine.abort(list(engine.outputs._prompts))
        while engine.has_unfinished:
            engine.step()
        return trace

    engine.plan.route = recording
    stages = Stages(engine)
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
        "slow_steps": [entry for entry in trace if entry["ms"] > 2 * eager],
        "trace": trace,
    }
    llm.close()
    return result


class Stages:
    """Milliseconds that the host spent in each part of a step; a part within another counts in both."""

    def __init__(self, engine: Any) -> None:
        runner = engine.runner
        self.ms: dict[str, float] = {}
        for owner, name, label in (
            (engine.scheduler, "schedule", "schedule"),
            (engine.buffers, "write", "write"),
            (runner, "poll", "verdict"),
            (runner.eager, "run", "eager step"),
            (runner.cache, "capture", "capture"),
            (runner.backend, "capture", "record"),
            (runner.backend, "instantiate", "instantiate"),
            (runner.checker, "trial", "trial"),
            (runner.checker, "_lay_out", "trial: lay out"),
            (runner.cache, "replay", "replay"),
            (engine.scheduler, "commit", "commit"),
        ):
            self._time(owner, name, label)

    def clear(self) -> None:
        self.ms.clear()

    def _time(self, owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.ms[label] = self.ms.get(label, 0.0) + (time.perf_counter() - begin) * 1e3

        setattr(owner, name, timed)


def device_memory() -> dict[str, int]:
    """What shows that something was loaded or allocated.

    Memory that is taken outside torch's allocator is kernels being loaded, library workspaces or
    executables of graphs.
    """
    import torch

    statistics = torch.cuda.memory_stats()
    free, total = torch.cuda.mem_get_info()
    reserved = statistics.get("reserved_bytes.all.current", 0)
    return {
        "allocations": statistics.get("allocation.all.allocated", 0),
        "segments from the driver": statistics.get("segment.all.allocated", 0),
        "bytes outside torch": total - free - reserved,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--trace", action="store_true", help="print every step")
    args = parser.parse_args()
    found = measure(args.shape)
    if not args.trace:
        found.pop("trace")
    print(json.dumps(found, indent=1))
