"""How models write tool calls, and how they are found in what a model writes.

A model can call tools if its chat template mentions them and one of the formats below.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..tokenizer import Tokenizer
from . import grammar
from .protocol import Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"


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

    name: Literal["hermes", "llama"]

    def parser(self) -> ToolParser:
        return TaggedCalls() if self.name == "hermes" else BareCalls()

    def grammar(self, tools: Sequence[Tool]) -> str:
        """The grammar of one call of one of these tools."""
        arguments = "arguments" if self.name == "hermes" else "parameters"
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
        return grammar.json_between(f"{_OPEN}\n", schema, f"\n{_CLOSE}")


def detect(tokenizer: Tokenizer | None) -> ToolFormat | None:
    """The format that a model's chat template teaches; None if it knows no tools, or another format."""
    source = tokenizer.tool_template if tokenizer is not None else None
    if source is None or "tools" not in source:
        return None
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


def _call(text: str, arguments: str) -> Call | None:
    """A call from its JSON; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        return None
    given: Any = found.get(arguments, found.get("arguments", {}))
    if not isinstance(given, Mapping):
        return None
    return Call(f"call_{uuid.uuid4().hex[:24]}", found["name"], json.dumps(given, ensure_ascii=False))


def _held_length(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
