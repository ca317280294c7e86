"""The HTTP application: routes, who may use them, and how errors look."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
from collections.abc import Awaitable
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from . import body as bodies
from .chat import chat, final_message
from .completions import complete
from .errors import ApiError
from .metrics import CONTENT_TYPE
from .protocol import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    VersionResponse,
)
from .service import Service

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

_REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_OPEN_PATHS = ("/health",)
"""Paths that need no key."""
_LONG_LIST = 2000
"""Token ids that are decoded on the event loop; longer lists are decoded on a thread."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": ErrorResponse,
        "description": "The request cannot be served; the message names the field.",
    },
    "5XX": {"model": ErrorResponse, "description": "The engine died, or the request took too long."},
}
_SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def make_app(service: Service) -> FastAPI:
    """The application over a service."""
    app = FastAPI(
        title="ostinato",
        version=__version__,
        docs_url=None,  # they would fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_routes(app, service)
    _add_pages(app, service)

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        service.metrics.refused(error.status)
        return error_response(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = {404: f"there is no {request.url.path}", 405: f"{request.method} is not allowed here"}
        message = text.get(error.status_code, str(error.detail))
        return error_response(ApiError(message, error.status_code, headers=error.headers))

    async def unexpected(_: Request, error: Exception) -> Response:
        service.metrics.refused(500)  # uvicorn logs the traceback
        return error_response(ApiError("internal error; the log says more", 500, kind="server_error"))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
    if service.options.api_keys:
        app.add_middleware(KeyCheck, keys=service.options.api_keys)
    elif not service.options.beyond_loopback:
        app.add_middleware(HostCheck, allowed=service.options.allowed_hosts)
    if service.options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    def read(request: Request, model: type[M]) -> Awaitable[M]:
        return bodies.read(request, model, service.options.max_body_size)

    @app.post("/v1/completions", response_model=CompletionResponse, responses=_ERRORS)
    async def completions(request: Request) -> Response:
        return await complete(service, await read(request, CompletionRequest))

    @app.post("/v1/chat/completions", response_model=ChatResponse, responses=_ERRORS)
    async def chat_completions(request: Request) -> Response:
        return await chat(service, await read(request, ChatRequest))

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        return _json(ModelList(object="list", data=[_card(service, name) for name in service.names]))

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=_ERRORS)
    async def model(name: str) -> Response:
        return _json(_card(service, service.check_model(name)))

    @app.post("/tokenize", response_model=TokenizeResponse, responses=_ERRORS)
    async def tokenize(request: Request) -> Response:
        return await _tokenize(service, await read(request, TokenizeRequest))

    @app.post("/detokenize", response_model=DetokenizeResponse, responses=_ERRORS)
    async def detokenize(request: Request) -> Response:
        body = await read(request, DetokenizeRequest)
        service.check_model(body.model)
        tokenizer = service.need_tokenizer("tokens")
        ids = body.tokens
        service.check_ids(ids, "tokens")
        text = await service.run(lambda: tokenizer.decode(ids, False), len(ids) > _LONG_LIST, "tokens")
        return _json(DetokenizeResponse(prompt=text))

    @app.get("/health", response_model=HealthResponse, responses={503: {"model": HealthResponse}})
    async def health() -> Response:
        if service.engine.dead is not None:
            return _json(HealthResponse(status="engine_died"), 503)
        return (
            _json(HealthResponse(status="shutting_down"), 503)
            if service.draining
            else _json(HealthResponse(status="ok"))
        )

    @app.get("/version", response_model=VersionResponse)
    async def version() -> Response:
        return _json(VersionResponse(version=__version__))

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        service.metrics.stats = service.engine.stats
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _add_pages(app: FastAPI, service: Service) -> None:
    page = resources.files("ostinato.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=_SECURITY_HEADERS)

    @app.get("/graphs", responses=_ERRORS)
    async def graphs(request: Request) -> Response:
        """The graph inspector's report: a page for browsers, JSON for everybody else, or as `format` says."""
        form = request.query_params.get("format")
        if form not in (None, "json", "html"):
            raise ApiError("format: must be json or html", param="format")
        text = await service.engine.graphs_report()
        if form == "json" or (form is None and "text/html" not in request.headers.get("accept", "")):
            return Response(text, media_type="application/json")
        return HTMLResponse(await asyncio.to_thread(_graphs_page, text), headers=_SECURITY_HEADERS)


def _graphs_page(text: str) -> str:
    from ..graphs.report import GraphReport, html

    return html(GraphReport.from_json(text))


async def _tokenize(service: Service, body: TokenizeRequest) -> Response:
    service.check_model(body.model)
    tokenizer = service.need_tokenizer("prompt")
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("prompt: give either prompt or messages", param="prompt")
    if body.prompt is not None:
        for name in ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise ApiError(f"{name}: only with messages", param=name)
        (prompt,) = await service.encode([body.prompt], body.add_special_tokens is not False)
    else:
        if body.add_special_tokens:
            raise ApiError(
                "add_special_tokens: the chat template writes the special tokens", param="add_special_tokens"
            )
        continues, generation_prompt = final_message(body)
        prompt = await service.render(
            body.messages or (),
            body.tools,
            body.chat_template_kwargs or {},
            generation_prompt=generation_prompt,
            continues=continues,
        )
    ids = list(prompt.ids)

    def answer() -> Response:
        strings = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
        longest = service.ready.max_model_len
        return _json(TokenizeResponse(count=len(ids), max_model_len=longest, tokens=ids, token_strs=strings))

    return await service.run(answer, len(ids) > _LONG_LIST, "prompt")


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        object="model",
        created=service.created,
        owned_by="ostinato",
        root=service.ready.model,
        max_model_len=service.ready.max_model_len,
    )


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


class HostCheck:
    """For a server of this machine without a key: refuses names that somebody's DNS may have pointed here.

    A page at such a name would be of the same origin, and could use the server (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self._app, self._allowed = app, frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._known(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "this server answers to localhost and to addresses; start it with --allowed-host for another name",
            403,
            kind="permission_error",
            code="unknown_host",
        )
        await error_response(error)(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        given = next((v for k, v in scope["headers"] if k == b"host"), b"").decode("latin-1").lower()
        name = given[1:].partition("]")[0] if given.startswith("[") else given.partition(":")[0]
        if not name or name == "localhost" or name.endswith(".localhost") or name in self._allowed:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class KeyCheck:
    """Lets requests through that carry a key: `Authorization: Bearer KEY`, or as a password for browsers."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "this server asks for a key: send it as 'Authorization: Bearer KEY'",
            401,
            kind="authentication_error",
            code="invalid_api_key",
            # Browsers ask the user for a password then, and send it with every request of the page.
            headers={"WWW-Authenticate": 'Basic realm="ostinato, any name and the key as password"'},
        )
        await error_response(error)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = _key(next((v for k, v in scope["headers"] if k == b"authorization"), b""))
        digest = _digest(given)
        # All are compared, each in the same time whatever it holds.
        return bool(sum([hmac.compare_digest(digest, known) for known in self._digests]))


def _key(header: bytes) -> bytes:
    """The key in an Authorization header; b"" if there is none."""
    scheme, _, rest = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


_EVENT = {
    "type": "object",
    "description": "Each event of the stream: `data` is a chunk as JSON, or [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
"""Before OpenAPI 3.2 the schema of a stream describes one event."""


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document of the routes, with the bodies that they read by themselves."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    template = "#/components/schemas/{model}"
    _, definitions = models_json_schema(
        [(model, "validation") for model in _REQUESTS.values()], ref_template=template
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= {name: found for name, found in definitions["$defs"].items() if name not in schemas}
    for path, model in _REQUESTS.items():
        reference = {"$ref": template.format(model=model.__name__)}
        operation = document["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = document["paths"][path]["post"]["responses"]["200"]["content"]
        answers["text/event-stream"] = {"schema": _EVENT}
    app.openapi_schema = document
    return document
