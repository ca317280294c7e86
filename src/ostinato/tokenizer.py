"""Text to token ids and back: encoding, incremental decoding, stop strings, chat templates.

Encoding is the `tokenizers` library's, from a folder's tokenizer.json or rebuilt from GGUF
metadata. Decoding goes through bytes where the vocabulary allows it (byte-level BPE, and
SentencePiece with byte fallback): each token stands for some bytes, the text is their UTF-8.
That makes a stream of tokens cheap to decode and equal to decoding all of them at once.
Other decoders are decoded a few tokens at a time.

Knows nothing of models, requests or devices; imports neither torch nor transformers.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from .errors import OstinatoError, RequestError, TokenizerError
from .types import SamplingParams, TextSink

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["GGUF_PRE_TOKENIZERS", "Tokenizer"]

_LONG = 2000
"""Characters whose encoding other threads should not have to wait for."""

Message = Mapping[str, Any]
"""One chat message: `role`, `content`, and whatever else the model's template reads."""


class Tokenizer:
    """A model's tokenizer. Immutable, and safe to share between threads.

    Build one with `load` (a folder or .gguf file), `from_folder` or `from_gguf`.
    """

    def __init__(
        self,
        library: RustTokenizer,
        *,
        source: str,
        special: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            library: the tokenizer proper.
            source: where it comes from, for messages.
            special: special tokens' text by role: "bos_token", "eos_token", "pad_token", ...
            eos_token_ids: further end-of-sequence ids, beside that of "eos_token".
            add_bos, add_eos: whether `encode` adds them; None leaves it to the library's post-processor.
            chat_templates: Jinja source by name; "default" is the usual one.
        """
        self._library = library
        self._source = source
        self._special = dict(special or {})
        self._templates = dict(chat_templates or {})
        self._compiled: dict[str, Template] = {}
        self.bos_token_id = self._role_id("bos_token")
        eos = self._role_id("eos_token")
        self.eos_token_ids: frozenset[int] = frozenset(eos_token_ids) | ({eos} if eos is not None else set())
        """Ids that end a sequence."""
        self.vocab_size: int = library.get_vocab_size(with_added_tokens=True)
        """Tokens, added ones included. A model's embedding may be padded beyond it."""
        added = library.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._to_bytes, self._strip = _byte_rule(library)
        self._pieces: dict[int, bytes] = {}
        self._passing = lru_cache(maxsize=32)(lambda stops, skip: _Passing(self._piece, skip, stops))
        self._head, self._tail = _ends(library)
        if add_bos is not None:
            self._head = [self._need("add_bos_token", self.bos_token_id)] if add_bos else []
        if add_eos is not None:
            self._tail = [self._need("add_eos_token", eos)] if add_eos else []

    # --- building ---

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """From a folder with tokenizer.json, or from a .gguf file.

        Raises:
            TokenizerError: there is no usable tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_folder(path)
        from .models.gguf import read_header

        return cls.from_gguf(read_header(path).metadata, str(path))

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """From tokenizer.json and the settings beside it (tokenizer_config.json, chat_template.jinja, ...).

        Raises:
            TokenizerError: a file is missing or cannot be used; the message names it and the fix.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(_no_tokenizer_json(path))
        try:
            library = RustTokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise TokenizerError(f"{file} cannot be used: {error}") from error
        # Padding and truncation saved with a tokenizer must not reach into prompts.
        library.no_padding()
        library.no_truncation()
        config = _json(path / "tokenizer_config.json")
        special = _special_texts(_json(path / "special_tokens_map.json")) | _special_texts(config)
        eos = _json(path / "generation_config.json").get("eos_token_id")
        return cls(
            library,
            source=str(path),
            special=special,
            eos_token_ids=[i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)],
            add_bos=_flag(config, "add_bos_token"),
            add_eos=_flag(config, "add_eos_token"),
            chat_templates=_folder_templates(path, config),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF metadata") -> Tokenizer:
        """From the `tokenizer.*` keys of a GGUF file.

        Raises:
            TokenizerError: the vocabulary is missing, contradicts itself, or is of an unknown kind.
        """
        return _from_gguf(metadata, source)

    def _role_id(self, role: str) -> int | None:
        text = self._special.get(role)
        return None if text is None else self._library.token_to_id(text)

    def _need(self, setting: str, token_id: int | None) -> int:
        if token_id is None:
            raise TokenizerError(f"{self._source}: {setting} is set, but the vocabulary has no such token")
        return token_id

    # --- text to ids ---

    def encode(self, text: str, add_special_tokens: bool = True, *, name: str = "the prompt") -> list[int]:
        """Token ids of `text`. Special tokens written out in it become their ids.

        Args:
            text: any Unicode text without lone surrogates.
            add_special_tokens: add what the model expects around a text, such as BOS. Leave it
                out for a rendered chat, whose template has written them already.
            name: what to call the text in messages.

        Raises:
            RequestError: `text` is not valid text.
        """
        if not isinstance(text, str):
            raise RequestError(f"{name} must be text, got {type(text).__name__}")
        try:
            text.encode()  # the library's own error does not say what is wrong with a surrogate
            if len(text) < _LONG:
                found = self._library.encode(text, add_special_tokens=False)
            else:  # of the library's ways the one that lets go of the interpreter lock
                (found,) = self._library.encode_batch_fast([text], add_special_tokens=False)
            ids: list[int] = found.ids
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} contains a lone surrogate (U+D800..U+DFFF) at position {error.start}: it is not text"
            ) from error
        except Exception as error:  # the Rust library raises bare Exception
            raise RequestError(f"{name} cannot be encoded: {error}") from error
        return [*self._head, *ids, *self._tail] if add_special_tokens else ids

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a rendered chat: `apply_chat_template`, encoded without a second BOS."""
        return self.encode(
            self.apply_chat_template(messages, tools=tools, **kwargs), add_special_tokens=False
        )

    def bad_word_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences of each bad word, at the start of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for spelling in (word, " " + word.lstrip()):
                ids = tuple(self.encode(spelling, False, name=f"bad_words: {word!r}"))
                if ids:
                    found[ids] = None
        return tuple(found)

    # --- ids to text ---

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary, nothing."""
        if self._to_bytes is None:
            known = [i for i in ids if 0 <= i < self.vocab_size]
            return str(self._library.decode(known, skip_special_tokens=skip_special_tokens))
        data = b"".join([self._piece(i) for i in ids if not (skip_special_tokens and i in self._special_ids)])
        if self._strip and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """One token by itself, special or not, as shown beside its logprob; part of a character is U+FFFD."""
        if self._to_bytes is not None:
            return self._piece(token_id).decode("utf-8", "replace")
        return str(self._library.decode([token_id], skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, special or not; as far as its text where tokens have none."""
        return self._piece(token_id) if self._to_bytes is not None else self.token_text(token_id).encode()

    def to_json(self) -> str:
        """tokenizer.json, as the `tokenizers` library writes it."""
        return str(self._library.to_str())

    def stream(
        self, params: SamplingParams, prompt_ids: Sequence[int] = (), shown: Collection[int] = ()
    ) -> TextSink:
        """A sink that turns the output tokens of one request into text.

        Args:
            params: `skip_special_tokens`, `stop`, `include_stop_str_in_output`, `min_tokens`
                (no stop string ends within that many tokens).
            prompt_ids: what the tokens continue. After text, a SentencePiece vocabulary keeps
                the space before the first word.
            shown: special tokens that are not skipped. With a decoder that looks at neighbours none is then.
        """
        feed: _Bytes | _Window
        stops = params.stop_strings
        passes: Mapping[int, bool] = defaultdict(bool)  # none
        if self._to_bytes is None:
            feed = _Window(self, params.skip_special_tokens and not shown, prompt_ids)
        else:
            skip = self._special_ids.difference(shown) if params.skip_special_tokens else frozenset()
            strip = self._strip and not any(self._piece(i) for i in reversed(prompt_ids) if i not in skip)
            feed = _Bytes(self._piece, skip, strip)
            if not any("\ufffd" in stop for stop in stops):  # that may be any bytes
                passes = self._passing(tuple(stops), skip)
        return _Sink(feed, stops, passes, params.include_stop_str_in_output, params.min_tokens)

    def _piece(self, token_id: int) -> bytes:
        """The bytes that a token stands for; cached, since a stream asks again and again."""
        piece = self._pieces.get(token_id)
        if piece is None:
            text = self._library.id_to_token(token_id) if token_id >= 0 else None
            assert self._to_bytes is not None
            piece = b"" if text is None else self._to_bytes(text)
            self._pieces[token_id] = piece
        return piece

    # --- chat ---

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    @property
    def tool_template(self) -> str | None:
        """Source of the chat template that tools are rendered with; None if there is none."""
        return self._templates.get("tool_use") or self._templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """Render a conversation as the text that the model was trained on.

        The text has its special tokens written out: encode it with `add_special_tokens=False`.

        Args:
            messages: dicts with "role" and "content" (text, or a list of {"type": "text"} parts).
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: tool descriptions, as the template expects them.
            kwargs: further variables for the template, e.g. `enable_thinking`; "chat_template"
                replaces the model's own.

        Raises:
            RequestError: bad messages, or messages that the template refuses.
            TokenizerError: the model has no chat template, or one that is not valid.
        """
        source = kwargs.pop("chat_template", None) or self._template(tools)
        template = self._compile(source)
        variables = {**self._special, "tools": tools, "documents": None, **kwargs}
        try:
            return template.render(
                messages=_messages(messages), add_generation_prompt=add_generation_prompt, **variables
            )
        except OstinatoError:
            raise
        except Exception as error:  # a template is a program and can fail in any way
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error

    def _template(self, tools: Sequence[Any] | None) -> str:
        if not self._templates:
            raise TokenizerError(
                f"{self._source} has no chat template, so it is probably not a chat model. Use plain prompts "
                f"(`generate`), or put a template into chat_template.jinja beside its tokenizer"
            )
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if len(self._templates) == 1:
            return next(iter(self._templates.values()))
        raise TokenizerError(
            f"{self._source} has chat templates {sorted(self._templates)} and none is called 'default'"
        )

    def _compile(self, source: str) -> Template:
        if source not in self._compiled:
            self._compiled[source] = _compile_template(source, self._source)
        return self._compiled[source]


def _ends(library: RustTokenizer) -> tuple[list[int], list[int]]:
    """What the library's post-processor puts before and after a text; it does not depend on the text."""
    inner = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    for at in range(len(full) - len(inner) + 1):
        if full[at : at + len(inner)] == inner:
            return full[:at], full[at + len(inner) :]
    return [], []


# --- tokens as bytes -------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


_ALPHABET = _byte_alphabet()
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[c] for c in token])
    except KeyError:  # an added token is plain text
        return token.encode("utf-8")


