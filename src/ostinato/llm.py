"""`LLM`: offline generation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from .config import EngineOptions
from .engine import Engine, build
from .errors import OstinatoError, RequestError
from .types import CompletionOutput, GraphKey, RequestOutput, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from .graphs.inspect import AuditReport
    from .graphs.report import GraphReport
    from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`."""
Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: mappings with `role` and `content`."""


class LLM:
    """A model, ready to generate.

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
        self.engine: Engine = build(EngineOptions.from_kwargs({"model": model, **options}))

    @classmethod
    def over(cls, engine: Engine) -> LLM:
        """An LLM over an engine that was built already."""
        made = cls.__new__(cls)
        made.engine = engine
        return made

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
        return self._run([(item, True) for item in items], _params_for(sampling_params, len(items)), use_tqdm)

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
            chat_template_kwargs: passed to the template.

        Raises:
            TokenizerError: the model has no tokenizer or no chat template.
            RequestError: as in `generate`.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        tokenizer = self.get_tokenizer()
        items: list[tuple[Prompt | Exception, bool]] = []
        for conversation in conversations:
            try:
                text = tokenizer.apply_chat_template(
                    conversation,  # type: ignore[arg-type]  # checked by the template itself
                    add_generation_prompt=add_generation_prompt,
                    tools=tools,
                    **(chat_template_kwargs or {}),
                )
                items.append((text, False))  # the template writes the special tokens itself
            except RequestError as error:
                items.append((error, False))
        return self._run(items, _params_for(sampling_params, len(items)), use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, chat: bool = False
    ) -> Iterator[RequestOutput]:
        """Yield the output of one prompt as it grows, as `SamplingParams.output_kind` asks.

        With `chat=True` the prompt is a rendered conversation: no special tokens are added.
        Leaving the loop early aborts the request.
        """
        text, special = _split(prompt)
        prompt_id = self.engine.add_request(
            text, sampling_params or SamplingParams(), add_special_tokens=special and not chat
        )
        ended = False
        try:
            while not ended:
                for output in self.engine.step():
                    if output.request_id == prompt_id:
                        ended = output.finished
                        yield output
        finally:
            if not ended:
                self._stop([prompt_id])

    def _run(
        self,
        items: Sequence[tuple[Prompt | Exception, bool]],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        results: dict[int, RequestOutput] = {}
        waiting: dict[str, int] = {}
        for index, ((item, special), one) in enumerate(zip(items, params, strict=True)):
            try:
                if isinstance(item, Exception):
                    raise item
                prompt, own_special = _split(item)
                final = replace(one, output_kind=RequestOutputKind.FINAL_ONLY)
                waiting[
                    self.engine.add_request(prompt, final, add_special_tokens=special and own_special)
                ] = index
            except RequestError as error:
                named = type(error)(f"prompt {index}: {error}") if len(items) > 1 else error
                results[index] = _refused(index, item, named)
        if items and not waiting:
            first = results[0].error
            assert first is not None
            raise first
        for refused in results.values():
            logger.warning("refused: %s", refused.error)
        self._drain(waiting, results, use_tqdm)
        return [results[index] for index in range(len(items))]

    def _drain(self, waiting: dict[str, int], results: dict[int, RequestOutput], use_tqdm: bool) -> None:
        """Step until every waiting prompt has its result."""
        from tqdm.auto import tqdm

        engine, tokens = self.engine, 0
        bar = tqdm(total=len(waiting), desc="prompts", disable=not use_tqdm, dynamic_ncols=True)
        try:
            with bar:
                while waiting:
                    for output in engine.step():
                        index = waiting.pop(output.request_id, None)
                        if index is None:
                            continue
                        results[index] = output
                        tokens += sum(len(o.token_ids) for o in output.outputs)
                        elapsed = bar.format_dict["elapsed"]
                        if elapsed:
                            bar.set_postfix_str(f"{tokens / elapsed:.0f} tok/s", refresh=False)
                        bar.update()
        finally:
            if waiting:
                self._stop(list(waiting))

    def _stop(self, prompt_ids: Sequence[str]) -> None:
        """Abort what is left of a call that ends early, and finish the steps in flight."""
        engine = self.engine
        try:
            engine.abort(prompt_ids)
            while engine.has_unfinished and not engine.scheduler.has_unfinished:
                engine.step()
        except OstinatoError:
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
        return self.engine.metrics()

    def explain(self, batch: int | None = None) -> str:
        """What was decided and why: config with sources, ladder, holes, buffers, memory.

        Args:
            batch: also say what a decode step of that many sequences would do.
        """
        from .graphs.report import explain

        return explain(self.graph_report(), batch)

    def graph_report(self, *, chains: bool = False) -> GraphReport:
        """Everything known of the graphs, as data; `ostinato.graphs.report` renders it.

        Args:
            chains: also time every kernel of every graph, which takes a while.
        """
        from .graphs.survey import survey

        return survey(self.engine, chains=chains)

    def audit_graphs(self) -> dict[GraphKey, AuditReport]:
        """Check every pointer of every captured graph against live memory.

        Raises:
            GraphError: this engine has no graphs.
        """
        from .graphs.survey import audit

        return audit(self.engine)

    def release_graphs(self) -> int:
        """Free all graphs, for instance while the model sleeps; the next use captures again.

        Returns:
            Bytes of device memory that came back.
        """
        return self.engine.release_graphs()

    def close(self) -> None:
        """Free graphs and end what still runs. A closed LLM cannot be used again."""
        self.engine.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many; a list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]  # type: ignore[list-item]  # all integers, as just checked
    return items  # type: ignore[return-value]


def _split(prompt: Prompt) -> tuple[str | Sequence[int], bool]:
    """(text or ids, whether the tokenizer should add special tokens)."""
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or len(prompt) != 1:
            raise RequestError(f"a prompt mapping has 'prompt' or 'prompt_token_ids', got {sorted(prompt)}")
        prompt = next(iter(prompt.values()))
    if isinstance(prompt, str) or (isinstance(prompt, Sequence) and not isinstance(prompt, bytes)):
        return prompt, True
    if hasattr(prompt, "tolist"):
        return prompt.tolist(), True
    raise RequestError(f"a prompt must be text or a list of token ids, got {type(prompt).__name__}")


def _params_for(
    given: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if len(given) != count:
        raise RequestError(
            f"{count} prompts but {len(given)} sampling_params: pass one, or one for each prompt"
        )
    for index, one in enumerate(given):
        if not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params[{index}] must be a SamplingParams, got {type(one).__name__}")
    return given


def _refused(index: int, item: Prompt | Exception, error: Exception) -> RequestOutput:
    empty = CompletionOutput(0, "", [], finish_reason="error", stop_reason=str(error))
    text = item if isinstance(item, str) else None
    return RequestOutput(f"refused-{index}", text, [], [empty], finished=True, error=error)
