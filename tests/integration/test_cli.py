"""The command line, as a user runs it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

RUN = [sys.executable, "-m", "ostinato.cli"]


def run(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *args], capture_output=True, text=True, input=stdin, timeout=120, check=False
    )


def test_chat_answers_and_says_what_ran() -> None:
    done = run("chat", "What is the capital of France?")
    assert done.returncode == 0
    assert "Paris" in done.stdout
    for words in ("tokens/s", "first token", "on graphs", "eager", "need an NVIDIA GPU"):
        assert words in done.stderr


def test_generate_continues_the_prompt() -> None:
    done = run("generate", "The capital of France is", "--max-tokens", "5")
    assert done.stdout.startswith("The capital of France is Paris")


def test_a_conversation_from_standard_input() -> None:
    done = run("chat", "--max-tokens", "12", stdin="My name is Ada.\nWhat is my name?\n")
    assert done.returncode == 0
    assert done.stdout.count("> ") == 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "x", "--model", "/no/such/folder"], "/no/such/folder"),
        (["generate", "x", "--temperature", "-1"], "temperature must be"),
        (["generate", ""], "empty"),
        (["chat", "hi", "--max-model-len", "9999999"], "at most 8192"),
    ],
)
def test_errors_are_one_line_and_exit_1(args: list[str], words: str) -> None:
    done = run(*args)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_flag_exits_2() -> None:
    done = run("chat", "--temprature", "1")
    assert done.returncode == 2
    assert "temprature" in done.stderr


def test_ctrl_c_ends_cleanly() -> None:
    process = subprocess.Popen(
        [*RUN, "generate", "Once upon a time", "--max-tokens", "4000", "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(40)  # it is generating
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert time.monotonic() - begin < 20
