"""The public API on a CPU, every step checked by the strict runner."""

from __future__ import annotations

import linecache
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ostinato import LLM, RequestOutputKind, SamplingParams
from ostinato.errors import ConfigError, EngineDeadError, FallbackError, RequestError
from ostinato.types import Reason

Tiny = Callable[[str], tuple[Path, Any]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def tiny_llm(tiny: Tiny, name: str = "llama3", **options: Any) -> LLM:
    defaults = {"skip_tokenizer_init": True, "strict": True, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(str(tiny(name)[0]), **defaults | options)


def prompts(count: int, low: int = 1, high: int = 60) -> list[list[int]]:
    return [torch.randint(3, 151, (int(torch.randint(low, high, ())),)).tolist() for _ in range(count)]


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


@pytest.fixture(scope="module")
def smol() -> Iterator[LLM]:
    """The default model, with its own tokenizer."""
    llm = LLM(strict=True, max_num_seqs=8, max_model_len=512, max_num_batched_tokens=256)
    yield llm
    llm.close()


# --- results ---------------------------------------------------------------------------


def test_the_program_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(model=None, enable_cuda_graph=True)
    outputs = llm.generate(["Hello, my name is"], SamplingParams(temperature=0.8, top_p=0.95))
    assert outputs[0].prompt == "Hello, my name is"
    assert len(outputs[0].outputs[0].token_ids) == 16
    assert outputs[0].outputs[0].text
    assert "prompts" in capsys.readouterr().err  # the progress bar


def test_mixed_prompts_keep_their_order_and_their_parameters(
    smol: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    tok = smol.get_tokenizer()
    text = ["The capital of France is", "Two plus two is", "Water boils at"]
    given = [text[0], tok.encode(text[1]), {"prompt": text[2]}]
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (9, 3, 6)]
    outputs = smol.generate(given, params, use_tqdm=False)
    assert capsys.readouterr().err == ""
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 3, 6]
    assert [o.prompt for o in outputs] == [text[0], None, text[2]]
    assert [o.prompt_token_ids for o in outputs] == [tok.encode(t) for t in text]
    for output, prompt in zip(outputs, text, strict=True):
        alone = smol.generate(prompt, SamplingParams(temperature=0.0, max_tokens=9), use_tqdm=False)[0]
        n = len(output.outputs[0].token_ids)
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids[:n]
        assert output.outputs[0].text == tok.decode(output.outputs[0].token_ids)
        assert output.finished


def test_chat_answers_a_question(smol: LLM) -> None:
    (output,) = smol.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        SamplingParams(temperature=0.0, max_tokens=30),
        use_tqdm=False,
    )
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None
    assert output.outputs[0].token_ids[-1] in smol.engine.eos_token_ids


def test_several_chats_in_one_call(smol: LLM) -> None:
    ask = [[{"role": "user", "content": f"Name a {thing}."}] for thing in ("colour", "river")]
    outputs = smol.chat(ask, SamplingParams(temperature=0.0, max_tokens=5), use_tqdm=False)
    assert len(outputs) == 2
    assert outputs[0].prompt is not None
    assert "colour" in outputs[0].prompt


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_batches_chunks_and_lags_do_not_change_greedy_tokens(tiny: Tiny, depth: int) -> None:
    llm = tiny_llm(tiny, pipeline_depth=depth, max_num_batched_tokens=16)
    given = prompts(20)
    together = tokens(llm.generate(given, GREEDY, use_tqdm=False))
    alone = [tokens(llm.generate([p], GREEDY, use_tqdm=False))[0] for p in given]
    assert together == alone
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.allocator.usage == 0


@pytest.mark.parametrize("depth", [1, 3])
def test_preemption_recomputes_to_the_same_tokens(tiny: Tiny, depth: int) -> None:
    given = prompts(8, 20, 40)
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=60, ignore_eos=True, repetition_penalty=1.3)
    roomy = tiny_llm(tiny, pipeline_depth=depth)
    tight = tiny_llm(tiny, pipeline_depth=depth, num_gpu_blocks_override=18)
    assert tokens(tight.generate(given, params, use_tqdm=False)) == tokens(
        roomy.generate(given, params, use_tqdm=False)
    )
    assert tight.engine.scheduler.num_preemptions > 0
    tight.engine.scheduler.check()