def _sentencepiece(token: str) -> bytes:
    if match := _FALLBACK.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode("utf-8")


def _byte_rule(library: RustTokenizer) -> tuple[Callable[[str], bytes] | None, bool]:
    """How a token becomes bytes, and whether one leading space of the text is dropped.

    (None, False) for decoders that do not work token by token.
    """
    if library.decoder is None:
        return None, False
    try:
        decoder: Any = library.decoder
        state: dict[str, Any] = json.loads(decoder.__getstate__())
    except Exception:  # a decoder written in Python has no state
        return None, False
    steps = [dict(step) for step in state["decoders"]] if state.get("type") == "Sequence" else [state]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _byte_level, False
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    base = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if steps == base or steps == [*base, strip]:
        return _sentencepiece, len(steps) == 4
    return None, False


# --- incremental decoding and stop strings ---------------------------------------------


class _Bytes:
    """Tokens to text through their bytes; holds back an incomplete character."""

    def __init__(self, piece: Callable[[int], bytes], skip: frozenset[int], strip: bool) -> None:
        self._piece, self._skip, self._strip = piece, skip, strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skip else self._add(self._piece(token_id))

    def push_all(self, token_ids: Sequence[int]) -> str:
        return self._add(b"".join([self._piece(i) for i in token_ids if i not in self._skip]))

    def _add(self, data: bytes) -> str:
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    @property
    def pending(self) -> bool:
        """Whether a part of a character is held back."""
        return bool(self._utf8.getstate()[0])


