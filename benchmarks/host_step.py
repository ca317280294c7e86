"""What a decode step costs the host, stage by stage, with nothing behind it: no model, no device work.

    python benchmarks/host_step.py [--batch 1 8 64 256] [--steps 600] [--churn]

Scheduler, plan, buffers, graph cache, result ring and outputs are the engine's own; the graphs
replay nothing. Prompts of 32 tokens, greedy, token ids only, two steps in flight. Microseconds are
medians. A steady step has the rows of the step before it; `--churn` gives requests random
lengths and replaces those that end, so that few steps are steady.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

PROMPT, DEPTH, BLOCK, VOCAB = 32, 2, 16, 1000
LAUNCH = ("schedule", "route", "write", "replay", "send")


class NoDevice:
    """A graph backend whose replays do nothing."""

    def replay(self, graph: Any) -> None:
        pass

    def passed(self, mark: Any) -> bool:
        return True

    def mark(self) -> None:
        return None


class Host:
    """The engine's host side over buffers on the CPU."""

    def __init__(self, batch: int, output: int) -> None:
        import torch

        from ostinato.graphs.cache import GraphCache
        from ostinato.graphs.keys import KeyBook
        from ostinato.graphs.plan import CudaGraphMode, Plan, default_capture_sizes
        from ostinato.graphs.results import ResultRing
        from ostinato.inputs import BufferShapes, StepBuffers
        from ostinato.kv_blocks import BlockAllocator
        from ostinato.outputs import OutputAssembler
        from ostinato.scheduler import Scheduler, SchedulerConfig

        longest = PROMPT + output
        per_seq = -(-longest // BLOCK)
        tokens = max(8192, batch)
        shapes = BufferShapes(batch, tokens, per_seq, BLOCK, VOCAB)
        self.buffers = StepBuffers(shapes, torch.device("cpu"), DEPTH)
        book: Any = KeyBook()
        self.plan = Plan(
            mode=CudaGraphMode.FULL_DECODE_ONLY,
            capture_sizes=default_capture_sizes(batch),
            book=book,
            pad=True,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=batch, max_num_batched_tokens=tokens, max_model_len=longest, block_size=BLOCK
            ),
            BlockAllocator(4 * batch * per_seq + 2, BLOCK, True),
            self.plan.pad_seqs,
        )
        backend: Any = NoDevice()
        self.cache: Any = GraphCache(lambda key: None, {}, backend=backend, verify=False, book=book)
        self.ring = ResultRing(self.buffers)
        self.outputs = OutputAssembler(self.plan)
        self.inflight: deque[Any] = deque()
        self._random = random.Random(0)
        self._count = 0

    def serve_graphs(self) -> None:
        """Every key of the ladder has a graph, of nothing."""
        from ostinato.graphs.cache import _Graph
        from ostinato.graphs.keys import KeyState
        from ostinato.types import SamplerVariant

        for key in self.plan.ladder(SamplerVariant.GREEDY):
            record = self.cache.book[key]
            record.state, record.trusted = KeyState.CAPTURED, True
            self.cache._graphs[key] = _Graph(None, record)

    def add(self, output: int) -> None:
        from ostinato.types import Request, RequestOutputKind, SamplingParams

        self._count += 1
        name = str(self._count)
        params = SamplingParams(
            temperature=0.0, max_tokens=output, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = tuple(self._random.randrange(VOCAB) for _ in range(PROMPT))
        request = Request(name, name, prompt, params, frozenset({1}), PROMPT + output, 0)
        self.scheduler.add(request)
        self.outputs.add(name, None, [request], params, lambda token: None)

    def post(self) -> None:
        """What a step does at its end: everybody gets token 5."""
        from ostinato.inputs import POST_CYCLE

        state, places = self.buffers.state, len(self.buffers.state.posted) - 1
        number = int(state.number) % (places * POST_CYCLE) + 1
        state.number.fill_(number)
        place = state.posted[1 + (number - 1) % places]
        place.fill_(5)
        place[0] = number

    def step(self) -> dict[str, float] | None:
        """One round of `Engine.step`; microseconds by stage, None if nothing was launched."""
        clock, spent = time.perf_counter, {}
        begin = clock()
        schedule = self.scheduler.schedule()
        spent["schedule"] = clock() - begin
        if schedule is not None:
            begin = clock()
            route = self.plan.route(schedule)
            spent["route"] = clock() - begin
            begin = clock()
            batch = self.buffers.write(schedule, route)
            spent["write"] = clock() - begin
            begin = clock()
            self.cache.poll()
            self.ring.begin()
            if route.reason is None:
                self.cache.replay(route.key)
            self.cache.idle()
            spent["replay"] = clock() - begin
            self.post()
            begin = clock()
            self.inflight.append((schedule, self.ring.send(batch)))
            spent["send"] = clock() - begin
        if len(self.inflight) >= DEPTH or (schedule is None and self.inflight):
            launched, pending = self.inflight.popleft()
            begin = clock()
            result = pending.result()
            spent["result"] = clock() - begin
            begin = clock()
            changed = self.scheduler.commit(launched, result)
            spent["commit"] = clock() - begin
            begin = clock()
            self.outputs.make(changed)
            spent["outputs"] = clock() - begin
        graph = schedule is not None and route.reason is None
        return {name: s * 1e6 for name, s in spent.items()} if graph else None


def measure(batch: int, steps: int, churn: bool = False) -> dict[str, Any]:
    """Medians of each stage over the decode steps of a run."""
    host = Host(batch, steps)
    rng = random.Random(1)

    def length() -> int:
        return rng.randint(1, steps) if churn else steps

    host.serve_graphs()
    for _ in range(batch):
        host.add(length())
    found = []
    for _ in range(steps):
        spent = host.step()
        if spent is not None and "commit" in spent:
            found.append(spent)
        while churn and len(host.scheduler.unfinished) < batch:
            host.add(length())
    medians = {name: statistics.median(s[name] for s in found) for name in found[0]}
    launches = sorted(sum(s[name] for name in LAUNCH) for s in found)
    return {
        "batch": batch,
        "decode_steps": len(found),
        "launch_us": statistics.median(launches),
        "launch_us_p99": launches[len(launches) * 99 // 100],
        "commit_us_per_row": medians["commit"] / batch,
        "stages_us": medians,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--churn", action="store_true", help="random lengths; requests that end are replaced")
    args = parser.parse_args()
    print(json.dumps([measure(batch, args.steps, args.churn) for batch in args.batch], indent=1))
