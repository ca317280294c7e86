"""What a server does when something goes wrong: each fault is brought about for real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, APIStatusError, OpenAI

from tests.serve.servers import FAULTY, RUN, Server, get, post, serving

LONG: Any = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
SMALL = ("--max-num-seqs", "4", "--max-num-batched-tokens", "128")


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


class Open:
    """Requests that run in threads, and how they end."""

    def __init__(self, server: Server, streamed: int, at_once: int, max_tokens: int = 4000) -> None:
        self.body: Any = LONG | {"max_tokens": max_tokens}
        self.client, self.errors = client_of(server), [None] * (streamed + at_once)
        self.tokens = [0] * (streamed + at_once)
        self.threads = [
            threading.Thread(target=self._run, args=(n, n < streamed)) for n in range(streamed + at_once)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, n: int, stream: bool) -> None:
        try:
            if not stream:
                self.client.completions.create(**self.body)
                return
            for _ in self.client.completions.create(**self.body, stream=True):
                self.tokens[n] += 1
        except Exception as error:
            self.errors[n] = error  # type: ignore[call-overload]

    def join(self) -> list[Any]:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive(), "a request hangs"
        return self.errors


def wait_for(server: Server, text: str, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while text not in server.log:
        assert time.monotonic() < limit, f"{text!r} is not in the log:\n{server.log}"
        time.sleep(0.02)


# --- the engine dies -------------------------------------------------------------------


def dies_by_kill(server: Server) -> None:
    os.kill(server.engine_pid, signal.SIGKILL)


def dies_by_itself(server: Server) -> None:
    pass


def healths(server: Any, until: float) -> set[int]:
    """Answers of /health until the server is gone, or until a time."""
    seen = set()
    while server.process.poll() is None and time.monotonic() < until:
        try:
            seen.add(get(f"{server.url}/health")[0])
        except OSError:
            break
        time.sleep(0.02)
    return seen


@pytest.mark.parametrize(
    ("fault", "die", "said"),
    [
        ("slow", dies_by_kill, "its process ended"),
        ("raise", dies_by_itself, "the device fell out of the rack"),
        ("nonsense", dies_by_itself, "bytes"),
    ],
)
def test_a_dead_engine_answers_everybody_and_ends_the_server(
    model: Path, tmp_path: Path, fault: str, die: Callable[[Server], None], said: str
) -> None:
    env = {"FAULT": fault, "AFTER": "30"}
    with serving(str(model), *SMALL, command=FAULTY, env=env, folder=tmp_path) as server:
        requests = Open(server, streamed=4, at_once=2)  # two of them wait
        if fault == "slow":
            server.wait_for("num_requests_running", 4)
        die(server)
        begin = time.monotonic()
        seen = healths(server, until=begin + 20)
        errors = requests.join()
        assert all(isinstance(error, APIError) for error in errors), errors
        assert all("the engine died" in str(error) for error in errors), errors
        assert 503 in seen
        assert server.process.wait(20) == 1
        assert said in server.log


@pytest.mark.parametrize("busy", [True, False])
def test_an_engine_that_hangs_is_as_dead(model: Path, tmp_path: Path, busy: bool) -> None:
    options = {"command": FAULTY, "env": {"FAULT": "slow"}, "folder": tmp_path}
    with serving(str(model), *SMALL, "--engine-timeout", "2", **options) as server:
        requests = Open(server, streamed=4, at_once=2) if busy else None
        if busy:
            server.wait_for("num_requests_running", 4)
        engine = server.engine_pid
        os.kill(engine, signal.SIGSTOP)
        begin = time.monotonic()
        if requests is None:  # somebody comes while it hangs
            requests = Open(server, streamed=1, at_once=1)
        report: list[Any] = []
        asking = threading.Thread(target=lambda: report.append(get(f"{server.url}/graphs")))
        asking.start()
        seen = healths(server, until=begin + 20)
        assert time.monotonic() - begin > 1.5
        for error in requests.join():
            assert isinstance(error, APIError)
            assert "it said nothing for 2 s" in str(error)
        asking.join(20)
        assert report[0][0] == 500
        assert seen == {200, 503}
        assert server.process.wait(20) == 1
        assert_gone(engine)


def test_a_long_step_is_no_hang(model: Path, tmp_path: Path) -> None:
    options = {"command": FAULTY, "env": {"FAULT": "slow", "SLOW": "1.5"}, "folder": tmp_path}
    with serving(str(model), *SMALL, "--engine-timeout", "4", **options) as server:
        status, answer, _ = post(
            f"{server.url}/v1/completions", {"prompt": "a", "max_tokens": 4, "ignore_eos": True}
        )
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 4
        assert server.end() == 0


def test_a_server_that_was_stopped_as_a_whole_goes_on(model: Path, tmp_path: Path) -> None:
    with serving(str(model), *SMALL, "--engine-timeout", "2", folder=tmp_path) as server:
        processes = (server.engine_pid, server.process.pid)
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        for pid in reversed(processes):
            os.kill(pid, signal.SIGCONT)
        time.sleep(1)
        assert post(f"{server.url}/v1/completions", {"prompt": "a", "max_tokens": 3})[0] == 200
        assert server.end() == 0


def test_an_engine_that_cannot_be_built_is_one_line(tmp_path: Path) -> None:
    for args, words, status in (
        (["/no/such/model"], "/no/such/model", 1),
        (["--max-model-len", "99999999"], "max_model_len", 2),
        (["--max-waiting", "-1"], "--max-waiting", 2),
        (["--ssl-keyfile", "/no/such/key"], "--ssl-keyfile", 2),
        (["--engine-timeout", "inf"], "--engine-timeout", 2),
        (["--request-timeout", "nan"], "--request-timeout", 2),
    ):
        done = subprocess.run(
            [*RUN, *args, "--log-level", "error"], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == status
        assert words in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([*RUN, "--port", port], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "weights" not in done.stderr


# --- ending ----------------------------------------------------------------------------


def test_sigterm_lets_open_requests_end(model: Path, tmp_path: Path) -> None:
    with serving(str(model), *SMALL, "--shutdown-timeout", "60", folder=tmp_path) as server:
        requests = Open(server, streamed=2, at_once=0, max_tokens=800)
        server.wait_for("num_requests_running", 2)
        server.process.send_signal(signal.SIGTERM)
        wait_for(server, "2 requests have")
        assert get(f"{server.url}/health")[0] == 503
        status, answer, headers = post(f"{server.url}/v1/completions", {"prompt": "a"})
        assert status == 503
        assert answer["error"]["code"] == "shutting_down"
        assert headers["retry-after"]
        assert requests.join() == [None, None]
        assert server.process.wait(30) == 0
        assert min(requests.tokens) > 1


def test_the_time_to_end_has_a_limit(model: Path, tmp_path: Path) -> None:
    options = {"command": FAULTY, "env": {"FAULT": "slow"}, "folder": tmp_path}
    with serving(str(model), *SMALL, "--shutdown-timeout", "0.5", **options) as server:
        requests = Open(server, streamed=1, at_once=1)
        server.wait_for("num_requests_running", 2)
        begin = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - begin < 8
        for error in requests.join():
            assert isinstance(error, APIError)
            assert "shutting down" in str(error)


def test_a_second_signal_ends_at_once(model: Path, tmp_path: Path) -> None:
    options = {"command": FAULTY, "env": {"FAULT": "slow"}, "folder": tmp_path}
    with serving(str(model), *SMALL, **options) as server:
        requests = Open(server, streamed=1, at_once=0)
        server.wait_for("num_requests_running", 1)
        engine = server.engine_pid
        server.process.send_signal(signal.SIGINT)
        wait_for(server, "requests have")
        begin = time.monotonic()
        assert server.end(signal.SIGINT) == 130
        assert time.monotonic() - begin < 2
        requests.join()
        assert_gone(engine)


def test_a_signal_during_the_start_ends_it(model: Path, tmp_path: Path) -> None:
    server = Server(str(model), command=FAULTY, env={"FAULT": "start"}, folder=tmp_path)
    limit = time.monotonic() + 30
    while True:
        try:
            engine = server.engine_pid
            break
        except (IndexError, FileNotFoundError):
            assert time.monotonic() < limit
            time.sleep(0.05)
    assert server.end() == 0
    assert_gone(engine)


def test_the_engine_does_not_outlive_a_killed_server(model: Path, tmp_path: Path) -> None:
    with serving(str(model), *SMALL, folder=tmp_path) as server:
        engine = server.engine_pid
        server.end(signal.SIGKILL)
    assert_gone(engine)


def assert_gone(pid: int, seconds: float = 10) -> None:
    limit = time.monotonic() + seconds
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # ended, and nobody has asked for its status yet
            return
        assert time.monotonic() < limit, f"process {pid} is still there"
        time.sleep(0.05)


# --- limits ----------------------------------------------------------------------------


def test_limits_of_time_size_and_waiting(model: Path, tmp_path: Path) -> None:
    limits = (
        "--max-num-seqs",
        "2",
        "--max-waiting",
        "1",
        "--request-timeout",
        "1.5",
        "--max-body-size",
        "20000",
    )
    options = {"command": FAULTY, "env": {"FAULT": "slow"}, "folder": tmp_path}
    with serving(str(model), *limits, **options) as server:
        status, answer, _ = post(f"{server.url}/v1/completions", {"prompt": "a" * 20_000})
        assert status == 413
        assert "20000 bytes" in answer["error"]["message"]
        assert post(f"{server.url}/v1/completions", {"prompt": "a", "n": 4})[0] == 400
        begin = time.monotonic()
        requests = Open(server, streamed=2, at_once=1)
        server.wait_for("num_requests_waiting", 1)
        status, answer, headers = post(f"{server.url}/v1/completions", {"prompt": "a"})
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert answer["error"]["type"] == "rate_limit_error"
        for error in requests.join():
            assert isinstance(error, APIError)
            assert "took longer than 1.5 s" in str(error)
        assert any(isinstance(e, APIStatusError) and e.status_code == 504 for e in requests.errors)
        assert time.monotonic() - begin < 6
        server.wait_for("num_requests_running", 0)
        assert server.end() == 0


def test_a_slow_reader_stalls_nobody(server: Server) -> None:
    body = b'{"prompt":"a","max_tokens":500,"n":8,"ignore_eos":true,"stream":true,"logprobs":20}'
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode() + body)
        assert slow.recv(100).startswith(b"HTTP/1.1 200")  # and reads no more
        begin = time.monotonic()
        for _ in range(5):
            assert post(f"{server.url}/v1/completions", {"prompt": "b", "max_tokens": 10})[0] == 200
        assert time.monotonic() - begin < 10
        server.wait_for("num_requests_running", 0, seconds=60)  # the engine is done with it, unread as it is
        assert post(f"{server.url}/v1/completions", {"prompt": "c", "max_tokens": 3})[0] == 200


def test_a_client_that_never_sends_its_body_harms_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as lazy:
        lazy.connect((host, int(port)))
        lazy.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        assert post(f"{server.url}/v1/completions", {"prompt": "b", "max_tokens": 3})[0] == 200
    assert get(f"{server.url}/health")[0] == 200


def test_a_server_without_its_packages_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None; from ostinato.cli import main; sys.exit(main(['serve']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "ostinato[serve]" in done.stderr
