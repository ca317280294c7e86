"""Sending what a generation brings: at once when it has ended, or as server-sent events.

Both free everything when the client goes away: whoever waits for the next token also watches the
connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import msgspec
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .generation import Delta, Generation
from .service import Service

logger = logging.getLogger(__name__)

UNREAD_SECONDS = 10.0
"""For the client to read what is left once the request's time is over; then the connection is closed."""
_DONE = b"data: [DONE]\n\n"
_LINE_ENDS = tuple((char.encode(), b"\\u%04x" % ord(char)) for char in "\x85\u2028\u2029")
"""Of text, not of events: clients that cut lines by Unicode's rules would tear an event at them."""
_encode = msgspec.json.Encoder().encode


class Format(Protocol):
    """How one endpoint writes a generation."""

    def chunk(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Chunks of something new."""
        ...

    def usage_chunk(self) -> dict[str, Any] | None:
        """The last chunk, where it was asked for."""
        ...

    def keep(self, delta: Delta) -> None:
        """Remember something new, for `whole`."""
        ...

    def whole(self) -> BaseModel:
        """The answer to who does not stream."""
        ...


class Answer(Response):
    """The response of a generation; an error of it becomes an error answer, or an event."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, generation: Generation, form: Format, stream: bool) -> None:
        self._service, self._generation, self._form, self._stream = service, generation, form, stream
        self.status_code, self.background = 200, None
        service.num_open += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future((self._events if self._stream else self._at_once)(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            limit = self._service.options.request_timeout + UNREAD_SECONDS
            await asyncio.wait({work, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work
            self._generation.close()
            self._service.num_open -= 1

    async def _at_once(self, send: Send) -> None:
        try:
            async for deltas in self._generation.deltas():
                for delta in deltas:
                    self._form.keep(delta)
            body = await asyncio.to_thread(self._whole) if self._generation.is_large else self._whole()
            status, headers = 200, [(b"content-type", b"application/json")]
        except ApiError as error:
            self._generation.close("error")
            self._service.metrics.refused(error.status)
            body, status = error.to_json(), error.status
            headers = [(b"content-type", b"application/json")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _whole(self) -> bytes:
        return self._form.whole().model_dump_json(exclude_unset=True).encode()

    async def _events(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._event_bytes():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _event_bytes(self) -> AsyncIterator[bytes]:
        """All that has arrived goes out in one piece: a reader that lags gets fewer, longer ones."""
        form = self._form
        try:
            async for deltas in self._generation.deltas():
                yield b"".join(_event(chunk) for delta in deltas for chunk in form.chunk(delta))
        except ApiError as error:
            self._generation.close("error")
            self._service.metrics.refused(error.status)
            yield _event(error.body()) + _DONE
            return
        usage = form.usage_chunk()
        yield (_event(usage) if usage is not None else b"") + _DONE


def _event(chunk: dict[str, Any]) -> bytes:
    data = _encode(chunk)
    if not data.isascii():
        for char, written in _LINE_ENDS:
            data = data.replace(char, written)
    return b"data: " + data + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
