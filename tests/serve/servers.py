"""Servers as their users run them: a process of their own, spoken to over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_SECONDS = 120
RUN = (sys.executable, "-m", "ostinato.cli", "serve")
FAULTY = (sys.executable, "-m", "tests.serve.faulty")
"""The same, with an engine process that fails as $FAULT says."""


class Server:
    """A running server."""

    def __init__(
        self, *args: str, command: tuple[str, ...] = RUN, env: dict[str, str] | None = None, folder: Path
    ) -> None:
        self.log_path = folder / f"server-{time.monotonic_ns()}.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *args, "--port", "0"],
                stderr=log, stdout=subprocess.DEVNULL, env=os.environ | (env or {}),
            )  # fmt: skip
        self.url = ""

    def wait_until_ready(self) -> Server:
        limit = time.monotonic() + START_SECONDS
        while not (found := re.search(r"(https?://\S+?:\d+)", self.log)):
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            assert time.monotonic() < limit, f"the server does not start:\n{self.log}"
            time.sleep(0.05)
        self.url = found[1].replace("0.0.0.0", "127.0.0.1")
        return self

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def engine_pid(self) -> int:
        """Of the engine's process, the only child."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def metric(self, name: str, **headers: str) -> float:
        """The sum of a metric's samples."""
        request = urllib.request.Request(f"{self.url}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"ostinato:{name}{{"))

    def wait_for(self, name: str, value: float, seconds: float = 20) -> None:
        limit = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < limit, f"{name} is {found}, and does not become {value}"
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send a signal and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


@contextlib.contextmanager
def serving(*args: str, **options: Any) -> Iterator[Server]:
    """A server that is ready, and is gone afterwards."""
    server = Server(*args, **options)
    try:
        yield server.wait_until_ready()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    """(status, parsed body, headers) of a POST of JSON; `body` may be bytes already."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"} | (headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read()), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), dict(error.headers)


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=60) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)
