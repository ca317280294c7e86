"""What the HTTP process and the engine process say to each other, and how it travels.

MessagePack over one stream socket, four bytes of length before each message; every message has a
type of its own and is checked as it is read. Nothing is ever unpickled.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Any, TypeAlias

import msgspec

_LENGTH = struct.Struct(">I")
MAX_MESSAGE = 1 << 30
"""Bytes; more than that is a stream that lost its place."""
_READ = 1 << 18

TokenLogprob: TypeAlias = tuple[int, float, int]
"""Token, natural-log probability, rank from 1."""


class _Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Sent as an array: its type's name, then its fields."""


# --- to the engine ---------------------------------------------------------------------


class Start(_Message, frozen=True):
    """The first message: which engine to build."""

    options: dict[str, Any]
    """Fields of `EngineOptions`."""
    log_level: str
    log_format: str
    beat_seconds: float
    """How often the loop says that it comes round."""


class Add(_Message, frozen=True):
    """One completion to generate."""

    key: int
    """Names it in everything that follows; never used twice."""
    prompt: list[int]
    params: dict[str, Any]
    """Fields of `SamplingParams` that differ from their defaults; no strings to stop at."""
    bad_words: list[list[int]] = []
    grammar: str | None = None
    """An llguidance grammar that the output has to follow."""


class Abort(_Message, frozen=True):
    """Nobody wants these any more."""

    keys: list[int]


class ReportGraphs(_Message, frozen=True):
    """Ask for a `GraphsReport`."""


class Stop(_Message, frozen=True):
    """End what runs and exit with status 0."""


# --- from the engine -------------------------------------------------------------------


class Ready(_Message, frozen=True):
    """The engine serves."""

    model: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    eos_token_ids: list[int]
    num_kv_tokens: int
    """Tokens that the whole KV cache holds."""
    config: dict[str, str]
    memory_bytes: dict[str, int]
    startup_seconds: dict[str, float]


class Failed(_Message, frozen=True):
    """The engine ends: it could not be built, or a step raised."""

    message: str
    wrong_option: bool = False
    """It could not be built because an option has a value that cannot work."""


class Refused(_Message, frozen=True):
    """A request that cannot be served."""

    key: int
    message: str


class First(_Message, frozen=True):
    """Comes with a completion's first token."""

    key: int
    num_cached_tokens: int
    admitted: float
    """When it first got a row: `time.monotonic`, which the processes of a machine share."""
    prompt_logprobs: list[list[TokenLogprob] | None] | None


class End(_Message, frozen=True):
    """Comes with a completion's last token."""

    key: int
    finish_reason: str
    stop_token: int | None


class Stats(_Message, frozen=True):
    """Counters since the start, and what is under way."""

    running: int
    waiting: int
    kv_usage: float
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    host_dependency: int
    graph_steps: int
    eager_steps: dict[str, int]
    """By reason code."""
    graph_memory_bytes: dict[str, int]
    captures: int
    capture_seconds: float
    step_tokens: dict[int, int]
    """How many steps had how many tokens."""


class Step(_Message, frozen=True):
    """All that one step brought."""

    keys: list[int]
    tokens: list[int]
    """One for each key."""
    logprobs: dict[int, list[TokenLogprob]]
    """By key, where asked for: the chosen token, then the most likely ones in order."""
    firsts: list[First]
    ends: list[End]
    stats: Stats | None = None


class Alive(_Message, frozen=True):
    """The loop has come round; an engine that says nothing for long hangs."""


class GraphsReport(_Message, frozen=True):
    """A `GraphReport` as JSON, or why there is none."""

    json: str
    error: str = ""


ToEngine: TypeAlias = Start | Add | Abort | ReportGraphs | Stop
FromEngine: TypeAlias = Ready | Failed | Refused | Step | Alive | GraphsReport

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def pack(message: ToEngine | FromEngine) -> bytes:
    """A message with its length before it."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into message bodies."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Bodies that are complete with these bytes.

        Raises:
            ValueError: a length that no message has.
        """
        self._data += data
        bodies, at = [], 0
        while len(self._data) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, at)
            if length > MAX_MESSAGE:
                raise ValueError(f"a message of {length} bytes, at most {MAX_MESSAGE} were expected")
            end = at + _LENGTH.size + length
            if len(self._data) < end:
                break
            bodies.append(bytes(self._data[at + _LENGTH.size : end]))
            at = end
        del self._data[:at]
        return bodies


def read_from_engine(body: bytes) -> FromEngine:
    """
    Raises:
        msgspec.DecodeError: not a message of the engine's.
    """
    return _FROM_ENGINE.decode(body)


class Channel:
    """The engine's end of the socket. One thread; sending never waits, receiving only where asked.

    What the other side does not read yet is kept and sent on with later calls.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock, self._frames, self._out = sock, Frames(), bytearray()
        self.closed = False
        """The other side has gone."""

    def send(self, message: FromEngine) -> None:
        self._out += pack(message)
        self._write()

    def receive(self, timeout: float | None) -> list[ToEngine]:
        """Messages that have arrived.

        Args:
            timeout: seconds to wait for one; 0 does not wait, None waits as long as it takes.
        """
        if timeout != 0:
            select.select([self._sock], [self._sock] if self._out else [], [], timeout)
        self._write()
        bodies: list[bytes] = []
        while not self.closed:
            try:
                data = self._sock.recv(_READ)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            bodies += self._frames.feed(data)
            if len(data) < _READ:
                break
        return [_TO_ENGINE.decode(body) for body in bodies]

    def flush(self, seconds: float) -> None:
        """Send what is left, for as long as that may take."""
        while self._out and not self.closed:
            if not select.select([], [self._sock], [], seconds)[1]:
                return
            self._write()

    def _write(self) -> None:
        while self._out and not self.closed:
            try:
                sent = self._sock.send(self._out)
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
                return
            del self._out[:sent]
