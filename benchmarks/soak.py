"""Mixed traffic with random joins, leaves and aborts, until a number of replays: nothing may differ.

    python benchmarks/soak.py [--shape smollm2-135m] [--replays 100000] [--verify-every 40]
    python benchmarks/soak.py --part 1/4 --json soak.json; ...; python benchmarks/soak.py --part 4/4 --json soak.json
    python benchmarks/soak.py --parallel 4 --json soak.json
    python benchmarks/soak.py --shape llama-3.2-1b --max-num-seqs 160 --seconds 25

Requests of random lengths and sampling parameters come and go; every so many replays one is run
both ways on live rows and compared bit for bit. At the end every captured key is tried at every
size (one of many rows at a few), its pointers are audited, and its values held against a second capture. A run that is too
long for one call is split: each part has its share of the replays and traffic of its own, and FILE
holds the sum of the parts so far. `--parallel` runs the parts at once, each in a process of its own on the one GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

SEQS = 24
"""Most sequences of a step, unless told otherwise"""


def measure(
    shape: str = "smollm2-135m",
    replays: int = 100_000,
    verify_every: int = 40,
    seconds: float = 300.0,
    seed: int = 0,
    max_num_seqs: int = SEQS,
) -> dict[str, Any]:
    """Run until enough replays, or until the time is up; with many rows requests come in bursts, so that most steps only decode."""
    from ostinato import LLM

    rng = random.Random(seed)
    llm = LLM(
        model=shape,
        load_format="dummy",
        max_model_len=1024,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048 if max_num_seqs > SEQS else 512,
        cudagraph_verify_every=verify_every,
        num_gpu_blocks_override=320 * max_num_seqs // SEQS,  # tight, so that requests are preempted too
        seed=seed,
    )
    engine = llm.engine
    vocab = engine.spec.vocab_size
    longest = engine.config.max_model_len // 5
    shared = [[rng.randrange(vocab) for _ in range(64)] for _ in range(3)]
    running: set[str] = set()
    finished = aborted = 0
    # Few at a time are other keys, and other kernels.
    levels = [size for size in (1, 3, 10, 28, 60, 120) if size < max_num_seqs]
    levels += (
        [max_num_seqs * 5 // 3] * 2
        if max_num_seqs <= SEQS
        else [max_num_seqs * 5 // 3, max_num_seqs, max_num_seqs]
    )
    many = max_num_seqs > SEQS
    most, burst, kinds = levels[3 if many else -1], 0, 1.0
    begin = time.perf_counter()
    while engine.runner.num_replays < replays and time.perf_counter() - begin < seconds:
        if rng.random() < (0.01 if many else 0.004):
            most = rng.choice(levels)
            # One row with everything makes a step one with everything.
            kinds = rng.choice((0.4, 0.9, 1.0)) if many else 1.0
        if many and not burst and rng.random() < 0.1:
            burst = rng.randint(1, max_num_seqs // 3)
        while len(running) < most and (burst > 0 or rng.random() < 0.3 * SEQS / max_num_seqs):
            burst -= burst > 0
            prompt = (rng.choice(shared) if rng.random() < 0.3 else []) + [
                rng.randrange(vocab) for _ in range(rng.randint(1, longest))
            ]
            running.add(engine.add_request(prompt, random_params(rng, vocab, kinds)))
        if len(running) >= most:
            burst = 0
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
        "max_num_seqs": max_num_seqs,
        "seconds": elapsed,
        "replays": engine.runner.num_replays,
        "eager_steps": {r.value: n for r, n in engine.plan.eager_steps.items()},
        "live_checks": engine.runner.num_live_checks,
        "checks": sum(r.checks for r in book.records()),
        "checks_at_every_size": every_size,
        "mismatches": sum(r.mismatches for r in book.records()),
        "keys": len(book.captured),
        "decode_replays": decode_replays(engine),
        "whole_layers": whole_layers(engine),
        "finished": finished,
        "aborted": aborted,
        "preemptions": engine.scheduler.num_preemptions,
        "audit": audit(llm),
        "baked_differences": baked(engine),
    }
    llm.close()
    return result


def decode_replays(engine: Any) -> dict[str, int]:
    """Replays of decode steps by padded rows."""
    found: Counter[int] = Counter()
    for key, count in engine.plan.graph_steps.items():
        if key.num_tokens == key.num_seqs and str(key).startswith("decode"):
            found[key.num_seqs] += count
    return {str(rows): found[rows] for rows in sorted(found)}


def whole_layers(engine: Any) -> list[str]:
    """What kernels of more than one op serve, and whether that was measured."""
    from ostinato.graphs.survey import survey

    found = [use for use in survey(engine).kernels if use.op in ("fused", "attend", "chain")]
    rows = [", ".join(f"{first} to {last}" for first, last in use.decode) for use in found]
    return [f"{use}, decode steps of {those} rows" for use, those in zip(found, rows, strict=True) if those]


def random_params(rng: random.Random, vocab: int, kinds: float = 1.0) -> Any:
    """`kinds`: 0.4 for greedy ones alone, 0.9 for such with sampling too."""
    from ostinato import SamplingParams

    kind = rng.random() * kinds
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


def sizes(num_seqs: int) -> list[int]:
    """Numbers of rows to try a key at: all, or of many its ends, the fewest that are padded to it, and one between."""
    if num_seqs <= SEQS:
        return list(range(1, num_seqs + 1))
    return sorted({1, 2, num_seqs // 2, num_seqs - num_seqs // 9, num_seqs - 1, num_seqs})


def try_every_size(engine: Any) -> int:
    """Each captured key on scratch rows at every number of rows that it can serve (see `sizes`); returns how many."""
    runner, count = engine.runner, 0
    with engine.device_context():
        for record in engine.plan.book.captured:
            replay = partial(runner.backend.replay, runner.cache.graph(record.key))
            for rows in sizes(record.key.num_seqs):
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


SUMMED = ("seconds", "replays", "live_checks", "checks", "checks_at_every_size", "mismatches", "finished", "aborted",
          "preemptions")  # fmt: skip


def part_of(text: str) -> tuple[int, int]:
    """ "2/4" as (2, 4)."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text!r}")
    return int(number), int(parts)


