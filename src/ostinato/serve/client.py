"""The HTTP side of the engine process: starts it, talks to it, and notices at once when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from ..errors import ConfigError, OstinatoError
from .errors import ApiError, engine_died
from .messages import (
    Abort,
    Add,
    Alive,
    End,
    Failed,
    First,
    Frames,
    FromEngine,
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
    pack,
    read_from_engine,
)

logger = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "ostinato.serve.worker")
"""The engine process; the descriptor of its socket is added."""
_BEAT_SECONDS = 1.0
"""Most seconds between two signs of life."""
_TICKS = 4
"""How often the time without a sign of life is looked at before it is over."""
_KILL_SECONDS = 5.0
"""For a killed process to be gone."""


class Inbox:
    """Where one HTTP request waits for its completions; one task takes from it."""

    def __init__(self) -> None:
        self._ready: list[Feed] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> list[Feed]:
        """The completions that have something new, after as long as it takes.

        Raises:
            ApiError: the request has failed; what had arrived before is given out first.
        """
        if not self._ready and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, []
        if not ready and self._error is not None:
            raise self._error
        for feed in ready:
            feed.listed = False
        return ready

    def put(self, feed: Feed) -> None:
        if not feed.listed:
            feed.listed = True
            self._ready.append(feed)
            self._wake()

    def fail(self, error: ApiError) -> None:
        """End the request; the first error counts."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Feed:
    """One completion as it comes from the engine; `tokens` and `logprobs` hold what was not taken yet."""

    __slots__ = (
        *(
            "admitted",
            "arrived",
            "cached_tokens",
            "end",
            "first_at",
            "inbox",
            "index",
            "key",
            "last_at",
            "listed",
        ),
        *("logprobs", "num_tokens", "prompt_logprobs", "tokens"),
    )

    def __init__(self, index: int, inbox: Inbox) -> None:
        self.index, self.inbox = index, inbox
        self.key = -1
        self.tokens: list[int] = []
        self.logprobs: list[list[TokenLogprob]] = []
        self.listed = False
        self.end: End | None = None
        self.cached_tokens = 0
        self.prompt_logprobs: list[list[TokenLogprob] | None] | None = None
        self.num_tokens = 0
        self.arrived = time.monotonic()
        self.admitted = self.first_at = self.last_at = 0.0
        """As `arrived`, once there is a token."""


