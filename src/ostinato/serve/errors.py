"""Errors as OpenAI's API writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class ApiError(Exception):
    """An answer that is an error.

    Args:
        message: for people; names the field where one is to blame.
        status: HTTP status.
        param: the field, as a path such as `messages[0].content`.
        kind: `type` of the error object.
        code: `code` of the error object.
        headers: further response headers.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.kind, self.code = message, status, param, kind, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def to_json(self) -> bytes:
        return msgspec.json.encode(self.body())


def engine_died(reason: str) -> ApiError:
    return ApiError(f"the engine died: {reason}", 500, kind="server_error", code="engine_died")


def shutting_down() -> ApiError:
    return ApiError(
        "the server is shutting down",
        503,
        kind="server_error",
        code="shutting_down",
        headers={"Retry-After": "5"},
    )
