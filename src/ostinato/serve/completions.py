"""`/v1/completions`: from the body to a job, and from what comes of it to the answer."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from .answers import Answer
from .errors import ApiError
from .generation import Delta, Generation, Job, Prompt
from .messages import TokenLogprob
from .protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    StreamOptions,
)
from .service import Service, now
from .usage import (
    candidates_by_text,
    finite,
    prompt_candidates,
    stream_options,
    text_of,
    usage,
    usage_dict,
)

_DEFAULT_MAX_TOKENS = 16


async def complete(service: Service, body: CompletionRequest) -> Answer:
    """
    Raises:
        ApiError: the request cannot be served.
    """
    with service.preparing():
        return await _complete(service, body)


async def _complete(service: Service, body: CompletionRequest) -> Answer:
    model = service.check_model(body.model)
    options = stream_options(body.stream, body.stream_options)
    wanted = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        if wanted is not None and wanted != body.logprobs:
            raise ApiError("prompt_logprobs: echo with logprobs sets it already", param="prompt_logprobs")
        wanted = body.logprobs
    own: dict[str, Any] = {"max_tokens": body.max_tokens or _DEFAULT_MAX_TOKENS, "logprobs": body.logprobs}
    params = service.sampling(body, **own, prompt_logprobs=wanted)
    grammar = await service.grammar(body)
    prompts = await _prompts(service, body)
    words = service.tokenizer.bad_word_ids(params.bad_words) if service.tokenizer and params.bad_words else ()
    job = Job(prompts, params, words, grammar)
    generation = service.submit(job)
    form = CompletionFormat(service, model, body, options, generation)
    service.log("completion", form.id, job, body.user)
    return Answer(service, generation, form, bool(body.stream))


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    special = body.add_special_tokens is not False
    value = body.prompt
    if isinstance(value, str):
        return await service.encode([value], special)
    if isinstance(value[0], str):
        return await service.encode([text for text in value if isinstance(text, str)], special)
    if body.add_special_tokens is not None:
        raise ApiError("add_special_tokens: the prompt is token ids already", param="add_special_tokens")
    lists: list[Any] = value if isinstance(value[0], list) else [value]
    return [Prompt(ids) for ids in lists]


class _Choice:
    """What one choice has said so far."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[list[TokenLogprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.offset = 0
        """Where the next token's text begins, for `text_offset`."""
        self.begun = False


class CompletionFormat:
    """`Format` of `/v1/completions`."""

    def __init__(
        self,
        service: Service,
        model: str,
        body: CompletionRequest,
        options: StreamOptions,
        generation: Generation,
    ) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._service, self._model, self._body, self._options = service, model, body, options
        self._generation, self._created = generation, now()
        self._choices = [_Choice(choice.prompt) for choice in generation.choices]

    # --- streamed ----------------------------------------------------------------------

    def chunk(self, delta: Delta) -> Iterator[dict[str, Any]]:
        choice = self._choices[delta.index]
        text, logprobs = self._delta(choice, delta)
        entry: dict[str, Any] = {
            "index": delta.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            entry["token_ids"] = delta.token_ids
            if not choice.begun:
                entry["prompt_token_ids"] = list(choice.prompt.ids)
        if self._body.prompt_logprobs is not None and not choice.begun:
            entry["prompt_logprobs"] = self._prompt_logprobs(delta.index)
        choice.begun = True
        yield self._envelope([entry], self._options.continuous_usage_stats)

    def usage_chunk(self) -> dict[str, Any] | None:
        return self._envelope([], True) if self._options.include_usage else None

    def _envelope(self, choices: list[dict[str, Any]], with_usage: bool | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage_dict(self._generation) if with_usage else None,
        }

    def _delta(self, choice: _Choice, delta: Delta) -> tuple[str, dict[str, Any] | None]:
        """Text and logprobs of something new, the echoed prompt before the first of it."""
        echoed = self._body.echo and not choice.begun
        text = delta.text
        entries: list[list[TokenLogprob] | None] = list(delta.logprobs)
        tokens = list(delta.token_ids)
        if echoed:
            text = self._prompt_text(choice.prompt) + text
            tokens = [*choice.prompt.ids, *tokens]
            entries = [*(self._generation.choices[delta.index].feed.prompt_logprobs or ()), *entries]
        if self._body.logprobs is None:
            return text, None
        found = self._logprobs(tokens, entries, choice.offset)
        choice.offset = found["text_offset"][-1] + len(found["tokens"][-1]) if tokens else choice.offset
        return text, found

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._service.tokenizer.decode(list(prompt.ids)) if self._service.tokenizer else ""

    def _logprobs(
        self, tokens: Sequence[int], entries: Sequence[list[TokenLogprob] | None], offset: int
    ) -> dict[str, Any]:
        """OpenAI's columns; the first prompt token has no probability."""
        texts, offsets, values, tops = [], [], [], []
        for token, entry in zip(tokens, entries, strict=True):
            text = text_of(self._service.tokenizer, token)
            texts.append(text)
            offsets.append(offset)
            offset += len(text)
            values.append(finite(entry[0][1]) if entry else None)
            tops.append(candidates_by_text(self._service.tokenizer, entry) if entry else None)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": tops}

    def _prompt_logprobs(self, index: int) -> list[dict[str, Any] | None] | None:
        feed = self._generation.choices[index].feed
        return prompt_candidates(self._service.tokenizer, feed.prompt_logprobs)

    # --- at once -----------------------------------------------------------------------

    def keep(self, delta: Delta) -> None:
        choice = self._choices[delta.index]
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason

    def whole(self) -> CompletionResponse:
        return CompletionResponse(
            id=self.id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=[self._whole(index, choice) for index, choice in enumerate(self._choices)],
            usage=usage(self._generation),
        )

    def _whole(self, index: int, choice: _Choice) -> CompletionChoice:
        delta = Delta(index, choice.text, choice.token_ids, choice.logprobs)
        text, logprobs = self._delta(choice, delta)
        more: dict[str, Any] = {}
        if self._body.return_token_ids:
            more = {"token_ids": choice.token_ids, "prompt_token_ids": list(choice.prompt.ids)}
        if self._body.prompt_logprobs is not None:
            more["prompt_logprobs"] = self._prompt_logprobs(index)
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=None if logprobs is None else CompletionLogprobs(**logprobs),
            finish_reason=choice.finish_reason,  # type: ignore[arg-type]
            stop_reason=choice.stop_reason,
            **more,
        )
