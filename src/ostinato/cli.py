"""The command line: `ostinato generate | chat | serve | explain | graphs | bench`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .bench.options import Parser, at_least
from .errors import ConfigError, GraphError, OstinatoError, RequestError, SamplingParamsError
from .files import check_writable, write
from .serve.options import KEY_VARIABLE, from_arguments, named_model
from .serve.options import add_arguments as add_serve_arguments
from .types import RequestOutput, SamplingParams
from .wake import wake_driver

if TYPE_CHECKING:
    from .llm import LLM

_START = time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an error, 2 for a wrong argument, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(argv)
    args = parser.parse_args(argv)
    if args.run is None:
        parser.error("a COMMAND is missing: ostinato --help lists them")
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s"
    )
    try:
        return int(args.run(args))
    except OstinatoError as error:
        print(f"ostinato: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ConfigError, SamplingParamsError)) else 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read us has gone; there is nobody to tell
        return 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The arguments of every command; those of `bench` only where `argv` asks for it."""
    parser = Parser(prog="ostinato", description="Generate text with open-weight models.")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND")  # not `required`: an unknown option is then named

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        _engine_options(sub)
        _sampling_options(sub)
        return sub

    generate = command("generate", _generate, "Complete a prompt as it stands, streaming to the terminal.")
    generate.add_argument("prompt")
    chat = command("chat", _chat, "Talk with a model: one answer to MESSAGE, or a conversation without it.")
    chat.add_argument("message", nargs="?")
    chat.add_argument("--system", help="system message")

    serve = commands.add_parser("serve", help="Serve a model over HTTP, as OpenAI's API does.")
    serve.set_defaults(run=_serve)
    add_serve_arguments(serve)
    _engine_options(serve)

    def inspector(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("inspected", nargs="?", metavar="MODEL", help="as --model")
        sub.add_argument("--load-format", default="auto", help="dummy: random weights for a shape name")
        _engine_options(sub)
        return sub

    explain = inspector("explain", _explain, "Say what is decided for a model and why.")
    explain.add_argument(
        "--batch", type=at_least(1), help="what would a decode step of this many sequences do?"
    )
    graphs = inspector("graphs", _graphs, "Capture the ladder of a model and show every graph.")
    graphs.add_argument("--html", metavar="FILE", help="write a page to look at")
    graphs.add_argument("--json", metavar="FILE", help="write the report as data")
    graphs.add_argument("--dot", metavar="FILE", help="write the smallest graph for GraphViz")
    graphs.add_argument("--audit", action="store_true", help="check every pointer of every graph")
    graphs.add_argument("--url", help="read a running server instead, such as http://127.0.0.1:8000")
    graphs.add_argument("--api-key", help=f"of that server (default: ${KEY_VARIABLE})")

    text = "Measure: latency, throughput, startup, step, serve."
    bench = commands.add_parser("bench", help=text, description=text)
    if argv[:1] == ["bench"]:
        from .bench.cli import add_commands

        add_commands(bench)
    return parser


def _engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--model", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct)")
    group.add_argument("--tokenizer", help="folder or file (default: the model's own)")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    group.add_argument("--quantization", help="fp8: 8-bit weights, quantised at load")
    group.add_argument("--device", default="auto", help="auto, cuda or cpu")
    group.add_argument("--max-model-len", type=int, help="longest prompt plus output, in tokens")
    group.add_argument("--max-num-seqs", type=int, help="most sequences in one step")
    group.add_argument("--max-num-batched-tokens", type=int, help="most tokens in one step")
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, help="share of GPU memory to use"
    )
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    group.add_argument("--verbose", action="store_true", help="log what happens")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256)
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--repetition-penalty", type=float, default=1.0)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", help="string that ends the text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true")


