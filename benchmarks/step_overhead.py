"""Is the host seen? One decode step through `LLM.generate` against the bare replay of its graph.

    python benchmarks/step_overhead.py [--shape llama-3.2-1b]

Random weights, batch 1, 128 tokens of prompt, 256 of output, greedy. Through the engine:
(time of 256 tokens - time of 1) / 255. Bare: the same captured graph replayed back to back on
a live row over the same positions, timed by device events.
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

PROMPT, OUTPUT = 128, 256


def measure(shape: str, repeats: int = 5) -> dict[str, Any]:
    """Both figures and their ratio, in one process."""
    import torch

    from ostinato import LLM, SamplingParams

    llm = LLM(
        model=shape, load_format="dummy", max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=512
    )
    generator = torch.Generator().manual_seed(0)

    def seconds(tokens: int) -> float:
        prompt = torch.randint(0, llm.engine.spec.vocab_size, (PROMPT,), generator=generator).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate([prompt], params, use_tqdm=False)
        return time.perf_counter() - begin

    for tokens in (OUTPUT, 1, 1, 1, OUTPUT):
        seconds(tokens)  # captures, checks, clocks
    first = [seconds(1) for _ in range(repeats)]
    whole = [seconds(OUTPUT) for _ in range(repeats)]
    step = (statistics.median(whole) - statistics.median(first)) / (OUTPUT - 1)
    bare = [bare_replay(llm) for _ in range(repeats)]
    metrics = llm.get_metrics()
    result = {
        "shape": shape,
        "time_to_first_token_ms": statistics.median(first) * 1e3,
        "step_us": step * 1e6,
        "bare_replay_us": statistics.median(bare) * 1e6,
        "ratio": step / statistics.median(bare),
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


def bare_replay(llm: Any) -> float:
    """Seconds a replay of the batch-1 greedy decode graph, on a row that is live throughout."""
    import torch

    engine = llm.engine
    (key,) = (
        r.key for r in engine.plan.book.captured if r.key.kind.value == "decode" and r.key.num_seqs == 1
    )
    graph = engine.runner.cache.graph(key)
    static, state, replays = engine.buffers.static, engine.buffers.state, OUTPUT - 1
    with engine.device_context():
        blocks = -(-(PROMPT + OUTPUT) // engine.config.block_size)
        static.block_table[0, :blocks] = torch.arange(1, blocks + 1, dtype=torch.int32)
        for tensor, value in ((static.enabled, 1), (static.last_position, 10**6), (static.num_stop_ids, 0)):
            tensor[0] = value
        state.active[0], state.last_token[0], state.position[0] = 1, 1, PROMPT
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        assert int(state.position[0]) == PROMPT + replays, (
            "the row was not live: the figure would be too good"
        )
        state.active[0] = 0
        static.enabled[0] = 0
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / replays


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    print(json.dumps(measure(parser.parse_args().shape), indent=2))
