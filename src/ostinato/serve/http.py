"""uvicorn's HTTP protocol, with limits on what comes before a body.

uvicorn keeps whatever a client sends as headers, and waits for ever for a request to begin.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 1 << 16
"""Bytes of a request's line and headers; as much again may come in the read that goes beyond."""
HEAD_SECONDS = 30.0
"""For a request's line and headers to arrive; also until a connection's first one begins."""


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    head_seconds = HEAD_SECONDS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._partial = self._headers = 0
        self._late: asyncio.TimerHandle | None = None
        """Runs while a head is awaited."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._late is not None and not self.transport.is_closing():
            self._partial += len(data)
            if self._partial > MAX_HEAD:
                self.send_400_response(f"The request's line and headers are longer than {MAX_HEAD} bytes.")

    # --- the parser's ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers = 0
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += len(name) + len(value)
        if self._headers > MAX_HEAD:  # those that follow a body in chunks, too
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_came()
        super().on_headers_complete()

    # --- the time limit ----------------------------------------------------------------

    def _expect_head(self) -> None:
        self._partial = 0
        if self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self.transport.close)

    def _head_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
