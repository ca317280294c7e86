"""Bad input, generated from the models of the bodies: each gets 4xx with a message that names the field."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ostinato.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.serve.servers import Server, get

MESSAGES = [{"role": "user", "content": "Hello"}]
GOOD: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "a", "max_tokens": 2}),
    "/v1/chat/completions": (ChatRequest, {"messages": MESSAGES, "max_tokens": 2}),
    "/tokenize": (TokenizeRequest, {"prompt": "a"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}
TYPES: list[Any] = [None, True, 1.5, 7, "x", [], ["x"], [[]], {}, {"x": {"y": 1}}]
"""One value of each type that JSON has, and a few nested ones."""


def names(field: FieldInfo) -> str:
    """What a field's annotation allows, roughly: text to look into."""
    return str(field.annotation)


def wrong_types(field: FieldInfo) -> Iterator[Any]:
    """Values of types that the field is not."""
    text = names(field)
    for value in (True, 1.5, "x", ["x"], {"x": {"y": 1}}):
        if isinstance(value, bool) and "bool" in text:
            continue
        if isinstance(value, float) and "float" in text:
            continue
        if isinstance(value, str) and ("str" in text or "Literal" in text):
            continue
        if isinstance(value, list) and ("list[str" in text or "List[str" in text or "StopText" in text):
            continue
        if isinstance(value, list) and "list" in text and "str" in text:
            continue
        if isinstance(value, dict) and ("dict[str, typing.Any]" in text or "Dict" in text):
            continue
        yield value


def bounds(field: FieldInfo) -> Iterator[Any]:
    """Numbers and lengths just outside what the annotation says."""
    for base, found in _constraints(field):
        match found:
            case Ge(ge):
                yield ge - 1
            case Gt(gt):
                yield gt
            case Le(le):
                yield math.nextafter(float(le), math.inf) if isinstance(le, float) else le + 1
            case Lt(lt):
                yield lt
            case MinLen():
                yield [] if base is list else ""
            case MaxLen(most) if base is dict:
                yield {str(n): 1.0 for n in range(most + 1)}
            case MaxLen(most) if base is list and most < 100:
                yield ["a" if "str" in names(field) else 1] * (most + 1)
            case MaxLen(most) if base is str:
                yield "a" * (most + 1)


def _constraints(field: FieldInfo) -> Iterator[tuple[Any, Any]]:
    """(type, constraint) pairs in a field's annotation; not those of a list's items."""
    for part in (field.annotation, *get_args(field.annotation)):
        own = getattr(part, "__metadata__", field.metadata if part is field.annotation else ())
        base = get_args(part)[0] if hasattr(part, "__metadata__") else part
        for entry in own:
            for found in getattr(entry, "metadata", ()) or (entry,):
                yield get_origin(base) or base, found


def cases() -> Iterator[tuple[str, str, str, Any]]:
    for path, (model, _) in GOOD.items():
        for name, field in model.model_fields.items():
            for value in (*wrong_types(field), *bounds(field)):
                yield path, name, json.dumps(value), name
            if "float" in names(field) or "int" in names(field):
                for literal in ("NaN", "Infinity", "-Infinity", "1e400", "-" + "9" * 40):
                    yield path, name, literal, name
        yield path, "best_of", "2", "best_of"
        yield path, "no_such_field", "null", "no_such_field"
        yield path, "model", '"gpt-4"', "model"


TABLE = list(dict.fromkeys((p, n, v) for p, n, v, _ in cases()))


def send(
    server: Server, path: str, data: bytes, kind: str = "application/json"
) -> tuple[int, dict[str, Any]]:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request("POST", path, data, {"content-type": kind})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def body_with(path: str, name: str, literal: str) -> bytes:
    """The good body of a path with one field replaced by JSON text, valid or not."""
    good = {k: v for k, v in GOOD[path][1].items() if k != name}
    if name == "messages" and path == "/tokenize":
        good = {}
    fields = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in good.items()]
    return ("{" + ", ".join([*fields, f"{json.dumps(name)}: {literal}"]) + "}").encode()


def test_the_table_covers_every_field() -> None:
    for path, (model, _) in GOOD.items():
        for name in model.model_fields:
            assert sum((p, n) == (path, name) for p, n, _ in TABLE) >= 2, (path, name)
    assert len(TABLE) > 500


