"""What a decode step costs the host, with nothing behind it: no model, no device work.

    python benchmarks/host_step.py [--batch 1 8 64 256] [--steps 600] [--churn] [--cold] [--text | --stop]

The main loop is `Engine.step` over the engine's own scheduler, plan, buffers, graph runner, result ring
and outputs; the graphs replay nothing. Prompts of 32 tokens, greedy, token ids only, two steps in
flight. `--text`: text is wanted, at the end; `--stop`: and a stop string, which never comes, is watched for;
one token of 256 is its first letter. Microseconds are medians of the decode steps on graphs. `launch` is a round
of the main loop less what comes behind the wait: `read` up to the tokens, `commit` up to the outputs.

A steady step has the rows of the step before it; `--churn` gives requests random lengths and replaces
those that end, so that few steps are steady. `--cold` empties the processor's caches while the host would
wait for the device, as other work on the machine does: what counts then is not how much is computed, but
how much memory is touched. A machine with a slow host is like that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from ostinato.engine import Engine
from ostinato.graphs.cache import _Graph
from ostinato.graphs.graph_runner import GraphRunner
from ostinato.graphs.keys import KeyBook, KeyState
from ostinato.graphs.plan import CudaGraphMode, Plan, default_capture_sizes
from ostinato.graphs.results import ResultRing
from ostinato.inputs import POST_CYCLE, BufferShapes, StepBuffers
from ostinato.kv_blocks import BlockAllocator
from ostinato.scheduler import Scheduler, SchedulerConfig
from ostinato.tokenizer import Tokenizer
from ostinato.types import RequestOutputKind, SamplerVariant, SamplingParams, StepKind

PROMPT, DEPTH, BLOCK, VOCAB = 32, 2, 16, 1000
CACHES = 64 << 20
"""Bytes that no processor's caches hold, for the most part."""
EDGE = 16


class NoDevice:
    """A graph backend whose replays do nothing."""

    def replay(self, graph: Any) -> None:
        pass

    def launcher(self, graph: Any) -> Any:
        return self.wait

    def passed(self, mark: Any) -> bool:
        return True

    def mark(self) -> None:
        return None

    def wait(self) -> None:
        pass