class _Window:
    """Tokens to text by decoding the last few again, for decoders that look at neighbours."""

    CONTEXT = 6
    """Tokens of the prompt that are decoded with the first output tokens."""
    LIMIT = 16
    """Most tokens to hold back while the text ends in U+FFFD: it may be there to stay."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, prompt_ids: Sequence[int]) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids = list(prompt_ids[-self.CONTEXT :])
        self._shown = len(self._ids)
        """Ids whose text has been returned; those before them are context."""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._advance(hold=len(self._ids) - self._shown < self.LIMIT)

    def push_all(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        return self._advance(hold=False)

    @property
    def pending(self) -> bool:
        return True

    def _advance(self, hold: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown], self._skip_special)
        now = self._tokenizer.decode(self._ids, self._skip_special)
        if len(now) <= len(before) or (hold and now.endswith("\ufffd")):
            return ""
        # The tokens just shown are the context of the next ones.
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return now[len(before) :]


class _Passing(dict[int, bool]):
    """`TextSink.passes` where tokens have bytes; found out when a token is first met.

    A stop string's bytes begin in some token: that one holds them all, or ends with their beginning.
    """

    def __init__(self, piece: Callable[[int], bytes], skip: frozenset[int], stops: Sequence[str]) -> None:
        self._piece, self._skip = piece, skip
        self._stops = [stop.encode(errors="surrogatepass") for stop in stops]
        self._firsts = {stop[0] for stop in self._stops}

    def __missing__(self, token_id: int) -> bool:
        piece = b"" if token_id in self._skip else self._piece(token_id)
        passes = self[token_id] = self._firsts.isdisjoint(piece) or not any(
            stop.startswith(piece[at:]) or piece.startswith(stop, at)
            for stop in self._stops
            for at in range(len(piece))
        )
        return passes


class _Sink:
    """`TextSink`: text of one request, cut at the first stop string to be completed.

    Of stop strings that end at the same character the one that starts first counts. The
    result depends on the text alone, not on how it is split into tokens.
    """

    def __init__(
        self,
        feed: _Bytes | _Window,
        stops: Sequence[str],
        passes: Mapping[int, bool],
        include_stop: bool,
        min_tokens: int,
    ) -> None:
        self._feed, self._stops, self.passes = feed, tuple(stops), passes
        self._include, self._min_tokens = include_stop, min_tokens
        self._parts: list[str] = []
        """The text, in pieces: one string that grows would be copied with each token."""
        self._held = ""
        """Text after those that may be the beginning of a stop string."""
        self._count = 0
        self._stopped = False

    @property
    def text(self) -> str:
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    @property
    def watches(self) -> bool:
        return bool(self._stops)

    @property
    def open(self) -> bool:
        return bool(self._held) or self._feed.pending

    def catch_up(self, token_ids: Sequence[int]) -> str | None:
        new = token_ids[self._count :]
        if not new:
            return None
        passed = new[:-1] if self._stops else new
        if passed:
            assert not self._held, "each token may complete a stop string"
            self._parts.append(self._feed.push_all(passed))
            self._count += len(passed)
        return self.push(new[-1]) if self._stops else None

    def push(self, token_id: int) -> str | None:
        assert not self._stopped, "push after a stop string"
        self._count += 1
        if self.passes[token_id] and not self.open:
            self._parts.append(self._feed.push(token_id))
            return None
        window = self._held + self._feed.push(token_id)
        found = self._find(window, len(self._held)) if self._count > self._min_tokens else None
        if found is not None:
            start, end, stop = found
            self._parts.append(window[: end if self._include else start])
            self._held, self._stopped = "", True
            return stop
        keep = len(window) - self._held_length(window)
        self._parts.append(window[:keep])
        self._held = window[keep:]
        return None

    def finish(self) -> str:
        if not self._stopped:
            self._parts.append(self._held + self._feed.flush())
            self._held = ""
        return self.text

    def _find(self, window: str, old: int) -> tuple[int, int, str] | None:
        """(start, end, stop string) of the match that ends first beyond the first `old` characters."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = window.find(stop, max(0, old - len(stop) + 1))
            end = start + len(stop)
            if start >= 0 and (best is None or (end, start) < (best[1], best[0])):
                best = (start, end, stop)
        return best

    def _held_length(self, window: str) -> int:
        """Length of the longest end of `window` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            at = window.find(stop[0], max(0, len(window) - len(stop) + 1))
            while at >= 0:
                if stop.startswith(window[at:]):
                    longest = max(longest, len(window) - at)
                    break
                at = window.find(stop[0], at + 1)
        return longest


# --- chat templates --------------------------------------------------------------------


def _compile_template(source: str, where: str) -> Template:
    """Compile as transformers does, in a sandbox: a template is code out of a download."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it only passes them on."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"the chat template of {where} is not valid: {error}") from error


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked copies with text content."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(
            f'messages must be a list like [{{"role": "user", "content": "Hello"}}], got {type(messages).__name__}'
        )
    if not messages:
        raise RequestError("messages is empty; a chat needs at least one message")
    out = []
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"messages[{n}] must be a dict with role and content, got {type(message).__name__}"
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(
                f'messages[{n}] needs a "role" such as "system", "user" or "assistant", got {role!r}'
            )
        out.append({**message, "content": _content(message, n)})
    return out


