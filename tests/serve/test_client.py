"""The official client against a real server."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from ostinato import LLM, SamplingParams
from tests.serve.servers import Server, get, post

HELLO: Any = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def offline(model: Path) -> LLM:
    return LLM(str(model), max_num_seqs=8, max_num_batched_tokens=256)


def greedy(llm: LLM, prompt: Any, **options: Any) -> Any:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 20} | options)
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]


# --- the answers -----------------------------------------------------------------------


def test_a_completion_is_the_offline_one(client: OpenAI, offline: LLM) -> None:
    answer = client.completions.create(model="tiny", prompt="Once upon", max_tokens=20, temperature=0)
    wanted = greedy(offline, "Once upon")
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(wanted.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_completion_says_the_same(client: OpenAI, offline: LLM) -> None:
    stream = client.completions.create(
        model="tiny", prompt="Once upon", max_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    wanted = greedy(offline, "Once upon")
    assert "".join(c.choices[0].text for c in chunks[:-1]) == wanted.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count(None) == len(chunks) - 2
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(wanted.token_ids)
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks[:-1])


def test_a_chat_is_the_offline_one(client: OpenAI, offline: LLM) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, temperature=0)
    (wanted,) = offline.chat(HELLO, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert answer.choices[0].message.content == wanted.outputs[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)


def test_a_streamed_chat_says_the_same(client: OpenAI) -> None:
    given: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**given)
    chunks = list(client.chat.completions.create(**given, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_chat_ends_at_the_models_length_where_nothing_else_ends_it(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x" * 3900}], temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.total_tokens == 4096
    assert answer.choices[0].finish_reason == "length"


def test_many_prompts_and_many_completions(client: OpenAI, offline: LLM) -> None:
    prompts = ["one", "two", [1, 2, 3]]
    given: Any = {"model": "tiny", "max_tokens": 6, "n": 2, "seed": 5}
    answer = client.completions.create(prompt=prompts[:2], **given)  # type: ignore[arg-type]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    params = SamplingParams(n=2, seed=5, max_tokens=6)
    wanted = [o.text for r in offline.generate(prompts[:2], params, use_tqdm=False) for o in r.outputs]
    assert [c.text for c in answer.choices] == wanted
    assert len(set(wanted)) == 4
    ids = client.completions.create(prompt=[[1, 2, 3]], **given)
    assert len(ids.choices) == 2
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(prompt=prompts[:2], stream=True, **given):  # type: ignore[arg-type]
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[i] for i in range(4)] == wanted


def test_a_seed_says_the_same_each_time(client: OpenAI) -> None:
    def say(seed: int) -> str:
        return client.completions.create(model="tiny", prompt="a", max_tokens=12, seed=seed).choices[0].text

    assert say(1) == say(1) != say(2)


def test_stop_strings_span_tokens_and_end_the_request_in_the_engine(
    server: Server, client: OpenAI, offline: LLM
) -> None:
    wanted = greedy(offline, "Once upon", max_tokens=60)
    readable = [n for n in range(8, 40) if "\ufffd" not in wanted.text[n : n + 3]]
    stop = wanted.text[readable[0] : readable[0] + 3]
    given: Any = {"model": "tiny", "prompt": "Once upon", "temperature": 0, "max_tokens": 4000}
    for streamed in (False, True):
        answer: Any = client.completions.create(**given, stop=[stop, "never"], stream=streamed)
        choices = [c.choices[0] for c in answer] if streamed else answer.choices
        text = "".join(c.text for c in choices)
        assert text == wanted.text[: wanted.text.index(stop)]
        assert choices[-1].finish_reason == "stop"
        assert choices[-1].stop_reason == stop
    kept = client.completions.create(**given, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text.endswith(stop)
    server.wait_for("num_requests_running", 0)


def test_a_stop_token_is_counted_and_not_shown(client: OpenAI, offline: LLM) -> None:
    wanted = greedy(offline, "Once upon")
    token = wanted.token_ids[4]
    first = wanted.token_ids.index(token)
    answer: Any = client.completions.create(
        model="tiny", prompt="Once upon", temperature=0, max_tokens=20,
        extra_body={"stop_token_ids": [token], "return_token_ids": True},
    )  # fmt: skip
    assert answer.choices[0].stop_reason == token
    assert answer.choices[0].token_ids == wanted.token_ids[: first + 1]
    assert answer.usage.completion_tokens == first + 1
    assert wanted.text.startswith(answer.choices[0].text.rstrip("\ufffd"))


def test_logprobs(client: OpenAI, offline: LLM) -> None:
    wanted = greedy(offline, "Once upon", logprobs=3, max_tokens=5)
    found = client.completions.create(
        model="tiny", prompt="Once upon", temperature=0, max_tokens=5, logprobs=3
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    best = [entry[token].logprob for entry, token in zip(wanted.logprobs, wanted.token_ids, strict=True)]
    assert logprobs.token_logprobs == pytest.approx(best, abs=1e-4)
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 4
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob >= entry.top_logprobs[1].logprob
    assert b"".join(bytes(e.bytes or []) for e in content).decode("utf-8", "replace") == (
        chat.choices[0].message.content
    )


def test_echo_repeats_the_prompt_with_its_logprobs(client: OpenAI) -> None:
    given: Any = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 3, "echo": True}
    answer = client.completions.create(**given, logprobs=1)
    assert answer.choices[0].text.startswith("Once")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 7
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert None not in logprobs.token_logprobs[1:]
    streamed = "".join(c.choices[0].text for c in client.completions.create(**given, stream=True))
    assert streamed == answer.choices[0].text


def test_logit_bias_and_allowed_tokens(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="a", max_tokens=5, logit_bias={"65": 1000.0}, temperature=0
    )
    only = client.completions.create(
        model="tiny", prompt="a", max_tokens=5, extra_body={"allowed_token_ids": [65]}
    )
    assert answer.choices[0].text == only.choices[0].text
    assert len(set(only.choices[0].text)) == 1


def test_bad_words_never_appear(client: OpenAI, offline: LLM) -> None:
    wanted = greedy(offline, "Once upon")
    bad = next(wanted.text[n : n + 2] for n in range(18) if "\ufffd" not in wanted.text[n : n + 2])
    answer = client.completions.create(
        model="tiny", prompt="Once upon", temperature=0, max_tokens=20, extra_body={"bad_words": [bad]}
    )
    assert bad in wanted.text
    assert bad not in answer.choices[0].text


# --- the other endpoints -----------------------------------------------------------------


def test_models_and_version(client: OpenAI, server: Server) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny"
    assert client.models.retrieve("tiny").owned_by == "ostinato"
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")
    import ostinato

    assert json.loads(get(f"{server.url}/version")[1]) == {"version": ostinato.__version__}
    assert get(f"{server.url}/health")[0] == 200


def test_tokenize_and_back(server: Server, offline: LLM) -> None:
    text = "Grüße, the world\n"
    status, found, _ = post(f"{server.url}/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200
    tokenizer = offline.get_tokenizer()
    assert found["tokens"] == tokenizer.encode(text)
    assert found["count"] == len(found["token_strs"]) == len(found["tokens"])
    assert found["max_model_len"] == 4096
    assert post(f"{server.url}/detokenize", {"tokens": found["tokens"]})[1] == {"prompt": text}
    _, chat, _ = post(f"{server.url}/tokenize", {"messages": HELLO})
    assert chat["tokens"] == tokenizer.encode_chat(HELLO)


def test_graphs_as_data_and_as_a_page(server: Server) -> None:
    assert post(f"{server.url}/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3})[0] == 200
    status, data, headers = get(f"{server.url}/graphs")
    assert status == 200
    assert headers["content-type"] == "application/json"
    report = json.loads(data)["report"]
    assert report["model"] == "tiny"
    assert report["eager_by_reason"]["disabled"] > 0
    _, page, headers = get(f"{server.url}/graphs", {"accept": "text/html"})
    assert headers["content-type"].startswith("text/html")
    assert page.startswith(b"<!")


def test_the_command_line_reads_a_running_server(server: Server, tmp_path: Path) -> None:
    data, page = tmp_path / "r.json", tmp_path / "r.html"

    def graphs(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ostinato.cli", "graphs", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = graphs("--url", server.url, "--json", str(data), "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny on cpu")
    assert json.loads(data.read_text())["report"]["model"] == "tiny"
    assert page.read_text().startswith("<!")
    for args, words in (
        (["--url", server.url, "--audit"], "--audit"),
        (["--url", f"{server.url}/nothing"], "HTTP 404"),
        (["--url", "http://127.0.0.1:9"], "cannot be read"),
        (["--url", "nonsense"], "--url must be"),
    ):
        failed = graphs(*args)
        assert failed.returncode == (2 if words.startswith("--") else 1)
        assert words in failed.stderr
        assert failed.stderr.count("\n") == 1


def documented_commands() -> list[str]:
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text() + (root / "docs" / "server.md").read_text()
    return re.findall(r"^```\n(curl .*?)\n```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_as_in_the_documentation(server: Server) -> None:
    commands = documented_commands()
    assert len(commands) == 2
    for command in commands:
        assert "http://127.0.0.1:8000/" in command
        here = command.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["object"] in ("text_completion", "chat.completion"), answer
        assert answer["usage"]["completion_tokens"] > 0


def test_metrics_have_vllms_names(server: Server, client: OpenAI) -> None:
    before = {n: server.metric(n) for n in ("prompt_tokens_total", "generation_tokens_total")}
    client.completions.create(model="tiny", prompt="abc", max_tokens=7, extra_body={"ignore_eos": True})
    assert server.metric("generation_tokens_total") == before["generation_tokens_total"] + 7
    assert server.metric("prompt_tokens_total") == before["prompt_tokens_total"] + 3
    text = get(f"{server.url}/metrics")[1].decode()
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total", "request_success_total"),
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
        *("e2e_request_latency_seconds_sum", "request_prompt_tokens_count", "graph_memory_bytes"),
        *("cudagraph_iterations_total", "graph_capture_seconds", "cache_config_info"),
        *("time_per_output_token_seconds_bucket", "request_params_max_tokens_bucket"),
    ):
        assert f"\nostinato:{name}{{" in text, name
    assert 'model_name="tiny",reason="disabled"' in text


def test_tokens_of_steps_are_counted(server: Server, client: OpenAI) -> None:
    server.wait_for("num_requests_running", 0)
    steps, tokens = (f"iteration_tokens_total_{kind}" for kind in ("count", "sum"))
    before = {name: server.metric(name) for name in (steps, tokens)}
    client.completions.create(model="tiny", prompt="abc", max_tokens=7, extra_body={"ignore_eos": True})
    # Three prompt tokens in a step of their own, then a token a step; the last one is not computed.
    server.wait_for(steps, before[steps] + 7)
    server.wait_for(tokens, before[tokens] + 3 + 6)


def test_the_times_of_a_request_add_up(server: Server, client: OpenAI) -> None:
    names = ("queue", "prefill", "decode", "inference")
    totals = [f"request_{name}_time_seconds_sum" for name in names]
    totals += ["time_to_first_token_seconds_sum", "e2e_request_latency_seconds_sum"]
    counts = [f"request_{name}_time_seconds_count" for name in names]
    before = {name: server.metric(name) for name in (*totals, *counts)}
    n = 20  # more than run at once: some wait
    client.completions.create(model="tiny", prompt="abc", n=n, max_tokens=12, extra_body={"ignore_eos": True})
    grown = {name: server.metric(name) - value for name, value in before.items()}
    assert [grown[name] for name in counts] == [n] * 4
    queue, prefill, decode, inference, first, whole = (grown[name] for name in totals)
    assert min(queue, prefill, decode) > 0
    assert queue + prefill == pytest.approx(first)
    assert prefill + decode == pytest.approx(inference)
    assert queue + inference <= whole < queue + inference + 0.5 * n
    assert queue > 0.2 * whole, "12 of 20 waited for a row"


def test_tokens_of_prompts_and_of_the_longest_completion(server: Server, client: OpenAI) -> None:
    names = ("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens")
    kinds = [f"{name}_{kind}" for name in names for kind in ("sum", "count")]
    before = [server.metric(name) for name in kinds]
    client.completions.create(
        model="tiny", prompt=["abc", "defg"], n=2, max_tokens=5, extra_body={"ignore_eos": True}
    )
    grown = [server.metric(name) - value for name, value in zip(kinds, before, strict=True)]
    assert grown == [2 * 3 + 2 * 4, 4, 20, 4, 10, 2]


# --- errors ------------------------------------------------------------------------------


def test_errors_have_openais_shape_and_name_the_field(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", extra_body={"best_of": 2})
    assert caught.value.param == "best_of"
    assert caught.value.type == "invalid_request_error"
    assert "best_of" in caught.value.message
    with pytest.raises(NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"


# --- aborts ------------------------------------------------------------------------------


def test_leaving_a_stream_frees_its_blocks(server: Server, client: OpenAI) -> None:
    given: Any = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(**given, stream=True)
    next(iter(stream))
    server.wait_for("num_requests_running", 1)
    before = server.metric("generation_tokens_total")
    stream.close()
    server.wait_for("num_requests_running", 0, seconds=5)
    server.wait_for("kv_cache_usage_perc", 0, seconds=5)
    assert server.metric("generation_tokens_total") - before < 2000


def test_a_client_that_gives_up_frees_its_blocks(server: Server) -> None:
    async def give_up() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            given: Any = {"model": "tiny", "prompt": "a", "max_tokens": 4000}
            task = asyncio.create_task(client.completions.create(**given, extra_body={"ignore_eos": True}))
            await asyncio.to_thread(server.wait_for, "num_requests_running", 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(give_up())
    server.wait_for("num_requests_running", 0, seconds=5)


def test_the_async_client_streams(server: Server, offline: LLM) -> None:
    async def say() -> str:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=20, temperature=0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    (wanted,) = offline.chat(HELLO, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert asyncio.run(say()) == wanted.outputs[0].text


def test_status_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="a" * 5000)
    assert caught.value.status_code == 400
    assert "max_model_len=4096" in str(caught.value)
