"""Many streams at once through `ostinato serve`, each text checked, beside the same work offline.

    python benchmarks/serve_streams.py [--streams 200] [--json FILE]

Starts the server, sends all requests at once, twice (the second run counts: kernels and graphs are
there by then), stops it, and does the same with `LLM.generate`. A text is right if it is the offline greedy
text, up to the first token whose two best logits lie closer than the tolerance.
On a GPU: `--streams 256 --model llama-3.2-1b --load-format dummy --tokenizer made-up --no-check
--max-num-seqs 256 --output-len 256`: random weights, and a tokenizer of bytes and invented words.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument(
        "--tokenizer", help="made-up: bytes, and invented words for the rest of the vocabulary"
    )
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--warmup", type=int, help="streams of the first run (default: as many)")
    parser.add_argument("--input-len", type=int, default=40, help="words of a prompt")
    parser.add_argument("--output-len", type=int, default=32, help="tokens")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--no-check", action="store_true", help="only the speed: for random weights")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    if args.tokenizer == "made-up":
        with tempfile.TemporaryDirectory() as folder:
            args.tokenizer = made_up_tokenizer(Path(folder), args.model)
            return run(args)
    return run(args)


def made_up_tokenizer(folder: Path, shape: str) -> str:
    """A tokenizer.json whose ids are all words: bytes first, then inventions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from ostinato.models.shapes import SHAPES

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"\u0120w{number}" for number in range(SHAPES[shape]["vocab_size"] - len(words))]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    return str(folder)


def run(args: argparse.Namespace) -> int:
    from benchmarks.environment import describe
    from ostinato.bench.serve import random_asks, summary, table

    runs = [
        random_asks(count, args.input_len, args.output_len, spread=0.5, vocab_size=None, seed=seed)
        for seed, count in enumerate((args.warmup or args.streams, args.streams))
    ]
    answers, seconds = served(args, runs)
    result: dict[str, Any] = {
        "streams": args.streams,
        "model": args.model or "SmolLM2-135M-Instruct",
        "input_words": args.input_len,
        "output_tokens": args.output_len,
        **summary(answers, seconds),
    }
    offline, wrong, compared = alone(args, runs, answers)
    result |= {
        "offline_output_throughput": offline,
        "share_of_offline": result["output_throughput"] / offline,
        "texts_checked": compared,
        "texts_wrong": len(wrong),
        "environment": describe(),
    }
    print(table(result))
    print(f"\noffline output tokens/s {offline:.2f}, share {result['share_of_offline']:.3f}")
    print(f"texts checked {compared}, wrong {len(wrong)}")
    for text in (*wrong[:5], *{a.error for a in answers if a.error}):
        print(text)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if wrong or result["failed"] else 0


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "tokenizer", "load_format", "max_num_seqs", "max_model_len")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def served(args: argparse.Namespace, runs: list[Any]) -> tuple[list[Any], float]:
    from ostinato.bench.serve import Load, send
    from tests.serve.servers import serving

    flags = [text for n, v in engine_options(args).items() for text in (f"--{n.replace('_', '-')}", str(v))]
    with tempfile.TemporaryDirectory() as folder, serving(*flags, folder=Path(folder)) as server:
        name = json.loads(_get(f"{server.url}/v1/models"))["data"][0]["id"]
        load = Load(server.url, name, body={"temperature": 0, "ignore_eos": True})
        for asks in runs:
            begin = time.perf_counter()
            answers = asyncio.run(send(load, asks))
            seconds = time.perf_counter() - begin
        server.end()
    return answers, seconds


def alone(args: argparse.Namespace, runs: list[Any], answers: list[Any]) -> tuple[float, list[str], int]:
    """(output tokens/s of `LLM.generate`, texts that differ, texts compared)."""
    from ostinato import LLM, SamplingParams
    from tests.serve.agreement import disagreement

    llm = LLM(**engine_options(args))

    def generate(asks: list[Any], **options: Any) -> list[Any]:
        params = [
            SamplingParams(temperature=0, max_tokens=a.max_tokens, ignore_eos=True, **options) for a in asks
        ]
        return llm.generate([a.prompt for a in asks], params, use_tqdm=False)

    for asks in runs:
        begin = time.perf_counter()
        outputs = generate(asks)
        seconds = time.perf_counter() - begin
    speed = sum(len(o.outputs[0].token_ids) for o in outputs) / seconds
    if args.no_check:
        return speed, [], 0
    wanted = generate(runs[-1], logprobs=2)
    tokenizer = llm.get_tokenizer()
    found = [disagreement(a.text, w.outputs[0], tokenizer) for a, w in zip(answers, wanted, strict=True)]
    return speed, [text for text in found if text], len(found)


def _get(url: str) -> bytes:
    from urllib.request import urlopen

    with urlopen(url, timeout=30) as answer:
        data: bytes = answer.read()
    return data


if __name__ == "__main__":
    sys.exit(main())
