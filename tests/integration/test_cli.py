"""The command line, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = ["smollm2-135m", "--load-format", "dummy", "--max-model-len", "64"]
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
        (["chat", ""], "the message is empty"),
        (["graphs", "--json", "/no/such/folder/x"], "/no/such/folder/x cannot be written"),
        (["graphs", "--html", "/tmp"], "it is a folder"),
        (["graphs", *SMALL, "--json", "/dev/full"], "/dev/full cannot be written"),
        (["graphs", *SMALL, "--audit"], "there are no graphs for --audit"),
        (["graphs", *SMALL, "--dot", "/dev/null"], "there are no graphs for --dot"),
    ],
)
def test_errors_are_one_line_and_exit_1(args: list[str], words: str) -> None:
    done = run(*args)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_chat_without_standard_input() -> None:
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" <&-', "bash", *RUN, "chat"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "ostinato: there is no standard input to talk through: give a MESSAGE\n"


def test_a_message_that_is_too_long_does_not_end_the_conversation() -> None:
    long = "word " * 200
    done = run("chat", "--max-model-len", "64", "--max-tokens", "3", stdin=f"Hi\n{long}\nHi\n")
    assert done.returncode == 0
    assert done.stdout.count("> ") == 4
    assert "max_model_len=64" in done.stderr
    assert "start a new chat" in done.stderr


def test_a_terminal_that_knows_ascii_only() -> None:
    done = subprocess.run(
        [*RUN, "generate", "caf\u00e9", "--max-tokens", "2"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("caf?")


def test_explain() -> None:
    done = run("explain", *SMALL, "--batch", "3")
    assert done.returncode == 0, done.stderr
    assert "a decode step of 3 sequences:" in done.stdout
    assert "    every op: plain torch, the reference\n" in done.stdout
    assert re.search(r"every op +1 to 32 +1 to 1,024 +plain torch, the reference\n", done.stdout)
    assert "max_model_len" in done.stdout


def test_reports_without_graphs(tmp_path: Path) -> None:
    data, page = tmp_path / "r.json", tmp_path / "r.html"
    done = run("graphs", *SMALL, "--json", str(data), "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert "no graphs: CUDA graphs need an NVIDIA GPU" in done.stdout
    report = json.loads(data.read_text())["report"]
    assert report["keys"] == []
    (use,) = report["kernels"]
    assert use == {
        "op": "every op", "shape": "", "kernel": "plain torch, the reference", "why": "",
        "decode": [[1, 32]], "prompts": [[1, 1024]],
    }  # fmt: skip
    assert page.read_text().startswith("<!")
    assert "every op: plain torch, the reference" in page.read_text()


def test_an_unknown_flag_exits_2() -> None:
    done = run("chat", "--temprature", "1")
    assert done.returncode == 2
    assert "temprature" in done.stderr


def hear_ctrl_c() -> None:
    """A shell's background jobs ignore it, and so would whatever they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_cleanly() -> None:
    process = subprocess.Popen(
        [*RUN, "generate", "Once upon a time", "--max-tokens", "4000", "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c,
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
