"""The command line, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ostinato import CompletionOutput, RequestOutput, SamplingParams, cli
from ostinato.errors import FallbackError

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
        (["generate", ""], "empty"),
        (["generate", "word word word word", "--max-model-len", "3"], "max_model_len=3"),
        (["chat", ""], "the message is empty"),
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
    if args[0] != "graphs":
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["frob"], "'frob'"),
        (["--frob"], "--frob"),
        ([], "a COMMAND is missing"),
        (["bench"], "BENCHMARK"),
        (["generate"], "prompt"),
        (["generate", "x", "--max-tokens", "y"], "--max-tokens"),
        (["generate", "x", "--temperature", "-1"], "temperature must be"),
        (["generate", "x", "--quantization", "nonsense"], "quantization must be"),
        (["chat", "--temprature", "1"], "--temprature"),
        (["chat", "hi", "--max-model-len", "9999999"], "at most 8192"),
        (["explain", "--batch", "0"], "--batch: must be at least 1"),
        (["explain", "a", "--model", "b"], "MODEL 'a' and --model 'b'"),
        (["serve", "a", "--model", "b"], "MODEL 'a' and --model 'b'"),
        (["serve", "--port", "99999"], "--port must be"),
        (["serve", "--max-waiting", "-1"], "--max-waiting must be"),
        (["serve", "--quantization", "nonsense", "--log-level", "error"], "quantization must be"),
        (["graphs", "--json", "/no/such/folder/x"], "--json: /no/such/folder/x cannot be written"),
        (["graphs", "--html", "/tmp"], "--html: /tmp cannot be written: it is a folder"),
        (["graphs", "--json", ""], "--json needs the name of a file"),
        (["graphs", "--html", ""], "--html needs the name of a file"),
        (["graphs", "--url", "http://127.0.0.1:9", "--audit"], "--audit needs the graphs themselves"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_arguments_are_one_line_and_exit_2(args: list[str], words: str) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("ostinato")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_the_same_model_twice_is_one() -> None:
    assert run("explain", *SMALL, "--model", SMALL[0]).returncode == 0


def test_an_error_amid_a_text_starts_on_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        def stream(self, prompt: str, params: SamplingParams, *, chat: bool) -> Iterator[RequestOutput]:
            yield RequestOutput("1", prompt, [1], [CompletionOutput(0, " more", [2])], finished=False)
            raise FallbackError("no graph")

    with pytest.raises(FallbackError):
        cli._show(Failing(), "word", SamplingParams(), chat=False, before="word")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "word more\n"


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
