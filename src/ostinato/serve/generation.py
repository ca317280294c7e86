"""From prompts to text as it grows: the completions of one HTTP request.

Tokens become text here, and stop strings are found here, on the HTTP side: the engine sends
token ids and hears which completions nobody wants any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..tokenizer import Tokenizer
from ..types import FinishReason, SamplingParams
from .client import EngineClient, Feed, Inbox
from .errors import ApiError
from .messages import TokenLogprob
from .metrics import Metrics

_LARGE = 2000
"""Tokens and their alternatives."""
_DEFAULTS = SamplingParams()
_NOT_SENT = frozenset(
    ("n", "seed", "stop", "include_stop_str_in_output", "skip_special_tokens", "bad_words", "output_kind")
)
"""What the HTTP side does by itself, or sends apart."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request."""

    ids: Sequence[int]
    text: str | None = None
    """None where the request brought ids."""


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks for: `params.n` completions of each prompt."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    bad_words: Sequence[Sequence[int]] = ()
    grammar: str | None = None
    shown: Collection[int] = ()
    """Special tokens that are text all the same."""

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one completion."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[list[TokenLogprob]]
    """As many as `token_ids`, where the request asked for them; else none."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Choice:
    """One completion under way."""

    def __init__(self, feed: Feed, prompt: Prompt, job: Job, tokenizer: Tokenizer | None) -> None:
        self.feed, self.prompt, self._params = feed, prompt, job.params
        self._sink = tokenizer.stream(job.params, prompt.ids, job.shown) if tokenizer is not None else None
        self._sent = 0
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def take(self) -> Delta:
        """What has arrived since the last time.

        Raises:
            ApiError: the engine ended it with an error.
        """
        feed, sink = self.feed, self._sink
        tokens, feed.tokens = feed.tokens, []
        logprobs, feed.logprobs = feed.logprobs, []
        end, kept = feed.end, 0
        reason: str | None = None
        stop: int | str | None = None
        for kept, token in enumerate(tokens, 1):  # read after the loop
            if end is not None and kept == len(tokens):
                reason = end.finish_reason
                if reason == FinishReason.ERROR.value:
                    raise ApiError(
                        "the engine could not follow the grammar of this request", 500, kind="server_error"
                    )
                if reason == FinishReason.STOP.value:  # a stop token: counted, but its text is not shown
                    stop = end.stop_token
                    break
            match = sink.push(token) if sink is not None else None
            if match is not None and self.num_tokens + kept >= self._params.min_tokens:
                reason, stop = "stop", match
                break
        self.num_tokens += kept
        self.finish_reason = reason
        text = ""
        if sink is not None:
            text = sink.finish() if reason is not None else sink.text
            self._sent, text = len(text), text[self._sent :]
        return Delta(feed.index, text, tokens[:kept], logprobs[:kept], reason, stop)


class Generation:
    """All completions of one HTTP request. Made and used on the event loop, by one task.

    Choice i is completion i % n of prompt i // n.

    Args:
        timeout: seconds until the request is ended with an error.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer | None,
        metrics: Metrics,
        job: Job,
        timeout: float,
    ) -> None:
        self.job = job
        self._engine, self._metrics = engine, metrics
        self._inbox = Inbox()
        n = job.params.n
        self.choices = [
            Choice(Feed(index, self._inbox), job.prompts[index // n], job, tokenizer)
            for index in range(job.num_choices)
        ]
        self._open = set(range(len(self.choices)))
        self._left = [n] * len(job.prompts)
        """Completions of each prompt that have not ended."""
        late = ApiError(
            f"the request took longer than {timeout:g} s", 504, kind="server_error", code="timeout"
        )
        self._timer = asyncio.get_running_loop().call_later(timeout, self._inbox.fail, late)
        params = wire(job.params)
        try:
            for index, choice in enumerate(self.choices):
                seed = job.params.seed
                own = params if seed is None else params | {"seed": seed + index % n}
                engine.add(choice.feed, choice.prompt.ids, own, job.bad_words, job.grammar)
        except ApiError:
            self.close()
            raise
        for prompt in job.prompts:
            metrics.started(len(prompt.ids), n, job.params.max_tokens)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What is new, each time that something is; ends with the last completion.

        Raises:
            ApiError: the request cannot be finished.
        """
        while self._open:
            found = []
            for feed in await self._inbox.take():
                if feed.index not in self._open:
                    continue
                delta = self.choices[feed.index].take()
                found.append(delta)
                if delta.finish_reason is not None:
                    self.end(delta.index, delta.finish_reason)
            if found:
                yield found

    def end(self, index: int, reason: str) -> None:
        """This completion is as long as it should be."""
        if index in self._open:
            self._open.remove(index)
            choice = self.choices[index]
            choice.finish_reason = reason
            self._engine.abort([choice.feed])
            self._observe(choice, reason)

    def close(self, reason: str = "abort") -> None:
        """Free whatever the engine still holds; afterwards nothing more comes."""
        self._timer.cancel()
        left, self._open = self._open, set()
        self._engine.abort(self.choices[index].feed for index in left)
        for index in left:
            self._observe(self.choices[index], reason)

    @property
    def num_generated(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def is_large(self) -> bool:
        """Whether writing it all takes longer than an event loop should."""
        params = self.job.params
        prompts = self.job.num_prompt_tokens * params.n * (params.prompt_logprobs or 0)
        return self.num_generated * ((params.logprobs or 0) + 1) + prompts > _LARGE

    @property
    def num_cached(self) -> int:
        """Prompt tokens that the prefix cache supplied, each prompt counted once."""
        return sum(choice.feed.cached_tokens for choice in self.choices[:: self.job.params.n])

    def _observe(self, choice: Choice, reason: str) -> None:
        self._metrics.ended(choice.feed, reason, len(choice.prompt.ids), choice.num_tokens, time.monotonic())
        n = self.job.params.n
        prompt = choice.feed.index // n
        self._left[prompt] -= 1
        if not self._left[prompt]:
            self._metrics.longest(max(c.num_tokens for c in self.choices[prompt * n : (prompt + 1) * n]))


def wire(params: SamplingParams) -> dict[str, Any]:
    """The fields that the engine has to know, as far as they differ from their defaults."""
    return {
        f.name: value
        for f in fields(params)
        if f.name not in _NOT_SENT and (value := getattr(params, f.name)) != getattr(_DEFAULTS, f.name)
    }