_SAMPLING = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("seed", "stop", "ignore_eos"),
)
_ENGINE = (
    *("tokenizer", "revision", "dtype", "quantization", "device", "max_model_len"),
    *("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "enforce_eager"),
)


def _make(args: argparse.Namespace) -> tuple[LLM, SamplingParams]:
    params = SamplingParams(**{name: getattr(args, name) for name in _SAMPLING})  # before anything is loaded
    wake_driver(args.device)
    from .llm import LLM

    return LLM(args.model, **{name: getattr(args, name) for name in _ENGINE}), params


def _generate(args: argparse.Namespace) -> int:
    llm, params = _make(args)
    output = _show(llm, args.prompt, params, chat=False, before=args.prompt)
    _report(llm, output)
    return 0


def _chat(args: argparse.Namespace) -> int:
    if args.message == "":
        raise RequestError("the message is empty")
    if args.message is None and sys.stdin is None:
        raise RequestError("there is no standard input to talk through: give a MESSAGE")
    llm, params = _make(args)
    tokenizer = llm.get_tokenizer()
    messages: list[dict[str, Any]] = [{"role": "system", "content": args.system}] if args.system else []
    while True:
        message = args.message or _ask()
        if not message:
            return 0
        messages.append({"role": "user", "content": message})
        try:
            output = _show(llm, tokenizer.apply_chat_template(messages), params, chat=True)
        except RequestError as error:
            if args.message:
                raise
            messages.pop()
            print(f"ostinato: {error}", file=sys.stderr)
            print("That message was left out: send a shorter one, or start a new chat.", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": output.outputs[0].text})
        if args.message:
            _report(llm, output)
            return 0


def _inspected(args: argparse.Namespace, **options: Any) -> LLM:
    model = named_model(args.inspected, args.model)
    wake_driver(args.device)
    from .llm import LLM

    named = {name: getattr(args, name) for name in (*_ENGINE, "load_format")}
    return LLM(model, **named | options)


def _serve(args: argparse.Namespace) -> int:
    options = from_arguments(args, _ENGINE)
    try:
        from .serve.server import run
    except ImportError as error:
        raise OstinatoError(
            f"{error}; the server needs more packages: pip install 'ostinato[serve]'"
        ) from error
    return run(options)


def _explain(args: argparse.Namespace) -> int:
    print(_inspected(args).explain(args.batch))
    return 0


def _graphs(args: argparse.Namespace) -> int:
    from .graphs import report

    for name in ("html", "json", "dot"):
        check_writable(f"--{name}", getattr(args, name))  # before anything is loaded
    if args.url is not None:
        if args.dot or args.audit:
            raise ConfigError(
                f"{'--dot' if args.dot else '--audit'} needs the graphs themselves: leave --url out"
            )
        from .serve.remote import graphs_report

        remote = graphs_report(args.url, args.api_key or os.environ.get(KEY_VARIABLE))
        print(report.table(remote))
        for path, render in ((args.html, report.html), (args.json, type(remote).to_json)):
            _write(path, render(remote))
        return 0
    llm = _inspected(args, cudagraph_capture="startup")
    found = llm.graph_report(chains=bool(args.html or args.json))
    print(report.table(found))
    for path, render in ((args.html, report.html), (args.json, type(found).to_json)):
        _write(path, render(found))
    captured = [record.key for record in llm.engine.plan.book.captured]
    if not captured:
        why = llm.engine.why_no_graphs or "none could be captured"
        if args.dot or args.audit:
            raise GraphError(f"there are no graphs for {'--dot' if args.dot else '--audit'}: {why}")
        print(f"no graphs: {why}")
        return 0
    if args.dot:
        from .graphs.survey import dot

        _write(args.dot, dot(llm.engine, min(captured, key=lambda k: k.num_tokens)))
    if not args.audit:
        return 0
    audits = llm.audit_graphs()
    for key, result in audits.items():
        print(f"{key}: {result}")
    return 0 if all(result.ok for result in audits.values()) else 1


def _write(name: str | None, text: str) -> None:
    if name is None:
        return
    write(name, text)
    print(f"wrote {name}")


def _ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not text: {error}") from error


def _show(llm: LLM, prompt: str, params: SamplingParams, *, chat: bool, before: str = "") -> RequestOutput:
    """Print a completion as it grows, and `before` in front of it; returns the finished one."""
    shown = 0
    output = None
    try:
        for output in llm.stream(prompt, params, chat=chat):
            text = before + output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    except OstinatoError:
        if shown:
            print(flush=True)  # what is said of the error gets a line of its own
        raise
    print()
    assert output is not None  # a stream ends with a finished output or an error
    return output


def _report(llm: LLM, output: RequestOutput) -> None:
    """What ran: speed, and where each step ran and why."""
    m, count = output.metrics, len(output.outputs[0].token_ids)
    assert m is not None
    assert m.first_token_time is not None
    assert m.finished_time is not None
    lines = [
        f"model        {llm.engine.name}, {llm.engine.config.dtype} on {llm.engine.config.device}".replace(
            "torch.", ""
        )
    ]
    decode = m.finished_time - m.first_token_time
    speed = f", {(count - 1) / decode:.1f} tokens/s after the first" if count > 1 and decode > 0 else ""
    lines.append(f"tokens       {len(output.prompt_token_ids)} in, {count} out{speed}")
    lines.append(
        f"first token  {m.first_token_time - m.arrival_time:.3f} s after the request, "
        f"{time.perf_counter() - _START - (time.monotonic() - m.first_token_time):.2f} s after the command's start"
    )
    reasons = ", ".join(f"{n} {reason}" for reason, n in m.eager_steps.items())
    steps = f"{m.graph_steps} on graphs, {sum(m.eager_steps.values())} eager"
    lines.append(f"steps        {steps}" + (f" ({reasons})" if reasons else ""))
    graphs = llm.get_metrics()["graph_steps"]
    lines.extend(f"  {key}: {n}" for key, n in graphs.items())
    why = llm.engine.why_no_graphs
    if why:
        lines.append(f"graphs       off: {why}")
    print("\n" + "\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
