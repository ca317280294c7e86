"""The engine process: `python -m ostinato.serve.worker FD`, where FD is its end of the socket.

One thread: it takes what has arrived, runs a step, sends what came out. It neither tokenises nor
detokenises; grammars are compiled on a second thread, outside the interpreter lock. It ends when
the other side goes away.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, OstinatoError
from ..types import FinishReason, Request, RequestOutputKind, SamplingParams, TokenGrammar, TokenLogprobs
from ..wake import wake_driver
from . import logs
from .messages import (
    Abort,
    Add,
    Alive,
    Channel,
    End,
    Failed,
    First,
    GraphsReport,
    Ready,
    Refused,
    ReportGraphs,
    Start,
    Stats,
    Step,
    Stop,
    ToEngine,
    TokenLogprob,
)
from .pauses import spare_what_is_there

if TYPE_CHECKING:
    from ..engine import Engine
    from .grammar import Compiler, Walk

logger = logging.getLogger(__name__)

_STATS_SECONDS = 0.25
"""Between two `Stats` while steps run; the steps around an idle time always carry one."""
_LAST_WORDS_SECONDS = 2.0
_COMPILING_SECONDS = 0.005
"""How often an idle engine looks for a grammar that is ready."""


class Worker:
    """Runs an engine for whoever is at the other end of the channel."""

    def __init__(self, engine: Engine, channel: Channel, beat_seconds: float) -> None:
        self._engine, self._channel = engine, channel
        self._beat_seconds, self._beat_due = beat_seconds, 0.0
        self._stats_due = 0.0
        self._idle_told = False
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiler: Compiler | None = None
        self._compiling: dict[int, tuple[Add, Future[Walk]]] = {}
        self._stopped = False

    def run(self) -> None:
        """Serve until the other side says so or goes away."""
        channel, engine = self._channel, self._engine
        with engine.device_context():  # once for all steps
            while True:
                idle = not engine.has_unfinished
                timeout = 0.0 if not idle else _COMPILING_SECONDS if self._compiling else self._beat_seconds
                for message in channel.receive(timeout):
                    self._take(message)
                if self._stopped or channel.closed:
                    break
                self._beat()
                self._take_compiled()
                if engine.has_unfinished:
                    self._tell(engine.advance())
                elif not self._idle_told:  # an abort ended the last one
                    self._tell([])
        self._threads.shutdown(wait=False, cancel_futures=True)
        engine.close()

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._beat_due:
            self._beat_due = now + self._beat_seconds
            self._channel.send(Alive())

    def _take(self, message: ToEngine) -> None:
        match message:
            case Add():
                if message.grammar is None:
                    self._add(message, None)
                else:
                    future = self._threads.submit(self._compile, message.grammar)
                    self._compiling[message.key] = (message, future)
            case Abort(keys):
                for key in keys:
                    if (found := self._compiling.pop(key, None)) is not None:
                        found[1].cancel()
                self._engine.abort(map(str, keys))
                self._idle_told = False
            case ReportGraphs():
                self._channel.send(self._report())
            case Stop():
                self._stopped = True
            case Start():
                raise ValueError("a second Start")

    def _compile(self, grammar: str) -> Walk:
        """On the second thread, which alone uses the compiler."""
        from .grammar import Compiler

        if self._compiler is None:
            self._compiler = Compiler(self._engine)
        return self._compiler.compile(grammar)

    def _take_compiled(self) -> None:
        for key, (message, future) in list(self._compiling.items()):
            if future.done():
                del self._compiling[key]
                error = future.exception()
                if error is None:
                    self._add(message, future.result())
                    continue
                if not isinstance(
                    error, OstinatoError
                ):  # a panic of the library's, too: it is this request's alone
                    logger.error("a grammar could not be compiled", exc_info=error)
                self._channel.send(Refused(key, f"the grammar cannot be used: {error}"))

    def _add(self, message: Add, grammar: TokenGrammar | None) -> None:
        try:
            params = SamplingParams(
                **message.params, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
            )
            self._engine.add_request(
                message.prompt,
                params,
                str(message.key),
                bad_word_ids=message.bad_words,
                grammar=grammar,
            )
        except OstinatoError as error:
            self._channel.send(Refused(message.key, str(error)))

    def _tell(self, changed: list[Request]) -> None:
        """Send what a step brought; nothing where it brought nothing."""
        keys, tokens, firsts, ends = [], [], [], []
        logprobs: dict[int, list[TokenLogprob]] = {}
        ended = []
        for request in changed:
            key, output = int(request.request_id), request.output_token_ids
            keys.append(key)
            tokens.append(output[-1])
            if request.params.logprobs is not None:
                logprobs[key] = _candidates(request.logprobs[-1])
            if len(output) == 1:
                firsts.append(
                    First(key, request.num_cached_tokens, request.admitted, _prompt_candidates(request))
                )
            if request.finished:
                ended.append(request)
                reason = request.finish_reason or FinishReason.ERROR
                stop = request.stop_reason if isinstance(request.stop_reason, int) else None
                ends.append(End(key, reason.value, stop))
        if ended:
            self._engine.outputs.make(ended)
        idle = not self._engine.has_unfinished
        now = time.monotonic()
        stats = None
        if now >= self._stats_due or idle:
            stats = statistics(self._engine)
            self._stats_due = 0.0 if idle else now + _STATS_SECONDS
        self._idle_told = idle
        if keys or stats is not None:
            self._channel.send(Step(keys, tokens, logprobs, firsts, ends, stats))

    def _report(self) -> GraphsReport:
        from ..graphs.survey import survey

        try:
            return GraphsReport(survey(self._engine).to_json())
        except OstinatoError as error:
            return GraphsReport("", str(error))


def statistics(engine: Engine) -> Stats:
    """The engine's counters at this moment."""
    scheduler, plan = engine.scheduler, engine.plan
    records = list(plan.book.records())
    lines = {line.name: line.nbytes for line in engine.memory}
    return Stats(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        kv_usage=scheduler.allocator.usage,
        preemptions=scheduler.num_preemptions,
        prefix_queries=scheduler.prefix_cache_queries,
        prefix_hits=scheduler.prefix_cache_hits,
        host_dependency=scheduler.num_host_dependency,
        graph_steps=plan.graph_steps.total(),
        eager_steps={reason.value: count for reason, count in plan.eager_steps.items()},
        graph_memory_bytes={
            "executables": plan.book.used_bytes,
            "arena": lines.get("arena", 0),
            "trial_blocks": lines.get("KV blocks for trials", 0),
        },
        captures=sum(record.capture_ms > 0 for record in records),
        capture_seconds=sum(record.capture_ms + record.instantiate_ms for record in records) / 1000,
        step_tokens=dict(scheduler.step_tokens),
    )


