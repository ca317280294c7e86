"""schemathesis against the server's own OpenAPI document: whatever is sent, no 5xx, and answers as documented."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import DataObject, booleans, data, just, sampled_from, sets, text

from tests.serve.servers import Server, get, post

schemathesis: Any = pytest.importorskip("schemathesis", reason="fuzzing needs schemathesis")

EXAMPLES = 200
"""Of each endpoint, half of them against the document."""

ENDPOINTS = (
    *(("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize")),
    *(("POST", "/detokenize"), ("GET", "/v1/models"), ("GET", "/v1/models/{name}"), ("GET", "/health")),
    *(("GET", "/version"), ("GET", "/metrics"), ("GET", "/graphs")),
)


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_all_endpoints_are_tried(document: Any) -> None:
    found = {(o.ok().method.upper(), o.ok().path) for o in document.get_all_operations()}
    assert found == set(ENDPOINTS)


def checks() -> list[Any]:
    from schemathesis.specs.openapi import checks

    return [
        schemathesis.checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "abc"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]}),
    ],
)
def test_a_stream_is_as_documented(document: Any, path: str, asked: dict[str, Any]) -> None:
    """Random requests seldom ask for one that succeeds."""
    case = document[path]["POST"].Case(
        body={**asked, "stream": True, "max_tokens": 3}, media_type="application/json"
    )
    answer = case.call(timeout=60)
    assert answer.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(answer, checks=checks())


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_no_request_breaks_the_server(document: Any, method: str, path: str) -> None:
    tried = checks()
    operation = document[path][method]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if method == "POST":
        modes.append(schemathesis.GenerationMode.NEGATIVE)

    @settings(
        max_examples=EXAMPLES // 2 if method == "POST" else 10,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data())
    def try_it(source: DataObject) -> None:
        for mode in modes:
            case = source.draw(operation.as_strategy(generation_mode=mode))
            if isinstance(case.body, dict):
                tame(case.body, source if source.draw(booleans()) else None)
            answer = case.call(timeout=60)
            case.validate_response(answer, checks=tried)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]

    try_it()


NEEDED = ("prompt", "messages", "tokens", "stream", "max_tokens", "max_completion_tokens")


def tame(body: dict[str, Any], source: DataObject | None) -> None:
    """Bound what a valid body costs; with `source` also leave most fields out, so that more bodies are valid."""
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int) and not isinstance(body[name], bool):
            body[name] = min(body[name], 8)
    if "messages" in body and isinstance(body.get("max_tokens", 1), int):
        body.setdefault("max_tokens", 8)
    if source is None:
        return
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    optional = sorted(body.keys() - set(NEEDED))
    for name in set(optional) - source.draw(
        sets(sampled_from(optional), max_size=3) if optional else just(set())
    ):
        del body[name]
    if "messages" in body and source.draw(booleans()):
        body["messages"] = [{"role": "user", "content": source.draw(text())}]


def test_the_document_describes_the_bodies(server: Server) -> None:
    document = json.loads(get(f"{server.url}/openapi.json")[1])
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"][
            "$ref"
        ]
        found = document["components"]["schemas"][reference.rpartition("/")[2]]
        assert found["additionalProperties"] is False
        assert found["properties"]


def test_the_server_is_well_after_all_that(server: Server) -> None:
    server.wait_for("num_requests_running", 0)
    assert post(f"{server.url}/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
    assert server.metric("http_errors_total") > 0
    assert 'status="5' not in get(f"{server.url}/metrics")[1].decode()
