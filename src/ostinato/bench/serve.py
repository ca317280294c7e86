"""`ostinato bench serve`: load on any server that speaks OpenAI's API, with vLLM's field names.

Every request streams, and has a connection of its own. What is measured is what a client sees:
the time to the first chunk with a choice, and between chunks. A server that puts several tokens into
one chunk has fewer, longer gaps (`itl`); `tpot` is by token.

Needs nothing but Python's own library, so that the load costs little beside the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import ssl
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, OstinatoError
from ..files import write

PERCENTILES = (50, 90, 95, 99)
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_WORDS = (
    "the of and to in is that for it was on are as with his they at be this from have or by one had not but "
    "what all were when we there can an your which their said if do will each about how up out them then she"
)
_SHARES = {"input": 161.0, "output": 338.0}
"""Mean tokens of a question and of an answer."""
_SIGMA = 1.1
"""Spread of the logarithms of ShareGPT-like lengths."""
_LONGEST = 2048


@dataclass(frozen=True)
class Ask:
    """One request of the load."""

    prompt: str | list[int]
    max_tokens: int


@dataclass
class Answer:
    """What one request saw; seconds."""

    begin: float = 0.0
    ttft: float | None = None
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Seconds by token after the first."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Load:
    """How requests are sent."""

    base_url: str
    model: str
    api: str = "completions"
    """"completions" or "chat"."""
    request_rate: float = math.inf
    """Requests a second; inf: all at once."""
    burstiness: float = 1.0
    """1: arrivals as of many people (Poisson); below: in bursts; above: evenly."""
    max_concurrency: int | None = None
    api_key: str | None = None
    body: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request."""
    timeout: float = 3600.0
    seed: int = 0
    insecure: bool = False
    """Take any certificate."""


# --- the load --------------------------------------------------------------------------


async def send(
    load: Load, asks: Sequence[Ask], done: Callable[[Answer], None] = lambda answer: None
) -> list[Answer]:
    """Send all requests as the load says; answers in their order, failed ones with `error` set."""
    rng = random.Random(load.seed)
    limit = asyncio.Semaphore(load.max_concurrency or len(asks) or 1)

    async def one(ask: Ask) -> Answer:
        async with limit:
            answer = await ask_once(load, ask)
        done(answer)
        return answer

    tasks = []
    for ask in asks:
        tasks.append(asyncio.ensure_future(one(ask)))
        if load.request_rate != math.inf:
            gap = rng.gammavariate(load.burstiness, 1 / (load.request_rate * load.burstiness))
            await asyncio.sleep(gap)
    return list(await asyncio.gather(*tasks))


async def ask_once(load: Load, ask: Ask) -> Answer:
    """Send one request and read its stream to the end."""
    answer = Answer(begin=time.perf_counter())
    try:
        async with asyncio.timeout(load.timeout):
            await _stream(load, ask, answer)
    except (OSError, TimeoutError, ValueError, EOFError) as error:
        answer.error = str(error) or type(error).__name__
    answer.latency = answer.latency or time.perf_counter() - answer.begin
    return answer