def test_shared_prompts_are_computed_once(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    shared = torch.randint(3, 151, (48,)).tolist()
    first = llm.generate([[*shared, 7]], GREEDY, use_tqdm=False)[0]
    again = llm.generate([[*shared, 9], [*shared, 7]], GREEDY, use_tqdm=False)
    assert first.num_cached_tokens == 0
    assert [o.num_cached_tokens for o in again] == [48, 48]
    assert again[1].outputs[0].token_ids == first.outputs[0].token_ids
    fresh = torch.randint(3, 151, (50,)).tolist()
    before = llm.engine.scheduler.prefix_cache_hits
    many = llm.generate(fresh, SamplingParams(n=4, seed=1, max_tokens=4, ignore_eos=True), use_tqdm=False)[0]
    assert len(many.outputs) == 4
    assert llm.engine.scheduler.prefix_cache_hits - before == 3 * 48


def test_prefix_caching_can_be_off(tiny: Tiny) -> None:
    llm = tiny_llm(tiny, enable_prefix_caching=False)
    prompt = torch.randint(3, 151, (40,)).tolist()
    a, b = (llm.generate([prompt], GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 0)
    assert a.outputs[0].token_ids == b.outputs[0].token_ids


# --- sampling parameters ---------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_in_any_row(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    mine = SamplingParams(temperature=1.0, top_p=0.9, seed=42, max_tokens=20, ignore_eos=True)
    other = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    prompt = prompts(1)[0]
    alone = tokens(llm.generate([prompt], mine, use_tqdm=False))[0]
    for place in (0, 3, 6):
        batch = prompts(7)
        batch[place] = prompt
        chosen = [mine if i == place else other for i in range(7)]
        assert tokens(llm.generate(batch, chosen, use_tqdm=False))[place] == alone
    different = SamplingParams(temperature=1.0, top_p=0.9, seed=43, max_tokens=20, ignore_eos=True)
    assert tokens(llm.generate([prompt], different, use_tqdm=False))[0] != alone


def test_n_completions_are_those_of_consecutive_seeds(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    prompt = prompts(1)[0]
    (output,) = llm.generate(
        [prompt], SamplingParams(n=3, seed=10, max_tokens=10, ignore_eos=True), use_tqdm=False
    )
    assert [o.index for o in output.outputs] == [0, 1, 2]
    for i in range(3):
        single = SamplingParams(seed=10 + i, max_tokens=10, ignore_eos=True)
        assert tokens(llm.generate([prompt], single, use_tqdm=False))[0] == output.outputs[i].token_ids


def test_unseeded_requests_differ(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    prompt = prompts(1)[0]
    outputs = llm.generate([prompt] * 3, SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False)
    assert len({tuple(t) for t in tokens(outputs)}) == 3


def test_stop_strings_that_span_tokens(smol: LLM) -> None:
    base = SamplingParams(temperature=0.0, max_tokens=40)
    prompt = "The first three prime numbers are"
    whole = smol.generate(prompt, base, use_tqdm=False)[0].outputs[0]
    stop = whole.text[12:19]  # cuts across token boundaries
    at = whole.text.index(stop)
    for keep in (False, True):
        params = SamplingParams(
            temperature=0.0, max_tokens=40, stop=["never there", stop], include_stop_str_in_output=keep
        )
        found = smol.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert found.text == whole.text[: at + len(stop) * keep]
        assert (found.finish_reason, found.stop_reason) == ("stop", stop)
        assert len(found.token_ids) < len(whole.token_ids)


def test_stop_token_ids_and_min_tokens(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    prompt = prompts(1)[0]
    free = tokens(llm.generate([prompt], GREEDY, use_tqdm=False))[0]
    stop = free[4]
    (output,) = llm.generate(
        [prompt],
        SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[stop], ignore_eos=True),
        use_tqdm=False,
    )
    assert output.outputs[0].token_ids == free[: free.index(stop) + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    (output,) = llm.generate(
        [prompt],
        SamplingParams(temperature=0.0, max_tokens=12, min_tokens=8, stop_token_ids=[stop], ignore_eos=True),
        use_tqdm=False,
    )
    assert stop not in output.outputs[0].token_ids[:8]
    assert len(output.outputs[0].token_ids) >= 8


def test_bias_masks_and_penalties(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    prompt = prompts(1)[0]

    def run(**changes: Any) -> list[int]:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 15, "ignore_eos": True} | changes)
        return tokens(llm.generate([prompt], params, use_tqdm=False))[0]

    free = run()
    assert run(logit_bias={77: 1e4}) == [77] * 15
    assert free[0] not in run(logit_bias={free[0]: -1e4})
    assert set(run(allowed_token_ids=[5, 6, 150])) <= {5, 6, 150}
    assert len(set(run(frequency_penalty=2.0, presence_penalty=2.0))) >= len(set(free))
    assert len(set(run(repetition_penalty=50.0))) == 15  # nothing is ever said twice
    assert not set(run(repetition_penalty=50.0)) & set(prompt)


def test_bad_words_of_one_and_of_many_tokens(smol: LLM) -> None:
    tok = smol.get_tokenizer()
    prompt = "The capital of France is"
    free = (
        smol.generate(prompt, SamplingParams(temperature=0.0, max_tokens=20), use_tqdm=False)[0]
        .outputs[0]
        .text
    )
    assert "Paris" in free
    params = SamplingParams(temperature=0.0, max_tokens=20, bad_words=["Paris"])
    assert "Paris" not in smol.generate(prompt, params, use_tqdm=False)[0].outputs[0].text
    phrase = " ".join(free.split()[-3:-1])
    assert len(tok.encode(phrase, False)) > 1
    params = SamplingParams(temperature=0.0, max_tokens=20, bad_words=[phrase])
    assert phrase not in smol.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


def test_a_step_ahead_never_outruns_a_multi_token_bad_word(tiny: Tiny) -> None:
    free = tokens(tiny_llm(tiny).generate([[5, 6, 7]], GREEDY, use_tqdm=False))[0]
    for depth in (1, 3):
        llm = tiny_llm(tiny, pipeline_depth=depth)
        llm.engine._bad_words = lambda params: ((free[0], free[1]),)  # type: ignore[method-assign]
        got = tokens(
            llm.generate(
                [[5, 6, 7]],
                SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0),
                use_tqdm=False,
            )
        )[0]
        assert got[0] == free[0]
        assert all(pair != (free[0], free[1]) for pair in zip(got, got[1:], strict=False))


def test_without_detokenizing(smol: LLM) -> None:
    (output,) = smol.generate(
        "Hello", SamplingParams(max_tokens=4, detokenize=False, temperature=0.0), use_tqdm=False
    )
    assert output.outputs[0].text == ""
    assert len(output.outputs[0].token_ids) == 4


def test_max_tokens_none_runs_to_the_models_length(tiny: Tiny) -> None:
    llm = tiny_llm(tiny, max_model_len=40)
    (output,) = llm.generate(
        [[5] * 10], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True), use_tqdm=False
    )
    assert len(output.outputs[0].token_ids) == 30
    assert output.outputs[0].finish_reason == "length"


def test_every_family_of_parameters_at_once(tiny: Tiny) -> None:
    """One batch that mixes all three sampler variants: each row gets what it would get alone."""
    llm = tiny_llm(tiny, pipeline_depth=2)
    given = prompts(6)
    common = {"max_tokens": 10, "ignore_eos": True}
    mixed = [
        SamplingParams(temperature=0.0, **common),
        SamplingParams(seed=1, **common),
        SamplingParams(seed=2, top_k=5, min_p=0.01, **common),
        SamplingParams(seed=3, presence_penalty=1.5, logprobs=2, **common),
        SamplingParams(temperature=0.0, logit_bias={9: 3.0}, **common),
        SamplingParams(seed=4, allowed_token_ids=list(range(40)), **common),
    ]
    together = tokens(llm.generate(given, mixed, use_tqdm=False))
    assert together == [
        tokens(llm.generate([p], m, use_tqdm=False))[0] for p, m in zip(given, mixed, strict=True)
    ]


# --- streaming, refusal, failure -------------------------------------------------------


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_streaming_adds_up(smol: LLM, kind: RequestOutputKind) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=15, output_kind=kind)
    whole = smol.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=15), use_tqdm=False)[
        0
    ].outputs[0]
    pieces = [o.outputs[0] for o in smol.stream("Once upon a time", params)]
    if kind is RequestOutputKind.DELTA:
        assert "".join(p.text for p in pieces) == whole.text
        assert sum((p.token_ids for p in pieces), []) == whole.token_ids
        assert len(pieces) == 15
    elif kind is RequestOutputKind.CUMULATIVE:
        assert all(b.text.startswith(a.text) for a, b in zip(pieces, pieces[1:], strict=False))
        assert pieces[-1].text == whole.text
    else:
        assert [p.text for p in pieces] == [whole.text]


