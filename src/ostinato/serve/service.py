"""What the endpoints share: the engine, the tokenizer, the limits, and the way into the queue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import OstinatoError, RequestError, SamplingParamsError
from ..tokenizer import Tokenizer
from ..types import SamplingParams
from .checker import Checker
from .client import EngineClient
from .errors import ApiError, engine_died, shutting_down
from .generation import Generation, Job, Prompt
from .messages import Ready
from .metrics import Metrics
from .options import ServeOptions
from .protocol import Message, ResponseFormat, SamplingBody, StructuredOutputs, Tool

if TYPE_CHECKING:
    from .tools import ToolFormat

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SHORT = 2000
"""Characters that are tokenised on the event loop; longer texts are tokenised on a thread."""

_SAME_NAMES = (
    *("n", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop", "logit_bias"),
    *("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens"),
    *("skip_special_tokens", "include_stop_str_in_output", "allowed_token_ids", "bad_words"),
    "prompt_logprobs",
)
"""Fields of a body that are fields of `SamplingParams`."""


@dataclass
class Service:
    """One served model. Changes only where the server starts to end."""

    options: ServeOptions
    engine: EngineClient
    checker: Checker
    ready: Ready
    tokenizer: Tokenizer | None
    tools: ToolFormat | None
    """How the model writes tool calls; None: its chat template knows no tools."""
    names: tuple[str, ...]
    metrics: Metrics
    created: int
    draining: bool = False
    num_preparing: int = 0
    """Requests that were read, and are not in the queue yet."""
    num_open: int = 0
    """Requests that generate, their last bytes included."""

    # --- the model ---------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.names[0]

    def check_model(self, name: str | None) -> str:
        """The name to answer with.

        Raises:
            ApiError: 404, another model was asked for.
        """
        if name is not None and name not in self.names:
            raise ApiError(
                f"model: {name[:200]!r} is not served here; there is {', '.join(map(repr, self.names))}",
                404,
                param="model",
                code="model_not_found",
            )
        return name or self.name

    def need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ApiError(f"{what}: this model has no tokenizer; pass token ids as `prompt`", param=what)
        return self.tokenizer

    # --- text to ids -------------------------------------------------------------------

    async def encode(self, texts: Sequence[str], special: bool, name: str = "prompt") -> list[Prompt]:
        """Texts as prompts; long ones are tokenised on a thread."""
        tokenizer = self.need_tokenizer(name)

        def all_of_them() -> list[Prompt]:
            return [Prompt(tokenizer.encode(text, special, name=name), text) for text in texts]

        return await self.run(all_of_them, sum(map(len, texts)) > _SHORT, name)

    async def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: Mapping[str, Any],
        *,
        generation_prompt: bool,
        continues: bool,
    ) -> Prompt:
        """A chat as the model's template writes it, tokenised.

        Raises:
            ApiError: the template refuses it.
        """
        from .chat import template_messages

        tokenizer = self.need_tokenizer("messages")
        plain = template_messages(messages)
        listed = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
        special = dict(variables)
        for name in ("messages", "tools", "add_generation_prompt", "chat_template", "self"):
            if name in special:
                raise ApiError(
                    f"chat_template_kwargs.{name}: this is no variable of the template",
                    param=f"chat_template_kwargs.{name}",
                )

        def make() -> Prompt:
            text = tokenizer.apply_chat_template(
                plain, add_generation_prompt=generation_prompt, tools=listed, **special
            )
            if continues:
                last = str(plain[-1]["content"]).strip()
                text = text[: text.rindex(last) + len(last)] if last in text else text
            return Prompt(tokenizer.encode(text, False, name="messages"), text)

        return await self.run(make, True, "messages")

    async def run(self, work: Callable[[], T], on_thread: bool, param: str) -> T:
        """Do something that may refuse what the user sent; a refusal names `param`."""
        try:
            return await asyncio.to_thread(work) if on_thread else work()
        except OstinatoError as error:
            where = re.match(r"messages(\[\d+\])?", str(error))
            raise ApiError(_named(param, str(error)), param=where[0] if where else param) from error

    # --- parameters --------------------------------------------------------------------

    def sampling(self, body: SamplingBody, **own: Any) -> SamplingParams:
        """Sampling parameters of a body.

        Args:
            body: what was sent.
            own: fields that are called something else there.

        Raises:
            ApiError: a value that cannot be served; names its field.
        """
        given = {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
        for token in given.get("logit_bias", ()):
            self._check_id(token, f"logit_bias.{token}")
        if len(given.get("allowed_token_ids", ())) > self.ready.vocab_size:
            raise ApiError(
                f"allowed_token_ids: there are more than the {self.ready.vocab_size} tokens of the vocabulary",
                param="allowed_token_ids",
            )
        for name in ("stop_token_ids", "allowed_token_ids"):
            for index, token in enumerate(given.get(name, ())):
                self._check_id(token, f"{name}[{index}]")
        if self.tokenizer is None:
            for name in ("stop", "bad_words", "response_format", "structured_outputs"):
                if getattr(body, name) is not None:
                    self.need_tokenizer(name)
        try:
            params = SamplingParams(**given | own)
            params.stops(self.ready.eos_token_ids)
            return params
        except (SamplingParamsError, RequestError) as error:
            field = re.match(r"\w+", str(error))
            raise ApiError(str(error), param=field[0] if field else None) from error

    def check_ids(self, ids: Sequence[int], where: str) -> None:
        """
        Raises:
            ApiError: one is not in the vocabulary; names its place.
        """
        if max(ids, default=0) >= self.ready.vocab_size:
            for place, token in enumerate(ids):
                self._check_id(token, f"{where}[{place}]")

    def _check_id(self, token: int | str, where: str) -> None:
        try:
            number = int(token)
        except ValueError:
            raise ApiError(f"{where}: {token!r} is not a token id", param=where) from None
        if not 0 <= number < self.ready.vocab_size:
            raise ApiError(
                f"{where}: token id {str(token)[:30]} is out of range; the vocabulary has ids 0 to "
                f"{self.ready.vocab_size - 1}",
                param=where,
            )

    async def grammar(self, body: SamplingBody) -> str | None:
        """What the output has to follow, checked.

        Raises:
            ApiError: a schema, pattern or grammar that cannot be used, or a field beside it that cannot.
        """
        found = _asked_for(body.response_format, body.structured_outputs)
        if found is None:
            return None
        field, make = found
        return await self.check_grammar(body, field, make)

    async def check_grammar(self, body: SamplingBody, field: str, make: Callable[[], str]) -> str:
        """Make a grammar, and have it checked in a process of its own."""
        for name in ("min_tokens", "ignore_eos", "allowed_token_ids", "bad_words"):
            if getattr(body, name):
                raise ApiError(f"{name}: cannot be combined with {field}", param=name)
        self.need_tokenizer(field)

        def made() -> str:
            try:
                return make()
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{field}: {str(error)[:500]}") from error

        text = await self.run(made, True, field)
        problem = await self.checker.check(text)
        if problem is not None:
            raise ApiError(f"{field}: {problem[:500]}", param=field)
        return text

    # --- the queue ---------------------------------------------------------------------

    @property
    def _room(self) -> int:
        """Completions that may run or wait."""
        return self.ready.max_num_seqs + self.options.max_waiting

    def _full(self) -> ApiError:
        return ApiError(
            f"too many requests: {self.engine.num_open} completions run or wait, {self.num_preparing} requests "
            f"are being read, and {self._room} may",
            429,
            kind="rate_limit_error",
            code="too_many_waiting",
            headers={"Retry-After": "1"},
        )

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Around the work on a request before `submit`: texts and grammars wait for threads, but not without end.

        Raises:
            ApiError: 429, too many do already.
        """
        if self.engine.num_open + self.num_preparing >= self._room:
            raise self._full()
        self.num_preparing += 1
        try:
            yield
        finally:
            self.num_preparing -= 1

    def submit(self, job: Job) -> Generation:
        """Put a job into the queue, whole or not at all.

        Raises:
            ApiError: 400 too long, 429 too many wait, 500 or 503 there is no engine.
        """
        if self.engine.dead is not None:
            raise engine_died(self.engine.dead)
        if self.draining:
            raise shutting_down()
        self._check_lengths(job)
        room = self._room
        if job.num_choices > room:
            raise ApiError(
                f"n: {job.num_choices} completions in one request; {room} can run or wait at once", param="n"
            )
        if self.engine.num_open + job.num_choices > room:
            raise self._full()
        return Generation(self.engine, self.tokenizer, self.metrics, job, self.options.request_timeout)

    def _check_lengths(self, job: Job) -> None:
        longest = self.ready.max_model_len
        for index, prompt in enumerate(job.prompts):
            where = "prompt" if len(job.prompts) == 1 else f"prompt[{index}]"
            count = len(prompt.ids)
            if count == 0:
                raise ApiError(f"{where}: it is empty, and needs at least one token", param=where)
            if count >= longest:
                raise ApiError(
                    f"{where}: it has {count} tokens; with max_model_len={longest} it may have at most {longest - 1}",
                    param=where,
                    code="context_length_exceeded",
                )
            asked = job.params.max_tokens
            if asked is not None and count + asked > longest:
                raise ApiError(
                    f"max_tokens: {count} tokens of the prompt and max_tokens={asked} are more than "
                    f"max_model_len={longest}",
                    param="max_tokens",
                    code="context_length_exceeded",
                )
            if prompt.text is None:
                self.check_ids(prompt.ids, where)

    def log(self, kind: str, request_id: str, job: Job, user: str | None) -> None:
        """A line for a request, where that was asked for."""
        if not self.options.log_requests:
            return
        extra: dict[str, Any] = {
            "request_id": request_id,
            "prompt_tokens": job.num_prompt_tokens,
            "completions": job.num_choices,
            "max_tokens": job.params.max_tokens,
        }
        if user is not None:
            extra["user"] = user
        if self.options.log_prompts:
            extra["prompts"] = [p.text if p.text is not None else list(p.ids) for p in job.prompts]
        logger.info("%s %s", kind, " ".join(f"{k}={v!r}" for k, v in extra.items()), extra=extra)