async def _stream(load: Load, ask: Ask, answer: Answer) -> None:
    body: dict[str, Any] = {
        "model": load.model,
        "max_tokens": ask.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.api == "chat":
        body["messages"] = [{"role": "user", "content": ask.prompt}]
    else:
        body["prompt"] = ask.prompt
    last = answer.begin
    chunks = 0
    text = []
    async for data in _events(load, _PATHS[load.api], body | load.body):
        now = time.perf_counter()
        event = json.loads(data)
        if "error" in event:
            raise ValueError(event["error"].get("message", data))
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if not event["choices"]:
            continue
        choice = event["choices"][0]
        said = choice["text"] if load.api == "completions" else choice["delta"].get("content")
        text.append(said or "")
        chunks += 1
        if answer.ttft is None:
            answer.ttft = now - answer.begin
        else:
            answer.itl.append(now - last)
        last = now
        answer.latency = now - answer.begin
    answer.text = "".join(text)
    answer.output_tokens = answer.output_tokens or chunks  # a server that does not count for us
    if answer.ttft is None:
        raise ValueError("the stream ended without a token")


async def _events(load: Load, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """Data of the events of one POST, up to [DONE].

    Raises:
        ValueError: another status than 200, or not a stream.
        EOFError: the connection ended in between.
    """
    url = urlsplit(load.base_url)
    tls = _context(load) if url.scheme == "https" else None
    port = url.port or (443 if tls else 80)
    data = json.dumps(body).encode()
    host = f"{url.hostname}:{port}"
    head = [
        f"POST {url.path.rstrip('/')}{path} HTTP/1.1",
        *(f"Host: {host}", "Content-Type: application/json", "Accept: text/event-stream"),
        *(f"Content-Length: {len(data)}", "Connection: close"),
        *([f"Authorization: Bearer {load.api_key}"] if load.api_key else []),
    ]
    reader, writer = await asyncio.open_connection(url.hostname, port, ssl=tls)
    try:
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines[1:])}
        pieces = _body(reader, headers.get("transfer-encoding", "").lower() == "chunked")
        status = lines[0].split(" ", 2)[1]
        if status != "200":
            said = b"".join([piece async for piece in pieces])
            raise ValueError(f"HTTP {status}: {said[:500].decode('utf-8', 'replace')}")
        rest = b""
        async for piece in pieces:
            *events, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                if event.startswith(b"data:"):
                    found = event[5:].strip()
                    if found == b"[DONE]":
                        return
                    yield found
    except asyncio.IncompleteReadError as error:
        raise EOFError("the connection ended within the answer") from error
    finally:
        writer.close()


async def _body(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """A response body as it comes."""
    while True:
        if not chunked:
            data = await reader.read(1 << 16)
            if not data:
                return
            yield data
            continue
        size = int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16)
        data = await reader.readexactly(size + 2)
        if size == 0:
            return
        yield data[:-2]


def _context(load: Load) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if load.insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


# --- what is asked -----------------------------------------------------------------------


def random_asks(
    count: int, input_len: int, output_len: int, *, spread: float, vocab_size: int | None, seed: int
) -> list[Ask]:
    """Random prompts; lengths are uniform within `spread` of those given, as in vLLM's random data set."""
    rng = random.Random(seed)

    def length(middle: int) -> int:
        return rng.randint(max(1, round(middle * (1 - spread))), max(1, round(middle * (1 + spread))))

    return [Ask(_prompt(rng, length(input_len), vocab_size), length(output_len)) for _ in range(count)]


def sharegpt_like_asks(count: int, *, vocab_size: int | None, seed: int) -> list[Ask]:
    """Random prompts whose lengths are spread as those of ShareGPT's conversations: log-normal."""
    rng = random.Random(seed)

    def length(mean: float) -> int:
        return max(4, min(_LONGEST, round(rng.lognormvariate(math.log(mean) - _SIGMA**2 / 2, _SIGMA))))

    return [
        Ask(_prompt(rng, length(_SHARES["input"]), vocab_size), length(_SHARES["output"]))
        for _ in range(count)
    ]


def sharegpt_asks(path: Path, count: int, output_len: int | None, seed: int) -> list[Ask]:
    """First turns of a file of ShareGPT conversations; outputs as long as the file's, about 4 characters a token.

    Raises:
        ConfigError: no such file, or it holds too few conversations.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        turns = [[turn["value"] for turn in talk.get("conversations", ())[:2]] for talk in found]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--dataset-path: {path} is no file of ShareGPT conversations: {error}") from error
    pairs = [(q, a) for q, a in (turn for turn in turns if len(turn) == 2) if q and a]
    if len(pairs) < count:
        raise ConfigError(f"--dataset-path: {path} has {len(pairs)} conversations, {count} were asked for")
    chosen = random.Random(seed).sample(pairs, count)
    return [Ask(q[: 4 * _LONGEST], output_len or max(4, min(_LONGEST, len(a) // 4))) for q, a in chosen]


def _prompt(rng: random.Random, length: int, vocab_size: int | None) -> str | list[int]:
    """Random token ids, or as many short words: about a token each."""
    if vocab_size is not None:
        return [rng.randrange(vocab_size) for _ in range(length)]
    return " ".join(rng.choices(_WORDS.split(), k=length))


# --- what came of it ---------------------------------------------------------------------


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """vLLM's fields; times in milliseconds."""
    good = [a for a in answers if a.error is None]
    outputs, inputs = sum(a.output_tokens for a in good), sum(a.prompt_tokens for a in good)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
    }
    series: dict[str, list[float]] = {
        "ttft": [a.ttft for a in good if a.ttft is not None],
        "tpot": [a.tpot for a in good if a.tpot is not None],
        "itl": [gap for a in good for gap in a.itl],
        "e2el": [a.latency for a in good],
    }
    for name, values in series.items():
        times = sorted(1000 * value for value in values)
        if not times:
            continue
        found[f"mean_{name}_ms"] = statistics.fmean(times)
        found[f"median_{name}_ms"] = statistics.median(times)
        found[f"std_{name}_ms"] = statistics.pstdev(times)
        for share in PERCENTILES:
            found[f"p{share}_{name}_ms"] = _percentile(times, share)
    return found


