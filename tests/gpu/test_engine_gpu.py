"""The engine on a GPU: graph against eager bit for bit, capture, lags, families."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ostinato import LLM, SamplingParams
from ostinato.errors import CaptureError
from ostinato.graphs.results import ResultRing
from ostinato.types import StepKind

pytestmark = pytest.mark.gpu


def default_model() -> str | None:
    """The default model's file, where a machine without network was given one."""
    return os.environ.get("OSTINATO_TEST_MODEL")


def make(**options: Any) -> LLM:
    # Without prefix caching, so that a second run computes what the first did, at the same shapes.
    defaults = {"max_num_seqs": 40, "max_model_len": 512, "max_num_batched_tokens": 512}
    defaults |= {"kv_cache_memory_bytes": 1 << 30, "enable_prefix_caching": False}
    return LLM(**{"model": default_model(), **defaults, **options})


def default_by_transformers() -> Any:
    """The default model as transformers has it, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ostinato.models.checkpoint import open_checkpoint
    from ostinato.models.hub import resolve

    checkpoint = open_checkpoint(resolve(default_model()))
    keep = {k: v for k, v in checkpoint.config.items() if k not in ("architectures", "model_type", "dtype")}
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**keep)).to(torch.bfloat16).eval()
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    return model


def random_prompts(vocab: int, count: int, seed: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=g).tolist()
    return [torch.randint(0, vocab, (n,), generator=g).tolist() for n in lengths]


def traced(
    llm: LLM, prompts: list[list[int]], params: SamplingParams
) -> tuple[list[list[int]], list[tuple[str, torch.Tensor]]]:
    """Tokens, and (key, logits of the live rows) of every decode step, in order.

    No logits ([0]) of a step that keeps none.
    """
    engine, steps = llm.engine, []
    runner = engine.runner
    program = getattr(runner, "eager", runner).program
    run = runner.run

    def recording(batch: Any) -> Any:
        pending = run(batch)
        if batch.key.kind is StepKind.DECODE:
            scratch = program.arena.view(batch.num_tokens, batch.num_seqs)
            live = batch.state.emitted[: batch.num_seqs] >= 0
            kept = scratch.logits[live].clone() if program.keeps_logits(batch.key) else scratch.logits[:0]
            steps.append((str(batch.key), kept))
        return pending

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run", recording)
        patch.setattr(runner, "again", lambda batch: None)  # each step goes through `run`
        outputs = llm.generate(prompts, params, use_tqdm=False)
    torch.cuda.synchronize()
    return [o.outputs[0].token_ids for o in outputs], steps


def decode_steps(llm: LLM) -> int:
    """Decode steps that ran on a graph."""
    return sum(n for key, n in llm.engine.plan.graph_steps.items() if key.kind is StepKind.DECODE)


SAMPLERS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    "sample": SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24, ignore_eos=True),
    "full": SamplingParams(
        temperature=0.8, top_k=40, seed=7, repetition_penalty=1.2, max_tokens=24, ignore_eos=True
    ),
}


@contextlib.contextmanager
def make_pair(build: Callable[..., LLM]) -> Iterator[tuple[LLM, LLM]]:
    """A model twice: on graphs, and eagerly at the same keys.

    Without the one-kernel step, which only one engine of a process has.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OSTINATO_FUSED", "0")
        graph, eager = build(), build(enforce_eager=True)
    try:
        yield graph, eager
    finally:
        graph.close()
        eager.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[LLM, LLM]]:
    """The default model."""
    with make_pair(make) as made:
        yield made


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batch", [1, 3, 8, 33])
def test_graph_and_eager_are_equal_bit_for_bit(pair: Any, batch: int, sampler: str) -> None:
    assert_equal_bit_for_bit(pair, batch, sampler)


