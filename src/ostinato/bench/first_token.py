"""One start, for `bench startup`: build an LLM, make a token, say where the seconds went."""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

from ..wake import wake_driver


def main() -> None:
    """Do what one order from standard input says; answer with one line of JSON."""
    order: dict[str, Any] = json.load(sys.stdin)
    clock = _Clock(order["started"])
    clock.done("interpreter")
    wake_driver(order["options"].get("device", "auto"))
    from ..llm import LLM
    from ..types import RequestOutputKind, SamplingParams
    from .options import described

    clock.done("imports")
    begun = time.monotonic()
    llm = LLM(**order["options"])
    building = time.monotonic() - begun
    built = llm.get_metrics()["startup_seconds"]
    clock.seconds |= built
    clock.done("the rest of building")
    clock.seconds["the rest of building"] -= sum(built.values())
    rng = random.Random(order["seed"])
    prompt = [rng.randrange(llm.engine.spec.vocab_size) for _ in range(order["input_len"])]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=order["output_len"],
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )
    stream = llm.stream(prompt, params)
    next(stream)
    clock.done("first token")
    total = time.monotonic() - order["started"]
    for _ in stream:
        pass
    print(
        json.dumps(
            {
                "stages": clock.seconds,
                "building_seconds": building,
                "first_token_seconds": total,
                "engine": described(llm),
            }
        ),
        flush=True,
    )
    llm.close()


class _Clock:
    """Seconds of each stage since the one before."""

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = started

    def done(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


if __name__ == "__main__":
    main()