def table(found: dict[str, Any]) -> str:
    """The fields for people."""
    lines = [f"{'requests, completed and failed':34} {found['completed']:>10,} {found['failed']:>10,}"]
    lines += [f"{'seconds':34} {found['duration']:>10.2f}"]
    for name, words in (
        ("total_input_tokens", "input tokens"),
        ("total_output_tokens", "output tokens"),
    ):
        lines.append(f"{words:34} {found[name]:>10,}")
    for name, words in (
        ("request_throughput", "requests/s"),
        ("output_throughput", "output tokens/s"),
        ("total_token_throughput", "tokens/s"),
    ):
        lines.append(f"{words:34} {found[name]:>10.2f}")
    lines += ["", f"{'ms':34} {'mean':>10} {'median':>10} {'p95':>10} {'p99':>10}"]
    for name, words in (
        ("ttft", "time to first token"),
        ("tpot", "time per output token"),
        ("itl", "between chunks"),
        ("e2el", "whole request"),
    ):
        if f"mean_{name}_ms" in found:
            values = [found[f"{kind}_{name}_ms"] for kind in ("mean", "median", "p95", "p99")]
            lines.append(f"{words:34} " + " ".join(f"{value:>10.2f}" for value in values))
    return "\n".join(lines)


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` per cent of the values lie, interpolated as numpy does."""
    at = (len(ordered) - 1) * share / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


# --- the command -------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ostinato bench serve`."""
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", help="without /v1 (default: %(default)s)"
    )
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--api-key", help="default: $OPENAI_API_KEY")
    parser.add_argument("--insecure", action="store_true", help="take any TLS certificate")
    parser.add_argument("--backend", choices=("openai", "openai-chat"), default="openai")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--num-warmups", type=int, default=1, help="requests before, not counted")
    parser.add_argument(
        "--request-rate", type=float, default=math.inf, help="per second (default: all at once)"
    )
    parser.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; above: more evenly")
    parser.add_argument("--max-concurrency", type=int)
    parser.add_argument("--dataset-name", choices=("random", "sharegpt"), default="random")
    parser.add_argument(
        "--dataset-path", metavar="FILE", help="ShareGPT's JSON (default: random words of such lengths)"
    )
    parser.add_argument("--random-input-len", type=int, default=512)
    parser.add_argument("--random-output-len", type=int, default=128)
    parser.add_argument("--random-range-ratio", type=float, default=0.0, help="spread of the lengths, 0 to 1")
    parser.add_argument("--vocab-size", type=int, help="send random token ids below this instead of words")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--ignore-eos", action="store_true", help="every output as long as asked for")
    parser.add_argument("--extra-body", default="{}", metavar="JSON", help="further fields of every request")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="of one request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--save-detailed", action="store_true", help="each request's times and text too")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 if every request ended well.

    Raises:
        ConfigError: an argument that cannot work.
        OstinatoError: no server there.
    """
    asks = _asks(args)
    load = _load(args)
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError(f"--json: there is no folder for {args.json}")
    try:
        answers, seconds = asyncio.run(_measure(load, asks, args.num_warmups))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    found = summary(answers, seconds)
    print(f"{load.model} at {load.base_url}, {len(asks)} requests\n\n{table(found)}")
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    for text, count in errors.items():
        print(f"\n{count} failed: {text}", file=sys.stderr)
    if args.json is not None:
        _save(args, load, asks, answers, found)
        print(f"\nwrote {args.json}")
    return 1 if errors else 0


