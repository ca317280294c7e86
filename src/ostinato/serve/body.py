"""Reading request bodies: their size, their type, and what is wrong with them, field by field."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from ..errors import suggest
from .errors import ApiError

M = TypeVar("M", bound=BaseModel)

_READ_SECONDS = 30.0
"""For a body to arrive."""
_SHORT = 1 << 16
"""Bytes that are parsed on the event loop; longer bodies are parsed on a thread."""
_ALTERNATIVES = 3
"""Most complaints about one field that are shown."""


async def read(request: Request, model: type[M], limit: int) -> M:
    """The body of a request as a model.

    Args:
        request: with JSON in its body.
        model: what the JSON has to be.
        limit: bytes.

    Raises:
        ApiError: 408, 413, 415, or 400 that names the field.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Also keeps other people's pages out: a browser may send anything but JSON without asking first.
        raise ApiError(f"the content type must be application/json, got {kind[:100]!r}", 415)
    data = await _read(request, limit)
    if len(data) <= _SHORT:
        return parse(model, data)
    return await asyncio.to_thread(parse, model, data)


async def _read(request: Request, limit: int) -> bytes:
    too_long = ApiError(f"the body is longer than {limit} bytes", 413, code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(_READ_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise too_long
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {_READ_SECONDS:.0f} s", 408) from None
    except ClientDisconnect:
        raise ApiError("the client went away", 400) from None  # nobody reads this
    return bytes(data)


def parse(model: type[M], data: bytes) -> M:
    """
    Raises:
        ApiError: not JSON, or not such a model; the message names the field.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _explain(model, data, error) from None


def _explain(model: type[BaseModel], data: bytes, error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        reason = _surrogate(data, str(found[0]["ctx"]["error"]))
        return ApiError(f"the body is not valid JSON: {reason}", code="invalid_json")
    values = from_json(data)
    # Of a field that may be several things each is complained of: what lies deepest was meant.
    first = max(found, key=lambda e: len(re.findall(r"[.\[]", _path(e, values))))
    path = _path(first, values)
    if first["type"] == "extra_forbidden":
        known = model.model_fields if len(first["loc"]) == 1 else ()
        hint = suggest(path, known) if known else ""
        hint = hint if "did you mean" in hint else ""
        return ApiError(f"{path}: this field is not supported{hint}", param=path, code="unknown_field")
    about = dict.fromkeys(e["msg"] for e in found if _path(e, values) == path)
    said = ", or: ".join(list(about)[:_ALTERNATIVES])
    return ApiError(f"{path or 'the body'}: {said}", param=path or None, code="invalid_value")


def _surrogate(data: bytes, reason: str) -> str:
    """`reason`, which is about the digits where an escape is only half of a character."""
    if "hex escape" not in reason:
        return reason
    try:
        json.loads(data)  # takes lone surrogates, and no other escape that the models' parser refuses
    except (ValueError, RecursionError):
        return reason
    return f"a lone surrogate in a \\u escape is not a character{reason[reason.find(' at line') :]}"


def _path(error: ErrorDetails, values: Any) -> str:
    """Where in the body an error lies, as `messages[0].content`; the names of types are left out."""
    path, here = "", values
    for part in error["loc"]:
        if isinstance(part, int):
            if isinstance(here, list) and part < len(here):
                path, here = f"{path}[{part}]", here[part]
        elif isinstance(here, dict) and part in here:
            path, here = f"{path}.{part}", here[part]
        elif isinstance(here, dict) and error["type"] == "missing" and part == error["loc"][-1]:
            path = f"{path}.{part}"
    return path.removeprefix(".")