class Host:
    """An engine over buffers on the CPU, and the time of each part of its last step."""

    def __init__(self, batch: int, output: int, cold: bool, text: bool = False, stop: bool = False) -> None:
        longest = PROMPT + output
        per_seq = -(-longest // BLOCK)
        tokens = max(8192, batch)
        cpu: Any = torch.device("cpu")
        self.buffers = StepBuffers(BufferShapes(batch, tokens, per_seq, BLOCK, VOCAB), cpu, DEPTH)
        book: Any = KeyBook()
        plan = Plan(
            mode=CudaGraphMode.FULL_DECODE_ONLY,
            capture_sizes=default_capture_sizes(batch),
            book=book,
            pad=True,
        )
        scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=batch, max_num_batched_tokens=tokens, max_model_len=longest, block_size=BLOCK
            ),
            BlockAllocator(4 * batch * per_seq + 2, BLOCK, True),
            plan.pad_seqs,
        )
        config: Any = SimpleNamespace(
            pipeline_depth=DEPTH,
            seed=0,
            max_model_len=longest,
            device=cpu,
            cudagraph_verify_every=0,
            on_capture_error="raise",
            fail_on_mismatch=True,
        )
        backend: Any = NoDevice()
        runner = GraphRunner(
            NoProgram(), ResultRing(self.buffers), self.buffers, book, (), None, backend, None, config
        )  # type: ignore[arg-type]
        for key in plan.ladder(SamplerVariant.GREEDY):  # all have graphs, of nothing
            record = book[key]
            record.state, record.trusted = KeyState.CAPTURED, True
            runner.cache._graphs[key] = _Graph(None, record)
        entered = contextlib.nullcontext()
        spec: Any = SimpleNamespace(vocab_size=VOCAB)
        self.engine = Engine(
            name="none",
            config=config,
            spec=spec,
            tokenizer=_bytes() if text or stop else None,
            eos_token_ids=frozenset({1}),
            scheduler=scheduler,
            plan=plan,
            buffers=self.buffers,
            runner=runner,
            context=lambda: entered,
            memory=(),
            startup={},
        )
        self._stop = "never" if stop else None
        self._random = random.Random(0)
        self._touched = np.zeros(CACHES // 8 if cold else 0, np.int64)
        self._stamps: dict[str, float] = {}
        for slot in runner.eager.ring._slots:
            slot._wait = self._wait
        scheduler.commit = self._stamped("commit", scheduler.commit)  # type: ignore[method-assign]
        self.engine.outputs.make = self._stamped("make", self.engine.outputs.make)  # type: ignore[method-assign]

    def _wait(self) -> None:
        self._stamps["wait"] = time.perf_counter()
        self._touched += 1
        self._stamps["arrived"] = time.perf_counter()

    def _stamped(self, name: str, function: Any) -> Any:
        stamps = self._stamps

        def call(*args: Any) -> Any:
            stamps[name] = time.perf_counter()
            try:
                return function(*args)
            finally:
                stamps["committed"] = time.perf_counter()

        return call

    def add(self, output: int) -> None:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=output,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            stop=self._stop,
        )
        self.engine.add_request([self._random.randrange(VOCAB) for _ in range(PROMPT)], params)

    def post(self) -> None:
        """What a step does at its end: everybody gets some byte."""
        state, places = self.buffers.state, len(self.buffers.state.posted) - 1
        number = int(state.number) % (places * POST_CYCLE) + 1
        state.number.fill_(number)
        place = state.posted[1 + (number - 1) % places]
        place.random_(2, 256)
        place[0] = number

    def step(self) -> dict[str, float] | None:
        """One step; microseconds by part, None if it did not both launch a decode and commit."""
        at, inflight = self._stamps, self.engine._inflight
        at.clear()
        begin = time.perf_counter()
        self.engine.step()
        end = time.perf_counter()
        if inflight:  # one was launched; it was not waited for, as two may be in flight
            self.post()
        if not inflight or inflight[-1][0].kind is not StepKind.DECODE or "committed" not in at:
            return None
        spent = {
            "launch": at["wait"] - begin + end - at["committed"],
            "read": at["commit"] - at["arrived"],
            "commit": at["committed"] - at["commit"],
        }
        return {name: seconds * 1e6 for name, seconds in spent.items()}


def _bytes() -> Tokenizer:
    """A token is a byte."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library, source="bytes")


class NoProgram:
    """A step of nothing."""

    arena = cache = SimpleNamespace(data=torch.zeros(1))

    def __call__(self, batch: Any) -> None:
        pass


def measure(batch: int, steps: int, churn: bool = False, **host_options: bool) -> dict[str, Any]:
    """Medians of each part over the decode steps of a run."""
    host = Host(batch, steps, **{"cold": False, **host_options})
    rng = random.Random(1)

    def length() -> int:
        return rng.randint(1, steps) if churn else steps

    for _ in range(batch):
        host.add(length())
    found = []
    for _ in range(steps):
        spent = host.step()
        if spent is not None:
            found.append(spent)
        while churn and len(host.engine.scheduler.unfinished) < batch:
            host.add(length())
    found = found[EDGE:]
    launches = sorted(s["launch"] for s in found)
    medians = {f"{name}_us": statistics.median(s[name] for s in found) for name in found[0]}
    return {
        "batch": batch,
        "decode_steps": len(found),
        **medians,
        "launch_us_p99": launches[len(launches) * 99 // 100],
        "commit_us_per_row": medians["commit_us"] / batch,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--churn", action="store_true", help="random lengths; requests that end are replaced")
    parser.add_argument("--cold", action="store_true", help="empty the caches in each step")
    parser.add_argument("--text", action="store_true", help="text is wanted, at the end")
    parser.add_argument("--stop", action="store_true", help="and a stop string is watched for")
    args = parser.parse_args()
    torch.set_num_threads(1)
    how = {"churn": args.churn, "cold": args.cold, "text": args.text, "stop": args.stop}
    print(json.dumps([measure(batch, args.steps, **how) for batch in args.batch], indent=1))
