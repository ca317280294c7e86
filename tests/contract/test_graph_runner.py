"""The engine on graphs that are fake: policies, trials on scratch rows, every failure, on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ostinato import LLM, SamplingParams
from ostinato.errors import CaptureError, GraphError, MismatchError
from ostinato.graphs.keys import KeyState
from ostinato.graphs.profile import Profile
from ostinato.graphs.results import ResultRing
from ostinato.graphs.scratch import ScratchChecker
from ostinato.kv_cache import GUARD_BLOCK
from ostinato.models.decoder import Decoder
from ostinato.ops.reference import ReferenceOps
from ostinato.types import GraphKey, Route, SamplerVariant, StepKind
from tests.fakes import FakeBackend, FakeGraph, fake_engine

Tiny = Callable[[str], tuple[Path, Any]]


def traffic(llm: LLM, rounds: int = 4) -> list[list[list[int]]]:
    """The same mixed requests again and again: greedy, sampled and full."""
    g = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(3, 151, (int(torch.randint(1, 50, (), generator=g)),), generator=g).tolist()
        for _ in range(11)
    ]
    params = [
        SamplingParams(
            temperature=0.5 * (i % 3),
            seed=i,
            max_tokens=6 + i,
            ignore_eos=True,
            repetition_penalty=1.2 if i > 8 else 1.0,
        )
        for i in range(11)
    ]
    return [
        [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)] for _ in range(rounds)
    ]


def run_key(program: Any, buffers: Any, key: GraphKey) -> None:
    program(buffers.batch(Route(key, None)))


@pytest.fixture(scope="module")
def wanted(tiny: Tiny) -> list[list[int]]:
    llm = LLM(
        str(tiny("llama3")[0]),
        skip_tokenizer_init=True,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=256,
    )
    return traffic(llm, 1)[0]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_graphs_trials_and_live_checks_change_no_token(
    tiny: Tiny, wanted: list[list[int]], depth: int
) -> None:
    backend = FakeBackend()
    llm = fake_engine(tiny("llama3")[0], backend, pipeline_depth=depth, cudagraph_verify_every=2)
    assert traffic(llm) == [wanted] * 4
    records = llm.engine.plan.book.captured
    assert {r.key.kind for r in records} == {StepKind.DECODE, StepKind.MIXED}
    assert {r.key.sampler for r in records} == {SamplerVariant.FULL, SamplerVariant.SAMPLE}
    assert all(r.trusted and r.checks and not r.mismatches for r in records)
    assert llm.engine.runner.num_live_checks > 10
    assert llm.engine.plan.graph_steps.total() > llm.engine.plan.eager_steps.total()
    llm.engine.scheduler.check()


def counters(llm: LLM) -> list[Any]:
    """Everything that an engine counts about steps."""
    engine = llm.engine
    records = {
        r.key: (r.hits, r.served, r.replays, r.rows, r.padded_rows) for r in engine.plan.book.records()
    }
    steps = (engine.plan.num_graph_steps, engine.scheduler.num_steps, engine.runner.num_replays)
    return [records, engine.plan.graph_steps, engine.plan.eager_steps, steps, engine.scheduler.step_tokens]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_steps_that_repeat_the_one_before_count_and_answer_like_all(
    tiny: Tiny, wanted: list[list[int]], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the short way of the main loop and without it: the same tokens, and no counter differs."""
    repeats = 0
    again = ResultRing.again

    def counting(*args: Any) -> Any:
        nonlocal repeats
        repeats += 1
        return again(*args)

    monkeypatch.setattr(ResultRing, "again", counting)
    engines = []
    for short in (True, False):
        llm = fake_engine(tiny("llama3")[0], FakeBackend(), pipeline_depth=depth)
        if not short:
            monkeypatch.setattr(llm.engine.runner, "again", lambda batch: None)
        assert traffic(llm) == [wanted] * 4
        params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
        answers = [list(llm.stream([5, 6, 7], params)) for _ in range(2)]
        shown = [[(o.outputs[0].token_ids, o.metrics.graph_steps) for o in a if o.metrics] for a in answers]
        engines.append((counters(llm), shown))
        assert (repeats > 150) == short
        assert int(llm.engine.buffers.state.number) == llm.engine.scheduler.num_steps
        repeats = 0
    assert engines[0] == engines[1]