def _content(message: Message, n: int) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if message.get("tool_calls"):
            return None  # an assistant's turn that only calls tools
        raise RequestError(f'messages[{n}] needs "content"')
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(str(text) for text in texts)
        raise RequestError(f'messages[{n}]: only parts of type "text" are supported in "content"')
    raise RequestError(f'messages[{n}]: "content" must be text, got {type(content).__name__}')


# --- folders ---------------------------------------------------------------------------

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _json(path: Path) -> dict[str, Any]:
    """An optional JSON object; {} if the file is not there."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    out = {}
    for role in _ROLES:
        value = config.get(role)
        if isinstance(value, Mapping):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            out[role] = value
    return out


def _flag(config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    return value if isinstance(value, bool) else None


def _folder_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name; a file of its own wins over tokenizer_config.json, as in transformers."""
    templates: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list):
        for entry in inline:
            if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
                templates[str(entry.get("name"))] = entry["template"]
    legacy = _json(path / "chat_template.json").get("chat_template")
    if isinstance(legacy, str):
        templates["default"] = legacy
    files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if (path / "chat_template.jinja").is_file():
        files["default"] = path / "chat_template.jinja"
    for name, file in files.items():
        try:
            templates[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file} cannot be read: {error}") from error
    return templates


def _no_tokenizer_json(path: Path) -> str:
    if (path / "tokenizer.model").is_file():
        return (
            f"{path} has a SentencePiece tokenizer.model but no tokenizer.json. Convert it once with transformers: "
            f"`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
        )
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return (
            f"{path} has vocab.json and merges.txt but no tokenizer.json. Convert them once with transformers: "
            f"`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
        )
    return f"{path} has no tokenizer.json; add the model's own, or name a folder that has it with `tokenizer`"


