"""`LLM`: offline generation."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias

from .config import EngineOptions
from .engine import Engine, build
from .errors import ConfigError, RequestError
from .types import (
    CompletionOutput,
    GraphKey,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    shown,
    whole,
)

if TYPE_CHECKING:
    from .graphs.inspect import AuditReport
    from .graphs.report import GraphReport
    from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`."""
Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: mappings with `role` and `content`."""
_Box: TypeAlias = deque[RequestOutput]
"""Outputs that one call has not taken yet."""


class LLM:
    """A model, ready to generate.

    Calls may overlap: a stream stays open while other calls run, and threads may share an LLM.
    Whichever call runs a step hands its outputs to the calls that wait for them. One thread at a
    time uses the engine; which comes next is not promised.

    Args:
        model: a folder in Hugging Face layout, a `.gguf` file, a hub id, or None for
            SmolLM2-135M-Instruct.
        **options: fields of `EngineOptions`; names follow vLLM.

    Raises:
        UnknownOptionError: an option that does not exist; names the nearest one.
        ConfigError: an option with a value that cannot work.
        ModelError: the model cannot be found, read or supported.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._take(build(EngineOptions.from_kwargs({"model": model, **options})))

    @classmethod
    def over(cls, engine: Engine) -> LLM:
        """An LLM over an engine that was built already."""
        made = cls.__new__(cls)
        made._take(engine)
        return made

    def _take(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.RLock()  # around every use of the engine
        self._inbox: dict[str, _Box] = {}  # by id of each prompt under way: where its call waits
        self._stepping = False
        self._dropped: list[str] = []  # to abort after the step that runs now

    # --- generation --------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; results come in the order of the prompts.

        Every prompt is checked before anything runs. A bad one in a list is refused alone: its
        output has `error` set, finish_reason "error" and no tokens, and the others run. If no
        prompt can be run, the first error is raised.

        Args:
            prompts: one prompt or a list; text, token ids or a mapping, mixed as you like.
            sampling_params: one for all, or one for each prompt; None: `SamplingParams()`.
            use_tqdm: show a progress bar.

        Raises:
            RequestError: no prompt can be run, or the lists differ in length.
        """
        items = _as_list(prompts)
        params = _params_for(sampling_params, len(items), "prompt")
        return self._run([(item, True) for item in items], params, use_tqdm, "prompt")

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Continue conversations, rendered with the model's own chat template.

        Args:
            messages: one conversation or a list of them.
            sampling_params: as in `generate`.
            use_tqdm: as in `generate`.
            add_generation_prompt: end with the header of the assistant's turn.
            tools: passed to the template.
            chat_template_kwargs: further variables for the template, such as `enable_thinking`.

        Raises:
            TokenizerError: the model has no tokenizer or no chat template.
            RequestError: as in `generate`, or an argument is not what the template can use.
        """
        conversations = _conversations(messages)
        params = _params_for(sampling_params, len(conversations), "conversation")
        variables = _template_variables(chat_template_kwargs)
        tokenizer = self.get_tokenizer()
        items: list[tuple[Prompt | Exception, bool]] = []
        for conversation in conversations:
            try:
                text = tokenizer.apply_chat_template(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    tools=tools,
                    **variables,
                )
                items.append((text, False))  # the template writes the special tokens itself
            except RequestError as error:
                items.append((error, False))
        return self._run(items, params, use_tqdm, "conversation")

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, chat: bool = False
    ) -> Iterator[RequestOutput]:
        """Yield the output of one prompt as it grows, as `SamplingParams.output_kind` asks.

        With `chat=True` the prompt is a rendered conversation: no special tokens are added.
        Leaving the loop early aborts the request.
        """
        params = _params_for(sampling_params, 1, "prompt")[0]
        text, special = _split(prompt)
        box: _Box = deque()
        try:
            self._add(text, params, special and not chat, box)
            ended = False
            while not ended:
                output = self._next(box)
                ended = output.finished
                yield output
        finally:
            self._stop(box)

    def _run(
        self,
        items: Sequence[tuple[Prompt | Exception, bool]],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
        noun: str,
    ) -> list[RequestOutput]:
        results: dict[int, RequestOutput] = {}
        waiting: dict[str, int] = {}
        box: _Box = deque()
        try:
            for index, ((item, special), one) in enumerate(zip(items, params, strict=True)):
                try:
                    if isinstance(item, Exception):
                        raise item
                    prompt, own_special = _split(item)
                    final = one.delivered_as(RequestOutputKind.FINAL_ONLY)
                    waiting[self._add(prompt, final, special and own_special, box)] = index
                except RequestError as error:
                    named = type(error)(f"{noun} {index}: {error}") if len(items) > 1 else error
                    results[index] = _refused(index, item, named)
            if items and not waiting:
                first = results[0].error
                assert first is not None
                raise first
            for refused in results.values():
                logger.warning("refused: %s", refused.error)
            self._drain(waiting, results, box, use_tqdm)
        finally:
            self._stop(box)
        return [results[index] for index in range(len(items))]

    def _drain(
        self, waiting: dict[str, int], results: dict[int, RequestOutput], box: _Box, use_tqdm: bool
    ) -> None:
        """Step until every waiting prompt has its result."""

        def answer() -> RequestOutput:
            output = self._next(box)
            results[waiting.pop(output.request_id)] = output
            return output

        if not use_tqdm:  # a bar that shows nothing delays the first token all the same
            while waiting:
                answer()
            return
        from tqdm.auto import tqdm

        tokens = 0
        with tqdm(total=len(waiting), desc="prompts", dynamic_ncols=True) as bar:
            while waiting:
                tokens += sum(len(o.token_ids) for o in answer().outputs)
                elapsed = bar.format_dict["elapsed"]
                if elapsed:
                    bar.set_postfix_str(f"{tokens / elapsed:.0f} tok/s", refresh=False)
                bar.update()

    # --- the engine, shared by the calls that are open ------------------------------------

    def _add(self, prompt: str | Sequence[int], params: SamplingParams, special: bool, box: _Box) -> str:
        """Queue a prompt whose outputs go to `box`."""
        with self._lock:
            prompt_id = self.engine.new_id(params)
            self._inbox[prompt_id] = box  # first, so that whoever is interrupted knows what to abort
            try:
                return self.engine.add_request(prompt, params, prompt_id, add_special_tokens=special)
            except Exception:
                del self._inbox[prompt_id]
                raise

    def _next(self, box: _Box) -> RequestOutput:
        """The next output of a call, after as many steps as it takes; raises what ended its request."""
        with self.engine.device_context():  # once for all its steps
            while not box:
                with self._lock:
                    if box:  # another thread's step has answered meanwhile
                        break
                    self._advance()
                    if not box and not self.engine.has_unfinished:
                        raise RequestError("the request was ended by somebody who uses the engine directly")
        output = box.popleft()
        if output.error is not None:
            raise output.error
        return output

    def _advance(self) -> None:
        """Run one step; what comes out of it goes to the calls that wait for it."""
        try:
            try:
                self._stepping = True
                self._file(self.engine.step())
            finally:
                self._stepping = False
        finally:
            self._stepping = False  # an interrupt may have come right before the same line above
            self._file(self.engine.outputs.take_failed())
            self.engine.abort(self._dropped)
            self._dropped.clear()

    def _file(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            name = output.request_id
            box = self._inbox.pop(name, None) if output.finished else self._inbox.get(name)
            if box is not None:
                box.append(output)

    def _stop(self, box: _Box) -> None:
        """Abort what is left of a call that ends early, and finish the steps in flight."""
        engine = self.engine
        with self._lock:
            # A copy: the garbage collector may end a stream, and so come here, in the middle of the loop.
            left = [name for name, its in self._inbox.copy().items() if its is box]
            for name in left:
                self._inbox.pop(name, None)
            if self._stepping:  # the garbage collector ends a stream in the middle of this thread's step
                self._dropped.extend(left)
                return
            try:
                engine.abort(left)
                while left and engine.has_unfinished and not engine.scheduler.has_unfinished:
                    self._advance()
            except Exception:
                logger.debug("the engine could not be drained", exc_info=True)

    # --- everything else ---------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            TokenizerError: it was not loaded.
        """
        if self.engine.tokenizer is None:
            from .errors import TokenizerError

            raise TokenizerError(
                "this LLM has no tokenizer: it was made with random weights or skip_tokenizer_init"
            )
        return self.engine.tokenizer

    def get_metrics(self) -> dict[str, Any]:
        """Counters since the start: steps by graph and by reason, memory, start-up, queue."""
        with self._lock:
            return self.engine.metrics()

    def explain(self, batch: int | None = None) -> str:
        """What was decided and why: config with sources, ladder, holes, kernels, buffers, memory.

        Args:
            batch: also say what a decode step of that many sequences would do.

        Raises:
            ConfigError: `batch` is not a number of sequences.
        """
        from .graphs.report import explain

        if batch is not None:
            try:
                batch = whole(batch)
            except TypeError:
                raise ConfigError(f"batch must be an integer of at least 1, got {shown(batch)}") from None
        return explain(self.graph_report(), batch)

    def graph_report(self, *, chains: bool = False) -> GraphReport:
        """Everything known of the graphs, as data; `ostinato.graphs.report` renders it.

        Args:
            chains: also time every kernel of every graph, which takes a while.
        """
        from .graphs.survey import survey

        with self._lock:
            return survey(self.engine, chains=chains)

    def audit_graphs(self) -> dict[GraphKey, AuditReport]:
        """Check every pointer of every captured graph against live memory.

        Raises:
            GraphError: this engine has no graphs.
        """
        from .graphs.survey import audit

        with self._lock:
            return audit(self.engine)

    def release_graphs(self) -> int:
        """Free all graphs, for instance while the model sleeps; the next use captures again.

        Returns:
            Bytes of device memory that came back.
        """
        with self._lock:
            return self.engine.release_graphs()

    def close(self) -> None:
        """Free graphs and end what still runs. A closed LLM cannot be used again."""
        with self._lock:
            self.engine.close()
            self._file(self.engine.outputs.take_failed())


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many; integers, in a list or an array, are one prompt of token ids."""
    many: Any = prompts
    if isinstance(many, (str, Mapping, *_BYTES)):
        return [many]
    if hasattr(many, "tolist"):  # an array or a tensor
        many = many.tolist()
    try:
        items = list(many)
    except TypeError:
        return [many]  # no list and no prompt either: refused where prompts are
    return [items] if items and all(isinstance(item, Integral) for item in items) else items


def _split(prompt: Prompt) -> tuple[str | Sequence[int], bool]:
    """(text or ids, whether the tokenizer should add special tokens)."""
    value: Any = prompt
    if isinstance(value, Mapping):
        if len(value) != 1 or not value.keys() <= {"prompt", "prompt_token_ids"}:
            raise RequestError(f"a prompt mapping has 'prompt' or 'prompt_token_ids', got {list(value)}")
        value = next(iter(value.values()))
    found = value.tolist() if hasattr(value, "tolist") and not isinstance(value, _BYTES) else value
    if isinstance(found, Sequence) and not isinstance(found, _BYTES):
        return found, True
    raise RequestError(f"a prompt must be text or a list of token ids, got {_kind(value)}")


def _conversations(messages: Any) -> list[Messages]:
    """One conversation or many."""
    if isinstance(messages, (str, *_BYTES)) or not isinstance(messages, Sequence):
        raise RequestError(
            'messages must be a list like [{"role": "user", "content": "Hello"}], or a list of such lists, '
            f"got {_kind(messages)}"
        )
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def _template_variables(given: Any) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RequestError(
            f"chat_template_kwargs must be a dict of variables for the template, got {_kind(given)}"
        )
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in given:
            raise RequestError(f"chat_template_kwargs: pass {name!r} to chat() itself")
    if "chat_template" in given:
        raise RequestError(
            "chat_template_kwargs: 'chat_template' is not a variable; to use another template, put it into "
            "chat_template.jinja beside the model's tokenizer"
        )
    if "self" in given:
        raise RequestError(
            "chat_template_kwargs: 'self' has a meaning in every template; choose another name"
        )
    return given


def _params_for(given: Any, count: int, noun: str) -> Sequence[SamplingParams]:
    """Parameters for each of `count` prompts."""
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if not isinstance(given, Sequence) or isinstance(given, (str, *_BYTES)):
        raise RequestError(f"sampling_params must be a SamplingParams or a list of them, got {_kind(given)}")
    if len(given) != count:
        raise RequestError(
            f"{count} {noun}{'' if count == 1 else 's'} but {len(given)} sampling_params: "
            f"pass one, or one for each {noun}"
        )
    for index, one in enumerate(given):
        if not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params[{index}] must be a SamplingParams, got {_kind(one)}")
    return given


_BYTES = (bytes, bytearray, memoryview)
"""Sequences of integers that are not token ids."""


def _kind(value: object) -> str:
    """What to call a value of the wrong type."""
    return f"the class {value.__name__} itself" if isinstance(value, type) else type(value).__name__


def _refused(index: int, item: Prompt | Exception, error: Exception) -> RequestOutput:
    empty = CompletionOutput(0, "", [], finish_reason="error", stop_reason=str(error))
    text = item if isinstance(item, str) else None
    return RequestOutput(f"refused-{index}", text, [], [empty], finished=True, error=error)