@pytest.mark.parametrize("path", list(GOOD))
def test_every_field_is_refused_by_name(server: Server, path: str) -> None:
    for where, name, literal in TABLE:
        if where != path:
            continue
        shown = literal[:60]
        status, answer = send(server, path, body_with(path, name, literal))
        assert 400 <= status < 500, (name, shown, status, answer)
        error = answer["error"]
        assert name in error["message"], (name, shown, error)
        assert error["param"].partition(".")[0].partition("[")[0] == name, (name, shown, error)
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", list(GOOD))
def test_null_is_as_if_a_field_were_not_there(server: Server, path: str) -> None:
    model, good = GOOD[path]
    optional = {name: None for name, field in model.model_fields.items() if not field.is_required()}
    status, answer = send(server, path, json.dumps(optional | good).encode())
    assert status == 200, answer


BODIES: list[tuple[bytes, str]] = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"nonsense", "JSON"),
    (b"\xff\xfe{}", "JSON"),
    (b'{"prompt": "\xff"}', "JSON"),
    (b'{"prompt": "\\ud800"}', "JSON: a lone surrogate in a \\u escape is not a character at line 1"),
    (b'{"prompt": "\\ud800\\u0041"}', "JSON: a lone surrogate"),
    (b'{"prompt": "\\udc00"}', "JSON: a lone surrogate"),
    (b'{"prompt": "\\ud8"}', "JSON: invalid escape"),
    (b'{"prompt": 5}', "prompt: Input should be a string, a list of strings, a list of token ids or"),
    (b'{"prompt": null}', "prompt: Input should be a string, a list of strings, a list of token ids or"),
    (b"[]", "the body"),
    (b"null", "the body"),
    (b'"text"', "the body"),
    (b"{}", "prompt"),
    (b'{"prompt": ""}', "prompt"),
    (b'{"prompt": []}', "prompt"),
    (b'{"prompt": [[]]}', "prompt"),
    (b'{"prompt": ["a", 1]}', "prompt[1]"),
    (b'{"prompt": [1, "a"]}', "prompt[1]"),
    (b'{"prompt": [1, -1]}', "prompt[1]"),
    (b'{"prompt": [1, 5000]}', "prompt[1]"),
    (b'{"prompt": [1, 99999999999999999999]}', "prompt[1]"),
    (b'{"prompt": [[1], [2, 5000]]}', "prompt[1][1]"),
    (b'{"prompt": "a", "max_tokens": 4096}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": 3, "min_tokens": 4}', "min_tokens"),
    (b'{"prompt": "a", "stop": [""]}', "stop"),
    (b'{"prompt": "a", "stop": ["a", 1]}', "stop"),
    (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    (b'{"prompt": "a", "logit_bias": {"-1": 1}}', "logit_bias"),
    (b'{"prompt": "a", "logit_bias": {"99999": 1}}', "logit_bias"),
    (b'{"prompt": "a", "logit_bias": {"1": 1, "01": 2}}', "logit_bias"),
    (b'{"prompt": "a", "stop_token_ids": [99999]}', "stop_token_ids[0]"),
    (b'{"prompt": "a", "allowed_token_ids": [99999]}', "allowed_token_ids[0]"),
    (b'{"prompt": "a", "allowed_token_ids": [262], "min_tokens": 1, "stream": true}', "allowed_token_ids"),
    (b'{"prompt": "a", "stop_token_ids": %s, "stream": true}' % str([*range(64)]).encode(), "stop_token_ids"),
    (b'{"prompt": "a", "allowed_token_ids": [0%s]}' % (b",0" * 263), "allowed_token_ids"),
    (b'{"prompt": "a", "allowed_token_ids": [66], "bad_words": ["c"]}', "bad_words"),
    (b'{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options"),
    (b'{"prompt": "a", "stream": true, "stream_options": {"x": true}}', "stream_options.x"),
    (b'{"prompt": [1], "add_special_tokens": true}', "add_special_tokens"),
    (b'{"prompt": "a", "n": 5000}', "n"),
    (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "JSON"),
    (b'{"prompt": "a", "x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "JSON"),
]


@pytest.mark.parametrize(("data", "named"), BODIES, ids=lambda v: repr(v)[:40])
def test_bodies_of_completions(server: Server, data: bytes, named: str) -> None:
    status, answer = send(server, "/v1/completions", data)
    assert 400 <= status < 500, answer
    assert named in answer["error"]["message"], answer


@pytest.mark.parametrize("tokens", [[99999999], [1, 5000], [0] * 3000 + [5000]], ids=len)
def test_tokens_outside_the_vocabulary_are_no_text(server: Server, tokens: list[int]) -> None:
    status, answer = send(server, "/detokenize", json.dumps({"tokens": tokens}).encode())
    assert status == 400, answer
    where = f"tokens[{len(tokens) - 1}]"
    assert answer["error"]["param"] == where
    assert answer["error"]["message"].startswith(f"{where}: token id {tokens[-1]} is out of range")
    assert send(server, "/detokenize", b'{"tokens": []}')[0] == 200


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


USER = {"role": "user", "content": "a"}
CHATS: list[tuple[Any, str]] = [
    ([], "messages"),
    ("hello", "messages"),
    ([USER, "hello"], "messages[1]"),
    ([{}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "wizard", "content": "a"}], "messages[0].role"),
    ([{"role": 5, "content": "a"}], "messages[0].role"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages[0].content[0]",
    ),
    ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": "a", "colour": "red"}], "messages[0].colour"),
    ([{"role": "user", "content": "a", "tool_calls": [call("{}")]}], "messages[0].tool_calls"),
    ([{"role": "tool", "content": "a"}], "messages[0].tool_call_id"),
    ([{"role": "tool", "content": "a", "tool_call_id": "1"}], "messages[0].role"),
    ([USER, {"role": "user", "content": "a", "tool_call_id": "1"}], "messages[1].tool_call_id"),
    ([USER, {"role": "assistant", "tool_calls": []}], "messages[1].tool_calls"),
    (
        [USER, {"role": "assistant", "tool_calls": [call("no")]}],
        "messages[1].tool_calls[0].function.arguments",
    ),
    (
        [USER, {"role": "assistant", "tool_calls": [call("[1]")]}],
        "messages[1].tool_calls[0].function.arguments",
    ),
    (
        [USER, {"role": "assistant", "tool_calls": [call({"a": 1})]}],
        "messages[1].tool_calls[0].function.arguments",
    ),
    ([{"role": "assistant", "content": "I speak first"}, USER], "messages"),
    ([{"role": "user", "content": "\ud800"}], "JSON"),
]


@pytest.mark.parametrize(("messages", "named"), CHATS, ids=lambda v: repr(v)[:40])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_messages(server: Server, path: str, messages: Any, named: str) -> None:
    status, answer = send(server, path, json.dumps({"messages": messages}).encode())
    assert 400 <= status < 500, answer
    assert named in answer["error"]["message"], answer


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"temperatur": 1}, "did you mean 'temperature'"),
    ],
)
def test_fields_of_chats(server: Server, extra: dict[str, Any], named: str) -> None:
    status, answer = send(server, "/v1/chat/completions", json.dumps({"messages": MESSAGES} | extra).encode())
    assert status == 400, answer
    assert named in answer["error"]["message"], answer


def test_a_chat_that_is_too_long_can_be_tokenised_and_not_be_answered(server: Server) -> None:
    data = json.dumps({"messages": [{"role": "user", "content": "word " * 5000}]}).encode()
    status, answer = send(server, "/v1/chat/completions", data)
    assert status == 400
    assert "max_model_len=4096" in answer["error"]["message"]
    status, answer = send(server, "/tokenize", data)
    assert status == 200
    assert answer["count"] > answer["max_model_len"] == 4096


def test_other_methods_and_paths(server: Server) -> None:
    for path, status in (
        ("/v1/completions", 405),
        ("/v1/nothing", 404),
        ("/v1/models/x/y", 404),
        ("/docs", 404),
    ):
        found, data, _ = get(server.url + path)
        assert found == status
        assert json.loads(data)["error"]["type"] == "invalid_request_error"
    assert json.loads(get(f"{server.url}/graphs?format=xml")[1])["error"]["param"] == "format"