def quarantine(llm: LLM) -> None:
    cache = llm.engine.runner.cache  # type: ignore[attr-defined]
    for record in llm.engine.plan.book.captured:
        cache.quarantine(record.key, "test")


def borrow(llm: LLM) -> None:
    runner: Any = llm.engine.runner
    with llm.engine.device_context():
        for record in llm.engine.plan.book.captured:
            runner.on_scratch_rows(record.key, 1, lambda: None)


def pause(llm: LLM) -> None:
    runner: Any = llm.engine.runner
    with llm.engine.device_context():
        runner.eager.ring.pause()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("disturb", "eager"),
    [(quarantine, True), (lambda llm: llm.engine.release_graphs(), True), (borrow, False), (pause, False)],
    ids=["quarantine", "release", "borrow", "pause"],
)
def test_what_comes_between_two_repetitions(
    tiny: Tiny, disturb: Callable[[LLM], object], eager: bool, depth: int
) -> None:
    llm = fake_engine(tiny("llama3")[0], FakeBackend(), pipeline_depth=depth)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for _ in range(3):
        expected = list(llm.stream([5, 6, 7], params))[-1].outputs[0].token_ids
    engine = llm.engine
    assert engine._again is not None
    before = sum(engine.plan.eager_steps.values())
    stream = llm.stream([5, 6, 7], params)
    outputs = [next(stream) for _ in range(23)]
    disturb(llm)
    assert [*outputs, *stream][-1].outputs[0].token_ids == expected
    assert (sum(engine.plan.eager_steps.values()) > before) == eager
    engine.scheduler.check()


def test_a_replay_that_fails_in_a_repetition_ends_the_call_and_not_the_engine(tiny: Tiny) -> None:
    backend = FakeBackend()
    llm = fake_engine(tiny("llama3")[0], backend)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    expected = [list(llm.stream([5, 6, 7], params)) for _ in range(3)][-1][-1].outputs[0].token_ids
    stream = llm.stream([5, 6, 7], params)
    for _ in range(23):
        next(stream)
    backend.fail["replay"] = RuntimeError("injected")
    with pytest.raises(RuntimeError, match="injected"):
        list(stream)
    backend.fail.clear()
    assert list(llm.stream([5, 6, 7], params))[-1].outputs[0].token_ids == expected


def test_a_live_check_of_a_mixed_step_counts_penalties_once(tiny: Tiny) -> None:
    """The rows of a mixed step are arbitrary device rows, not the first ones."""
    tight = SamplingParams(temperature=0.0, max_tokens=8, frequency_penalty=1.0, ignore_eos=True)
    short = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 151, (150,), generator=g).tolist() for _ in range(6)]
    results = []
    for every in (0, 1):
        llm = fake_engine(
            tiny("llama3")[0], FakeBackend(), cudagraph_verify_every=every, enable_prefix_caching=False
        )
        results.append(
            [
                llm.generate([[5] * 5, p], [short, tight], use_tqdm=False)[1].outputs[0].token_ids
                for p in prompts
            ]
        )
        assert not any(r.mismatches for r in llm.engine.plan.book.records())
    assert llm.engine.runner.num_live_checks > 0
    assert results[0] == results[1]