@pytest.fixture(scope="module")
def wide_pair() -> Iterator[tuple[LLM, LLM]]:
    """Random weights, and room for as many rows as a step may have."""
    options = {"model": "smollm2-135m", "load_format": "dummy", "max_num_seqs": 256}
    options |= {"max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 2 << 30}
    with make_pair(partial(make, **options)) as made:
        yield made


@pytest.mark.parametrize(("batch", "sampler"), [(129, "greedy"), (200, "sample"), (256, "full")])
def test_many_rows_are_equal_bit_for_bit(wide_pair: Any, batch: int, sampler: str) -> None:
    assert_equal_bit_for_bit(wide_pair, batch, sampler)
    records = wide_pair[0].engine.plan.book.captured
    assert all(r.trusted and not r.mismatches for r in records), records


def assert_equal_bit_for_bit(pair: tuple[LLM, LLM], batch: int, sampler: str) -> None:
    """Tokens and logits of every decode step, all of which run on graphs in the first engine."""
    graph, eager = pair
    prompts = random_prompts(graph.engine.spec.vocab_size, batch, seed=batch)
    for _ in range(2):  # first hits, capture, checks
        graph.generate(prompts, SAMPLERS[sampler], use_tqdm=False)
    with graph.engine.device_context():
        graph.engine.runner.cache.settle()  # a trial right behind a step would overwrite what it left
    before = decode_steps(graph)
    on_graph, graph_steps = traced(graph, prompts, SAMPLERS[sampler])
    by_hand, eager_steps = traced(eager, prompts, SAMPLERS[sampler])
    assert decode_steps(graph) - before == len(graph_steps), "every decode step ran on a graph"
    assert [key for key, _ in graph_steps] == [key for key, _ in eager_steps]
    for (key, a), (_, b) in zip(graph_steps, eager_steps, strict=True):
        # the sampler with everything overwrites its logits, on both sides alike
        assert torch.equal(a, b), f"{key}: logits differ by {(a - b).abs().max().item()}"
    assert on_graph == by_hand
    outputs = graph.generate(prompts, SAMPLERS[sampler], use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == by_hand, "steps that only repeat the one before"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_one_kernel_step_is_equal_on_a_graph(sampler: str) -> None:
    """One engine after the other, as only one has it: tokens, logits where kept, and all of the KV cache."""
    found = []
    for eager in (False, True):
        llm = make(enforce_eager=eager, max_num_seqs=1)
        try:
            program = llm.engine.program
            if not program.ops.fuses(program.model, 1):
                pytest.skip("needs Hopper and NVRTC")
            (prompt,) = random_prompts(llm.engine.spec.vocab_size, 1, seed=1)
            for _ in range(2):
                llm.generate([prompt], SAMPLERS[sampler], use_tqdm=False)
            before = decode_steps(llm)
            tokens, steps = traced(llm, [prompt], SAMPLERS[sampler])
            assert decode_steps(llm) - before == (0 if eager else len(steps))
            used = -(-(len(prompt) + len(tokens[0])) // llm.engine.config.block_size)
            found.append((tokens, steps, _kv(llm, used)))
        finally:
            llm.close()
        del llm, program
    (tokens, steps, kv), (other, other_steps, other_kv) = found
    assert tokens == other
    for (key, a), (other_key, b) in zip(steps, other_steps, strict=True):
        assert key == other_key
        assert torch.equal(a, b), key
    assert torch.equal(kv, other_kv)


def _kv(llm: LLM, blocks: int) -> torch.Tensor:
    """Keys and values of the blocks that an engine hands out first, which one sequence used."""
    return llm.engine.program.cache.data[:, :, 1 : 1 + blocks].clone()


def test_threads_that_never_used_the_gpu_get_the_same(pair: Any) -> None:
    graph, _ = pair
    prompts = random_prompts(graph.engine.spec.vocab_size, 3, seed=3)

    def tokens() -> list[list[int]]:
        return [o.outputs[0].token_ids for o in graph.generate(prompts, SAMPLERS["greedy"], use_tqdm=False)]

    wanted = [tokens() for _ in range(3)][-1]
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(tokens).result() == wanted


def test_steps_that_repeat_the_one_before_in_any_thread_and_under_the_profiler(pair: Any) -> None:
    """Without the engine's stream being current, and from a thread that has not used the GPU before."""
    graph, _ = pair
    engine, params = graph.engine, SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    wanted = [list(graph.stream([5, 6, 7], params))[-1].outputs[0].token_ids for _ in range(3)][-1]
    again, repeats = ResultRing.again, []

    def counting(*args: Any) -> Any:
        repeats.append(args)
        return again(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResultRing, "again", counting)
        engine.add_request([5, 6, 7], params)
        outputs = [output for _ in range(30) for output in engine.step()]
        assert len(repeats) > 10
        with ThreadPoolExecutor(1) as pool:
            outputs += pool.submit(lambda: [output for _ in range(20) for output in engine.step()]).result()
        assert len(repeats) > 25
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(8):
                outputs += engine.step()
            torch.cuda.synchronize()
        assert sum(e.device_time for e in profiler.events()) > 0, "the profiler saw no kernel"
        while engine.has_unfinished:
            outputs += engine.step()
    assert len(repeats) > 70
    assert outputs[-1].outputs[0].token_ids == wanted


def test_every_key_was_checked_and_none_differed(pair: Any) -> None:
    graph, _ = pair
    for batch in (1, 3):  # where this test runs alone
        for _ in range(2):
            graph.generate(
                random_prompts(graph.engine.spec.vocab_size, batch, seed=batch),
                SAMPLERS["greedy"],
                use_tqdm=False,
            )
    with graph.engine.device_context():
        graph.engine.runner.cache.settle()
    records = graph.engine.plan.book.captured
    assert records
    assert all(r.trusted and r.checks and not r.mismatches for r in records), records
    assert not graph.engine.runner.cache.capture_failures  # a capture that allocates is a failure


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_lags_change_nothing(depth: int) -> None:
    # float32 and few candidates: other lags batch other rows together, so logits differ in their last
    # bits, and a draw that falls between two of 49,152 tokens would go either way.
    eager = make(enforce_eager=True, pipeline_depth=1, dtype="float32")
    prompts = random_prompts(eager.engine.spec.vocab_size, 20, seed=100)
    params = [
        SamplingParams(
            temperature=0.4 * (i % 3),
            top_k=8,
            seed=i,
            max_tokens=5 + i,
            ignore_eos=True,
            logprobs=2 if i % 5 == 0 else None,
        )
        for i in range(20)
    ]
    llm = make(pipeline_depth=depth, dtype="float32")
    try:
        for _ in range(3):  # eager first hits, then captures, then replays
            got = llm.generate(prompts, params, use_tqdm=False)
            for output, one in zip(got, params, strict=True):
                assert len(output.outputs[0].token_ids) == one.max_tokens
        wanted = eager.generate(prompts, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in wanted]
        llm.engine.scheduler.check()
        assert llm.engine.plan.graph_steps.total() > 0
    finally:
        llm.close()
        eager.close()


def test_text_of_the_default_model(pair: Any) -> None:
    graph, _ = pair
    (output,) = graph.generate(
        ["The capital of France is"],
        SamplingParams(temperature=0.0, max_tokens=30),
        use_tqdm=False,
    )
    assert "Paris" in output.outputs[0].text
    assert output.metrics.graph_steps > 0
    assert output.metrics.time_to_first_token is not None


def test_default_model_against_transformers(pair: Any) -> None:
    """bfloat16 on both sides: tokens agree until the two best logits lie close together."""
    graph, _ = pair
    reference = default_by_transformers()
    prompt = graph.get_tokenizer().encode("The history of the city begins with a river, a hill and")
    (output,) = graph.generate(
        [prompt], SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True), use_tqdm=False
    )
    ours = output.outputs[0].token_ids
    with torch.inference_mode():
        logits = (
            reference(torch.tensor([prompt + ours[:-1]], device="cuda")).logits[0, len(prompt) - 1 :].float()
        )
    for step, token in enumerate(ours):
        gap = (logits[step].max() - logits[step, token]).item()
        assert gap < 0.35, f"step {step}: token {token} is {gap} below transformers' best"


WINDOWS = (1, 256, 1024, 1600)
"""Of contexts: decode attention cuts them into one part, a few, many."""
PLAIN = ("OSTINATO_FUSED", "OSTINATO_TILES", "OSTINATO_CUDA_ATTENTION")


def decode_against_prefill(llm: LLM, batch: int, length: int = WINDOWS[-1]) -> list[float]:
    """How far the logarithms of the same tokens' probabilities lie apart in a decode step and in a prompt: means over windows of contexts."""
    prompts = random_prompts(llm.engine.spec.vocab_size, batch, seed=batch)
    draw = SamplingParams(
        temperature=1.0, seed=3, max_tokens=length - 60, ignore_eos=True, logprobs=0, detokenize=False
    )
    outputs = llm.generate(prompts, draw, use_tqdm=False)
    apart: list[list[float]] = [[] for _ in WINDOWS[1:]]
    for prompt, output in list(zip(prompts, outputs, strict=True))[:4]:
        (found,) = output.outputs
        known = prompt + found.token_ids
        again = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (whole,) = llm.generate([known], again, use_tqdm=False)
        for at in range(len(prompt) + 1, len(known)):  # the first one came out of a prompt too
            token, window = known[at], sum(at > end for end in WINDOWS[1:])
            decoded, read = found.logprobs[at - len(prompt)][token], whole.prompt_logprobs[at][token]
            apart[window].append(abs(decoded.logprob - read.logprob))
    return [sum(window) / len(window) for window in apart]


@pytest.fixture(scope="module")
def plain_deviations() -> list[float]:
    """Of Triton's kernels, op by op."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PLAIN:
            patch.setenv(name, "0")
        llm = make(max_model_len=2048, max_num_batched_tokens=2048)
    try:
        return decode_against_prefill(llm, 4)
    finally:
        llm.close()


@pytest.mark.parametrize("batch", [1, 4, 12, 40])
def test_decode_agrees_with_prefill_at_every_length(batch: int, plain_deviations: list[float]) -> None:
    """The real model far into its context: no more apart than rounding explains."""
    llm = make(max_model_len=2048, max_num_batched_tokens=2048)
    try:
        ours = decode_against_prefill(llm, batch)
    finally:
        llm.close()
    for mine, plain in zip(ours, plain_deviations, strict=True):
        assert mine <= 1.3 * plain, (ours, plain_deviations)


@pytest.mark.parametrize("how", ["raise", "synchronise", "allocate", "out of memory"])
def test_a_failed_capture_leaves_the_engine_serving(how: str) -> None:
    llm = make()
    try:
        prompts = random_prompts(llm.engine.spec.vocab_size, 3, seed=5)
        program = llm.engine.runner._program
        advance = program.ops.advance

        def broken(*args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_current_stream_capturing():
                if how == "synchronise":
                    torch.cuda.synchronize()  # not allowed: the driver gives the capture up
                elif how == "allocate":
                    torch.empty(1 << 20, device="cuda")
                elif how == "out of memory":
                    raise torch.OutOfMemoryError("injected")
                else:
                    raise RuntimeError("injected")
            advance(*args, **kwargs)

        object.__setattr__(program.ops, "advance", broken)
        got = llm.generate(prompts, SAMPLERS["greedy"], use_tqdm=False)
        assert llm.get_metrics()["eager_steps"]["capture_failed"] > 0
        assert not llm.engine.plan.book.captured
        object.__setattr__(program.ops, "advance", advance)
        again = llm.generate(prompts, SAMPLERS["greedy"], use_tqdm=False)
        assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in again]
        torch.randn(3, device="cuda")  # torch's own state is usable too
        assert llm.generate(prompts[:1], SAMPLERS["full"], use_tqdm=False)
        llm.generate(prompts[:1], SAMPLERS["full"], use_tqdm=False)
        assert llm.engine.plan.book.captured, "other keys are captured after it"
        llm.engine.runner.cache._on_error = "raise"
        object.__setattr__(program.ops, "advance", broken)
        with pytest.raises(CaptureError, match="capture failed"):
            llm.generate(prompts, SAMPLERS["sample"], use_tqdm=False)
    finally:
        llm.close()


@pytest.mark.parametrize("name", ["llama3", "llama-bias", "mistral-window", "qwen2", "qwen3"])
def test_families_agree_with_the_cpu(name: str, tmp_path: Path) -> None:
    """float32 on the GPU against the same engine on the CPU, which is held against transformers."""
    import transformers

    from tests.models import FAMILIES, SMALL

    family, changes = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**SMALL | changes)
    )
    for key, weight in model.named_parameters():
        weight.requires_grad_(False).normal_(1.0 if "norm" in key else 0.0, 0.1)
    model.save_pretrained(tmp_path)
    common = {
        "skip_tokenizer_init": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "dtype": "float32",
    }
    prompts = random_prompts(151, 6, seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=1)
    on_gpu = LLM(str(tmp_path), kv_cache_memory_bytes=1 << 24, **common)
    on_cpu = LLM(str(tmp_path), device="cpu", **common)
    try:
        for a, b in zip(
            on_gpu.generate(prompts, params, use_tqdm=False),
            on_cpu.generate(prompts, params, use_tqdm=False),
            strict=True,
        ):
            ours, wanted = a.outputs[0], b.outputs[0]
            assert ours.logprobs is not None
            assert wanted.logprobs is not None
            for step, (t, u) in enumerate(zip(ours.token_ids, wanted.token_ids, strict=True)):
                p = ours.logprobs[step][t].logprob
                q = wanted.logprobs[step][u].logprob
                assert p == pytest.approx(q, abs=2e-3)
                if t != u:
                    break  # a near-tie: the histories differ from here on
    finally:
        on_gpu.close()
