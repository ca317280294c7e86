"""What `ostinato serve` can be told."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError

KEY_VARIABLE = "OSTINATO_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """Everything but the engine's own options.

    Raises:
        ConfigError: a value that cannot work; the message names the option.
    """

    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of `EngineOptions`."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    names: tuple[str, ...] = ()
    """What requests call the model; empty: what the user called it."""
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 1024
    """Completions that may wait beside those that run."""
    request_timeout: float = 600.0
    """Seconds"""
    engine_timeout: float = 300.0
    """Seconds without a sign of life after which the engine counts as hung. A step and what it captures or
    compiles must fit."""
    shutdown_timeout: float = 30.0
    """Seconds that open requests get to end after SIGTERM."""
    max_body_size: int = 16 << 20
    """Bytes"""
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    """Names beside localhost that requests may be addressed to, where there is no key."""
    log_level: str = "info"
    log_format: str = "text"
    log_requests: bool = False
    """Ids, sizes and times of requests."""
    log_prompts: bool = False
    """The text of requests, too."""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port must be 0 to 65535, got {self.port}")
        if self.max_waiting < 0:
            raise ConfigError(f"--max-waiting must be at least 0, got {self.max_waiting}")
        for name in ("request_timeout", "engine_timeout", "max_body_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if not 0 <= self.shutdown_timeout < math.inf:
            raise ConfigError(f"--shutdown-timeout must be at least 0, got {self.shutdown_timeout}")
        if any(not key or not key.isascii() for key in self.api_keys):
            raise ConfigError("--api-key must not be empty, and plain ASCII: it travels in a header")
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"--{name.replace('_', '-')}: no such file: {path}")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")

    @property
    def beyond_loopback(self) -> bool:
        """Whether other machines can reach the server."""
        return self.host != "localhost" and not self.host.startswith("127.") and self.host != "::1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ostinato serve`, beside those that every command with an engine has."""
    parser.add_argument("served", nargs="?", metavar="MODEL", help="as --model")
    http = parser.add_argument_group("server")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    http.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    http.add_argument(
        *("--served-model-name",), nargs="+", default=[], metavar="NAME",
        help="what requests call the model (default: as it was named here)",
    )  # fmt: skip
    http.add_argument(
        "--api-key", action="append", metavar="KEY",
        help=f"ask for this key; may be repeated (default: ${KEY_VARIABLE}, else none)",
    )  # fmt: skip
    http.add_argument(
        "--max-waiting", type=int, default=1024, help="completions that may wait; 429 beyond (default: 1024)"
    )
    http.add_argument("--request-timeout", type=float, default=600.0, metavar="S", help="default: 600")
    http.add_argument(
        "--engine-timeout", type=float, default=300.0, metavar="S",
        help="seconds after which an engine that says nothing counts as hung; one step must fit (default: 300)",
    )  # fmt: skip
    http.add_argument(
        "--shutdown-timeout", type=float, default=30.0, metavar="S",
        help="seconds for open requests to end after SIGTERM (default: 30)",
    )  # fmt: skip
    http.add_argument("--max-body-size", type=int, default=16 << 20, metavar="BYTES", help="default: 16 MiB")
    http.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="may be repeated (default: none)"
    )
    http.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a name beside localhost, for a server of this machine without a key; may be repeated",
    )  # fmt: skip
    http.add_argument("--ssl-keyfile", metavar="FILE", help="serve TLS")
    http.add_argument("--ssl-certfile", metavar="FILE")
    http.add_argument("--ssl-keyfile-password", metavar="TEXT")
    http.add_argument("--ssl-ca-certs", metavar="FILE", help="ask clients for a certificate of these")
    logs = parser.add_argument_group("logs")
    logs.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    logs.add_argument("--log-format", default="text", choices=("text", "json"))
    logs.add_argument("--log-requests", action="store_true", help="log ids, sizes and times of requests")
    logs.add_argument("--log-prompts", action="store_true", help="log the text of requests, too")
    engine = parser.add_argument_group("engine, further options")
    engine.add_argument("--load-format", default="auto", help="dummy: random weights for a shape name")
    engine.add_argument("--seed", type=int, default=0, help="seeds requests that bring none")
    engine.add_argument("--block-size", type=int, default=16)
    engine.add_argument("--kv-cache-memory-bytes", type=int)
    engine.add_argument("--num-gpu-blocks-override", type=int)
    engine.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    engine.add_argument("--pipeline-depth", type=int)
    engine.add_argument("--compilation-config", type=_json_object, default={}, metavar="JSON")
    engine.add_argument("--cudagraph-capture", default="lazy", choices=("lazy", "startup", "profile"))
    engine.add_argument("--cudagraph-verify-every", type=int, default=0)
    engine.add_argument("--fail-on-fallback", action="store_true")
    engine.add_argument("--fail-on-mismatch", action="store_true")
    engine.add_argument("--strict", action="store_true", help="check the graph contract at every step (CPU)")


_ENGINE = (
    *("load_format", "seed", "block_size", "kv_cache_memory_bytes", "num_gpu_blocks_override"),
    *("enable_prefix_caching", "pipeline_depth", "compilation_config", "cudagraph_capture"),
    *("cudagraph_verify_every", "fail_on_fallback", "fail_on_mismatch", "strict"),
)


def named_model(place: str | None, option: str | None) -> str | None:
    """The model that MODEL or --model names; None: neither.

    Raises:
        ConfigError: they name two.
    """
    if place is not None and option is not None and place != option:
        raise ConfigError(f"MODEL {place!r} and --model {option!r} are two models: name one")
    return option if place is None else place


def from_arguments(args: argparse.Namespace, engine: Sequence[str]) -> ServeOptions:
    """Options from parsed arguments.

    Args:
        args: of a parser with `add_arguments`.
        engine: the names of the engine options that every command has.

    Raises:
        ConfigError: a value that cannot work.
    """
    model = named_model(args.served, args.model)
    keys = args.api_key
    if keys is None:
        keys = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
    return ServeOptions(
        engine={"model": model} | {name: getattr(args, name) for name in (*engine, *_ENGINE)},
        host=args.host,
        port=args.port,
        names=tuple(args.served_model_name),
        api_keys=tuple(keys),
        max_waiting=args.max_waiting,
        request_timeout=args.request_timeout,
        engine_timeout=args.engine_timeout,
        shutdown_timeout=args.shutdown_timeout,
        max_body_size=args.max_body_size,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=tuple(args.allowed_host),
        log_level="debug" if args.verbose else args.log_level,
        log_format=args.log_format,
        log_requests=args.log_requests or args.log_prompts,
        log_prompts=args.log_prompts,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile_password=args.ssl_keyfile_password,
        ssl_ca_certs=args.ssl_ca_certs,
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