# --- GGUF ------------------------------------------------------------------------------

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS_THEN_GPT2 = (r"\p{N}", _GPT2)

GGUF_PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "phi-2": (_GPT2,),
    "olmo": (_GPT2,),
    "mpt": (_GPT2,),
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "command-r": _DIGITS_THEN_GPT2,
    "codeshell": _DIGITS_THEN_GPT2,
    "minerva-7b": _DIGITS_THEN_GPT2,
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "stablelm2": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
"""`tokenizer.ggml.pre` to the regexes that split text before BPE, applied one after another."""

_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
"""A piece that is a token is taken as it is, without merging up to it; BOS is added unless the file says otherwise."""

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6


def _from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind is None or not isinstance(tokens, list) or not tokens:
        raise TokenizerError(
            f"{source} holds no tokenizer; name a folder with tokenizer.json with `tokenizer`"
        )
    vocab = {token: n for n, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise TokenizerError(f"{source}: {len(tokens) - len(vocab)} tokens appear twice in the vocabulary")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise TokenizerError(f"{source}: {len(tokens)} tokens, but not as many token types")
    try:
        if kind == "gpt2":
            library, add_bos = _bpe(metadata, vocab, source)
        elif kind == "llama":
            library, add_bos = _spm(metadata, tokens, vocab, types, source), True
        else:
            raise TokenizerError(
                f"{source}: tokenizer model {kind!r} is not supported; known: gpt2 (BPE), llama (SPM)"
            )
    except TokenizerError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise TokenizerError(f"{source}: the vocabulary cannot be used: {error}") from error
    _mark_added(library, tokens, types)
    special = {}
    for role, key in _GGUF_ROLES.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise TokenizerError(
                f"{source}: {key}_token_id is {token_id!r}, the vocabulary has {len(tokens)} tokens"
            )
        special[role] = tokens[token_id]
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    # A default yields to a file without the token; a setting does not.
    add_bos = add_bos and "bos_token" in special
    return Tokenizer(
        library,
        source=source,
        special=special,
        eos_token_ids=[i for i in ends if isinstance(i, int)],
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_templates=_gguf_templates(metadata),
    )


_GGUF_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
}


