"""ostinato and transformers side by side on this CPU: the default model, float32.

    make bench-cpu        (or: python benchmarks/cpu.py [--json FILE] [--rounds 3])

Same file, same weights, same threads, one process; the two sides take turns, and medians are
compared. Decode: tokens/s after the first token (time of 65 tokens minus time of 1, over 64).
Mixed: 32 requests with prompts of 10 to 200 tokens, 32 tokens out each; transformers runs them
one by one, as a plain script would.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DECODE_TOKENS = 64
PROMPT = 32
REQUESTS, REQUEST_TOKENS = 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    from benchmarks.environment import describe
    from ostinato import LLM, SamplingParams
    from ostinato.models.hub import resolve

    hf_logging.set_verbosity_error()
    path = resolve(None)
    # The prefix cache would spare ostinato prompts that a round repeats: off, to compare like with like.
    llm = LLM(str(path), max_model_len=512, enable_prefix_caching=False)
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    vocab = llm.engine.spec.vocab_size
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(length)]

    def ours(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate(prompts, params, use_tqdm=False)

    def theirs(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )

    def decode_speed(run: Callable[[list[list[int]], int], None], prompts: list[list[int]]) -> float:
        first, whole = (seconds(lambda n=n: run(prompts, n)) for n in (1, 1 + DECODE_TOKENS))
        return len(prompts) * DECODE_TOKENS / (whole - first)

    mixed = [prompt(rng.randint(10, 200)) for _ in range(REQUESTS)]

    def one_by_one(prompts: list[list[int]], tokens: int) -> None:
        for one in prompts:
            theirs([one], tokens)

    batches = {size: [prompt(PROMPT) for _ in range(size)] for size in (1, 8)}
    for run in (ours, theirs):
        run(batches[8], 4)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.rounds):
        for name, run in (("ostinato", ours), ("transformers", theirs)):
            for size, batch in batches.items():
                found.setdefault(f"decode, batch {size} [tokens/s]", {}).setdefault(name, []).append(
                    decode_speed(run, batch)
                )
        for name, run in (("ostinato", ours), ("transformers", one_by_one)):
            found.setdefault(f"{REQUESTS} mixed requests [s]", {}).setdefault(name, []).append(
                seconds(lambda run=run: run(mixed, REQUEST_TOKENS))
            )
    result: dict[str, Any] = {"environment": describe(), "rows": {}}
    print(f"\n{'':32} {'ostinato':>10} {'transformers':>13} {'ratio':>7}  wanted")
    wanted = (">= 1.0", ">= 1.2", "<= 0.5")
    for (name, sides), bound in zip(found.items(), wanted, strict=True):
        a, b = (statistics.median(sides[side]) for side in ("ostinato", "transformers"))
        result["rows"][name] = {
            "ostinato": a,
            "transformers": b,
            "ratio": a / b,
            "wanted": bound,
            "all": sides,
        }
        print(f"{name:32} {a:10.2f} {b:13.2f} {a / b:7.2f}  {bound}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
