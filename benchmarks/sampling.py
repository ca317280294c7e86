"""What a sampled token costs over a greedy one: the sampling kernels alone, in CUDA graphs.

    python benchmarks/sampling.py [--batches 1,8,64,256] [--vocabs 32000,128256,151936]

Logits are flat (normal, standard deviation 0.5: a model of random weights) or peaked (4: nearer to
a trained one). A graph holds CALLS calls, so that launching it does not show; a figure is the
median over replays, in microseconds a call. FULL changes its logits: its bias, mask and
penalties are on but leave them as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

CALLS, REPLAYS = 20, 15
SCALES = {"flat": 0.5, "peaked": 4.0}
FILTERS: dict[str, dict[str, float]] = {
    "temperature": {},
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 50},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 1000, "top_p": 0.95, "min_p": 0.001},
}


def inputs_of(rows: int, vocab: int, temperature: float, **filters: float) -> SimpleNamespace:
    """The fields of `StaticInputs` that sampling reads, on the GPU; FULL's features on and neutral."""
    import torch

    from ostinato.inputs import FLAG_BIAS, FLAG_LOGPROBS, FLAG_MASK, FLAG_PENALTIES
    from ostinato.types import MAX_LOGIT_BIAS, MAX_STOP_IDS

    def full(value: float, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape or (rows,), value, dtype=dtype, device="cuda")

    f32 = torch.float32
    flags = FLAG_BIAS | FLAG_LOGPROBS | FLAG_MASK | FLAG_PENALTIES
    return SimpleNamespace(
        temperature=full(temperature, dtype=f32),
        top_p=full(filters.get("top_p", 1.0), dtype=f32),
        min_p=full(filters.get("min_p", 0.0), dtype=f32),
        top_k=full(int(filters.get("top_k", 0))),
        seed=torch.arange(2 * rows, dtype=torch.int32, device="cuda").view(rows, 2),
        flags=full(flags),
        presence_penalty=full(0.0, dtype=f32),
        frequency_penalty=full(0.0, dtype=f32),
        repetition_penalty=full(1.0, dtype=f32),
        min_position=full(0),
        num_stop_ids=full(0),
        stop_ids=full(0, rows, MAX_STOP_IDS),
        num_bias=full(1),
        bias_ids=full(0, rows, MAX_LOGIT_BIAS),
        bias_values=full(0.0, rows, MAX_LOGIT_BIAS, dtype=f32),
        mask=full(-1, rows, (vocab + 31) // 32),
    )


def state_of(rows: int, vocab: int) -> SimpleNamespace:
    """The fields of `StepState` that sampling touches, on the GPU."""
    import torch

    from ostinato.types import MAX_LOGPROBS

    i32 = torch.int32
    return SimpleNamespace(
        output_counts=torch.zeros(rows, vocab, dtype=torch.int16, device="cuda"),
        prompt_mask=torch.zeros(rows, (vocab + 31) // 32, dtype=i32, device="cuda"),
        logprob_values=torch.zeros(rows, 1 + MAX_LOGPROBS, device="cuda"),
        logprob_ids=torch.zeros(rows, 1 + MAX_LOGPROBS, dtype=i32, device="cuda"),
        logprob_rank=torch.zeros(rows, dtype=i32, device="cuda"),
    )


def microseconds(call: Callable[[], None]) -> float:
    """One call, from a graph that holds CALLS of them."""
    import torch

    call()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def measure(batch: int, vocab: int, pdl: bool, one_launch: bool) -> list[dict[str, Any]]:
    """Every case at one shape; `one_launch`: drawn by a cluster of blocks for each row."""
    import torch

    from ostinato.ops.cuda.sample import ClusterSampler
    from ostinato.ops.triton import sampling as kernels
    from ostinato.types import SamplerVariant

    rows = torch.arange(batch, dtype=torch.int32, device="cuda")
    out = torch.empty_like(rows)
    scratch = torch.empty(kernels.scratch_words(batch, vocab), dtype=torch.int32, device="cuda")
    state = state_of(batch, vocab)
    draw = ClusterSampler(torch.device("cuda", torch.cuda.current_device())) if one_launch else None
    generator = torch.Generator("cuda").manual_seed(0)
    found = []

    def record(logits: str, case: str, call: Callable[[], None]) -> float:
        took = microseconds(call)
        shape = {"batch": batch, "vocab": vocab, "pdl": pdl, "one_launch": one_launch}
        found.append({**shape, "logits": logits, "case": case, "us": took})
        return took

    for name, scale in SCALES.items():
        logits = torch.randn(batch, vocab, device="cuda", generator=generator) * scale

        def sampler(
            variant: SamplerVariant, inputs: SimpleNamespace, logits: torch.Tensor = logits
        ) -> Callable[[], None]:
            return lambda: kernels.sample(
                logits,
                rows,
                rows,
                inputs,  # type: ignore[arg-type]
                state,  # type: ignore[arg-type]
                variant=variant,
                out=out,
                scratch=scratch,
                pdl=pdl,
                draw=draw,
            )

        greedy = record(name, "greedy", sampler(SamplerVariant.GREEDY, inputs_of(batch, vocab, 0.0)))
        for case, filters in FILTERS.items():
            record(name, case, sampler(SamplerVariant.SAMPLE, inputs_of(batch, vocab, 0.8, **filters)))
            found[-1]["over_greedy_us"] = found[-1]["us"] - greedy
        full = inputs_of(batch, vocab, 0.8, **FILTERS["all"])
        record(name, "full", sampler(SamplerVariant.FULL, full))
        found[-1]["over_greedy_us"] = found[-1]["us"] - greedy
    return found


def main() -> None:
    import torch

    from benchmarks.environment import describe

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,64,256", help="numbers of sequences")
    parser.add_argument("--vocabs", default="32000,128256,151936", help="vocabulary sizes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    ways = [(False, False), (True, False), (True, True)] if hopper else [(False, False)]
    cases = [
        case
        for vocab in map(int, args.vocabs.split(","))
        for batch in map(int, args.batches.split(","))
        for pdl, one_launch in ways
        for case in measure(batch, vocab, pdl, one_launch)
    ]
    print(json.dumps({"environment": describe(), "calls_a_graph": CALLS, "cases": cases}, indent=2))


if __name__ == "__main__":
    main()
