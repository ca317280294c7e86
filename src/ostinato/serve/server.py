"""The life of a server: start the engine, serve, drain, end.

SIGTERM or Ctrl-C: no new requests, open ones may end within the time limit, exit status 0. A second
one ends everything at once. If the engine dies or hangs, every open request is answered with an error,
`/health` says 503 for a moment, and the exit status is 1, so that a supervisor starts anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from ..errors import OstinatoError
from ..models.hub import DEFAULT_MODEL_NAME, resolve
from ..tokenizer import Tokenizer
from . import logs
from .answers import UNREAD_SECONDS
from .app import make_app
from .checker import Checker
from .client import EngineClient
from .errors import shutting_down
from .http import HttpProtocol
from .metrics import Metrics
from .options import KEY_VARIABLE, ServeOptions
from .pauses import spare_what_is_there
from .service import Service
from .tools import detect

logger = logging.getLogger(__name__)

_LAST_SECONDS = 1.0
"""For which a server without an engine still says so."""
_LONGEST_UNREAD = 1e6
"""Seconds"""
_ENGINE_SECONDS = 5.0
"""For the engine to end when asked to."""


def run(options: ServeOptions) -> int:
    """Serve until told to stop; returns the exit status.

    Raises:
        OstinatoError: the server cannot be started.
    """
    logs.set_up(options.log_level, options.log_format)
    spare_what_is_there()
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_Server(options).run())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Server(options).run())


class _Quiet(uvicorn.Server):
    """uvicorn's server, with the signals left to ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server:
    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._stop = asyncio.Event()
        self._engine = EngineClient(self._on_token)
        self._checker = Checker()
        self._metrics: Metrics | None = None

    def _on_token(self, feed: Any, gap: float | None) -> None:
        if self._metrics is not None:
            self._metrics.token(feed, gap)

    def _signal(self, number: int) -> None:
        if self._stop.is_set():
            logger.warning("second %s: ending at once", signal.Signals(number).name)
            self._engine.kill()
            os._exit(128 + number)
        self._stop.set()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal, number)
        with _bound(self._options) as sock:
            starting = asyncio.ensure_future(self._start())
            stopping = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await self._engine.stop(0.0)
                logger.info("stopped before the engine was ready")
                return 0
            try:
                service = starting.result()
                return await self._serve(service, sock)
            finally:
                stopping.cancel()
                await self._checker.close()
                await self._engine.stop(_ENGINE_SECONDS)

    async def _start(self) -> Service:
        """The engine, and beside it the tokenizer."""
        options = self._options
        begin = time.perf_counter()
        path = await asyncio.to_thread(_model_path, options.engine)
        engine = {**options.engine, "model": str(path)} if path is not None else options.engine
        tokenizer_at = await asyncio.to_thread(_tokenizer_path, options.engine, path)
        building = asyncio.ensure_future(
            self._engine.start(engine, options.log_level, options.log_format, options.engine_timeout)
        )
        try:
            tokenizer = (
                await asyncio.to_thread(Tokenizer.load, tokenizer_at) if tokenizer_at is not None else None
            )
            ready = await building
        finally:
            building.cancel()
        seconds = time.perf_counter() - begin
        logger.info("start: engine ready, %.3f s, %d bytes", seconds, sum(ready.memory_bytes.values()))
        names = options.names or (_name(options.engine.get("model")),)
        self._metrics = Metrics(names[0], ready)
        tools = detect(tokenizer)
        return Service(
            options,
            self._engine,
            self._checker,
            ready,
            tokenizer,
            tools,
            names,
            self._metrics,
            int(time.time()),
        )

    async def _serve(self, service: Service, sock: socket.socket) -> int:
        options = self._options
        config = uvicorn.Config(
            make_app(service),
            http=HttpProtocol,
            log_config=None,
            log_level=options.log_level,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=2,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile or "",
            ssl_keyfile_password=options.ssl_keyfile_password,
            ssl_ca_certs=options.ssl_ca_certs,
            ssl_cert_reqs=_client_certificates(options),
        )
        logging.getLogger("uvicorn.error").setLevel("WARNING")
        config.load()
        server = _Quiet(config)
        serving = asyncio.ensure_future(server.serve([sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if not serving.done():
            _announce(service, sock, bool(options.ssl_certfile))
        assert self._engine.died is not None
        stopping = asyncio.ensure_future(self._stop.wait())
        ends: set[asyncio.Future[Any]] = {serving, stopping, self._engine.died}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        service.draining = True
        await self._checker.close()
        if self._engine.dead is not None:
            logger.critical("the engine died: %s", self._engine.dead)
            await asyncio.sleep(_LAST_SECONDS)
        elif self._stop.is_set():
            await self._drain(service)
        stopping.cancel()
        server.should_exit = True
        await serving
        if self._engine.dead is not None:
            return 1
        logger.info("stopped")
        return 0

    async def _drain(self, service: Service) -> None:
        """Let open requests end, within the time limit or until the engine dies."""
        limit = time.monotonic() + self._options.shutdown_timeout
        if service.num_open:
            logger.info(
                "shutting down: %d requests have %g s to end",
                service.num_open,
                self._options.shutdown_timeout,
            )
        while (
            (service.num_open or service.num_preparing)
            and time.monotonic() < limit
            and self._engine.dead is None
        ):
            await asyncio.sleep(0.02)
        if service.num_open:
            logger.warning("shutting down: ended %d requests that were not done", service.num_open)
            self._engine.fail_all(shutting_down())
            await asyncio.sleep(0.1)


@contextlib.contextmanager
def _bound(options: ServeOptions) -> Iterator[socket.socket]:
    """A socket that holds the port, and refuses connections until it is served."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections have these from here: nothing else ends one whose client never reads, or is gone unheard.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            unread = min(options.request_timeout + UNREAD_SECONDS, _LONGEST_UNREAD)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unread * 1000))
        try:
            sock.bind((options.host, options.port))
        except OSError as error:
            raise OstinatoError(
                f"cannot listen on {options.host} port {options.port}: {error.strerror or error}; "
                "choose another with --host and --port"
            ) from error
        yield sock


def _announce(service: Service, sock: socket.socket, tls: bool) -> None:
    options = service.options
    host, port = sock.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    if options.beyond_loopback and not options.api_keys:
        logger.warning(
            "ANYONE WHO REACHES %s PORT %d CAN USE THIS SERVER: it listens beyond this machine without a key. "
            "Use --api-key, $%s, or --host 127.0.0.1",
            *(host, port, KEY_VARIABLE),
        )
    logger.info(
        "serving %s on %s://%s:%d", ", ".join(service.names), "https" if tls else "http", address, port
    )


def _client_certificates(options: ServeOptions) -> int:
    import ssl

    return ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE


def _model_path(engine: dict[str, Any]) -> Path | None:
    """Where the model lies, fetched first where necessary; None for random weights."""
    if engine.get("load_format") == "dummy":
        return None
    return resolve(engine.get("model"), engine.get("revision"))


def _tokenizer_path(engine: dict[str, Any], model: Path | None) -> Path | None:
    if engine.get("tokenizer") is not None:
        return resolve(engine["tokenizer"], engine.get("revision"))
    return None if engine.get("skip_tokenizer_init") else model


def _name(model: str | None) -> str:
    """What to call a model that was named like this."""
    if model is None:
        return DEFAULT_MODEL_NAME
    path = Path(model)
    return path.name if path.exists() else model