def _candidates(found: TokenLogprobs) -> list[TokenLogprob]:
    return [(token, p.logprob, p.rank or 0) for token, p in found.items()]


def _prompt_candidates(request: Request) -> list[list[TokenLogprob] | None] | None:
    if request.params.prompt_logprobs is None:
        return None
    return [None if at is None else _candidates(at) for at in request.prompt_logprobs]


def ready(engine: Engine) -> Ready:
    """What the other side has to know of an engine."""
    config = engine.config
    allocator = engine.scheduler.allocator
    return Ready(
        model=engine.name,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=engine.spec.vocab_size,
        eos_token_ids=sorted(engine.eos_token_ids),
        num_kv_tokens=allocator.num_usable * config.block_size,
        config={
            name: str(getattr(config, name))
            for name in (
                *("block_size", "gpu_memory_utilization", "enable_prefix_caching", "dtype", "device"),
                *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "pipeline_depth"),
            )
        },
        memory_bytes={line.name: line.nbytes for line in engine.memory},
        startup_seconds=dict(engine.startup),
    )


def serve(channel: Channel) -> int:
    """Build the engine that the first message asks for and run it; returns the exit status."""
    messages: list[ToEngine] = []
    while not messages:
        messages = channel.receive(None)
        if channel.closed:
            return 0
    first = messages[0]
    assert isinstance(first, Start)
    logs.set_up(first.log_level, first.log_format)
    try:
        engine = _build(first.options)
    except OstinatoError as error:
        return _last_words(channel, str(error), isinstance(error, ConfigError))
    except Exception as error:
        logger.exception("the engine could not be built")
        return _last_words(channel, f"{type(error).__name__}: {error}")
    spare_what_is_there()
    channel.send(ready(engine))
    worker = Worker(engine, channel, first.beat_seconds)
    try:
        for message in messages[1:]:
            worker._take(message)
        worker.run()
    except Exception as error:
        logger.exception("the engine failed")
        return _last_words(channel, f"{type(error).__name__}: {error}")
    return 0


def _build(options: dict[str, Any]) -> Engine:
    wake_driver(options.get("device", "auto"))
    from ..config import EngineOptions
    from ..engine import build

    return build(EngineOptions.from_kwargs(options, "ostinato serve"))


def _last_words(channel: Channel, message: str, wrong_option: bool = False) -> int:
    channel.send(Failed(message, wrong_option))
    channel.flush(_LAST_WORDS_SECONDS)
    return 1


def main() -> int:
    # Ctrl-C and a supervisor's SIGTERM reach the whole group; the HTTP process decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return serve(Channel(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    sys.exit(main())