def _gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    templates = {}
    for key, value in metadata.items():
        if isinstance(value, str) and (key == prefix or key.startswith(prefix + ".")):
            templates[key[len(prefix) + 1 :] or "default"] = value
    return templates


def _mark_added(library: RustTokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens are special: found whole in text, and left out of decoded text."""
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    library.add_tokens(added)


def _bpe(metadata: Mapping[str, Any], vocab: dict[str, int], source: str) -> tuple[RustTokenizer, bool]:
    """Byte-level BPE, and whether it adds BOS by default."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in GGUF_PRE_TOKENIZERS:
        raise TokenizerError(
            f"{source}: pre-tokenizer {pre!r} is not known, and guessing would tokenize wrongly. "
            f"Known: {', '.join(sorted(GGUF_PRE_TOKENIZERS))}. Name a folder with tokenizer.json with `tokenizer`"
        )
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise TokenizerError(f"{source}: a BPE vocabulary needs tokenizer.ggml.merges")
    merges = [tuple(line.split(" ")) for line in lines]
    if any(len(pair) != 2 for pair in merges):
        bad = next(line for line in lines if line.count(" ") != 1)
        raise TokenizerError(f"{source}: merge {bad!r} is not two tokens")
    library = RustTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    splits: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in GGUF_PRE_TOKENIZERS[pre]
    ]
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    return library, pre in _WHOLE_WORDS


def _spm(
    metadata: Mapping[str, Any], tokens: list[str], vocab: dict[str, int], types: list[int], source: str
) -> RustTokenizer:
    """SentencePiece BPE: pieces with scores, unknown characters as bytes."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(
            f"{source}: a SentencePiece vocabulary needs one score for each of {len(tokens)} tokens"
        )
    whole = {_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE}
    normal = {token: n for token, n in vocab.items() if types[n] not in whole}
    merges = []
    for token, n in normal.items():
        for cut in range(1, len(token)):
            left, right = normal.get(token[:cut]), normal.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[n], left, right, token[:cut], token[cut:]))
    merges.sort()
    unknown = next((tokens[n] for n, kind in enumerate(types) if kind == _UNKNOWN), None)
    library = RustTokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    first: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    library.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return library
