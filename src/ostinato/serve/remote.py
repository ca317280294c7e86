"""Reading a running server from the command line."""

from __future__ import annotations

import json
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ..errors import ConfigError, GraphError
from ..graphs.report import GraphReport

_SECONDS = 60.0


def graphs_report(url: str, api_key: str | None) -> GraphReport:
    """The graph report of the server at `url`.

    Raises:
        ConfigError: `url` is none.
        GraphError: no server there, it asks for another key, or what it says is no report.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"--url must be like http://127.0.0.1:8000, got {url!r}")
    address = f"{url.rstrip('/')}/graphs?format=json"
    request = Request(address, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urlopen(request, timeout=_SECONDS) as answer:
            text = answer.read().decode("utf-8")
    except HTTPError as error:
        with error:
            raise GraphError(f"{address}: HTTP {error.code}: {_message(error.read())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"{address} cannot be read: {error}") from error
    return GraphReport.from_json(text)


def _message(body: bytes) -> str:
    """What an error answer says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode("utf-8", "replace")