def test_leaving_a_stream_early_frees_everything(smol: LLM) -> None:
    for output in smol.stream("Once upon a time", SamplingParams(temperature=0.0, max_tokens=100)):
        if len(output.outputs[0].token_ids) == 3:
            break
    assert not smol.engine.has_unfinished
    assert smol.engine.scheduler.allocator.usage == 0
    assert smol.generate("Hello", GREEDY, use_tqdm=False)[0].finished


def test_a_bad_prompt_in_a_batch_is_refused_alone(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    llm = tiny_llm(tiny)
    good = prompts(2)
    outputs = llm.generate([good[0], [], [5, 9999], [5] * 300, good[1], ["a"]], GREEDY, use_tqdm=False)
    assert [o.error is None for o in outputs] == [True, False, False, False, True, False]
    assert tokens([outputs[0], outputs[4]]) == tokens(llm.generate(good, GREEDY, use_tqdm=False))
    for index, words in ((1, "empty"), (2, "9999"), (3, "300 tokens"), (5, "token ids")):
        assert isinstance(outputs[index].error, RequestError)
        assert f"prompt {index}: " in str(outputs[index].error)
        assert words in str(outputs[index].error)
        assert outputs[index].outputs[0].finish_reason == "error"
        assert f"prompt {index}: " in caplog.text


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ([-1], "-1"),
        ([151], "0 to 150"),
        ([5] * 256, "at most 255"),
        ("text", "no tokenizer"),
        ([1.5], "1.5"),
    ],
)
def test_a_lone_bad_prompt_raises(tiny: Tiny, prompt: Any, words: str) -> None:
    llm = tiny_llm(tiny)
    with pytest.raises(RequestError, match=words):
        llm.generate([prompt], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logit_bias": {500: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [151]}, "allowed_token_ids"),
        ({"allowed_token_ids": [2], "min_tokens": 1}, "allowed_token_ids: each of them ends the request"),
        ({"stop_token_ids": [151]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(3, 80))}, "at most 64"),
        ({"stop": "x"}, "tokenizer"),
    ],
)
def test_parameters_that_do_not_fit_the_model(tiny: Tiny, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tiny_llm(tiny).generate([[5]], SamplingParams(**changes), use_tqdm=False)


def test_lists_of_different_lengths(tiny: Tiny) -> None:
    with pytest.raises(RequestError, match="2 prompts but 1"):
        tiny_llm(tiny).generate([[5], [6]], [GREEDY])


def test_nothing_in_nothing_out(tiny: Tiny) -> None:
    assert tiny_llm(tiny).generate([], GREEDY) == []


def test_interrupt_ends_cleanly(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm(tiny, pipeline_depth=2)
    run, calls = llm.engine.runner.run, []

    def interrupted(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(batch)

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts(5), GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished
    llm.engine.scheduler.check()
    assert llm.engine.outputs.take_failed() == []
    given = prompts(3)
    assert tokens(llm.generate(given, GREEDY, use_tqdm=False)) == tokens(
        tiny_llm(tiny).generate(given, GREEDY, use_tqdm=False)
    )


def assert_untouched(llm: LLM, given: list[list[int]], wanted: list[list[int]]) -> None:
    """Nothing is left of a call that was interrupted, and the next one computes what it should."""
    assert llm._inbox == {}
    assert not llm.engine.scheduler.has_unfinished
    assert not llm.engine.outputs._prompts
    assert not llm.engine.outputs._request_ids
    assert tokens(llm.generate(given, GREEDY, use_tqdm=False)) == wanted
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.allocator.usage == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("where", ["schedule", "launch", "between", "commit", "in commit", "add"])
def test_interrupts_leave_nothing_behind(tiny: Tiny, where: str, depth: int) -> None:
    llm, given = tiny_llm(tiny, pipeline_depth=depth), prompts(4)
    wanted = tokens(llm.generate(given, GREEDY, use_tqdm=False))
    engine = llm.engine
    owner, name = {
        "schedule": (engine.scheduler, "schedule"),
        "launch": (engine.runner, "run"),
        "between": (llm, "_file"),
        "commit": (engine.scheduler, "commit"),
        "in commit": (engine.scheduler, "_finish"),
        "add": (engine.outputs, "add"),
    }[where]
    real, after = getattr(owner, name), where in ("schedule", "launch", "in commit", "add")
    for calls in range(1, 4):
        left = [calls]

        def interrupted(*args: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] == 0 and not after:
                raise KeyboardInterrupt
            result = real(*args)
            if left[0] == 0:
                raise KeyboardInterrupt  # its effects are there, its caller knows of none
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(given, GREEDY, use_tqdm=False)
        assert_untouched(llm, given, wanted)


def test_an_interrupt_at_any_line(tiny: Tiny) -> None:
    """Python raises KeyboardInterrupt between any two lines: here at lines drawn by lot."""
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    llm, given = tiny_llm(tiny, pipeline_depth=2), prompts(3)
    wanted = tokens(llm.generate(given, GREEDY, use_tqdm=False))
    files = {"llm.py", "engine.py", "scheduler.py", "outputs.py", "kv_blocks.py", "inputs.py", "runner.py"}

    def interrupt_at(count: int) -> tuple[int, str]:
        """Generate, interrupted at a line by number; (lines left to go, where it was)."""
        left, where = [count], [""]

        def trace(frame: Any, event: str, argument: Any) -> Any:
            file = Path(frame.f_code.co_filename)
            if file.name not in files or "ostinato" not in file.parts:
                return None
            # No signal is handled at `try`: it is no operation, and what it guards begins behind it.
            if event == "line" and linecache.getline(str(file), frame.f_lineno).strip() != "try:":
                left[0] -= 1
                if left[0] == 0:
                    where[0] = f"{file.name}:{frame.f_lineno}"
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            llm.generate(given, GREEDY, use_tqdm=False)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return left[0], where[0]

    most = 10**9
    lines, hits = most - interrupt_at(most)[0], 0
    for at in random.Random(seed).sample(range(1, lines), 60):
        where = interrupt_at(at)[1]
        print(at, where)
        hits += bool(where)  # what is cached changes how many lines there are: the last may not be reached
        assert_untouched(llm, given, wanted)
    assert hits > 50


def test_a_step_that_fails_answers_every_request(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm(tiny)
    stream = llm.stream([5, 6], GREEDY)
    next(stream)

    def broken(batch: Any) -> Any:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", broken)
        with pytest.raises(RuntimeError, match="on fire"):
            llm.generate(prompts(5), GREEDY, use_tqdm=False)
    with pytest.raises(RuntimeError, match="on fire"):  # the stream was not the one that stepped
        next(stream)
    assert llm.engine.outputs.take_failed() == []
    assert llm._inbox == {}
    assert len(llm.generate(prompts(2), GREEDY, use_tqdm=False)) == 2


def test_an_interrupt_ends_other_streams(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm(tiny)
    stream = llm.stream([5, 6], GREEDY)
    next(stream)

    def interrupted(batch: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[7]], GREEDY, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in stream] == ["abort"]
    assert llm._inbox == {}


# --- calls that overlap ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_call_inside_a_stream(tiny: Tiny, depth: int, kind: RequestOutputKind) -> None:
    llm = tiny_llm(tiny, pipeline_depth=depth)
    alone, other = (tokens(llm.generate([p], GREEDY, use_tqdm=False))[0] for p in ([5, 6], [7]))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, output_kind=kind)
    pieces = []
    for output in llm.stream([5, 6], params):
        pieces.append(output.outputs[0].token_ids)
        assert tokens(llm.generate([[7]], GREEDY, use_tqdm=False)) == [other]
    assert (sum(pieces, []) if kind is RequestOutputKind.DELTA else pieces[-1]) == alone
    assert llm._inbox == {}
    assert llm.engine.scheduler.allocator.usage == 0


def test_streams_side_by_side(tiny: Tiny) -> None:
    llm = tiny_llm(tiny, pipeline_depth=2)
    wanted = tokens(llm.generate([[5], [6]], GREEDY, use_tqdm=False))
    pairs = list(zip(llm.stream([5], GREEDY), llm.stream([6], GREEDY), strict=True))
    assert tokens(list(pairs[-1])) == wanted
    left, right = llm.stream([5], GREEDY), llm.stream([6], GREEDY)
    next(left), next(right)
    left.close()  # aborts its own request only
    assert tokens(list(right))[-1] == wanted[1]
    assert llm._inbox == {}


def test_two_threads(tiny: Tiny) -> None:
    llm = tiny_llm(tiny, pipeline_depth=2)
    given = [prompts(6) for _ in range(2)]
    wanted = [tokens(llm.generate(one, GREEDY, use_tqdm=False)) for one in given]
    found: list[list[list[list[int]]]] = [[], []]

    def work(mine: int) -> None:
        for _ in range(3):
            found[mine].append(tokens(llm.generate(given[mine], GREEDY, use_tqdm=False)))
            streamed = [list(llm.stream(p, GREEDY))[-1] for p in given[mine]]
            found[mine].append(tokens(streamed))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[one] * 6 for one in wanted]
    assert llm._inbox == {}
    llm.engine.scheduler.check()


def test_metrics_wait_for_the_step_of_another_thread(tiny: Tiny) -> None:
    """They walk counters that a step adds to."""
    llm = tiny_llm(tiny)
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(llm.get_metrics()))
    with llm._lock:
        thread.start()
        thread.join(0.2)
        assert found == []
    thread.join(60)
    assert found[0]["num_requests_running"] == 0


@pytest.mark.parametrize("batch", ["a", 1.5, True, [1], 0, -1], ids=repr)
def test_explaining_what_is_no_batch(tiny: Tiny, batch: Any) -> None:
    with pytest.raises(ConfigError, match="batch must be .*at least 1, got"):
        tiny_llm(tiny).explain(batch)


def test_a_stream_that_is_collected_during_a_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm(tiny)
    wanted = tokens(llm.generate([[6]], GREEDY, use_tqdm=False))
    stream, run = llm.stream([5], GREEDY), llm.engine.runner.run
    unfinished: list[int] = []
    next(stream)

    def collects(batch: Any) -> Any:
        stream.close()  # type: ignore[attr-defined]  # a generator
        unfinished.append(len(llm.engine.scheduler.unfinished))
        return run(batch)

    monkeypatch.setattr(llm.engine.runner, "run", collects)
    assert tokens(llm.generate([[6]], GREEDY, use_tqdm=False)) == wanted
    assert unfinished[:2] == [2, 1]  # aborted after the step, not in it
    assert not llm.engine.has_unfinished
    llm.engine.scheduler.check()


def test_a_request_that_the_engine_was_told_to_end(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    stream = llm.stream([5], GREEDY)
    running = next(stream).request_id
    llm.engine.abort([running])
    with pytest.raises(RequestError, match="ended"):
        list(stream)


# --- request ids -----------------------------------------------------------------------


def test_a_request_id_that_is_taken_leaves_nothing(tiny: Tiny) -> None:
    engine = tiny_llm(tiny).engine
    engine.add_request([5], GREEDY, "a-0")
    with pytest.raises(RequestError, match="'a-0' is already running"):
        engine.add_request([5], SamplingParams(n=2), "a")
    with pytest.raises(RequestError, match="'a-0' is already running"):
        engine.add_request([5], GREEDY, "a-0")
    assert "a" not in engine.outputs
    assert len(engine.scheduler.unfinished) == 1
    engine.abort(["a-0"])
    assert engine.add_request([5], SamplingParams(n=2), "a") == "a"  # free again
    engine.close()


def test_a_request_that_cannot_be_queued_leaves_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_llm(tiny).engine
    add = engine.scheduler.add

    def full(request: Any) -> None:
        if request.index == 1:
            raise RequestError("full")
        add(request)

    monkeypatch.setattr(engine.scheduler, "add", full)
    with pytest.raises(RequestError, match="full"):
        engine.add_request([5], SamplingParams(n=3), "a")
    assert "a" not in engine.outputs
    assert not engine.has_unfinished


def test_the_engines_own_ids_skip_those_in_use(tiny: Tiny) -> None:
    engine = tiny_llm(tiny).engine
    engine.add_request([5], GREEDY, "1")
    engine.add_request([5], GREEDY, "2-1")
    assert engine.add_request([5], SamplingParams(n=2)) == "3"
    assert engine.add_request([5], GREEDY) == "4"
    engine.close()


def test_fail_on_fallback_names_the_reason(tiny: Tiny) -> None:
    llm = tiny_llm(tiny, fail_on_fallback=True)
    with pytest.raises(FallbackError, match="disabled"):
        llm.generate([[5]], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished


def test_a_closed_llm_says_so(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    llm.close()
    with pytest.raises(EngineDeadError, match="^this LLM was closed; make a new one$"):
        llm.generate([[5]], GREEDY)


def test_closing_ends_open_streams(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    stream = llm.stream([5], GREEDY)
    next(stream)
    llm.close()
    assert [o.outputs[0].finish_reason for o in stream] == ["abort"]
    assert llm.engine.outputs.take_failed() == []


def test_every_step_is_accounted_for(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    (output,) = llm.generate([[5, 6]], GREEDY, use_tqdm=False)
    metrics = llm.get_metrics()
    assert metrics["eager_steps"] == {Reason.DISABLED.value: 12}
    assert metrics["graph_steps"] == {}
    assert output.metrics is not None
    assert output.metrics.eager_steps == {"disabled": 12}
    assert output.metrics.graph_steps == 0
    assert set(metrics["memory_bytes"]) == {"weights", "arena", "static inputs and step state", "KV cache"}


def test_a_request_that_depends_on_the_host_says_how_often_it_sat_out() -> None:
    """bad_words of several tokens: its next mask needs its last token, so it runs at every second step."""
    llm = LLM(pipeline_depth=2, max_num_seqs=4, max_model_len=256, max_num_batched_tokens=128)
    params = [
        SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, bad_words=words)
        for words in (["a phrase of several tokens"], None)
    ]
    tied, free = llm.generate(["Once upon a time", "Twice"], params, use_tqdm=False)
    assert tied.metrics is not None
    assert free.metrics is not None
    assert tied.metrics.delays["host_dependency"] >= 8
    assert free.metrics.delays == {}
    assert llm.get_metrics()["delayed_steps"] == tied.metrics.delays
    assert "sat out" in llm.explain()
    assert "host_dependency" in llm.explain()
    llm.close()


def test_refused_prompts_are_named_by_their_place(tiny: Tiny) -> None:
    llm = tiny_llm(tiny)
    outputs = llm.generate([[5], [10**6], [6, 7], []], GREEDY, use_tqdm=False)
    assert [o.request_id.startswith("refused-") for o in outputs] == [False, True, False, True]
    assert (outputs[1].request_id, outputs[3].request_id) == ("refused-1", "refused-3")
    assert [str(outputs[i].error).split(":")[0] for i in (1, 3)] == ["prompt 1", "prompt 3"]
    llm.close()
