"""Clients that mean harm: what they send is bounded, and harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

from ostinato.serve import client as clients
from ostinato.serve.answers import _event
from ostinato.serve.checker import Checker
from ostinato.serve.client import EngineClient
from ostinato.serve.grammar import json_schema
from ostinato.serve.http import MAX_HEAD, HttpProtocol
from ostinato.serve.messages import GraphsReport
from ostinato.serve.options import ServeOptions
from ostinato.serve.server import _bound
from ostinato.tokenizer import Tokenizer
from tests.serve.servers import FAULTY, Server, get, post, serving

SMALL = ("--max-num-seqs", "4", "--max-num-batched-tokens", "128")
BOMB: Any = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(1, 20)]}
"""Under a kilobyte; its regular expressions have an intersection of 2^20 states."""


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer_to(server: Server, first: bytes, piece: bytes, times: int) -> bytes:
    """What a client gets that sends this, piece by piece, for as long as it may."""
    with connect(server) as sock:
        sock.sendall(first)
        sent = 0
        try:
            for _ in range(times):
                sock.sendall(piece)
                sent += len(piece)
            return b"still open"
        except OSError:  # the server has closed it
            assert sent < 32 << 20
            return b"closed"


# --- what comes before a body ----------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X-A: " + b"a" * 60_000 + b"\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"a" * 60_000),
        (b"GET /", b"a" * 60_000),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n",
            b"X-A: " + b"a" * 60_000 + b"\r\n",
        ),
    ],
    ids=["headers", "a header", "a path", "headers after the body"],
)
def test_headers_have_an_end(server: Server, first: bytes, piece: bytes) -> None:
    assert answer_to(server, first, piece, 2000) == b"closed"
    assert get(f"{server.url}/health")[0] == 200


def test_long_headers_are_answered_and_usual_ones_allowed(server: Server) -> None:
    assert get(f"{server.url}/health", {"x-a": "a" * 20_000})[0] == 200
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * (MAX_HEAD + 10))
        assert sock.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_connection_that_asks_for_nothing_is_closed() -> None:
    class Impatient(HttpProtocol):
        head_seconds = 0.3

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.6)  # an answer may take longer than that
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def talk(port: int, *pieces: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.1)
            async with asyncio.timeout(5):
                return await reader.read(1000)
        finally:
            writer.close()

    async def main() -> list[bytes]:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            config = uvicorn.Config(app, http=Impatient, lifespan="off", log_config=None)
            server = uvicorn.Server(config)
            serving = asyncio.ensure_future(server.serve([sock]))
            port = sock.getsockname()[1]
            while not server.started:
                await asyncio.sleep(0.01)
            found = [
                await talk(port),
                await talk(port, b"GET / HT"),
                await talk(port, b"GET / HTTP/1.1\r\n", b"Host: a\r\n", b"\r\n"),
            ]
            server.should_exit = True
            await serving
        return found

    nothing, begun, asked = asyncio.run(main())
    assert nothing == begun == b""
    assert asked.startswith(b"HTTP/1.1 200")


def test_a_connection_that_is_never_read_ends_with_its_request() -> None:
    """The kernel's business: nothing of ours waits there any more."""
    with _bound(ServeOptions(port=0, request_timeout=7.0)) as sock:
        sock.listen()
        with socket.create_connection(sock.getsockname()), sock.accept()[0] as accepted:
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 17_000
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# --- grammars --------------------------------------------------------------------------


def test_a_grammar_that_takes_for_ever_is_given_up() -> None:
    async def main() -> tuple[list[str | None], float]:
        checker = Checker(seconds=1.0)
        assert await checker.check(json_schema({"type": "string"})) is None
        begin = time.monotonic()
        bombs = [checker.check(json_schema(BOMB)) for _ in range(2)]
        said = await asyncio.gather(*bombs, checker.check(json_schema({"type": "integer"})))
        took = time.monotonic() - begin
        said.append(await checker.check(json_schema({"type": 5})))
        await checker.close()
        assert checker._idle == []
        return said, took

    (one, two, good, bad), took = asyncio.run(main())
    assert one is not None
    assert one == two
    assert "longer than 1 s" in one
    assert good is None
    assert bad is not None
    assert "type" in bad
    assert took < 10


