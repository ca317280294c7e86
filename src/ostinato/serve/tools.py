"""How models write tool calls, and how they are found in what a model writes.

A model can call tools if its chat template mentions them and one of the formats below.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..tokenizer import Tokenizer
from . import grammar
from .protocol import Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_CALLS, _ARGS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
"""Mistral's, each a special token."""
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Call:
    """One call that a model made."""

    id: str
    name: str
    arguments: str
    """JSON"""


class ToolParser(Protocol):
    """Finds calls in text that arrives bit by bit; one for each completion."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """What of the text so far is content and was not said yet, and calls that are complete."""
        ...

    def finish(self) -> tuple[str, list[Call]]:
        """The same for what was held back; called once, at the end."""
        ...


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls."""

    name: Literal["hermes", "llama", "mistral", "mistral-named"]
    special: Mapping[str, int] = field(default_factory=dict)
    """Special tokens that calls are written with, by their text."""

    def parser(self) -> ToolParser:
        return _PARSERS[self.name]()

    def grammar(self, tools: Sequence[Tool]) -> str:
        """The grammar of one call of one of these tools."""
        if self.name == "mistral-named":
            calls = {t.function.name: t.function.parameters or {"type": "object"} for t in tools}
            return grammar.json_named(self._literal(_CALLS), self._literal(_ARGS), calls)
        arguments = "parameters" if self.name == "llama" else "arguments"
        schemas = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    arguments: tool.function.parameters or {"type": "object"},
                },
                "required": ["name", arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        if self.name == "llama":
            return grammar.json_schema(schema)
        if self.name == "mistral":
            listed = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
            return grammar.json_between(f'{self._literal(_CALLS)} " "?', listed, '""')
        return grammar.json_between(json.dumps(f"{_OPEN}\n"), schema, json.dumps(f"\n{_CLOSE}"))

    def _literal(self, text: str) -> str:
        """A tag in Lark: its token, where it is one."""
        return f"<[{self.special[text]}]>" if text in self.special else json.dumps(text)


def detect(tokenizer: Tokenizer | None) -> ToolFormat | None:
    """The format that a model's chat template teaches; None if it knows no tools, or another format."""
    source = tokenizer.tool_template if tokenizer is not None else None
    if source is None or "tools" not in source:
        return None
    if _CALLS in source:
        assert tokenizer is not None
        found = {tag: tokenizer.encode(tag, False) for tag in (_CALLS, _ARGS, _CALL_ID) if tag in source}
        special = {tag: ids[0] for tag, ids in found.items() if len(ids) == 1}
        return ToolFormat("mistral-named" if _ARGS in source else "mistral", special)
    if _OPEN in source:
        return ToolFormat("hermes")
    return ToolFormat("llama") if '"parameters"' in source else None


class TaggedCalls:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as many as the model likes, in text."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._after = False
        """Nothing but line ends since the last call."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        content = ""
        calls: list[Call] = []
        while True:
            if self._inside:
                body, closed, rest = self._held.partition(_CLOSE)
                if not closed:
                    return content, calls
                call = _call(body, "arguments")
                if call is not None:
                    calls.append(call)
                else:
                    content += _OPEN + body + _CLOSE
                self._held, self._inside, self._after = rest, False, True
                continue
            if self._after:
                self._held = self._held.lstrip("\n")
                self._after = not self._held
            before, opened, rest = self._held.partition(_OPEN)
            if opened:
                content += before.rstrip("\n") if not before.strip() else before
                self._held, self._inside = rest, True
                continue
            keep = _held_length(self._held, _OPEN)
            content += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
            return content, calls

    def finish(self) -> tuple[str, list[Call]]:
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        call = _call(held, "arguments")
        return ("", [call]) if call is not None else (_OPEN + held, [])


class BareCalls:
    """The whole text is `{"name": ..., "parameters": {...}}`, or there is no call in it."""

    def __init__(self) -> None:
        self._held = ""
        self._plain = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        begun = self._held.lstrip()
        if not self._plain and begun and not begun.startswith(("{", _PYTHON_TAG[: len(begun)])):
            self._plain = True
        if not self._plain:
            return "", []
        content, self._held = self._held, ""
        return content, []

    def finish(self) -> tuple[str, list[Call]]:
        held, self._held = self._held, ""
        if self._plain or not held.strip():
            return held, []
        call = _call(held.strip().removeprefix(_PYTHON_TAG), "parameters")
        return ("", [call]) if call is not None else (held, [])


class MistralCalls:
    """Text, then `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` or `[TOOL_CALLS]name[ARGS]{...}` again and again.

    A call is given out as soon as its JSON object is complete.
    """

    def __init__(self) -> None:
        self._held = ""
        self._at = 0
        """How much of `_held` is understood; what comes before is kept in case that it is no call after all."""
        self._next: Callable[[], bool] = self._text
        """Reads on from `_at`; False if that needs more text."""
        self._object = _ObjectEnd()
        self._name = self._id = ""
        self._after = False
        """Nothing but space since the last call."""
        self._content = ""
        self._calls: list[Call] = []

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        while self._next():
            pass
        return self._take()

    def finish(self) -> tuple[str, list[Call]]:
        listing = self._next in (self._list, self._in_list) and not self._held.startswith(_CALLS)
        self._content += self._held[self._at :] if listing else self._held
        self._held = ""
        return self._take()

    def _take(self) -> tuple[str, list[Call]]:
        found = self._content, self._calls
        self._content, self._calls = "", []
        return found

    # --- what may come next ------------------------------------------------------------

    def _text(self) -> bool:
        if self._after:
            self._held = self._held.lstrip(_SPACE)
            self._after = not self._held
        before, opened, _ = self._held.partition(_CALLS)
        keep = 0 if opened else _held_length(self._held, _CALLS)
        said = before[: len(before) - keep]
        self._content += said
        self._held, self._at = self._held[len(said) :], len(_CALLS)
        if opened:
            self._next = self._opened
        return bool(opened)

    def _opened(self) -> bool:
        if not self._skip(_SPACE):
            return False
        if self._held[self._at] == "[":
            self._at += 1
            self._next = self._list
        else:
            self._next = self._named
        return True

    def _list(self) -> bool:
        if not self._skip(_SPACE + ","):
            return False
        if self._held[self._at] == "]":
            self._done(self._at + 1)
            self._next = self._text
            return True
        return self._begin(self._in_list)

    def _in_list(self) -> bool:
        return self._object_then(lambda text: _call(text, "arguments", _short_id()), self._list)

    def _named(self) -> bool:
        end = self._held.find("{", self._at)
        if end < 0:
            return False
        name, _, key = self._held[self._at : end].strip().removesuffix(_ARGS).partition(_CALL_ID)
        self._name, self._id = name.strip(), key.strip()
        if not self._name or len(self._name.split()) > 1:
            return self._no_call()
        self._at = end
        return self._begin(self._arguments)

    def _arguments(self) -> bool:
        def call(text: str) -> Call | None:
            given = _json_object(text)
            return None if given is None else Call(self._id or _short_id(), self._name, _written(given))

        return self._object_then(call, self._text)

    # --- steps of these ----------------------------------------------------------------

    def _skip(self, what: str) -> bool:
        """Go on to the next character that is none of these; False if there is none yet."""
        while self._at < len(self._held) and self._held[self._at] in what:
            self._at += 1
        return self._at < len(self._held)

    def _begin(self, then: Callable[[], bool]) -> bool:
        """An object has to begin here."""
        if self._held[self._at] != "{":
            return self._no_call()
        self._object = _ObjectEnd()
        self._next = then
        return True

    def _object_then(self, make: Callable[[str], Call | None], then: Callable[[], bool]) -> bool:
        end = self._object.find(self._held, self._at)
        if end is None:
            return False
        call = make(self._held[self._at : end])
        if call is None:
            return self._no_call()
        self._calls.append(call)
        self._done(end)
        self._next, self._after = then, True
        return True

    def _done(self, end: int) -> None:
        self._held, self._at = self._held[end:], 0

    def _no_call(self) -> bool:
        """It is text after all, as far as the next tag."""
        end = len(_CALLS) if self._held.startswith(_CALLS) else 0
        self._content += self._held[:end]
        self._done(end)
        self._next = self._text
        return True


class _ObjectEnd:
    """Finds the end of a JSON object in text that grows; looks at each character once."""

    def __init__(self) -> None:
        self._seen = self._depth = 0
        self._quoted = self._escaped = False

    def find(self, text: str, start: int) -> int | None:
        """Where the object that begins at `start` has ended; None: not yet."""
        for at in range(start + self._seen, len(text)):
            char = text[at]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = char == "\\", char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if not self._depth:
                    return at + 1
        self._seen = len(text) - start
        return None


_PARSERS: Mapping[str, Callable[[], ToolParser]] = {
    "hermes": TaggedCalls,
    "llama": BareCalls,
    "mistral": MistralCalls,
    "mistral-named": MistralCalls,
}


def _json_object(text: str) -> Mapping[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, Mapping) else None


def _written(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _short_id() -> str:
    """Mistral's templates take ids of nine letters and digits, and no others."""
    return uuid.uuid4().hex[:9]


def _call(text: str, arguments: str, key: str = "") -> Call | None:
    """A call from its JSON; None if it is none."""
    found = _json_object(text)
    if found is None or not isinstance(found.get("name"), str):
        return None
    given: Any = found.get(arguments, found.get("arguments", {}))
    if not isinstance(given, Mapping):
        return None
    return Call(key or f"call_{uuid.uuid4().hex[:24]}", found["name"], _written(given))


def _held_length(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
