"""Grammars for guided decoding, by llguidance: from what a request asks for to masks over the vocabulary.

The HTTP process makes and checks grammar texts (`json_schema`, `check`); the engine process
compiles them (`Compiler`) and walks them with the tokens that were sampled (`Walk`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLTokenizer

from ..errors import RequestError

if TYPE_CHECKING:
    from ..engine import Engine
    from ..tokenizer import Tokenizer

JSON_OBJECT: dict[str, Any] = {"type": "object"}
"""The schema of `response_format={"type": "json_object"}`."""

_JSON_OPTIONS: dict[str, Any] = {"whitespace_flexible": False}
"""One way to write each value: a weak model would otherwise write spaces for ever."""


def json_schema(schema: dict[str, Any]) -> str:
    """The grammar of the JSON texts that a schema allows."""
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS))  # type: ignore[arg-type]


def json_text(schema: dict[str, Any] | str) -> str:
    """The same for a schema that may be written out.

    Raises:
        ValueError: it is not a JSON object.
    """
    found = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(found, dict):
        raise ValueError("a schema must be a JSON object")
    return json_schema(found)


def regex(pattern: str) -> str:
    """The grammar of texts that a regular expression matches whole."""
    return str(LLMatcher.grammar_from_regex(pattern))


def choice(options: Sequence[str]) -> str:
    """The grammar of a few texts."""
    return str(LLMatcher.grammar_from_lark(f"start: {' | '.join(json.dumps(o) for o in options)}"))


def lark(text: str) -> str:
    """A grammar in llguidance's dialect of Lark."""
    return str(LLMatcher.grammar_from_lark(text))


def json_between(before: str, schema: dict[str, Any], after: str) -> str:
    """The grammar of a JSON text between two others, which are in Lark."""
    return lark(f"start: {before} value {after}\nvalue: {_json_rule(schema)}")


def json_named(before: str, between: str, schemas: Mapping[str, dict[str, Any]]) -> str:
    """The grammar of one of these names and a JSON text of its schema; `before` and `between` are in Lark."""
    rules = [f"start: {before} ({' | '.join(f'call{n}' for n in range(len(schemas)))})"]
    for n, (name, schema) in enumerate(schemas.items()):
        rules += [f"call{n}: {json.dumps(name)} {between} json{n}", f"json{n}: {_json_rule(schema)}"]
    return lark("\n".join(rules))


def _json_rule(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': _JSON_OPTIONS})}"


def check(grammar: str) -> str | None:
    """Why a grammar cannot be used; None if it can. Takes as long as compiling: not for an event loop."""
    return str(LLMatcher.validate_grammar(grammar)) or None


class Compiler:
    """Compiles grammars for one engine's vocabulary."""

    def __init__(self, engine: Engine) -> None:
        if engine.tokenizer is None:
            raise RequestError("this model has no tokenizer, which response_format and tool calls need")
        self._tokenizer: Tokenizer = engine.tokenizer
        self._vocab_size = engine.spec.vocab_size
        self._eos = sorted(engine.eos_token_ids)
        self._made: LLTokenizer | None = None

    def compile(self, grammar: str) -> Walk:
        """
        Raises:
            RequestError: it cannot be compiled.
        """
        if self._made is None:
            size = max(self._vocab_size, self._tokenizer.vocab_size)
            self._made = LLTokenizer(self._tokenizer.to_json(), n_vocab=size, eos_token=self._eos or None)
        matcher = LLMatcher(self._made, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(str(matcher.get_error()))
        return Walk(matcher)


class Walk:
    """`TokenGrammar`: one request's way through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill(self, words: Any) -> None:
        mask = self._matcher.compute_bitmask()
        size = min(len(mask), words.nbytes)
        words[:] = 0
        words.view("uint8")[:size] = memoryview(mask)[:size]

    def accept(self, token_id: int) -> bool:
        return bool(self._matcher.consume_token(token_id))