def test_a_trial_puts_everything_back(tiny: Tiny) -> None:
    backend = FakeBackend()
    llm = fake_engine(tiny("llama3")[0], backend)
    traffic(llm, 2)
    runner, buffers = llm.engine.runner, llm.engine.buffers
    program = runner._program
    own = program.cache.data[:, :, 1 : runner.checker._blocks[0]].clone()
    words, counts = buffers.words.clone(), buffers.state.output_counts.clone()
    mirrors = buffers.mirrors()
    cases = [
        (kind, variant, rows)
        for kind in (StepKind.DECODE, StepKind.MIXED)
        for variant in SamplerVariant
        for rows in (1, 3, 8)
    ]
    with torch.inference_mode():
        for kind, variant, rows in cases:
            key = GraphKey(kind, 8 if kind is StepKind.DECODE else 64, 8, variant)
            run = lambda key=key: program(buffers.batch(__import__("ostinato.types").types.Route(key, None)))  # noqa: E731
            trial = runner.checker.trial(key, rows, run, run)
            assert trial is not None
            assert trial.mismatches() == []
            assert (trial.expected["emitted"][:rows] >= 0).all(), "the scratch rows were live"
            assert (trial.expected["emitted"][rows:] == -1).all()
    assert torch.equal(buffers.words, words)
    assert torch.equal(buffers.state.output_counts, counts)
    assert torch.equal(program.cache.data[:, :, 1 : runner.checker._blocks[0]], own), (
        "a request's blocks were written"
    )
    assert buffers.mirrors() == mirrors


def test_a_trial_posts_where_nobody_reads(tiny: Tiny) -> None:
    """With results of live steps still to be read, at whatever number."""
    llm = fake_engine(tiny("llama3")[0], FakeBackend())
    traffic(llm, 1)
    runner, buffers = llm.engine.runner, llm.engine.buffers
    state, key = buffers.state, GraphKey(StepKind.DECODE, 8, 8, SamplerVariant.GREEDY)
    assert int(state.number) == llm.engine.scheduler.num_steps
    number, before = int(state.number), state.posted.clone()
    with torch.inference_mode():
        trial = runner.checker.trial(key, 3, *[partial(run_key, runner.program, buffers, key)] * 2)
    assert trial is not None
    assert trial.mismatches() == []
    assert "posted" in trial.expected
    assert int(state.number) == number
    assert torch.equal(state.posted[1:], before[1:])
    assert state.posted[0, 0] == 0
    assert (state.posted[0, 1:4] >= 0).all(), "what it posted"


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("logits", lambda p, b: p.arena.view(b.num_tokens, b.num_seqs).logits[0, 5].add_(1e-3)),
        ("emitted", lambda p, b: b.state.emitted[0].add_(1)),
        ("posted", lambda p, b: b.state.posted[0, 1].add_(1)),
        ("position", lambda p, b: b.state.position[0].add_(1)),
        ("active", lambda p, b: b.state.active.fill_(1)),
        ("KV writes", lambda p, b: p.cache.data[1, 0, -16].add_(1.0)),
        ("guard block", lambda p, b: p.cache.data[0, 0, GUARD_BLOCK].fill_(0.0)),
    ],
)
def test_whatever_a_graph_does_wrong_is_seen_before_it_serves(
    tiny: Tiny,
    wanted: list[list[int]],
    what: str,
    spoil: Callable[[Any, Any], object],
) -> None:
    llm: Any = None

    def corrupt(graph: FakeGraph) -> None:
        program, buffers = llm.engine.runner._program, llm.engine.buffers
        spoil(program, buffers.batch(Route(graph.body.args[0], None)))  # type: ignore[attr-defined]

    backend = FakeBackend(corrupt=corrupt)
    llm = fake_engine(tiny("llama3")[0], backend)
    assert traffic(llm, 3) == [wanted] * 3
    assert not llm.engine.plan.graph_steps, "a wrong graph served"
    states = {r.state for r in llm.engine.plan.book.records() if r.hits > 4}
    assert states == {KeyState.QUARANTINED}
    assert any(what in r.note for r in llm.engine.plan.book.records())
    assert llm.get_metrics()["eager_steps"]["quarantined"] > 0


