"""What a stranger does: odd values, tiny limits, calls abandoned half way. All on the strict runner."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ostinato import LLM, RequestOutputKind, SamplingParams
from ostinato.errors import CheckpointError, OstinatoError, RequestError, TokenizerError
from ostinato.tokenizer import Tokenizer
from tests.integration.test_cli import hear_ctrl_c

Tiny = Callable[[str], tuple[Path, Any]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def tiny_llm(tiny: Tiny, **options: Any) -> LLM:
    defaults = {"skip_tokenizer_init": True, "strict": True, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(str(tiny("llama3")[0]), **defaults | options)


@pytest.fixture(scope="module")
def smol() -> Iterator[LLM]:
    """The default model, with its own tokenizer."""
    llm = LLM(strict=True, max_num_seqs=4, max_model_len=256, max_num_batched_tokens=128)
    yield llm
    llm.close()


def left_behind(llm: LLM) -> bool:
    """Whether a call left a request or a block in use."""
    llm.engine.scheduler.check()
    return llm.engine.has_unfinished or llm.engine.scheduler.allocator.usage > 0


# --- prompts ---------------------------------------------------------------------------


def test_token_ids_as_arrays(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    forms = [[5, 6, 7], (5, 6, 7), range(5, 8), np.array([5, 6, 7]), torch.tensor([5, 6, 7])]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    rows = llm.generate(torch.tensor([[5, 6], [7, 8]]), GREEDY, use_tqdm=False)  # type: ignore[arg-type]
    assert [o.prompt_token_ids for o in rows] == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    "prompt",
    [
        b"bytes",
        None,
        5,
        1.5,
        object(),
        {},
        {"prompts": "x"},
        {"prompt": None},
        [[1]],
        [1, "a"],
        [True],
        [10**30],
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused_and_the_rest_runs(tiny: Tiny, prompt: Any) -> None:
    llm = tiny_llm(tiny)
    good, bad = llm.generate([[5, 6], prompt], GREEDY, use_tqdm=False)
    assert good.error is None
    assert isinstance(bad.error, RequestError)
    assert str(bad.error).startswith("prompt 1: ")
    assert not left_behind(llm)


@pytest.mark.parametrize(
    "prompts",
    [None, 5, b"Hello", bytearray(b"Hello"), np.int64(5), torch.tensor(5), SamplingParams, {1: 2, "a": 3}],
    ids=repr,
)
def test_what_are_no_prompts(smol: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        smol.generate(prompts, GREEDY, use_tqdm=False)
    assert not left_behind(smol)


@pytest.mark.parametrize("prompt", [torch.tensor(5), np.int64(5), np.array([1.5]), b"x", memoryview(b"x")])
def test_the_others_run_beside_what_is_no_prompt(smol: LLM, prompt: Any) -> None:
    good, bad = smol.generate(["Hello", prompt], GREEDY, use_tqdm=False)
    assert good.error is None
    assert isinstance(bad.error, RequestError)


@pytest.mark.parametrize("ids", [np.array([5, 6, 7]), torch.tensor([5, 6, 7]), [np.int64(5), 6, 7]], ids=repr)
def test_an_array_is_one_prompt(tiny: Tiny, ids: Any) -> None:
    (output,) = tiny_llm(tiny).generate(ids, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == [5, 6, 7]


def test_a_failure_while_adding_leaves_nothing_queued(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm(tiny)
    check = llm.engine._check

    def broken(ids: tuple[int, ...], params: SamplingParams) -> None:
        check(ids, params)
        if ids == (7,):
            raise MemoryError

    monkeypatch.setattr(llm.engine, "_check", broken)
    with pytest.raises(MemoryError):
        llm.generate([[5], [6], [7]], GREEDY, use_tqdm=False)
    assert not left_behind(llm)


def test_a_lone_surrogate_is_no_text(smol: LLM) -> None:
    for call in (
        lambda: smol.generate("a\ud800", GREEDY, use_tqdm=False),
        lambda: smol.chat([{"role": "user", "content": "\ud800"}], GREEDY, use_tqdm=False),
    ):
        with pytest.raises(
            RequestError, match=r"the prompt contains a lone surrogate .* at position \d+: it"
        ):
            call()
    with pytest.raises(RequestError, match="bad_words.* contains a lone surrogate"):
        smol.generate("a", SamplingParams(bad_words=["\ud800"]), use_tqdm=False)
    assert not left_behind(smol)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "got int"),
        ((SamplingParams() for _ in range(1)), "got generator"),
        (SamplingParams, "got the class SamplingParams itself"),
        ({"max_tokens": 5}, "got dict"),
        ({}, "got dict"),
        ("x", "got str"),
        ([5], r"sampling_params\[0\] must be a SamplingParams, got int"),
    ],
    ids=str,
)
def test_what_are_no_sampling_params(smol: LLM, given: Any, words: str) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    for call in (
        lambda: smol.generate("Hello", given, use_tqdm=False),
        lambda: smol.chat(hello, given, use_tqdm=False),
        lambda: list(smol.stream("Hello", given)),
    ):
        with pytest.raises(RequestError, match=f"sampling_params.*{words}|{words}"):
            call()
    assert not left_behind(smol)


@pytest.mark.parametrize(
    "messages", [None, 5, {"role": "user"}, (m for m in ()), "Hello", b"Hello"], ids=repr
)
def test_what_are_no_messages(smol: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages must be a list like"):
        smol.chat(messages, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "must be a dict"),
        ({1: 2}, "must be a dict"),
        ({"messages": []}, "'messages'"),
        ({"tools": []}, "'tools'"),
        ({"add_generation_prompt": True}, "'add_generation_prompt'"),
        ({"chat_template": "x"}, "chat_template.jinja"),
        ({"self": 1}, "'self'"),
    ],
)
def test_what_are_no_template_variables(smol: LLM, given: Any, words: str) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    with pytest.raises(RequestError, match=f"^chat_template_kwargs.*{words}"):
        smol.chat(hello, GREEDY, use_tqdm=False, chat_template_kwargs=given)


def test_a_bad_conversation_is_called_one(smol: LLM) -> None:
    good = [{"role": "user", "content": "Hello"}]
    outputs = smol.chat([good, [5]], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    assert outputs[0].error is None
    assert str(outputs[1].error).startswith("conversation 1: messages[0]")
    with pytest.raises(RequestError, match="2 conversations but 1"):
        smol.chat([good, good], [GREEDY])


def test_a_model_without_a_chat_template(smol: LLM) -> None:
    tokenizer = Tokenizer(smol.get_tokenizer()._library, source="here")
    with pytest.raises(TokenizerError, match="no chat template") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert "/v1" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", ["2"], {"a": 2}, True, 2.0, list(range(70))], ids=str)
def test_end_of_sequence_ids_that_are_none(tiny: Tiny, tmp_path: Path, file: str, value: Any) -> None:
    folder = Path(shutil.copytree(tiny("llama3")[0], tmp_path / "model"))
    path = folder / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {"eos_token_id": value}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        LLM(str(folder), skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages must be a list like"),
        ([[]], "messages is empty"),
        ([{"role": None, "content": "x"}], "role"),
        ([{"content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 5}], "must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "only parts of type"),
        ([{"role": "user", "content": "x"}, "hello"], r"messages\[1\]"),
        ([{"role": "user", "content": "word " * 2000}], "max_model_len=256"),
    ],
)
def test_what_is_no_conversation(smol: LLM, messages: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        smol.chat(messages, GREEDY, use_tqdm=False)


def test_a_role_that_only_the_template_could_refuse(smol: LLM) -> None:
    (output,) = smol.chat([{"role": "wizard", "content": "Hi"}], GREEDY, use_tqdm=False)
    assert output.prompt is not None
    assert "wizard" in output.prompt


# --- parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_seeds_at_the_ends(tiny: Tiny, seed: int) -> None:
    llm = tiny_llm(tiny)
    params = SamplingParams(n=3, seed=seed, max_tokens=8, ignore_eos=True)
    a, b = ([o.token_ids for o in llm.generate([[5]], params, use_tqdm=False)[0].outputs] for _ in range(2))
    assert a == b
    assert len({tuple(ids) for ids in a}) == 3


def test_very_long_and_very_many_stop_strings(smol: LLM) -> None:
    plain = smol.generate("Once upon a time", GREEDY, use_tqdm=False)[0].outputs[0].text
    stops = ["x" * 10_000, *(plain[-4:] + "y" * 1000 + str(i) for i in range(100))]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, stop=stops)
    assert smol.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0].text == plain


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_what_was_held_back_for_a_stop_string_is_given_back(smol: LLM, kind: RequestOutputKind) -> None:
    prompt = "One two three"
    plain = smol.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text
    params = SamplingParams(
        temperature=0.0, max_tokens=6, ignore_eos=True, stop=plain[-3:] + "zzz", output_kind=kind
    )
    pieces = [o.outputs[0] for o in smol.stream(prompt, params)]
    delta = kind is RequestOutputKind.DELTA
    assert ("".join(p.text for p in pieces) if delta else pieces[-1].text) == plain
    assert pieces[-1].finish_reason == "length"


def test_a_stop_string_before_min_tokens_is_passed_over(smol: LLM) -> None:
    prompt = "One two three"
    plain = smol.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0]
    params = SamplingParams(temperature=0.0, max_tokens=6, min_tokens=6, ignore_eos=True, stop=plain.text[:2])
    found = smol.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    assert (found.text, found.finish_reason) == (plain.text, "length")


def test_prompt_logprobs_do_not_come_out_of_the_prefix_cache(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    prompt = torch.randint(3, 151, (50,)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2, ignore_eos=True)
    first, again, plain = (llm.generate([prompt], p, use_tqdm=False)[0] for p in (params, params, GREEDY))
    assert [o.num_cached_tokens for o in (first, again, plain)] == [0, 0, 48]
    assert again.prompt_logprobs is not None
    assert len(again.prompt_logprobs) == 50
    assert again.prompt_logprobs == first.prompt_logprobs


def test_logprobs_of_several_completions(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    params = SamplingParams(n=3, seed=1, max_tokens=5, logprobs=2, ignore_eos=True)
    (output,) = llm.generate([[5, 6]], params, use_tqdm=False)
    for completion in output.outputs:
        assert completion.logprobs is not None
        chosen = [at[t].logprob for at, t in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert sum(chosen) == pytest.approx(completion.cumulative_logprob)


def test_both_halves_of_a_seed_count(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    seeds = (0, -(2**63), -1, 2**63 - 1)  # two pairs that share their low 32 bits
    params = [SamplingParams(seed=seed, max_tokens=8, ignore_eos=True) for seed in seeds]
    outputs = llm.generate([[5]] * 4, params, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 4


def test_min_tokens_to_the_token(tiny: Tiny) -> None:
    """A stop token may be token number min_tokens + 1, and no earlier one."""
    llm = tiny_llm(tiny)
    for least in (0, 1, 4):
        params = SamplingParams(temperature=0.0, max_tokens=8, min_tokens=least, logit_bias={2: 1e4})
        (output,) = llm.generate([[5, 6]], params, use_tqdm=False)
        ids = output.outputs[0].token_ids
        assert ids.index(2) == least
        assert len(ids) == least + 1
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


def test_ignore_eos_goes_on(tiny: Tiny) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logit_bias={2: 1e4})
    (output,) = tiny_llm(tiny).generate([[5, 6]], params, use_tqdm=False)
    assert output.outputs[0].token_ids == [2] * 5
    assert output.outputs[0].finish_reason == "length"


def test_delta_logprobs_belong_to_the_delta(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    params = SamplingParams(
        temperature=0.0, max_tokens=5, logprobs=1, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    for output in llm.stream([5, 6], params):
        (piece,) = output.outputs
        assert piece.logprobs is not None
        assert len(piece.logprobs) == len(piece.token_ids) == 1
        assert piece.token_ids[0] in piece.logprobs[0]


def test_several_completions_repeat_their_prompt_and_are_timed(smol: LLM) -> None:
    (output,) = smol.generate(
        "Hello", SamplingParams(n=2, seed=0, max_tokens=8, ignore_eos=True), use_tqdm=False
    )
    assert output.prompt == "Hello"
    metrics = output.metrics
    assert metrics is not None
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    first, rest = (
        metrics.first_token_time - metrics.arrival_time,
        metrics.finished_time - metrics.first_token_time,
    )
    assert first > 0.0
    assert rest > first / 100  # seven more steps: the first token is not the last


# --- limits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"num_gpu_blocks_override": 4, "max_model_len": 48},
        {"num_gpu_blocks_override": 4, "max_model_len": 48, "pipeline_depth": 3},
        {"block_size": 256, "max_model_len": 200},
        {"block_size": 8, "num_gpu_blocks_override": 7, "max_model_len": 48, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_many_completions_under_tiny_limits(tiny: Tiny, options: dict[str, Any]) -> None:
    params = SamplingParams(n=8, seed=1, max_tokens=15, ignore_eos=True)
    wanted = tiny_llm(tiny).generate([[5] * 30], params, use_tqdm=False)[0]
    llm = tiny_llm(tiny, **options)
    (output,) = llm.generate([[5] * 30], params, use_tqdm=False)
    assert [o.token_ids for o in output.outputs] == [o.token_ids for o in wanted.outputs]
    assert not left_behind(llm)


def test_a_stream_that_nobody_reads_to_its_end(smol: LLM) -> None:
    stream = smol.stream("Once upon a time", SamplingParams(temperature=0.0, max_tokens=100))
    next(stream)
    del stream
    assert smol.generate("Hello", GREEDY, use_tqdm=False)[0].finished
    assert not left_behind(smol)


# --- the command line ------------------------------------------------------------------

RUN = [sys.executable, "-m", "ostinato.cli"]


def test_an_argument_that_is_not_utf_8() -> None:
    done = subprocess.run([*RUN, "chat", b"\xff\xfe"], capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_ctrl_c_while_loading() -> None:
    process = subprocess.Popen(
        [*RUN, "generate", "x", "--verbose"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    assert process.stderr is not None
    assert "open" in process.stderr.readline()  # the first stage of the start is done
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "options",
    [{"model": ""}, {"model": "a b"}, {"dtype": None}, {"device": "cuda:7"}, {"block_size": "16"}],
    ids=str,
)
def test_options_of_the_wrong_type_or_form(tiny: Tiny, options: dict[str, Any]) -> None:
    with pytest.raises(OstinatoError):
        LLM(**{"model": str(tiny("llama3")[0]), "skip_tokenizer_init": True} | options)
