"""Builds what the user gets: one `RequestOutput` for a prompt, from its n requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .graphs.plan import Plan
from .types import (
    CompletionOutput,
    Delay,
    FinishReason,
    Reason,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    RequestStatus,
    SamplingParams,
    TokenLogprobs,
)


@dataclass
class _Prompt:
    """One prompt under way."""

    prompt: str | None
    requests: Sequence[Request]
    params: SamplingParams
    arrival: float
    graph_steps: int
    """The plan's counters at arrival: the difference is what ran meanwhile."""
    eager_steps: Mapping[Reason, int]
    first_token: float | None = None
    quiet: bool = False
    """It wants nothing before its end, and its first token was seen."""
    sent_text: list[int] = field(default_factory=list)
    """Characters of each completion already delivered (DELTA)."""
    sent_tokens: list[int] = field(default_factory=list)
    final_text: dict[int, str] = field(default_factory=dict)


class OutputAssembler:
    """Knows every prompt under way and how its caller wants to hear of it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._prompts: dict[str, _Prompt] = {}
        self._request_ids: set[str] = set()
        self._token_text: Callable[[int], str | None] = lambda token: None
        self._failed: list[RequestOutput] = []
        self.silent: Iterable[Request] = ()
        """Requests of which nobody wants to hear, for as long as they run."""

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._prompts

    def taken(self, prompt_id: str, request_ids: Iterable[str]) -> str | None:
        """The first of these ids that a prompt under way has; None if all are free."""
        if prompt_id in self._prompts:
            return prompt_id
        return next((name for name in request_ids if name in self._request_ids), None)

    def add(
        self,
        prompt_id: str,
        prompt: str | None,
        requests: Sequence[Request],
        params: SamplingParams,
        token_text: Callable[[int], str | None],
    ) -> None:
        """Register a prompt and its requests."""
        plan, n = self._plan, len(requests)
        self._prompts[prompt_id] = _Prompt(
            prompt,
            requests,
            params,
            time.monotonic(),
            plan.num_graph_steps,
            dict(plan.eager_steps),
            sent_text=[0] * n,
            sent_tokens=[0] * n,
        )
        self._request_ids.update(r.request_id for r in requests)
        self._token_text = token_text

    def running(self, prompt_id: str) -> list[Request]:
        """The prompt's requests that have not ended; empty for an unknown id."""
        found = self._prompts.get(prompt_id)
        return [r for r in found.requests if not r.finished] if found else []

    def make(self, changed: Iterable[Request]) -> list[RequestOutput]:
        """Outputs for requests that got a token or ended, in the order given.

        Args:
            changed: a tuple that comes again says that none of them has ended meanwhile.
        """
        if changed is self.silent:
            return []
        prompts, running = self._prompts, RequestStatus.RUNNING
        # A step of many rows changes little for those that want one output, at the end.
        wanted = [r.prompt_id for r in changed if r.status is not running or not prompts[r.prompt_id].quiet]
        if not wanted:
            if isinstance(changed, tuple):
                self.silent = changed
            return []
        outputs = []
        now: float | None = None
        for prompt_id in dict.fromkeys(wanted):
            entry = prompts[prompt_id]
            if entry.first_token is None and any(r.output_token_ids for r in entry.requests):
                now = entry.first_token = now or time.monotonic()
                entry.quiet = entry.params.output_kind is RequestOutputKind.FINAL_ONLY
            done = all(r.finished for r in entry.requests)
            if done or entry.params.output_kind is not RequestOutputKind.FINAL_ONLY:
                outputs.append(self._output(prompt_id, entry, done))
            if done:
                self._forget(prompt_id)
        return outputs

    def discard(self, prompt_id: str) -> None:
        """Forget a prompt, if it is known, without an output."""
        if prompt_id in self._prompts:
            self._forget(prompt_id)

    def fail(self, error: BaseException | None) -> None:
        """A failed step has ended every request: the outputs of all prompts wait in `take_failed`.

        Prompts whose requests had ended by themselves are among them: what they have was not delivered.
        """
        for prompt_id in list(self._prompts):
            entry = self._forget(prompt_id)
            complete = all(
                r.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for r in entry.requests
            )
            cause = error if isinstance(error, Exception) and not complete else None
            self._failed.append(self._output(prompt_id, entry, True, cause))

    def take_failed(self) -> list[RequestOutput]:
        """Outputs of requests that ended in a failed step: every request gets an answer."""
        failed, self._failed = self._failed, []
        return failed

    def _forget(self, prompt_id: str) -> _Prompt:
        entry, self.silent = self._prompts[prompt_id], ()
        self._request_ids.difference_update(r.request_id for r in entry.requests)
        del self._prompts[prompt_id]  # last: an interrupt in between leaves nothing that nobody knows
        return entry

    def _output(
        self, prompt_id: str, entry: _Prompt, done: bool, error: Exception | None = None
    ) -> RequestOutput:
        first = entry.requests[0]
        return RequestOutput(
            request_id=prompt_id,
            prompt=entry.prompt,
            prompt_token_ids=list(first.prompt_token_ids),
            outputs=[self._completion(entry, r) for r in entry.requests],
            finished=done,
            prompt_logprobs=self._prompt_logprobs(first),
            metrics=self._metrics(entry, done),
            num_cached_tokens=first.num_cached_tokens,
            error=error,
        )

    def _completion(self, entry: _Prompt, request: Request) -> CompletionOutput:
        i, tokens = request.index, request.output_token_ids
        text = self._text(entry, request)
        logprobs = request.logprobs if request.params.logprobs is not None else None
        if request.params.output_kind is RequestOutputKind.DELTA:
            from_text, from_token = entry.sent_text[i], entry.sent_tokens[i]
            entry.sent_text[i], entry.sent_tokens[i] = len(text), len(tokens)
            text, tokens = text[from_text:], tokens[from_token:]
            logprobs = logprobs[from_token:] if logprobs is not None else None
        return CompletionOutput(
            index=i,
            text=text,
            token_ids=list(tokens),
            cumulative_logprob=request.cumulative_logprob if logprobs is not None else None,
            logprobs=[self._spell(entry_) for entry_ in logprobs] if logprobs is not None else None,
            finish_reason=request.finish_reason.value if request.finish_reason else None,
            stop_reason=request.stop_reason,
        )

    @staticmethod
    def _text(entry: _Prompt, request: Request) -> str:
        sink = request.sink
        if sink is None:
            return ""
        if request.index not in entry.final_text:
            tokens = request.output_token_ids
            sink.catch_up(tokens[:-1] if request.silent_end else tokens)
            if not request.finished:
                return sink.text
            entry.final_text[request.index] = sink.finish()
        return entry.final_text[request.index]

    def _prompt_logprobs(self, request: Request) -> list[TokenLogprobs | None] | None:
        if request.params.prompt_logprobs is None:
            return None
        return [None if at is None else self._spell(at) for at in request.prompt_logprobs]

    def _spell(self, candidates: TokenLogprobs) -> TokenLogprobs:
        return {t: p._replace(decoded_token=self._token_text(t)) for t, p in candidates.items()}

    def _metrics(self, entry: _Prompt, done: bool) -> RequestMetrics:
        plan, before = self._plan, entry.eager_steps
        eager = {reason: n - before.get(reason, 0) for reason, n in plan.eager_steps.items()}
        return RequestMetrics(
            arrival_time=entry.arrival,
            first_token_time=entry.first_token,
            finished_time=time.monotonic() if done else None,
            num_preemptions=sum(r.num_preemptions for r in entry.requests),
            graph_steps=plan.num_graph_steps - entry.graph_steps,
            eager_steps={reason.value: n for reason, n in eager.items() if n},
            delays=_total(r.delays for r in entry.requests),
        )


def _total(delays: Iterable[Mapping[Delay, int]]) -> dict[str, int]:
    """Delays of several requests, by code."""
    found: dict[str, int] = {}
    for own in delays:
        for why, count in own.items():
            found[why.value] = found.get(why.value, 0) + count
    return found
