"""`/v1/chat/completions`: from messages to a job, and from what comes of it to the answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from .answers import Answer
from .errors import ApiError
from .generation import Delta, Generation, Job
from .messages import TokenLogprob
from .protocol import (
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    FunctionCall,
    Message,
    NamedTool,
    StreamOptions,
    Tool,
    ToolCall,
)
from .service import Service, now
from .tools import Call, ToolParser
from .usage import finite, prompt_candidates, stream_options, text_of, usage, usage_dict


async def chat(service: Service, body: ChatRequest) -> Answer:
    """
    Raises:
        ApiError: the request cannot be served.
    """
    with service.preparing():
        return await _chat(service, body)


async def _chat(service: Service, body: ChatRequest) -> Answer:
    model = service.check_model(body.model)
    options = stream_options(body.stream, body.stream_options)
    if body.add_special_tokens:
        raise ApiError(
            "add_special_tokens: the chat template writes the special tokens", param="add_special_tokens"
        )
    continues, generation_prompt = final_message(body)
    tools = _tools(service, body)
    params = service.sampling(body, max_tokens=_max_tokens(body), logprobs=_logprobs(body))
    grammar = await _grammar(service, body, tools)
    prompt = await service.render(
        body.messages,
        tools,
        body.chat_template_kwargs or {},
        generation_prompt=generation_prompt,
        continues=continues,
    )
    words = service.tokenizer.bad_word_ids(params.bad_words) if service.tokenizer and params.bad_words else ()
    shown = service.tools.special.values() if tools and service.tools else ()
    job = Job([prompt], params, words, grammar, frozenset(shown))
    generation = service.submit(job)
    form = ChatFormat(service, model, body, options, generation, bool(tools))
    service.log("chat", form.id, job, body.user)
    return Answer(service, generation, form, bool(body.stream))


def final_message(body: Any) -> tuple[bool, bool]:
    """(whether the last message is continued, whether a new one is begun); for chats and tokenising them."""
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise ApiError(
            "add_generation_prompt: cannot be combined with continue_final_message",
            param="add_generation_prompt",
        )
    if continues and (body.messages[-1].role != "assistant" or not body.messages[-1].content):
        raise ApiError(
            "continue_final_message: the last message must be the assistant's, with content",
            param="continue_final_message",
        )
    return continues, not continues and body.add_generation_prompt is not False


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them.

    Raises:
        ApiError: a tool's answer without a call, or arguments that are no JSON object.
    """
    found = []
    called: set[str] = set()
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        plain = message.model_dump(exclude_none=True)
        if message.role == "developer":
            plain["role"] = "system"  # OpenAI's newer name for it
        if message.tool_calls is not None and message.role != "assistant":
            raise ApiError(f"{where}.tool_calls: only the assistant calls tools", param=f"{where}.tool_calls")
        if message.content is None and message.tool_calls is None:
            raise ApiError(f"{where}.content: this message needs it", param=f"{where}.content")
        if (message.role == "tool") != (message.tool_call_id is not None):
            raise ApiError(
                f"{where}.tool_call_id: a message of role 'tool' has one, and no other",
                param=f"{where}.tool_call_id",
            )
        if message.role == "tool" and message.tool_call_id not in called:
            raise ApiError(
                f"{where}.role: a message of role 'tool' must answer a call of an earlier assistant message",
                param=f"{where}.role",
            )
        for m, call in enumerate(message.tool_calls or ()):
            called.add(call.id)
            path = f"{where}.tool_calls[{m}].function.arguments"
            try:
                arguments = json.loads(call.function.arguments)
            except (ValueError, RecursionError):
                arguments = None
            if not isinstance(arguments, dict):
                raise ApiError(f"{path}: must be a JSON object, written out", param=path)
            plain["tool_calls"][m]["function"]["arguments"] = arguments
        found.append(plain)
    return found


def _max_tokens(body: ChatRequest) -> int | None:
    both = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(both) > 1:
        raise ApiError("max_tokens: max_completion_tokens says otherwise", param="max_tokens")
    return both.pop() if both else None