def test_a_grammar_that_takes_for_ever_keeps_nobody_waiting(model: Path, tmp_path: Path) -> None:
    with serving(str(model), *SMALL, folder=tmp_path) as server:
        url = f"{server.url}/v1/completions"
        bomb = {"prompt": "a", "max_tokens": 3, "structured_outputs": {"json": BOMB}}
        pool = ThreadPoolExecutor(8)
        asking = [pool.submit(post, url, bomb) for _ in range(8)]
        time.sleep(0.5)
        begin = time.monotonic()
        assert post(url, {"prompt": "word " * 600, "max_tokens": 3})[0] == 200  # tokenised on a thread
        assert post(f"{server.url}/tokenize", {"prompt": "word " * 5000})[0] == 200
        assert time.monotonic() - begin < 5
        assert server.end() == 0  # neither does its end wait
        assert time.monotonic() - begin < 10
        for answer in asking:
            status, said, _ = answer.result(20)
            assert (status, said["error"]["code"]) == (503, "shutting_down")


def test_a_grammar_that_breaks_the_compiler_is_one_request_s_alone(model: Path, tmp_path: Path) -> None:
    options = {"command": FAULTY, "env": {"FAULT": "compile"}, "folder": tmp_path}
    with serving(str(model), *SMALL, **options) as server:
        body = {"prompt": "a", "max_tokens": 3}
        guided = body | {"structured_outputs": {"regex": "[a-z]+"}}
        status, answer, _ = post(f"{server.url}/v1/completions", guided)
        assert status == 400
        assert "called unwrap on a None" in answer["error"]["message"]
        assert post(f"{server.url}/v1/completions", body)[0] == 200
        assert server.end() == 0


# --- the event loop, the queue ---------------------------------------------------------