def _asked_for(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> tuple[str, Callable[[], str]] | None:
    """(the field, what makes its grammar); None where the output is free."""
    from . import grammar

    if response_format is not None and response_format.type != "text":
        if structured is not None:
            raise ApiError(
                "structured_outputs: cannot be combined with response_format", param="structured_outputs"
            )
        if response_format.type == "json_object":
            if response_format.json_schema is not None:
                raise ApiError(
                    "response_format.json_schema: only for type 'json_schema'",
                    param="response_format.json_schema",
                )
            return "response_format", lambda: grammar.json_schema(grammar.JSON_OBJECT)
        schema = response_format.json_schema
        if schema is None or schema.schema_ is None:
            where = "response_format.json_schema" + ("" if schema is None else ".schema")
            raise ApiError(f"{where}: type 'json_schema' needs it", param=where)
        wanted = schema.schema_
        return "response_format.json_schema.schema", lambda: grammar.json_schema(wanted)
    if response_format is not None and response_format.json_schema is not None:
        raise ApiError(
            "response_format.json_schema: only for type 'json_schema'", param="response_format.json_schema"
        )
    if structured is None:
        return None
    given = [n for n in ("json_", "regex", "choice", "grammar") if getattr(structured, n) is not None]
    if len(given) != 1:
        raise ApiError(
            "structured_outputs: needs exactly one of json, regex, choice and grammar",
            param="structured_outputs",
        )
    name = given[0]
    value = getattr(structured, name)
    makers: dict[str, Callable[[Any], str]] = {
        "json_": grammar.json_text,
        "regex": grammar.regex,
        "choice": grammar.choice,
        "grammar": grammar.lark,
    }
    return f"structured_outputs.{name.rstrip('_')}", lambda: makers[name](value)


def _named(param: str, message: str) -> str:
    """A message that names its field."""
    return message if param.partition("[")[0].partition(".")[0] in message else f"{param}: {message}"


def now() -> int:
    return int(time.time())
