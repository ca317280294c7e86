"""Mixed traffic with random joins, leaves and aborts, until a number of replays: nothing may differ.

    python benchmarks/soak.py [--shape smollm2-135m] [--replays 100000] [--verify-every 50]

Requests of random lengths and sampling parameters come and go; every so many replays one is run
both ways on live rows and compared bit for bit. At the end every captured key is tried at every
size, its pointers are audited, and its values held against a second capture.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))


def measure(
    shape: str = "smollm2-135m",
    replays: int = 100_000,
    verify_every: int = 50,
    seconds: float = 300.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Run until enough replays, or until the time is up."""
    from ostinato import LLM

    rng = random.Random(seed)
    llm = LLM(
        model=shape,
        load_format="dummy",
        max_model_len=1024,
        max_num_seqs=24,
        max_num_batched_tokens=512,
        cudagraph_verify_every=verify_every,
        num_gpu_blocks_override=600,  # tight, so that requests are preempted too
        seed=seed,
    )
    engine = llm.engine
    vocab = engine.spec.vocab_size
    longest = engine.config.max_model_len // 5
    shared = [[rng.randrange(vocab) for _ in range(64)] for _ in range(3)]
    running: set[str] = set()
    finished = aborted = 0
    begin = time.perf_counter()
    while engine.runner.num_replays < replays and time.perf_counter() - begin < seconds:
        while len(running) < 40 and rng.random() < 0.3:
            prompt = (rng.choice(shared) if rng.random() < 0.3 else []) + [
                rng.randrange(vocab) for _ in range(rng.randint(1, longest))
            ]
            running.add(engine.add_request(prompt, random_params(rng, vocab)))
        if running and rng.random() < 0.004:
            victim = rng.choice(sorted(running))
            aborted += len(engine.abort([victim]))
            running.discard(victim)
        for output in engine.step():
            if output.finished:
                finished += 1
                running.discard(output.request_id)
    elapsed = time.perf_counter() - begin
    engine.abort(list(running))
    while engine.has_unfinished:
        engine.step()
    engine.scheduler.check()
    every_size = try_every_size(engine)
    book = engine.plan.book
    result = {
        "shape": shape,
        "seconds": elapsed,
        "replays": engine.runner.num_replays,
        "eager_steps": {r.value: n for r, n in engine.plan.eager_steps.items()},
        "live_checks": engine.runner.num_live_checks,
        "checks": sum(r.checks for r in book.records()),
        "checks_at_every_size": every_size,
        "mismatches": sum(r.mismatches for r in book.records()),
        "keys": len(book.captured),
        "finished": finished,
        "aborted": aborted,
        "preemptions": engine.scheduler.num_preemptions,
        "audit": audit(llm),
        "baked_differences": baked(engine),
    }
    llm.close()
    return result


def random_params(rng: random.Random, vocab: int) -> Any:
    from ostinato import SamplingParams

    kind = rng.random()
    common: dict[str, Any] = {"max_tokens": rng.randint(1, 150), "ignore_eos": True}
    if kind < 0.4:
        return SamplingParams(temperature=0.0, **common)
    common |= {
        "temperature": rng.uniform(0.1, 1.5),
        "top_p": rng.uniform(0.5, 1.0),
        "seed": rng.getrandbits(40),
    }
    if kind < 0.9:
        return SamplingParams(top_k=rng.choice([0, 20]), **common)
    return SamplingParams(
        repetition_penalty=1.1, logprobs=2, logit_bias={rng.randrange(vocab): 2.0}, **common
    )


def try_every_size(engine: Any) -> int:
    """Each captured key on scratch rows at every number of rows that it can serve; returns how many."""
    runner, count = engine.runner, 0
    with engine.device_context():
        for record in engine.plan.book.captured:
            replay = partial(runner.backend.replay, runner.cache.graph(record.key))
            for rows in range(1, record.key.num_seqs + 1):
                trial = runner.checker.trial(
                    record.key, rows, partial(run_eagerly, engine, record.key), replay
                )
                if trial is None:
                    continue
                runner.backend.wait()
                runner.cache.judge(record, trial, scratch=True)
                count += 1
    return count


def run_eagerly(engine: Any, key: Any) -> None:
    from ostinato.types import Route

    engine.program(engine.buffers.batch(Route(key, None)))


def audit(llm: Any) -> dict[str, Any]:
    """Pointers of every captured key."""
    reports = llm.audit_graphs()
    return {
        "keys": len(reports),
        "findings": [f"{key}: {finding}" for key, report in reports.items() for finding in report.findings],
        "pointers": sum(sum(report.pointers.values()) for report in reports.values()),
        "unregistered": sum(len(report.unregistered) for report in reports.values()),
    }


def baked(engine: Any) -> dict[str, Any]:
    """What differs between two captures of each key over other sequences."""
    from ostinato.graphs.survey import baked_values

    keys = [record.key for record in engine.plan.book.captured]
    found = {str(key): [str(d) for d in baked_values(engine, key)][:3] for key in keys}
    return {"keys": len(keys), "differing": {key: diffs for key, diffs in found.items() if diffs}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--replays", type=int, default=100_000)
    parser.add_argument("--verify-every", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(measure(args.shape, args.replays, args.verify_every, args.seconds, args.seed), indent=1))
