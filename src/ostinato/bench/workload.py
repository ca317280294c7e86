"""What is run: prompts as token ids, and how many tokens each asks for. Pure Python, no torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Work:
    """Requests of one run; the same arguments make the same ones everywhere."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids."""
    max_tokens: tuple[int, ...]
    """Tokens of output by request; nothing ends one earlier."""

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.max_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(p) + n for p, n in zip(self.prompts, self.max_tokens, strict=True))


def synthetic(
    requests: int,
    input_len: int,
    output_len: int,
    *,
    vocab_size: int,
    spread: float = 0.0,
    seed: int = 0,
) -> Work:
    """Random ids; lengths are uniform within `spread` of those given, as in vLLM's random data set.

    Args:
        requests: how many.
        input_len: tokens of a prompt.
        output_len: tokens of an output.
        vocab_size: ids are below this.
        spread: 0: all lengths alike; 0.5: from half to one and a half times the length.
        seed: of lengths and ids.
    """
    rng = random.Random(seed)

    def length(middle: int) -> int:
        return rng.randint(max(1, round(middle * (1 - spread))), max(1, round(middle * (1 + spread))))

    sizes = [(length(input_len), length(output_len)) for _ in range(requests)]
    prompts = tuple(tuple(rng.randrange(vocab_size) for _ in range(size)) for size, _ in sizes)
    return Work(prompts, tuple(size for _, size in sizes))


def nano_vllm(vocab_size: int, seed: int = 0) -> Work:
    """The requests of nano-vllm's benchmark: 256, of 100 to 1,024 tokens in and out.

    Raises:
        ConfigError: the vocabulary is smaller than the ids that the protocol draws.
    """
    if vocab_size <= 10_000:
        raise ConfigError(
            f"the nano-vllm protocol draws ids up to 10000, and this model's vocabulary has {vocab_size}: "
            "use --num-prompts, --input-len and --output-len instead"
        )
    rng = random.Random(seed)
    prompts = tuple(tuple(rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))) for _ in range(256))
    return Work(prompts, tuple(rng.randint(100, 1024) for _ in prompts))


@dataclass(frozen=True)
class Protocol:
    """A workload that others publish figures for."""

    make: Callable[[int, int], Work]
    """From the vocabulary's size and a seed; seed 0 is the published one."""
    temperature: float
    max_model_len: int


PROTOCOLS = {"nano-vllm": Protocol(nano_vllm, temperature=0.6, max_model_len=4096)}