def _logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs: only with logprobs=true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _tools(service: Service, body: ChatRequest) -> Sequence[Tool] | None:
    """The tools that the model is told of."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none"):
            raise ApiError("tool_choice: there are no tools", param="tool_choice")
        return None
    if service.tools is None:
        raise ApiError(
            "tools: this model's chat template knows no tools, or writes calls in a way that is not supported",
            param="tools",
        )
    if isinstance(choice, NamedTool) and choice.function.name not in {t.function.name for t in body.tools}:
        raise ApiError(
            f"tool_choice.function.name: there is no tool {choice.function.name!r}",
            param="tool_choice.function.name",
        )
    forced = choice == "required" or isinstance(choice, NamedTool)
    for n, tool in enumerate(body.tools):
        if tool.function.strict and not forced:
            path = f"tools[{n}].function.strict"
            raise ApiError(f"{path}: only with tool_choice 'required' or a named function", param=path)
    return None if choice == "none" else body.tools


async def _grammar(service: Service, body: ChatRequest, tools: Sequence[Tool] | None) -> str | None:
    choice = body.tool_choice
    if not tools or choice in (None, "auto"):
        return await service.grammar(body)
    for name in ("response_format", "structured_outputs"):
        if getattr(body, name) is not None:
            raise ApiError(f"{name}: cannot be combined with this tool_choice", param=name)
    named = choice.function.name if isinstance(choice, NamedTool) else None
    wanted = [tool for tool in tools if named in (None, tool.function.name)]
    form = service.tools
    assert form is not None
    return await service.check_grammar(body, "tools", lambda: form.grammar(wanted))


class _Choice:
    """What one choice has said so far."""

    def __init__(self, parser: ToolParser | None) -> None:
        self.parser = parser
        self.content = ""
        self.calls: list[Call] = []
        self.token_ids: list[int] = []
        self.logprobs: list[list[TokenLogprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.begun = False


class ChatFormat:
    """`Format` of `/v1/chat/completions`."""

    def __init__(
        self,
        service: Service,
        model: str,
        body: ChatRequest,
        options: StreamOptions,
        generation: Generation,
        parse_calls: bool,
    ) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._service, self._model, self._body, self._options = service, model, body, options
        self._generation, self._created = generation, now()
        self._choices = [
            _Choice(service.tools.parser() if parse_calls and service.tools else None)
            for _ in generation.choices
        ]

    def _read(self, choice: _Choice, delta: Delta) -> tuple[str, list[Call], str | None]:
        """(content, calls, finish reason) of something new."""
        if choice.parser is None:
            return delta.text, [], delta.finish_reason
        content, calls = choice.parser.push(delta.text)
        reason = delta.finish_reason
        if reason is not None:
            rest, more = choice.parser.finish()
            content, calls = content + rest, calls + more
        if self._body.parallel_tool_calls is False and calls:
            calls = calls[: 1 - len(choice.calls)]
            if reason is None:  # one is all that was asked for
                reason = "stop"
                self._generation.end(delta.index, "tool_calls")
        choice.calls += calls
        if reason == "stop" and choice.calls:
            reason = "tool_calls"
        return content, calls, reason

    # --- streamed ----------------------------------------------------------------------

    def chunk(self, delta: Delta) -> Iterator[dict[str, Any]]:
        choice = self._choices[delta.index]
        if not choice.begun:  # not before the first token, which clients measure by it
            opening = self._entry(delta.index, {"role": "assistant", "content": ""})
            yield self._envelope([opening], self._options.continuous_usage_stats)
        first = len(choice.calls)
        content, calls, reason = self._read(choice, delta)
        said: dict[str, Any] = {"content": content}
        if calls:
            said["tool_calls"] = [
                {
                    "index": first + n,
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for n, call in enumerate(calls)
            ]
        entry = self._entry(delta.index, said, reason, delta.stop_reason)
        if self._body.logprobs:
            entry["logprobs"] = {"content": self._logprobs(delta.token_ids, delta.logprobs)}
        if self._body.return_token_ids:
            entry["token_ids"] = delta.token_ids
        envelope = self._envelope([entry], self._options.continuous_usage_stats)
        if not choice.begun and self._body.return_token_ids:
            envelope["prompt_token_ids"] = list(self._generation.job.prompts[0].ids)
        if not choice.begun and self._body.prompt_logprobs is not None:
            envelope["prompt_logprobs"] = self._prompt_logprobs()
        choice.begun = True
        yield envelope

    def usage_chunk(self) -> dict[str, Any] | None:
        return self._envelope([], True) if self._options.include_usage else None

    @staticmethod
    def _entry(
        index: int,
        said: dict[str, Any],
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": said,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    def _envelope(self, choices: list[dict[str, Any]], with_usage: bool | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage_dict(self._generation) if with_usage else None,
        }

    def _logprobs(
        self, tokens: Sequence[int], entries: Sequence[Sequence[TokenLogprob]]
    ) -> list[dict[str, Any]]:
        """OpenAI's rows, one for each token."""
        top = self._body.top_logprobs or 0
        rows = []
        for token, entry in zip(tokens, entries, strict=True):
            likely = sorted(entry, key=lambda e: e[2])[:top]
            rows.append(
                self._spell(token, entry[0][1])
                | {"top_logprobs": [self._spell(other, p) for other, p, _ in likely]}
            )
        return rows

    def _spell(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._service.tokenizer
        return {
            "token": text_of(tokenizer, token),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token)) if tokenizer is not None else [],
        }

    def _prompt_logprobs(self) -> list[dict[str, Any] | None] | None:
        return prompt_candidates(self._service.tokenizer, self._generation.choices[0].feed.prompt_logprobs)

    # --- at once -----------------------------------------------------------------------

    def keep(self, delta: Delta) -> None:
        choice = self._choices[delta.index]
        content, _, choice.finish_reason = self._read(choice, delta)
        choice.content += content
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        choice.stop_reason = delta.stop_reason

    def whole(self) -> ChatResponse:
        more: dict[str, Any] = {}
        if self._body.return_token_ids:
            more["prompt_token_ids"] = list(self._generation.job.prompts[0].ids)
        if self._body.prompt_logprobs is not None:
            more["prompt_logprobs"] = self._prompt_logprobs()
        return ChatResponse(
            id=self.id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[self._whole(index, choice) for index, choice in enumerate(self._choices)],
            usage=usage(self._generation),
            **more,
        )

    def _whole(self, index: int, choice: _Choice) -> ChatChoice:
        calls = [
            ToolCall(id=c.id, type="function", function=FunctionCall(name=c.name, arguments=c.arguments))
            for c in choice.calls
        ]
        logprobs = None
        if self._body.logprobs:
            rows: Any = self._logprobs(choice.token_ids, choice.logprobs)
            logprobs = ChatLogprobs(content=rows)
        return ChatChoice(
            index=index,
            message=ChatAnswer(
                role="assistant",
                content=choice.content if choice.content or not calls else None,
                refusal=None,
                **({"tool_calls": calls} if calls else {}),
            ),
            logprobs=logprobs,
            finish_reason=choice.finish_reason,  # type: ignore[arg-type]
            stop_reason=choice.stop_reason,
            **({"token_ids": choice.token_ids} if self._body.return_token_ids else {}),
        )
