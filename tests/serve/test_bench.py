"""`ostinato bench serve` against a real server, and what it makes of odd ones."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ostinato.bench.serve import (
    Answer,
    Ask,
    Load,
    ask_once,
    random_asks,
    send,
    sharegpt_asks,
    sharegpt_like_asks,
    summary,
    table,
)
from ostinato.errors import ConfigError
from tests.serve.servers import Server

RUN = (sys.executable, "-m", "ostinato.bench.serve")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *args], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_the_fields_are_vllms_and_the_counts_are_right(server: Server, tmp_path: Path, backend: str) -> None:
    out = tmp_path / "r.json"
    before = server.metric("generation_tokens_total")
    done = run(
        *("--base-url", server.url, "--backend", backend, "--num-prompts", "12", "--random-input-len", "20"),
        *("--random-output-len", "8", "--ignore-eos", "--json", str(out), "--save-detailed"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"]) == (12, 0)
    assert found["total_output_tokens"] == 12 * 8
    assert server.metric("generation_tokens_total") - before == 13 * 8  # and one to warm up
    assert found["output_throughput"] == pytest.approx(96 / found["duration"])
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert found[f"p99_{name}_ms"] >= found[f"median_{name}_ms"] > 0
    assert found["model_id"] == "tiny"
    assert all(found["generated_texts"])
    assert "output tokens/s" in done.stdout


def test_a_rate_and_a_limit_are_kept(server: Server) -> None:
    asks = random_asks(20, 5, 4, spread=0.5, vocab_size=200, seed=1)
    most = 0

    async def watch() -> list[Answer]:
        nonlocal most
        load = Load(server.url, "tiny", request_rate=100, burstiness=1e6, max_concurrency=2)
        return await send(load, asks)

    answers = asyncio.run(watch())
    begins = sorted(a.begin for a in answers)
    ends = [(a.begin, 1) for a in answers] + [(a.begin + a.latency, -1) for a in answers]
    open_now = 0
    for _, change in sorted(ends):
        open_now += change
        most = max(most, open_now)
    assert most <= 2
    assert begins[-1] - begins[0] >= 19 / 100 * 0.9
    assert all(a.error is None for a in answers)


def test_refusals_and_missing_servers_are_failures(server: Server) -> None:
    done = run(
        "--base-url", server.url, "--num-prompts", "3", "--num-warmups", "0", "--random-input-len", "9000"
    )
    assert done.returncode == 1
    assert done.stderr.count("failed: HTTP 400") == 3  # each names its own length
    assert "max_model_len" in done.stderr
    nobody = run("--base-url", "http://127.0.0.1:9", "--model", "x")
    assert nobody.returncode == 1
    assert "http://127.0.0.1:9" in nobody.stderr
    assert "Traceback" not in nobody.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("--base-url", "nonsense"),
        ("--num-prompts", "0"),
        ("--request-rate", "0"),
        ("--max-concurrency", "0"),
        ("--extra-body", "[1]"),
        ("--dataset-path", "x"),
        ("--json", "/no/such/folder/x", "--model", "x"),
    ],
)
def test_arguments_that_cannot_work(args: tuple[str, ...]) -> None:
    done = run(*args)
    assert done.returncode == 1
    assert args[0] in done.stderr
    assert "Traceback" not in done.stderr


def answer_with(raw: bytes) -> Answer:
    """What the client makes of a server that says these bytes and hangs up."""

    async def talk() -> Answer:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"}")
            writer.write(raw)
            await writer.drain()
            writer.close()

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            return await ask_once(Load(f"http://127.0.0.1:{port}", "m", timeout=5), Ask("a", 2))

    return asyncio.run(talk())


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
TOKEN = b'data: {"choices": [{"text": "a"}]}\n\n'


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (OK + b"\r\n" + TOKEN + TOKEN + b"data: [DONE]\n\n", None),
        (OK + b"\r\n" + (TOKEN + TOKEN).replace(b"\n", b"\r\n"), None),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(TOKEN) + TOKEN + b"\r\n", "connection ended"),
        (OK + b"\r\n", "without a token"),
        (OK + b"\r\n" + b'data: {"error": {"message": "the engine died"}}\n\n', "the engine died"),
        (OK + b"\r\ndata: nonsense\n\n", "Expecting value"),
        (b"HTTP/1.1 503 No\r\n\r\nbusy", "HTTP 503: busy"),
        (b"", "connection ended"),
    ],
)
def test_odd_servers(raw: bytes, said: str | None) -> None:
    answer = answer_with(raw)
    if said is None:
        assert answer.error is None
        assert (answer.text, answer.output_tokens) == ("aa", 2)
    else:
        assert said in (answer.error or "")


def test_a_summary_by_hand() -> None:
    answers = [
        Answer(ttft=0.1, itl=[0.1, 0.3], latency=0.5, prompt_tokens=4, output_tokens=3),
        Answer(ttft=0.3, latency=0.3, prompt_tokens=6, output_tokens=1),
        Answer(error="no"),
    ]
    found = summary(answers, 2.0)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert found["output_throughput"] == 2.0
    assert found["total_token_throughput"] == 7.0
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx(200)
    assert found["p50_itl_ms"] == pytest.approx(200)
    assert "failed" in table(found)
    assert math.isfinite(summary([Answer(error="no")], 1.0)["duration"])


def test_lengths() -> None:
    fixed = random_asks(50, 10, 20, spread=0.0, vocab_size=100, seed=0)
    assert {(len(a.prompt), a.max_tokens) for a in fixed} == {(10, 20)}
    assert random_asks(5, 9, 9, spread=0.5, vocab_size=None, seed=3) == random_asks(
        5, 9, 9, spread=0.5, vocab_size=None, seed=3
    )
    words = random_asks(1, 10, 20, spread=0.0, vocab_size=None, seed=0)[0].prompt
    assert isinstance(words, str)
    assert len(words.split()) == 10
    like = sharegpt_like_asks(4000, vocab_size=100, seed=0)
    assert statistics.fmean(len(a.prompt) for a in like) == pytest.approx(161, rel=0.15)
    assert statistics.fmean(a.max_tokens for a in like) == pytest.approx(338, rel=0.2)


def test_conversations_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    talks: list[Any] = [
        {"conversations": [{"value": f"question {n}"}, {"value": "x" * 80}]} for n in range(4)
    ]
    path.write_text(json.dumps([*talks, {"conversations": [{"value": "alone"}]}]))
    asks = sharegpt_asks(path, 4, None, 0)
    assert {a.prompt for a in asks} == {f"question {n}" for n in range(4)}
    assert {a.max_tokens for a in asks} == {20}
    with pytest.raises(ConfigError, match="4 conversations, 5"):
        sharegpt_asks(path, 5, None, 0)
    with pytest.raises(ConfigError, match="no file of ShareGPT"):
        sharegpt_asks(tmp_path / "missing", 1, None, 0)