@pytest.mark.parametrize("name", ["tokens", "token_positions", "seq_lens"])
@pytest.mark.parametrize("kind", [StepKind.DECODE, StepKind.MIXED])
def test_whoever_reads_padding_does_not_get_the_same_twice(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kind: StepKind, name: str
) -> None:
    """The two runs of a trial find different numbers there, so a step that reads them differs."""
    llm = fake_engine(tiny("llama3")[0], FakeBackend())
    runner, buffers = llm.engine.runner, llm.engine.buffers
    program = runner._program
    advance = program.ops.advance

    def reads_padding(batch: Any, *step: Any) -> None:
        advance(batch, *step)
        batch.state.last_token[0] += getattr(batch, name)[-1]

    key = GraphKey(kind, 8 if kind is StepKind.DECODE else 64, 8, SamplerVariant.GREEDY)
    body = partial(run_key, program, buffers, key)
    with torch.inference_mode():
        clean = runner.checker.trial(key, 3, body, body)
        monkeypatch.setattr(program.ops, "advance", reads_padding)
        trial = runner.checker.trial(key, 3, body, body)
    assert clean.mismatches() == []
    assert any(found.startswith("last_token[0]") for found in trial.mismatches())


def test_no_trial_between_two_steps_is_the_first_of_its_kind(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kinds and samplers are rehearsed while the engine is built, the largest decode step among them."""
    rehearsed: list[GraphKey] = []
    trial = ScratchChecker.trial

    def noting(self: Any, key: GraphKey, *args: Any) -> Any:
        rehearsed.append(key)
        return trial(self, key, *args)

    monkeypatch.setattr(ScratchChecker, "trial", noting)
    llm = fake_engine(tiny("llama3")[0], FakeBackend())
    assert {(k.kind, k.sampler) for k in rehearsed} >= {(StepKind.DECODE, s) for s in SamplerVariant}
    assert StepKind.MIXED in {k.kind for k in rehearsed}
    assert max(k.num_seqs for k in rehearsed) == llm.engine.config.max_num_seqs
    assert not llm.engine.plan.book.records(), "nobody asked for a key yet"
    assert not llm.engine.plan.eager_steps


def test_live_checks_are_as_frequent_as_asked_for(tiny: Tiny) -> None:
    """Also where a verdict takes long: the check that was due meanwhile comes with the next replay."""
    llm = fake_engine(tiny("llama3")[0], FakeBackend(), cudagraph_verify_every=4)
    traffic(llm, 4)
    runner = llm.engine.runner
    assert runner.num_live_checks == runner.num_replays // 4 > 10


def test_a_key_that_has_no_graph_is_not_replayed(tiny: Tiny) -> None:
    """A route names a graph only if there is one; replaying another key is an error, not a guess."""
    llm = fake_engine(tiny("llama3")[0], FakeBackend())
    traffic(llm, 3)
    runner, buffers = llm.engine.runner, llm.engine.buffers
    unknown = GraphKey(StepKind.DECODE, 7, 7, SamplerVariant.GREEDY)
    with pytest.raises(GraphError, match=r"decode\[tokens=7, seqs=7, greedy\] has no graph"):
        runner.run(buffers.batch(Route(unknown, None)))


def test_a_graph_is_not_used_after_its_release(tiny: Tiny) -> None:
    """Also with a route that was made before: the steps in between are what a race would look like."""
    backend = FakeBackend()
    llm = fake_engine(tiny("llama3")[0], backend)
    traffic(llm, 3)
    runner, buffers = llm.engine.runner, llm.engine.buffers
    key = llm.engine.plan.book.captured[0].key
    stale = buffers.batch(Route(key, None))
    llm.release_graphs()
    assert all(graph.destroyed for graph in backend.graphs)
    with pytest.raises(GraphError, match="has no graph"):
        runner.run(stale)


def test_a_capture_inside_a_capture_fails_and_serves_on(tiny: Tiny, wanted: list[list[int]]) -> None:
    """A step that runs another captured function while it is being captured itself."""
    llm: Any = None

    def nested() -> None:
        llm.engine.runner.backend.capture(lambda: None)

    backend = FakeBackend(during_capture=nested)
    llm = fake_engine(tiny("llama3")[0], backend)
    assert traffic(llm, 2) == [wanted] * 2
    assert llm.get_metrics()["eager_steps"]["capture_failed"] > 0
    assert any("already capturing" in line for line in llm.engine.runner.cache.capture_failures)
    assert (backend.live, backend.capturing) == ([], False)


def test_eager_and_graph_read_the_same_buffers(tiny: Tiny) -> None:
    """Every tensor that the eager batch of a key sees is the one that its graph was captured over."""
    backend = FakeBackend()
    llm = fake_engine(tiny("llama3")[0], backend)
    seen: dict[GraphKey, set[tuple[tuple[str, int], ...]]] = {}
    program = llm.engine.program
    prepare = program.ops.prepare

    def noting(batch: Any, scratch: Any, stack: Any = None) -> Any:
        tensors = {**vars(batch.static), **vars(batch.state), **vars(batch), **vars(scratch)}
        places = ((name, t.data_ptr()) for name, t in tensors.items() if isinstance(t, torch.Tensor))
        seen.setdefault(batch.key, set()).add(tuple(sorted(places)))
        return prepare(batch, scratch, stack)

    object.__setattr__(program.ops, "prepare", noting)
    try:
        traffic(llm, 4)
    finally:
        object.__setattr__(program.ops, "prepare", prepare)
    replayed = {r.key for r in llm.engine.plan.book.captured if r.replays}
    assert replayed
    assert all(len(seen[key]) == 1 for key in replayed)


def test_a_graph_that_goes_bad_later_is_caught_by_a_live_check(tiny: Tiny) -> None:
    llm: Any = None
    bad: list[bool] = []

    def corrupt(graph: FakeGraph) -> None:
        if bad and llm.engine.runner._live is None and graph.replays > 3:
            llm.engine.buffers.state.last_token[0] += 1

    llm = fake_engine(tiny("llama3")[0], FakeBackend(corrupt=corrupt), cudagraph_verify_every=1)
    traffic(llm, 3)
    assert llm.engine.plan.graph_steps
    bad.append(True)
    traffic(llm, 1)
    assert KeyState.QUARANTINED in {r.state for r in llm.engine.plan.book.records()}


def test_fail_on_mismatch_raises(tiny: Tiny) -> None:
    llm: Any = None
    backend = FakeBackend(corrupt=lambda graph: llm.engine.buffers.state.position.add_(1))
    llm = fake_engine(tiny("llama3")[0], backend, fail_on_mismatch=True)
    with pytest.raises(MismatchError, match="position"):
        traffic(llm, 3)
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize("stage", ["begin", "middle", "end", "instantiate", "replay"])
def test_a_failure_at_any_stage_leaves_the_engine_serving(
    tiny: Tiny, wanted: list[list[int]], stage: str
) -> None:
    backend = FakeBackend(fail={stage: RuntimeError("injected")})
    memory = backend.memory
    llm = fake_engine(tiny("llama3")[0], backend)
    assert traffic(llm, 2) == [wanted] * 2
    assert llm.get_metrics()["eager_steps"]["capture_failed"] > 0
    assert (backend.memory, backend.live) == (memory, [])
    llm.engine.scheduler.check()


@pytest.mark.parametrize("stage", ["middle", "replay"])
def test_on_capture_error_raise_ends_the_call_and_not_the_engine(
    tiny: Tiny, wanted: list[list[int]], stage: str
) -> None:
    backend = FakeBackend(fail={stage: RuntimeError("injected")})
    llm = fake_engine(tiny("llama3")[0], backend, on_capture_error="raise")
    with pytest.raises(CaptureError, match="injected"):
        traffic(llm, 2)
    backend.fail.clear()
    assert traffic(llm, 1) == [wanted]


def test_a_tight_budget_is_kept(tiny: Tiny, wanted: list[list[int]]) -> None:
    backend = FakeBackend(cost=1000)
    llm = fake_engine(tiny("llama3")[0], backend, cudagraph_memory_budget=2000)
    assert traffic(llm) == [wanted] * 4
    assert len(backend.live) == 2
    assert llm.get_metrics()["eager_steps"]["over_budget"] > 0


def test_keys_captured_before_traffic_serve_the_first_request(tiny: Tiny, wanted: list[list[int]]) -> None:
    backend = FakeBackend()
    llm = fake_engine(tiny("llama3")[0], backend, cudagraph_capture="startup")
    sizes = llm.engine.config.capture_sizes
    decode = {r.key.num_seqs for r in llm.engine.plan.book.captured if r.key.kind is StepKind.DECODE}
    assert decode == set(sizes)
    assert all(r.trusted for r in llm.engine.plan.book.captured)
    greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    (output,) = llm.generate([[5, 6, 7]], greedy, use_tqdm=False)
    assert output.metrics.eager_steps == {}
    assert output.metrics.graph_steps == 5


def test_a_profile_remembers_what_fired(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTINATO_CACHE", str(tmp_path))
    first = fake_engine(tiny("llama3")[0], FakeBackend())
    traffic(first, 3)
    fired = {r.key for r in first.engine.plan.book.captured}
    first.close()
    second = fake_engine(tiny("llama3")[0], FakeBackend(), cudagraph_capture="profile")
    assert {r.key for r in second.engine.plan.book.captured} == fired
    assert all(r.hits == 0 for r in second.engine.plan.book.captured)
    other = fake_engine(tiny("llama3")[0], FakeBackend(), cudagraph_capture="profile", max_num_seqs=4)
    assert other.engine.plan.book.captured == [], "another config has a profile of its own"


@pytest.mark.parametrize("text", ["", "{}", '{"keys": [{"kind": "x"}]}', '{"keys": 5}', "\x00"])
def test_a_damaged_profile_is_ignored(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    profile = Profile(tmp_path, {"model": "m"})
    assert profile.load() == []
    profile.path.write_text(text)
    assert profile.load() == []
    assert "ignored" in caplog.text


def test_released_graphs_are_captured_again(tiny: Tiny, wanted: list[list[int]]) -> None:
    backend = FakeBackend()
    llm = fake_engine(tiny("llama3")[0], backend)
    traffic(llm, 3)
    live = len(backend.live)
    assert llm.release_graphs() == 1000 * live
    assert backend.live == []
    assert traffic(llm, 2) == [wanted] * 2
    assert backend.live


class Fused(ReferenceOps):
    """Does greedy decode steps of one sequence in one go, and leaves no logits: as the one kernel does."""

    steps = 0

    def fuses(self, stack: Any, seqs: int) -> bool:
        return seqs == 1

    def fused(self, stack: Any, view: Any, caches: Any, scratch: Any, *, greedy: bool) -> None:
        Fused.steps += 1
        own = dataclasses.replace(
            scratch, logits=torch.empty_like(scratch.logits) if greedy else scratch.logits
        )
        cache = SimpleNamespace(layer=lambda index: caches[index])
        Decoder.forward(stack, view, cache, own, self)
        if greedy:
            scratch.tokens.copy_(own.logits.argmax(1))


class Picking(ReferenceOps):
    """Finds the best token of one sequence without logits, as products on tiles do."""

    steps = 0

    def picks(self, linear: Any, seqs: int, dtype: torch.dtype) -> bool:
        return seqs == 1

    def best_token(self, *args: Any, **kwargs: Any) -> None:
        Picking.steps += 1
        super().best_token(*args, **kwargs)


@pytest.mark.parametrize("ops", [Fused, Picking])
def test_a_step_without_logits_is_checked_by_its_tokens(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, ops: type[Fused | Picking]
) -> None:
    """What an earlier step left where logits would be is no difference."""
    prompts, params = [[3, 5, 8], [4] * 20], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

    def run() -> tuple[list[list[int]], Any]:
        llm = fake_engine(tiny("llama3")[0], FakeBackend(), cudagraph_verify_every=2)
        alone = [
            llm.generate([p], params, use_tqdm=False)[0].outputs[0].token_ids for p in prompts for _ in "ab"
        ]
        return alone, llm.engine

    plain, _ = run()
    monkeypatch.setattr("ostinato.engine.select", lambda device: ops())
    ops.steps = 0
    without, engine = run()
    assert without == plain
    assert ops.steps > 20
    assert engine.runner.num_live_checks > 3
    assert not any(r.mismatches for r in engine.plan.book.records())
    assert any(
        r.key.num_seqs == 1 and r.key.sampler is SamplerVariant.GREEDY for r in engine.plan.book.captured
    )