async def _measure(load: Load, asks: Sequence[Ask], warmups: int) -> tuple[list[Answer], float]:
    for ask in asks[:warmups]:
        answer = await ask_once(load, ask)
        if answer.error is not None:
            raise OstinatoError(f"{load.base_url}: {answer.error}")
    ended = 0

    def done(_: Answer) -> None:
        nonlocal ended
        ended += 1
        if sys.stderr.isatty():
            print(f"\r{ended}/{len(asks)}", end="\n" if ended == len(asks) else "", file=sys.stderr)

    begin = time.perf_counter()
    answers = await send(load, asks, done)
    return answers, time.perf_counter() - begin


def _load(args: argparse.Namespace) -> Load:
    url = urlsplit(args.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"--base-url must be like http://127.0.0.1:8000, got {args.base_url!r}")
    for name in ("request_rate", "burstiness", "timeout"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency must be at least 1, got {args.max_concurrency}")
    try:
        body = json.loads(args.extra_body)
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError("--extra-body must be a JSON object")
    if args.temperature is not None:
        body["temperature"] = args.temperature
    if args.ignore_eos:
        body["ignore_eos"] = True
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    base = args.base_url.rstrip("/").removesuffix("/v1")
    model = args.model or _first_model(base, key, args.insecure)
    return Load(
        base_url=base,
        model=model,
        api="chat" if args.backend == "openai-chat" else "completions",
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency,
        api_key=key,
        body=body,
        timeout=args.timeout,
        seed=args.seed,
        insecure=args.insecure,
    )


def _asks(args: argparse.Namespace) -> list[Ask]:
    for name in ("num_prompts", "random_input_len", "random_output_len"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.random_range_ratio <= 1:
        raise ConfigError(f"--random-range-ratio must be 0 to 1, got {args.random_range_ratio}")
    if args.vocab_size is not None and (args.vocab_size < 1 or args.backend == "openai-chat"):
        raise ConfigError("--vocab-size must be at least 1, and a chat takes words only")
    if args.dataset_name == "sharegpt" and args.dataset_path is not None:
        return sharegpt_asks(Path(args.dataset_path), args.num_prompts, None, args.seed)
    if args.dataset_path is not None:
        raise ConfigError("--dataset-path needs --dataset-name sharegpt")
    if args.dataset_name == "sharegpt":
        return sharegpt_like_asks(args.num_prompts, vocab_size=args.vocab_size, seed=args.seed)
    return random_asks(
        args.num_prompts,
        args.random_input_len,
        args.random_output_len,
        spread=args.random_range_ratio,
        vocab_size=args.vocab_size,
        seed=args.seed,
    )


def _first_model(base: str, key: str | None, insecure: bool) -> str:
    from urllib.request import Request, urlopen

    request = Request(f"{base}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    context = _context(Load(base, "", insecure=insecure)) if base.startswith("https") else None
    try:
        with urlopen(request, timeout=30, context=context) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise OstinatoError(f"{base} does not say which models it has: {error}") from error


def _save(
    args: argparse.Namespace,
    load: Load,
    asks: Sequence[Ask],
    answers: Sequence[Answer],
    found: dict[str, Any],
) -> None:
    whole: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "model_id": load.model,
        "num_prompts": len(asks),
        "request_rate": "inf" if load.request_rate == math.inf else load.request_rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        **found,
    }
    if args.save_detailed:
        whole |= {
            "input_lens": [a.prompt_tokens for a in answers],
            "output_lens": [a.output_tokens for a in answers],
            "ttfts": [a.ttft for a in answers],
            "itls": [a.itl for a in answers],
            "generated_texts": [a.text for a in answers],
            "errors": [a.error or "" for a in answers],
        }
    write(args.json, json.dumps(whole, indent=2) + "\n")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ostinato.bench.serve", description=__doc__)
    add_arguments(parser)
    try:
        return main(parser.parse_args())
    except OstinatoError as error:
        print(f"ostinato: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(_main())