def test_other_threads_run_while_a_long_text_is_encoded(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    text = "There is another thing in the Antarctic: \u2028 penguins. " * 20_000
    with ThreadPoolExecutor(1) as pool:
        begin = last = time.monotonic()
        worst = 0.0
        future = pool.submit(tokenizer.encode, text)
        while not future.done():
            time.sleep(0.001)
            now = time.monotonic()
            worst, last = max(worst, now - last), now
        took = time.monotonic() - begin
    assert worst < 0.5 * took, f"{worst:.3f} s of {took:.3f} s without a turn"
    assert future.result() == tokenizer._library.encode(text, add_special_tokens=False).ids


def test_requests_that_wait_to_be_read_are_bounded(model: Path, tmp_path: Path) -> None:
    limits = ("--max-num-seqs", "1", "--max-num-batched-tokens", "64", "--max-waiting", "1")
    with serving(str(model), *limits, folder=tmp_path) as server:
        body = {"prompt": "word " * 300_000}
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: post(f"{server.url}/v1/completions", body), range(8)))
        seen = [status for status, _, _ in found]
        assert set(seen) == {400, 429}  # too long for the model; more than may wait
        refused = [headers for status, _, headers in found if status == 429]
        assert all(int(headers["retry-after"]) >= 1 for headers in refused)
        assert post(f"{server.url}/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
        assert server.end() == 0


def test_who_asks_for_graphs_meanwhile_gets_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = EngineClient()
        sent: list[Any] = []
        monkeypatch.setattr(engine, "_send", sent.append)
        asked = [asyncio.ensure_future(engine.graphs_report()) for _ in range(50)]
        await asyncio.sleep(0)
        asked[0].cancel()  # its client has gone
        engine.receive(GraphsReport("{}"))
        assert await asyncio.gather(*asked[1:]) == ["{}"] * 49
        assert len(sent) == 1
        again = asyncio.ensure_future(engine.graphs_report())
        await asyncio.sleep(0)
        assert len(sent) == 2
        again.cancel()

    asyncio.run(main())


def test_an_engine_that_cannot_be_killed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        pid, returncode, killed = 1 << 30, None, False

        async def wait(self) -> None:
            await asyncio.sleep(60)

        def kill(self) -> None:
            self.killed = True

    async def main() -> None:
        engine, stuck = EngineClient(), Stuck()
        engine._process = stuck  # type: ignore[assignment]
        begin = time.monotonic()
        await engine.stop(0.1)
        assert stuck.killed
        assert time.monotonic() - begin < 5

    monkeypatch.setattr(clients, "_KILL_SECONDS", 0.2)
    asyncio.run(main())


# --- what is sent back -----------------------------------------------------------------


def test_an_event_is_one_line_by_any_rule() -> None:
    odd = "".join(map(chr, (*range(0x20), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0xFEFF, 0x1F600, 0xFFFD)))
    data = _event({"text": odd, "é": "\u2028"})
    assert data.endswith(b"\n\n")
    line = data[:-2].decode()
    assert line.splitlines() == [line]
    assert json.loads(line.removeprefix("data: ")) == {"text": odd, "é": "\u2028"}


def test_streams_say_what_whole_answers_say(server: Server) -> None:
    """Several prompts and completions, stop strings across tokens, logprobs and usage."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    given: Any = {
        "model": "tiny", "prompt": ["abc", "the river"], "n": 3, "seed": 5, "temperature": 1.3, "logprobs": 2,
        "max_tokens": 60, "stop": ["in", "e", "r!"], "extra_body": {"ignore_eos": True, "min_tokens": 2},
    }  # fmt: skip
    whole = client.completions.create(**given)
    texts = [""] * 6
    rows: list[list[Any]] = [[] for _ in range(6)]
    ends: list[Any] = [None] * 6
    usage = None
    for chunk in client.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert ends[choice.index] is None, "something came after the end"
            texts[choice.index] += choice.text
            logprobs: Any = choice.logprobs
            rows[choice.index] += zip(
                logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs, strict=True
            )
            ends[choice.index] = choice.finish_reason
    assert usage == whole.usage
    assert usage is not None
    assert usage.completion_tokens == sum(map(len, rows))
    for choice, text, row, end in zip(whole.choices, texts, rows, ends, strict=True):
        assert choice.text == text
        assert not any(stop in text[2:] for stop in given["stop"])
        assert choice.finish_reason == end
        found: Any = choice.logprobs
        assert list(zip(found.tokens, found.text_offset, strict=True)) == [r[:2] for r in row]
    assert "stop" in ends


# --- nothing is left -------------------------------------------------------------------


def connections(pid: int) -> int:
    """TCP connections of a process, beside the socket that listens."""
    folder, inodes = f"/proc/{pid}/fd", set()
    for fd in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes.add(os.readlink(f"{folder}/{fd}").removeprefix("socket:[").removesuffix("]"))
    fields = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(f[9] in inodes and f[3] != "0A" for f in fields)


def test_clients_that_leave_at_any_moment_leave_nothing(model: Path, tmp_path: Path) -> None:
    bodies = [
        {"prompt": "word " * 700, "max_tokens": 200},
        {"prompt": "a", "n": 4, "max_tokens": 200, "stream": True, "logprobs": 5},
        {"prompt": "a", "max_tokens": 200, "structured_outputs": {"regex": "[a-z]{150,}"}},
        {
            "prompt": "a",
            "max_tokens": 200,
            "stream": True,
            "structured_outputs": {"json": {"type": "object"}},
        },
    ]
    with serving(str(model), *SMALL, folder=tmp_path) as server:
        for body in bodies:  # whatever starts once has started
            post(f"{server.url}/v1/completions", body | {"stream": False, "max_tokens": 2})
        files = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        with connect(server):
            limit = time.monotonic() + 10
            while connections(server.process.pid) != 1:
                assert time.monotonic() < limit, "a connection is not seen"
                time.sleep(0.01)
        for turn in range(60):
            body = json.dumps(bodies[turn % 4] | {"ignore_eos": turn % 4 < 2}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            with connect(server) as sock:
                sock.sendall((head.encode() + body)[: -1 if turn % 15 == 0 else None])
                time.sleep(0.002 * turn)
        server.wait_for("num_requests_running", 0)
        server.wait_for("num_requests_waiting", 0)
        server.wait_for("kv_cache_usage_perc", 0)
        assert post(f"{server.url}/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
        limit = time.monotonic() + 10
        # A second process that checks grammars may have started since: three files.
        while (
            connections(server.process.pid) or len(os.listdir(f"/proc/{server.process.pid}/fd")) > files + 3
        ):
            assert time.monotonic() < limit, "connections stay open"
            time.sleep(0.05)
        begin = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - begin < 5, "it waited for a request that nobody makes any more"
        assert "Traceback" not in server.log
        assert "were not done" not in server.log