class EngineClient:
    """Talks to one engine process. Everything runs on one event loop.

    Args:
        on_tokens: called with the seconds between a token and the one before it, or None for a
            completion's first; for metrics.
    """

    def __init__(self, on_tokens: Callable[[Feed, float | None], None] = lambda feed, gap: None) -> None:
        self._on_tokens = on_tokens
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._keys = itertools.count()
        self._feeds: dict[int, Feed] = {}
        self._report: asyncio.Future[GraphsReport] | None = None
        self._stopping = False
        self._heard = False
        self._watching: asyncio.Task[None] | None = None
        self.stats: Stats | None = None
        self.died: asyncio.Future[str] | None = None
        """Done, with the reason, once the engine is gone without having been told to stop."""

    # --- its life ----------------------------------------------------------------------

    async def start(
        self, options: Mapping[str, Any], log_level: str, log_format: str, silence: float
    ) -> Ready:
        """Start the process and wait until the engine serves.

        Args:
            options: fields of `EngineOptions`.
            log_level, log_format: of the process's log.
            silence: seconds after which an engine that serves and says nothing counts as hung.

        Raises:
            OstinatoError: it could not be built; the message is the engine's own.
        """
        loop = asyncio.get_running_loop()
        self._ready, self.died = loop.create_future(), loop.create_future()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *WORKER, str(theirs.fileno()), pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL
            )
        ours.setblocking(False)
        transport, _ = await loop.create_connection(lambda: _Wire(self), sock=ours)
        self._transport = transport
        beat = min(silence / (2 * _TICKS), _BEAT_SECONDS)
        self._send(Start(dict(options), log_level, log_format, beat))
        ready = await self._ready
        self._watching = asyncio.ensure_future(self._watch(silence))
        return ready

    async def _watch(self, silence: float) -> None:
        """End an engine that hangs.

        Counts ticks instead of seconds: where this process was stopped too, one tick has passed.
        """
        silent = 0
        while silent < _TICKS:
            self._heard = False
            await asyncio.sleep(silence / _TICKS)
            silent = 0 if self._heard else silent + 1
        if not self._stopping and self.dead is None:
            logger.critical("the engine process says nothing, and is killed")
            self.kill()
            self.gone(f"it said nothing for {silence:g} s (--engine-timeout)")

    @property
    def dead(self) -> str | None:
        """Why the engine is gone; None while it is not."""
        return self.died.result() if self.died is not None and self.died.done() else None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def stop(self, seconds: float) -> None:
        """Ask the engine to end, and kill it if it takes longer than that."""
        self._stopping = True
        if self._watching is not None:
            self._watching.cancel()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(TimeoutError):
            self._send(Stop())
            async with asyncio.timeout(seconds):
                await process.wait()
        self.kill()
        try:
            async with asyncio.timeout(_KILL_SECONDS):
                await process.wait()
        except TimeoutError:  # a driver may hold it where no signal arrives
            logger.error("the engine process %d does not end, and is left behind", process.pid)

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    # --- requests ----------------------------------------------------------------------

    def add(
        self,
        feed: Feed,
        prompt: Sequence[int],
        params: dict[str, Any],
        bad_words: Sequence[Sequence[int]],
        grammar: str | None,
    ) -> None:
        """Start one completion; what comes of it goes to `feed`.

        Raises:
            ApiError: the engine is gone.
        """
        if self.dead is not None:
            raise engine_died(self.dead)
        feed.key = next(self._keys)
        self._feeds[feed.key] = feed
        self._send(Add(feed.key, list(prompt), params, [list(w) for w in bad_words], grammar))

    def abort(self, feeds: Iterable[Feed]) -> None:
        """Free what these completions hold in the engine; those that have ended are left alone."""
        keys = [feed.key for feed in feeds if self._feeds.pop(feed.key, None) is not None]
        if keys and self.dead is None:
            self._send(Abort(keys))

    @property
    def num_open(self) -> int:
        """Completions under way."""
        return len(self._feeds)

    def fail_all(self, error: ApiError) -> None:
        """End every open request with an error."""
        feeds = list(self._feeds.values())
        self.abort(feeds)
        for feed in feeds:
            feed.inbox.fail(error)

    async def graphs_report(self) -> str:
        """The engine's `GraphReport` as JSON, made between two steps; who asks meanwhile gets the same.

        Raises:
            ApiError: the engine is gone, or has none.
        """
        if self.dead is not None:
            raise engine_died(self.dead)
        if self._report is None:
            self._report = asyncio.get_running_loop().create_future()
            self._send(ReportGraphs())
        report = await asyncio.shield(self._report)
        if report.error:
            raise ApiError(report.error, 500, kind="server_error")
        return report.json

    # --- the wire ----------------------------------------------------------------------

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(message))

    def receive(self, message: FromEngine) -> None:
        """Take one message of the engine's."""
        self._heard = True
        match message:
            case Step():
                self._take_step(message)
            case Refused(key, text):
                feed = self._feeds.pop(key, None)
                if feed is not None:
                    feed.inbox.fail(ApiError(text))
            case Ready():
                assert self._ready is not None
                self._ready.set_result(message)
            case Failed(text, wrong_option):
                self.gone(text, ConfigError if wrong_option else OstinatoError)
            case Alive():
                pass
            case GraphsReport():
                future, self._report = self._report, None
                if future is not None:
                    future.set_result(message)

    def _take_step(self, step: Step) -> None:
        now = time.monotonic()
        feeds = self._feeds
        for first in step.firsts:
            self._take_first(first, now)
        for key, token in zip(step.keys, step.tokens, strict=True):
            feed = feeds.get(key)
            if feed is None:
                continue  # aborted meanwhile
            feed.tokens.append(token)
            feed.num_tokens += 1
            self._on_tokens(feed, now - feed.last_at if feed.num_tokens > 1 else None)
            feed.last_at = now
            if step.logprobs and (found := step.logprobs.get(key)) is not None:
                feed.logprobs.append(found)
            feed.inbox.put(feed)
        for end in step.ends:
            feed = feeds.pop(end.key, None)
            if feed is not None:
                feed.end = end
        if step.stats is not None:
            self.stats = step.stats

    def _take_first(self, first: First, now: float) -> None:
        feed = self._feeds.get(first.key)
        if feed is not None:
            feed.first_at, feed.admitted = now, first.admitted
            feed.cached_tokens = first.num_cached_tokens
            feed.prompt_logprobs = first.prompt_logprobs

    def gone(self, reason: str, kind: type[OstinatoError] = OstinatoError) -> None:
        """The engine has ended, or says that it will; everybody who waits for it hears of it."""
        assert self._ready is not None
        assert self.died is not None
        if self.died.done() or self._stopping:
            return
        self.died.set_result(reason)
        if not self._ready.done():
            self._ready.set_exception(kind(reason))
        error = engine_died(reason)
        feeds, self._feeds = list(self._feeds.values()), {}
        for feed in feeds:
            feed.inbox.fail(error)
        report, self._report = self._report, None
        if report is not None:
            report.set_exception(error)
            report.exception()  # nobody may be left who waits for it


class _Wire(asyncio.Protocol):
    """Bytes from the engine process, as they come."""

    def __init__(self, client: EngineClient) -> None:
        self._client, self._frames = client, Frames()

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._client.receive(read_from_engine(body))
        except (ValueError, msgspec.MsgspecError) as error:
            logger.exception("the engine process sent something that cannot be read")
            self._client.kill()
            self._client.gone(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        self._client.gone("its process ended")
