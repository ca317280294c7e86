"""Parts of answers that both kinds of completion have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tokenizer import Tokenizer
from .errors import ApiError
from .generation import Generation
from .messages import TokenLogprob
from .protocol import StreamOptions, Usage

_LEAST = -9999.0
"""Written for a probability of 0: JSON has no infinity."""


def finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def stream_options(stream: bool | None, options: StreamOptions | None) -> StreamOptions:
    """
    Raises:
        ApiError: options of a stream for an answer that is none.
    """
    if options is not None and not stream:
        raise ApiError("stream_options: only with stream=true", param="stream_options")
    return options or StreamOptions()


def usage_dict(generation: Generation) -> dict[str, Any]:
    """Tokens so far."""
    prompt, completion = generation.job.num_prompt_tokens, generation.num_generated
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached},
    }


def usage(generation: Generation) -> Usage:
    return Usage(**usage_dict(generation))


def text_of(tokenizer: Tokenizer | None, token: int) -> str:
    """A token as people read it."""
    return tokenizer.token_text(token) if tokenizer is not None else f"token_id:{token}"


def candidates_by_text(tokenizer: Tokenizer | None, entry: Sequence[TokenLogprob]) -> dict[str, float]:
    """Logprobs by the token's text; of tokens with the same text the most likely counts."""
    found: dict[str, float] = {}
    for token, logprob, _ in sorted(entry, key=lambda e: e[2]):
        found.setdefault(text_of(tokenizer, token), finite(logprob))
    return found


def prompt_candidates(
    tokenizer: Tokenizer | None, entries: Sequence[list[TokenLogprob] | None] | None
) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: by token id."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": finite(p), "rank": rank, "decoded_token": text_of(tokenizer, token)}
            for token, p, rank in entry
        }
        for entry in entries
    ]