def add_part(file: Path, number: int, parts: int, found: dict[str, Any]) -> dict[str, Any]:
    """Put a part's result into a file; returns what all parts there make together.

    A part that stands in the file already is replaced; parts of another split are an error.
    """
    kept = json.loads(file.read_text()) if file.exists() else {"split_into": parts, "parts": {}}
    if kept["split_into"] != parts:
        raise SystemExit(f"{file} holds parts of a run split into {kept['split_into']}, not {parts}")
    kept["parts"][str(number)] = found
    result = merge(kept["parts"]) | {"split_into": parts, "parts": kept["parts"]}
    file.write_text(json.dumps(result, indent=1) + "\n")
    return {name: value for name, value in result.items() if name != "parts"}


def merge(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sums over parts; findings of every part stand beside each other."""
    runs = list(parts.values())
    eager: dict[str, int] = {}
    for run in runs:
        for reason, count in run["eager_steps"].items():
            eager[reason] = eager.get(reason, 0) + count
    return {
        "shape": runs[0]["shape"],
        "max_num_seqs": runs[0].get("max_num_seqs", SEQS),
        "decode_replays": dict(sum((Counter(run.get("decode_replays", {})) for run in runs), Counter())),
        **{name: sum(run[name] for run in runs) for name in SUMMED},
        "eager_steps": eager,
        "keys": max(run["keys"] for run in runs),
        "audit": {
            "keys": sum(run["audit"]["keys"] for run in runs),
            "findings": [finding for run in runs for finding in run["audit"]["findings"]],
            "pointers": sum(run["audit"]["pointers"] for run in runs),
            "unregistered": sum(run["audit"]["unregistered"] for run in runs),
        },
        "baked_differences": {
            "keys": sum(run["baked_differences"]["keys"] for run in runs),
            "differing": {
                f"part {number}: {key}": found
                for number, run in parts.items()
                for key, found in run["baked_differences"]["differing"].items()
            },
        },
        "parts_done": sorted(int(number) for number in parts),
    }


def together(args: argparse.Namespace) -> dict[str, Any]:
    """All parts at once; returns what they make together. A part that failed is an error."""
    parts = args.parallel
    options = [
        "--shape",
        args.shape,
        "--replays",
        str(args.replays),
        "--verify-every",
        str(args.verify_every),
    ]
    options += [
        "--seconds",
        str(args.seconds),
        "--seed",
        str(args.seed),
        "--max-num-seqs",
        str(args.max_num_seqs),
    ]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(1, parts + 1)]
        running = [
            subprocess.Popen(
                [sys.executable, __file__, *options, "--part", f"{number}/{parts}", "--json", str(file)],
                stdout=subprocess.DEVNULL,
            )
            for number, file in enumerate(files, 1)
        ]
        failed = [number for number, process in enumerate(running, 1) if process.wait() != 0]
        result: dict[str, Any] = {}
        target = args.json or Path(folder) / "all.json"
        for number, file in enumerate(files, 1):
            if number not in failed:
                found = json.loads(file.read_text())["parts"][str(number)]
                result = add_part(target, number, parts, found)
    if failed:
        raise SystemExit(f"parts {failed} of the soak failed; the others: {json.dumps(result)}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--replays", type=int, default=100_000)
    parser.add_argument("--verify-every", type=int, default=40, help="one replay in so many is checked")
    parser.add_argument("--seconds", type=float, default=300.0, help="of traffic, in this call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-num-seqs", type=int, default=SEQS, help="of a step (24)")
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N")
    parser.add_argument("--parallel", type=int, default=0, metavar="N", help="N parts at once")
    parser.add_argument("--json", type=Path, help="add this part's result to FILE")
    args = parser.parse_args()
    if args.parallel:
        print(json.dumps(together(args), indent=1))
        raise SystemExit
    number, parts = args.part
    share = -(-args.replays // parts)
    seed = parts * args.seed + number
    found = measure(args.shape, share, args.verify_every, args.seconds, seed, args.max_num_seqs)
    if args.json:
        found = add_part(args.json, number, parts, found)
    print(json.dumps(found, indent=1))
