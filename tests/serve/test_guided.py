"""Guided decoding and tool calls: a random model has to follow the grammar, or fails every one of these."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from ostinato.serve.tools import BareCalls, Call, MistralCalls, TaggedCalls, detect
from tests.serve.models import MISTRAL, MISTRAL_SPECIAL, save
from tests.serve.servers import Server, serving

HELLO: Any = [{"role": "user", "content": "Hello there"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "maximum": 9, "minimum": 1},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "time",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def check_person(text: str) -> None:
    person = json.loads(text)
    assert person.keys() == {"name", "age", "likes"}
    assert len(person["name"]) <= 12
    assert 0 <= person["age"] <= 150
    assert set(person["likes"]) <= {"tea", "coffee"}


def schema(name: str, value: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": value, "strict": True}}


def test_json_schema(client: OpenAI, server: Server) -> None:
    """Beside rows without a grammar, and with temperature: each follows its own."""
    waited = server.metric("host_dependency_total")

    def ask(seed: int) -> Any:
        given: dict[str, Any] = {"response_format": schema("person", PERSON)} if seed % 2 else {}
        return client.chat.completions.create(
            model="tiny", messages=HELLO, seed=seed, max_tokens=200, temperature=1.5, **given
        ).choices[0]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(12)))
    for seed, answer in enumerate(answers):
        if seed % 2:
            assert answer.finish_reason == "stop"
            check_person(answer.message.content)
    assert server.metric("host_dependency_total") > waited


def test_json_schema_streamed_and_with_many_completions(client: OpenAI) -> None:
    texts: dict[int, str] = {}
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        n=3,
        seed=1,
        max_tokens=200,
        stream=True,
        response_format=schema("p", PERSON),
    ):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert len(texts) == 3
    for text in texts.values():
        check_person(text)


def test_json_object(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="{", max_tokens=80, temperature=0, logit_bias={"92": 50.0},
        extra_body={"response_format": {"type": "json_object"}},
    ).choices[0]  # fmt: skip
    assert answer.text.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text), dict)
    with pytest.raises(json.JSONDecodeError):
        json.loads(client.completions.create(model="tiny", prompt="{", max_tokens=80).choices[0].text)


def test_structured_outputs(client: OpenAI) -> None:
    def say(**structured: Any) -> str:
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=100, extra_body={"structured_outputs": structured}
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].text

    assert re.fullmatch(r"[a-f]{3}-\d{4}", say(regex=r"[a-f]{3}-\d{4}"))
    assert say(choice=["yes", "no", 'per"haps']) in ("yes", "no", 'per"haps')
    assert say(grammar='start: "a" b\nb: /[0-9]{2}/')[0] == "a"
    check_person(say(json=PERSON))
    check_person(say(json=json.dumps(PERSON)))


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"response_format": schema("x", {"type": "nonsense"})}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"min_tokens": 3}}, "min_tokens"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"extra_body": {"structured_outputs": {"regex": "(("}}}, "structured_outputs.regex"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["a"]}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"grammar": "no grammar"}}}, "structured_outputs.grammar"),
        ({"extra_body": {"structured_outputs": {"json": "[1]"}}}, "structured_outputs.json"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER | {"function": WEATHER["function"] | {"strict": True}}]}, "tools[0].function.strict"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(client: OpenAI, given: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, **given)
    assert caught.value.param == field
    assert field in caught.value.message


# --- tools -----------------------------------------------------------------------------


def check_call(call: Any, name: str) -> None:
    assert call.type == "function"
    assert call.id
    assert call.function.name == name
    arguments = json.loads(call.function.arguments)
    if name == "weather":
        assert arguments["city"] in ("Paris", "Rome")
        assert 1 <= arguments["days"] <= 9


def test_a_required_call_is_made(client: OpenAI) -> None:
    names = set()
    for seed in range(6):
        answer = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[WEATHER, TIME],
            tool_choice="required",
            seed=seed,
            max_tokens=200,  # type: ignore[list-item]
        ).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        assert answer.message.tool_calls is not None
        (call,) = answer.message.tool_calls
        names.add(call.function.name)  # type: ignore[union-attr]
        check_call(call, call.function.name)  # type: ignore[union-attr]
    assert names == {"weather", "time"}


def test_a_named_call_is_made_and_answered(client: OpenAI) -> None:
    given: Any = {
        "model": "tiny", "tools": [WEATHER, TIME], "max_tokens": 200,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    }  # fmt: skip
    calls: dict[int, Any] = {}
    reasons = []
    for chunk in client.chat.completions.create(messages=HELLO, stream=True, **given):
        for call in chunk.choices[0].delta.tool_calls or []:
            calls[call.index] = call
        assert not (chunk.choices[0].delta.content or "").strip()
        reasons.append(chunk.choices[0].finish_reason)
    assert reasons[-1] == "tool_calls"
    check_call(calls[0], "weather")
    made = {
        "id": calls[0].id,
        "type": "function",
        "function": {"name": "weather", "arguments": calls[0].function.arguments},
    }
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 60


def test_tools_that_need_not_be_called(client: OpenAI) -> None:
    told = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], max_tokens=5)  # type: ignore[list-item]
    none = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        tools=[WEATHER],
        tool_choice="none",
        max_tokens=5,  # type: ignore[list-item]
    )
    assert told.usage is not None
    assert none.usage is not None
    assert told.usage.prompt_tokens > none.usage.prompt_tokens + 100
    assert told.choices[0].message.content
    assert told.choices[0].message.tool_calls is None


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("parser", "text", "content", "names"),
    [
        (
            TaggedCalls,
            'Look: <tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>',
            "Look: ",
            ["a"],
        ),
        (
            TaggedCalls,
            '<tool_call>{"name":"a"}</tool_call>\n<tool_call>{"name":"b"}</tool_call>',
            "",
            ["a", "b"],
        ),
        (TaggedCalls, '<tool_call>{"name":"a","arguments":{}}', "", ["a"]),
        (TaggedCalls, "1 <tool <tool_call>no JSON</tool_call>", "1 <tool <tool_call>no JSON</tool_call>", []),
        (TaggedCalls, "a < b <tool", "a < b <tool", []),
        (TaggedCalls, "<tool_call>[1", "<tool_call>[1", []),
        (BareCalls, '{"name": "a", "parameters": {"x": 1}}', "", ["a"]),
        (BareCalls, '<|python_tag|>{"name": "a", "parameters": {}}', "", ["a"]),
        (BareCalls, "plain {text}", "plain {text}", []),
        (BareCalls, '{"just": "JSON"}', '{"just": "JSON"}', []),
        (BareCalls, "", "", []),
        (MistralCalls, '[TOOL_CALLS] [{"name": "a", "arguments": {"x": "}]"}}, {"name": "b", "arguments": {}}]', "", ["a", "b"]),
        (MistralCalls, 'Look: [TOOL_CALLS][{"name":"a","arguments":{}}] \n', "Look: ", ["a"]),
        (MistralCalls, '[TOOL_CALLS]a[ARGS]{"x": {"y": "\\"{"}}[TOOL_CALLS]b.c[ARGS]{}', "", ["a", "b.c"]),
        (MistralCalls, 'So [TOOL_CALLS]a[CALL_ID]x1y2z3a4b[ARGS]{} done', "So done", ["a"]),
        (MistralCalls, '[TOOL_CALLS]a{"x": 1}', "", ["a"]),
        (MistralCalls, '[TOOL_CALLS][{"name":"a","arguments":{}}, ', "", ["a"]),
        (MistralCalls, '[TOOL_CALLS][{"name":"a","arguments":{}}, {"na', '{"na', ["a"]),
        (MistralCalls, '[TOOL_CALLS][{"name": "a", "argu', '[TOOL_CALLS][{"name": "a", "argu', []),
        (MistralCalls, '[TOOL_CALLS][{"name": 1}]', '[TOOL_CALLS][{"name": 1}]', []),
        (MistralCalls, "[TOOL_CALLS]", "[TOOL_CALLS]", []),
        (MistralCalls, "[TOOL_CALLS][1]", "[TOOL_CALLS][1]", []),
        (MistralCalls, "[TOOL_CALLS]I will {not}", "[TOOL_CALLS]I will {not}", []),
        (MistralCalls, "[TOOL_CALLS]a[ARGS]{no JSON}", "[TOOL_CALLS]a[ARGS]{no JSON}", []),
        (MistralCalls, '[TOOL_CALLS][TOOL_CALLS]a[ARGS]{"x":1}', "[TOOL_CALLS]", ["a"]),
        (MistralCalls, "a [TOOL_CALL", "a [TOOL_CALL", []),
        (MistralCalls, "a [b] {c}", "a [b] {c}", []),
    ],
)  # fmt: skip
def test_calls_in_text(parser: Any, text: str, content: str, names: list[str], size: int) -> None:
    found = parser()
    said, calls = "", list[Call]()
    for piece in pieces(text, size):
        more, new = found.push(piece)
        said, calls = said + more, calls + new
    more, new = found.finish()
    assert said + more == content
    assert [call.name for call in calls + new] == names
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls + new)
    if parser is MistralCalls:
        assert all(re.fullmatch("[a-z0-9]{9}", call.id) for call in calls + new)
        assert "[CALL_ID]" not in text or calls[0].id == "x1y2z3a4b"


def test_a_call_is_given_out_when_it_is_complete() -> None:
    parser = MistralCalls()
    first, second = '[TOOL_CALLS][{"name":"a","arguments":{}}', ',{"name":"b","arguments":{}}]'
    assert [call.name for call in parser.push(first)[1]] == ["a"]
    assert [call.name for call in parser.push(second)[1]] == ["b"]


def test_arguments_that_take_long_are_read_once() -> None:
    parser = MistralCalls()
    parser.push("[TOOL_CALLS]write[ARGS]")
    piece = '"' + "x" * 8 + '": {"y": [1, 2]},'
    begin = time.perf_counter()
    parser.push("{")
    for _ in range(20_000):
        assert parser.push(piece) == ("", [])
    assert time.perf_counter() - begin < 5
    assert parser.push('"end": 1}')[1][0].name == "write"


@pytest.fixture(scope="module", params=sorted(MISTRAL))
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("mistral") / "tiny"
    folder.mkdir()
    save(folder, MISTRAL[request.param], MISTRAL_SPECIAL)
    limits = ("--max-num-seqs", "4", "--max-num-batched-tokens", "128")
    with serving(str(folder), *limits, folder=folder.parent) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert server.end() == 0


def test_mistrals_calls(mistral: OpenAI) -> None:
    """Special tokens begin them, which are no text otherwise; and the answer goes back into the template."""
    names = set()
    for seed in range(5):
        given: dict[str, Any] = {"messages": HELLO, "tools": [WEATHER, TIME], "tool_choice": "required"}
        given |= {"model": "tiny", "seed": seed, "max_tokens": 100}
        answer = mistral.chat.completions.create(**given).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        (call,) = answer.message.tool_calls
        check_call(call, call.function.name)
        assert len(call.id) == 9
        names.add(call.function.name)
        streamed = [c.choices[0] for c in mistral.chat.completions.create(**given, stream=True)]
        (delta,) = [call for choice in streamed for call in choice.delta.tool_calls or ()]
        assert (delta.function.name, delta.function.arguments) == (
            call.function.name,
            call.function.arguments,
        )
        assert "".join(choice.delta.content or "" for choice in streamed) == ""
        assert streamed[-1].finish_reason == "tool_calls"
        told = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        again = mistral.chat.completions.create(
            model="tiny", messages=[*HELLO, answer.message, told], tools=[WEATHER, TIME], max_tokens=3
        )
        assert again.usage.completion_tokens > 0
    assert names == {"weather", "time"}


def test_special_tokens_are_text_only_where_calls_are_looked_for(mistral: OpenAI) -> None:
    ids = mistral.post("/../tokenize", body={"prompt": "[TOOL_CALLS][INST]"}, cast_to=object)["tokens"]
    assert len(ids) == 2
    bias: Any = {"logit_bias": {str(token): 100 for token in ids}}
    ask: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "seed": 2, **bias}
    assert mistral.chat.completions.create(**ask).choices[0].message.content == ""
    said = mistral.chat.completions.create(**ask, tools=[TIME]).choices[0].message.content
    assert said
    assert set(said.split("[TOOL_CALLS]")) == {""}


def test_formats_are_known_by_the_template() -> None:
    class Fake:
        def __init__(self, source: str | None) -> None:
            self.tool_template = source

        def encode(self, text: str, special: bool) -> list[int]:
            return [7]

    def name(source: str | None) -> str | None:
        found = detect(Fake(source))  # type: ignore[arg-type]
        return found.name if found else None

    assert name("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert name('{% if tools %}{"name": ..., "parameters": ...}{% endif %}') == "llama"
    assert name("{% if tools %}[TOOL_CALLS]{% endif %}") == "mistral"
    assert name("{% if tools %}[TOOL_CALLS]name[ARGS]{% endif %}") == "mistral-named"
    assert name("{% if tools %}<function>{% endif %}") is None
    assert name("{{ messages }}") is None
    assert name(None) is None
    assert detect(None) is None
