"""The scheduler against a fake device: every request must get the tokens it gets alone.

The fake device executes schedules in order of launch, and results are committed some steps
later. Its KV cache holds, per slot, a digest of the whole sequence up to that token, and its
next token depends on every slot that it reads through the block table: a block that is shared,
reused or skipped by mistake changes the tokens.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato.errors import ConfigError, KVCacheError, RequestError
from ostinato.kv_blocks import BlockAllocator
from ostinato.scheduler import Scheduler, SchedulerConfig
from ostinato.types import (
    Delay,
    FinishReason,
    Logprob,
    Request,
    RequestStatus,
    SamplerVariant,
    SamplingParams,
    SteadyRows,
    StepKind,
    StepResult,
)

VOCAB = 23
POISON = -1  # content of a slot that nobody wrote


# --- the model: a pure function ---------------------------------------------------------


def kv_of(previous, token, position):
    return hash((previous, token, position))


def next_token(slots, seed, position, banned):
    token = hash((seed, position, *slots)) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def top_logprobs(slots):
    """The most likely tokens in order, from what the cache holds."""
    first = hash(tuple(slots)) % VOCAB
    return {(first + i) % VOCAB: Logprob(-1.0 - i, i + 1) for i in range(5)}


def prompt_logprobs_at(slots, token):
    top = top_logprobs(slots)
    return {token: top.get(token, Logprob(-9.0, VOCAB))} | top


class FakeSink:
    """Matches where two given tokens follow each other, once `after` tokens were pushed."""

    watches = True

    def __init__(self, pair, after=0):
        self.pair, self.after, self.tokens, self.matched = pair, after, [], False
        self.passes = {token: token != pair[0] for token in range(VOCAB)}

    @property
    def text(self):
        return repr(self.tokens)

    @property
    def open(self):
        return self.tokens[-1:] == [self.pair[0]]

    def catch_up(self, token_ids):
        new = token_ids[len(self.tokens) :]
        for token in new[:-1]:
            assert self.passes[token]
            assert not self.open
            self.push(token)
        return self.push(new[-1]) if new else None

    def push(self, token_id):
        assert not self.matched, "no push after a match"
        self.tokens.append(token_id)
        self.matched = tuple(self.tokens[-2:]) == self.pair and len(self.tokens) >= self.after
        return "stop!" if self.matched else None

    def finish(self):
        return self.text


@dataclass
class Spec:
    """A request to make, with what happens to it from outside."""

    prompt: tuple[int, ...]
    max_tokens: int = 8
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_pair: tuple[int, int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    arrives: int = 0
    aborted: int | None = None

    def request(self, request_id):
        params = SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=min(self.min_tokens, self.max_tokens),
            temperature=0.0 if self.seed % 2 else 1.0,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            stop_token_ids=[i for i in self.stop_ids if i != 0],  # 0 plays end-of-sequence
        )
        return Request(
            request_id=request_id,
            prompt_id=request_id,
            prompt_token_ids=self.prompt,
            params=params,
            stop_token_ids=self.stop_ids,
            max_total_tokens=len(self.prompt) + self.max_tokens,
            seed=self.seed,
            bad_word_ids=self.bad_words,
            sink=FakeSink(self.stop_pair, params.min_tokens) if self.stop_pair else None,
        )


def banned_at(request, position, bad):
    floor = len(request.prompt_token_ids) + request.params.min_tokens
    return {*bad, *(request.stop_token_ids if position < floor else ())}


def run_alone(request):
    """The slow, obvious version: one request, all tokens, no cache. Returns the finished request."""
    slots = []
    for position, token in enumerate(request.prompt_token_ids):
        if request.params.prompt_logprobs is not None:
            entry = prompt_logprobs_at(slots, token) if position else None
            if entry is not None:
                k = request.params.prompt_logprobs
                entry = {t: p for t, p in entry.items() if t == token or p.rank <= k}
            request.prompt_logprobs.append(entry)
        slots.append(kv_of(slots[-1] if slots else 0, token, position))
    while request.finish_reason is None:
        position = len(slots)
        token = next_token(slots, request.seed, position, banned_at(request, position, request.banned_next()))
        request.output_token_ids.append(token)
        if request.params.logprobs is not None:
            top = top_logprobs(slots)
            kept = {token: top.get(token, Logprob(-9.0, VOCAB))}
            kept |= {t: p for t, p in top.items() if p.rank <= request.params.logprobs}
            request.logprobs.append(kept)
            request.cumulative_logprob += kept[token].logprob
        enough = len(request.output_token_ids) >= request.params.min_tokens
        if token in request.stop_token_ids and enough:
            request.finish_reason = FinishReason.STOP
            request.stop_reason = token or None
        elif request.sink and request.sink.push(token) is not None and enough:
            request.finish_reason, request.stop_reason = FinishReason.STOP, "stop!"
        elif position + 1 >= request.max_total_tokens:
            request.finish_reason = FinishReason.LENGTH
        slots.append(kv_of(slots[-1], token, position))
    return request


# --- the device -------------------------------------------------------------------------


@dataclass
class Row:
    """One device row: what `StaticInputs` and `StepState` hold of it."""

    request: Request
    epoch: int
    table: list[int] = field(default_factory=list)
    active: bool = False
    sampled: bool = False
    last_token: int = -1
    position: int = -1
    """Of the token whose KV comes next."""


class FakeDevice:
    def __init__(self, config, num_blocks, pad_seqs):
        self.config, self.pad_seqs = config, pad_seqs
        self.slots = [POISON] * (num_blocks * config.block_size)
        self.rows: dict[int, Row] = {}
        """Rows that the host has written and not taken back."""

    def read(self, row, stop):
        size = self.config.block_size
        slots = [self.slots[row.table[p // size] * size + p % size] for p in range(stop)]
        assert POISON not in slots, "read a slot that was never written"
        return slots

    def write(self, row, position, token):
        size = self.config.block_size
        block = row.table[position // size]
        assert block != 0, "wrote the guard block"
        previous = self.read(row, position)[-1] if position else 0
        self.slots[block * size + position % size] = kv_of(previous, token, position)

    def sample(self, row, position, result, column):
        request = row.request
        assert position < request.max_total_tokens, "sampled past the last position"
        slots = self.read(row, position)
        bad = request.banned_next() if request.bad_word_ids else ()
        token = next_token(slots, request.seed, position, banned_at(request, position, bad))
        row.last_token, row.position, row.sampled = token, position, True
        stopped = token in request.stop_token_ids  # those not allowed yet are masked
        row.active = not stopped and position + 1 < request.max_total_tokens
        result.tokens[column] = token
        if request.params.logprobs is not None:
            top = top_logprobs(slots)
            result.logprobs[column] = (top.get(token, Logprob(-9.0, VOCAB)), top)

    def run(self, schedule) -> StepResult:
        """Moves, leaves, joins, new blocks; then the step."""
        targets = {b for _, b in schedule.moves}
        assert not targets & {a for a, _ in schedule.moves}, "a row is source and target of moves"
        for source, target in schedule.moves:
            assert schedule.kind is StepKind.DECODE
            assert target not in self.rows or self.rows[target].request.row != target, "moved onto a live row"
            assert self.rows[source].sampled, "moved a row whose state is not on the device"
            self.rows[target] = self.rows.pop(source)
        for row in schedule.leaves:
            assert row not in targets, "a row left after it was moved onto"
            assert row in self.rows, "a row left that nobody had"
            del self.rows[row]
        for r in schedule.rows:
            if r.joins:
                assert r.num_blocks_before == 0
                self.rows[r.row] = Row(r.request, r.epoch)
            row = self.rows[r.row]
            assert (row.request, row.epoch) == (r.request, r.epoch), "a row of somebody else"
            assert r.num_blocks_before == len(row.table)
            row.table += r.new_blocks
            assert len(row.table) * self.config.block_size >= r.start + r.length, "too few blocks"
        decode = schedule.kind is StepKind.DECODE
        width = self.config.max_num_seqs if decode else len(schedule.rows)
        result = StepResult([-1] * width, {}, {})
        if decode:
            assert max(r.row for r in schedule.rows) < self.pad_seqs(schedule.num_seqs)
        # Rows of one step do not see each other's writes in any promised order: run them both ways.
        order = list(enumerate(schedule.rows))
        for place, r in order if schedule.step % 2 else order[::-1]:
            self.run_row(r, r.row if decode else place, result)
        return result

    def run_row(self, r, column, result):
        row = self.rows[r.row]
        if r.decode:
            assert row.sampled, "decode of a row that has not sampled"
            if not row.active:
                return
            assert (row.position, r.length, r.samples) == (r.start, 1, True)
            self.write(row, row.position, row.last_token)
            self.sample(row, row.position + 1, result, column)
            return
        assert not row.sampled
        prompt = row.request.prompt_token_ids
        token_ids = row.request.token_ids(r.start, r.start + r.length)
        assert len(token_ids) == r.length, "a chunk of unknown tokens"
        entries = []
        for position, token in enumerate(token_ids, r.start):
            self.write(row, position, token)
            if position + 1 < len(prompt) and row.request.params.prompt_logprobs is not None:
                entries.append(prompt_logprobs_at(self.read(row, position + 1), prompt[position + 1]))
        if row.request.params.prompt_logprobs is not None:
            result.prompt_logprobs[column] = entries
        if r.samples:
            self.sample(row, r.start + r.length, result, column)


# --- driving ----------------------------------------------------------------------------


@dataclass
class World:
    """Limits of one run."""

    max_num_seqs: int = 4
    budget: int = 16
    block_size: int = 4
    num_blocks: int = 40
    lag: int = 1
    blocks_ahead: int = 2
    caching: bool = True
    ladder: tuple[int, ...] = (1, 2, 4, 8)
    watched: bool = True
    """Check every promise after every call; a call brings the requests' counters up to date."""

    def pad_seqs(self, count):
        return next((size for size in self.ladder if size >= count), self.max_num_seqs)


class Engine:
    """Scheduler and fake device, with every promise checked at every step."""

    def __init__(self, world: World):
        self.world = world
        self.config = SchedulerConfig(
            max_num_seqs=world.max_num_seqs,
            max_num_batched_tokens=max(world.budget, world.max_num_seqs),
            max_model_len=1000,
            block_size=world.block_size,
            blocks_ahead=world.blocks_ahead,
            enable_prefix_caching=world.caching,
            max_lag=world.lag,
        )
        self.allocator = BlockAllocator(world.num_blocks, world.block_size, world.caching)
        self.scheduler = Scheduler(self.config, self.allocator, world.pad_seqs)
        self.device = FakeDevice(self.config, world.num_blocks, world.pad_seqs)
        self.inflight = []
        self.requests: list[Request] = []
        self.schedules = []
        self.first_sampled: dict[str, int] = {}
        self.chunk_tokens = self.num_repeats = 0

    def add(self, request):
        self.scheduler.add(request)
        self.requests.append(request)

    def next(self):
        """What the scheduler gives out, and what that says: a repetition says what its step would have."""
        again = self.scheduler.repeat()
        if again is None:
            schedule = self.scheduler.schedule()
            return schedule, schedule
        self.num_repeats += 1
        rows = again.rows.at(again.rows.members.launched - 1)
        return again, again._replace(step=len(self.schedules), rows=rows)

    def launch(self):
        """One schedule on the device, or None."""
        if not self.world.watched:
            given, schedule = self.next()
            if schedule is not None:
                self.inflight.append((given, schedule, self.device.run(schedule)))
                self.schedules.append(schedule)
            return schedule
        before = {r.request_id: (r.num_tokens, r.num_launched) for r in self.requests if not r.finished}
        preemptions, running = self.scheduler.num_preemptions, self.scheduler.running
        given, schedule = self.next()
        self.scheduler.check()
        for request in self.requests:
            if request.status is not RequestStatus.RUNNING:
                assert (request.row, request.blocks, request.on_device) == (-1, [], False)
                assert request.num_launched == request.num_computed == 0
        if schedule is None:
            assert self.scheduler.num_preemptions == preemptions, "preempted for nothing"
            return None
        assert json.loads(json.dumps(schedule.to_json()))["step"] == schedule.step == len(self.schedules)
        self.check_schedule(schedule, before)
        self.check_order(schedule)
        lost = [self.requests.index(r) for r in running if r.status is RequestStatus.WAITING]
        kept = [self.requests.index(r) for r in running if r.status is RequestStatus.RUNNING]
        assert not lost or min(lost) > max(kept), "preempted an earlier request than one that goes on"
        self.inflight.append((given, schedule, self.device.run(schedule)))
        on_device = {row: (state.request, state.epoch) for row, state in self.device.rows.items()}
        assert on_device == {r.row: (r, r.epoch) for r in self.scheduler.running}, "device rows differ"
        self.schedules.append(schedule)
        for r in schedule.rows:
            self.chunk_tokens += 0 if r.decode else r.length
            if r.samples:
                self.first_sampled.setdefault(r.request.request_id, schedule.step)
        return schedule

    def check_schedule(self, schedule, before):
        rows = schedule.rows
        assert 0 < schedule.num_tokens <= self.config.max_num_batched_tokens
        assert len(rows) <= self.config.max_num_seqs
        assert len({r.row for r in rows}) == len({r.request.request_id for r in rows}) == len(rows)
        kinds = {r.decode for r in rows}
        assert (
            schedule.kind
            is {
                (True,): StepKind.DECODE,
                (False,): StepKind.PREFILL,
                (False, True): StepKind.MIXED,
            }[tuple(sorted(kinds))]
        )
        if schedule.kind is StepKind.DECODE:
            assert [r.row for r in rows] == sorted(r.row for r in rows)
        variants = [r.request.sampler_variant for r in rows if r.samples]
        assert schedule.sampler == max(variants, default=SamplerVariant.GREEDY)
        assert not set(schedule.leaves) & {r.row for r in rows}
        for r in rows:
            request = r.request
            tokens, launched = before[request.request_id]
            assert (r.row, r.epoch) == (request.row, request.epoch)
            assert request.num_computed == r.start + r.length
            assert 0 < r.length <= self.config.max_num_batched_tokens
            assert r.decode or launched == 0
            assert r.samples == (r.start + r.length == tokens)
            assert request.num_tokens == tokens + r.samples <= request.max_total_tokens
            if request.host_dependent and r.samples:
                assert launched == 0, "its mask depends on an unknown token"
            size = self.config.block_size
            assert len(request.blocks) <= -(-(request.max_total_tokens - 1) // size), (
                "more blocks than needed"
            )
            if r.joins and request.num_preemptions == 0:
                assert request.num_cached_tokens == r.start
        if schedule.moves:
            assert all(request.on_device for request in self.scheduler.running)
            high = max(r.row for r in rows)
            assert self.world.pad_seqs(high + 1) <= self.world.pad_seqs(self.scheduler.num_running)

    def check_order(self, schedule):
        """Nobody is admitted before an earlier request, unless that one's prefix is being computed."""
        joined = [self.requests.index(r.request) for r in schedule.rows if r.joins]
        if not joined:
            return
        assert joined == sorted(joined)
        for waiting in self.requests[: max(joined)]:
            if waiting.status is RequestStatus.WAITING:
                assert self.shares_uncomputed_block(waiting), "passed over for no reason"

    def shares_uncomputed_block(self, waiting):
        if not self.world.caching or wants_prompt_logits(waiting):
            return False
        cached = len(self.allocator.lookup(waiting.block_hashes, 99))
        end = (cached + 1) * self.config.block_size
        return end < waiting.num_known and any(
            other.num_known >= end and other.token_ids(0, end) == waiting.token_ids(0, end)
            for other in self.scheduler.running
        )

    def commit(self):
        given, schedule, result = self.inflight.pop(0)
        if not self.world.watched:
            changed = self.scheduler.commit(given, result)
            # Whoever gets the same tuple again may take it that all of them still run.
            assert not (isinstance(changed, tuple) and any(r.finished for r in changed))
            return
        live = [
            r.request.request_id
            for r in schedule.rows
            if r.samples and not r.request.finished and r.epoch == r.request.epoch
        ]
        changed = self.scheduler.commit(given, result)
        assert [r.request_id for r in changed] == live
        assert not (isinstance(changed, tuple) and any(r.finished for r in changed))
        self.scheduler.check()
        for r in schedule.rows if self.world.caching else ():
            if r.epoch == r.request.epoch and not r.request.finished:
                full = (r.start + r.length) // self.config.block_size
                assert self.scheduler._entries[r.request.request_id].registered == full
        for request in changed:
            if request.finished:
                assert (request.row, request.blocks, request.num_launched) == (-1, [], 0)

    def step(self, lag=None):
        """As the engine does it: launch, then commit once enough is in flight."""
        lag = self.world.lag if lag is None else lag
        schedule = self.launch()
        while len(self.inflight) > lag or (schedule is None and self.inflight):
            self.commit()
            schedule = True
        return schedule

    def finish(self, limit=10_000):
        for _ in range(limit):
            if not self.scheduler.has_unfinished:
                break
            assert self.step() is not None, "nothing can run, and nothing is in flight: a deadlock"
        while self.inflight:
            self.commit()
        assert not self.scheduler.has_unfinished, "livelock"
        self.check_idle()

    def check_idle(self):
        self.scheduler.check()
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.num_in_flight == 0
        assert self.allocator.num_free == self.allocator.num_usable
        assert not self.scheduler._computing
        assert not self.scheduler._passed_over


def wants_prompt_logits(request):
    return request.params.prompt_logprobs is not None and len(request.prompt_logprobs) < len(
        request.prompt_token_ids
    )


def play(world, specs, lags=()):
    """Run all specs through one engine and compare every request with the same one alone."""
    engine = Engine(world)
    requests = [spec.request(str(i)) for i, spec in enumerate(specs)]
    pending = sorted(range(len(specs)), key=lambda i: specs[i].arrives)
    aborts = {i: spec.aborted for i, spec in enumerate(specs) if spec.aborted is not None}
    work = sum(len(s.prompt) + s.max_tokens for s in specs)
    limit = 20 * work + sum(s.arrives for s in specs) + 100
    tick = 0
    while pending or engine.scheduler.has_unfinished:
        assert tick < limit, "livelock"
        while pending and specs[pending[0]].arrives <= tick:
            engine.add(requests[pending.pop(0)])
        for i, when in list(aborts.items()):
            if when <= tick and requests[i] in engine.requests:
                del aborts[i]
                finished = requests[i].finished
                assert engine.scheduler.abort(str(i)) is (None if finished else requests[i])
                if world.watched:
                    engine.scheduler.check()
        lag = lags[tick % len(lags)] if lags else None
        moved = engine.step(lag=None if lag is None else min(lag, world.lag))
        assert moved is not None or pending or not engine.scheduler.has_unfinished, "deadlock"
        tick += 1
    while engine.inflight:
        engine.commit()
    engine.check_idle()
    check_answers(engine, specs, requests)
    return engine


def check_answers(engine, specs, requests):
    for spec, request in zip(specs, requests, strict=True):
        alone = run_alone(spec.request("alone"))
        got, want = request.output_token_ids, alone.output_token_ids
        assert request.status is RequestStatus.FINISHED
        if request.finish_reason is FinishReason.ABORT:
            assert got == want[: len(got)]
            assert request.logprobs == alone.logprobs[: len(got)]
            continue
        assert got == want
        assert (request.finish_reason, request.stop_reason) == (alone.finish_reason, alone.stop_reason)
        assert request.logprobs == alone.logprobs
        assert request.prompt_logprobs == alone.prompt_logprobs
        assert request.cumulative_logprob == pytest.approx(alone.cumulative_logprob)
        if request.sink is not None:
            request.sink.catch_up(got[:-1] if request.silent_end else got)
            assert request.sink.tokens == alone.sink.tokens
    # Equal prompts get their first token in order of arrival.
    seen: dict[tuple, int] = {}
    for request in engine.requests:
        if request.params.prompt_logprobs is None and request.request_id in engine.first_sampled:
            step = engine.first_sampled[request.request_id]
            assert step >= seen.get(request.prompt_token_ids, 0)
            seen[request.prompt_token_ids] = step


# --- properties -------------------------------------------------------------------------


@st.composite
def scenarios(draw):
    size = draw(st.sampled_from([1, 2, 4]))
    heads = [tuple(range(1, 1 + 3 * size)), tuple(range(1, 1 + 2 * size)), (5,) * (4 * size), ()]
    optional = lambda s: st.none() | s  # noqa: E731
    specs = draw(
        st.lists(
            st.builds(
                Spec,
                prompt=st.builds(
                    lambda head, tail: head + tuple(tail),
                    st.sampled_from(heads),
                    st.lists(st.integers(0, 3), min_size=1, max_size=6),
                ),
                max_tokens=st.integers(1, 12),
                seed=st.integers(0, 3),
                stop_ids=st.sampled_from([frozenset(), frozenset({0}), frozenset({0, 3, 7, 11})]),
                min_tokens=st.sampled_from([0, 0, 0, 3]),
                bad_words=st.sampled_from([(), (), (), ((1,), (2, 3), *((i, i + 1) for i in range(9)))]),
                stop_pair=st.sampled_from([None, None, (4, 9), (1, 1)]),
                logprobs=optional(st.integers(0, 3)),
                prompt_logprobs=st.sampled_from([None, None, None, 2]),
                arrives=st.integers(0, 12),
                aborted=st.sampled_from([None, None, None, 1, 5, 9, 14]),
            ),
            min_size=1,
            max_size=8,
        )
    )
    longest = max(len(s.prompt) + s.max_tokens - 1 for s in specs)
    least = -(-longest // size) + 1
    world = World(
        max_num_seqs=draw(st.integers(1, 8)),
        budget=draw(st.integers(1, 24)),
        block_size=size,
        num_blocks=least + draw(st.sampled_from([0, 0, 1, 2, 3, 5, 8, 20, 80])),
        lag=draw(st.integers(0, 3)),
        blocks_ahead=draw(st.integers(1, 4)),
        caching=draw(st.sampled_from([True, True, False])),
        ladder=draw(st.sampled_from([(1, 2, 4, 8), (4, 8), (8,), (1, 2, 3, 4, 5, 6, 7, 8)])),
    )
    return world, specs, draw(st.lists(st.integers(0, 3), max_size=4))


@settings(max_examples=700, deadline=None, derandomize=True)
@given(scenarios())
def test_every_request_gets_the_tokens_it_gets_alone(scenario):
    play(*scenario)


def random_scenario(rng):
    """Larger than `scenarios` and much cheaper to draw; does not shrink."""
    size = rng.choice([1, 2, 3, 4])
    heads = [[rng.randrange(VOCAB) for _ in range(rng.randrange(5 * size))] for _ in range(2)]
    specs = [
        Spec(
            prompt=tuple(rng.choice(heads) + [rng.randrange(3) for _ in range(rng.randrange(1, 6))]),
            max_tokens=rng.randrange(1, 16),
            seed=rng.randrange(3),
            stop_ids=frozenset(rng.sample(range(VOCAB), rng.choice([0, 0, 1, 3]))),
            min_tokens=rng.choice([0, 0, 0, 4]),
            bad_words=tuple((i, i + 1) for i in range(VOCAB)) if rng.random() < 0.1 else (),
            stop_pair=rng.choice([None, None, None, (1, 2)]),
            logprobs=rng.choice([None, None, 0, 2]),
            prompt_logprobs=rng.choice([None] * 6 + [1]),
            arrives=rng.randrange(rng.choice([1, 25])),
            aborted=rng.choice([None] * 6 + [rng.randrange(30)]),
        )
        for _ in range(rng.randrange(2, 12))
    ]
    longest = max(len(s.prompt) + s.max_tokens - 1 for s in specs)
    world = World(
        max_num_seqs=rng.randrange(1, 9),
        budget=rng.choice([1, 5, 12, 40]),
        block_size=size,
        num_blocks=-(-longest // size) + 1 + rng.choice([0, 1, 2, 4, 8, 100]),
        lag=rng.randrange(4),
        blocks_ahead=rng.randrange(1, 5),
        caching=rng.random() < 0.8,
        ladder=rng.choice([(1, 2, 4, 8), (2, 8), (1, 2, 3, 4, 5, 6, 7, 8)]),
    )
    return world, specs, [rng.randrange(4) for _ in range(rng.randrange(3))]


@pytest.mark.parametrize("block", range(8))
def test_many_random_scenarios(block):
    seen = Counter()
    for seed in range(block * 200, block * 200 + 200):
        engine = play(*random_scenario(random.Random(seed)))
        s = engine.scheduler
        seen.update(
            preemptions=s.num_preemptions,
            compactions=s.num_compactions,
            stalls=s.num_block_stalls,
            held_back=s.num_host_dependency,
            passed_over=s.num_passed_over,
            cached=s.prefix_cache_hits,
            evictions=engine.allocator.num_evictions,
            steady=sum(isinstance(x.rows, SteadyRows) for x in engine.schedules),
            steady_growth=sum(
                isinstance(x.rows, SteadyRows) and bool(x.rows.grown) for x in engine.schedules
            ),
            mixed=sum(x.kind is StepKind.MIXED for x in engine.schedules),
            reused=sum(r.joins and r.row in x.leaves for x in engine.schedules for r in x.rows),
        )
    # The scenarios are worth something only while they reach every path.
    missing = {
        "preemptions",
        "compactions",
        "stalls",
        "held_back",
        "passed_over",
        "cached",
        "evictions",
        "mixed",
        "steady",
        "steady_growth",
    }
    assert missing <= {name for name, count in seen.items() if count}


@pytest.mark.parametrize("block", range(4))
def test_the_short_way_of_steady_steps_makes_the_same_schedules(block, monkeypatch):
    """With the short way and without it, looked at after every call and never: row by row the same."""
    steady = repeated = 0
    for seed in range(block * 150, block * 150 + 150):
        world, specs, lags = random_scenario(random.Random(seed))
        watched = play(world, specs, lags)
        unwatched = play(replace(world, watched=False), specs, lags)
        with monkeypatch.context() as patched:
            patched.setattr(Scheduler, "_schedule_steady", lambda self: None)
            patched.setattr(Scheduler, "repeat", lambda self: None)
            plain = play(world, specs, lags)
        engines = watched, unwatched, plain
        schedules = [[s.to_json() for s in e.schedules] for e in engines]
        assert schedules[0] == schedules[1]
        assert schedules[0] == schedules[2]
        assert not any(isinstance(s.rows, SteadyRows) for s in plain.schedules)
        assert (
            len({(e.scheduler.num_steps, tuple(sorted(e.scheduler.step_tokens.items()))) for e in engines})
            == 1
        )
        steady += sum(isinstance(s.rows, SteadyRows) for s in unwatched.schedules)
        repeated += unwatched.num_repeats
        assert watched.num_repeats == unwatched.num_repeats
    assert steady > repeated > 300


# --- examples ---------------------------------------------------------------------------


def make(*specs, **world):
    engine = Engine(World(**world))
    requests = [spec.request(str(i)) for i, spec in enumerate(specs)]
    for request in requests:
        engine.add(request)
    return engine, requests


def shape(schedule):
    """(request id, device row, start, length) of each row."""
    return [(r.request.request_id, r.row, r.start, r.length) for r in schedule.rows]


def test_steps_run_ahead_of_commit_up_to_the_length_limit():
    engine, (request,) = make(Spec((1, 2, 3), max_tokens=3), lag=3)
    first, second, third = engine.launch(), engine.launch(), engine.launch()
    assert [s.kind for s in (first, second, third)] == [StepKind.PREFILL, StepKind.DECODE, StepKind.DECODE]
    assert [shape(s) for s in (first, second, third)] == [
        [("0", 0, 0, 3)],
        [("0", 0, 3, 1)],
        [("0", 0, 4, 1)],
    ]
    assert [r.joins for s in (first, second, third) for r in s.rows] == [True, False, False]
    assert (request.num_launched, request.num_known, request.on_device) == (3, 3, True)
    assert engine.launch() is None  # the last token is in flight
    engine.finish()
    assert request.finish_reason is FinishReason.LENGTH


def test_no_more_steps_in_flight_than_max_lag_allows():
    engine, _ = make(Spec((1,)), lag=1)
    assert engine.launch()
    assert engine.launch()
    assert engine.launch() is None
    engine.commit()
    assert engine.launch()


def test_prompts_are_chunked_and_decodes_come_first():
    engine, _ = make(Spec((1, 2)), Spec(tuple(range(9))), budget=4, max_num_seqs=4)
    a, b = engine.launch(), engine.launch()
    assert shape(a) == [("0", 0, 0, 2), ("1", 1, 0, 2)]
    assert [r.samples for r in a.rows] == [True, False]
    assert shape(b) == [("0", 0, 2, 1), ("1", 1, 2, 3)]
    assert b.kind is StepKind.MIXED
    engine.commit()
    c = engine.launch()
    engine.commit()
    d = engine.launch()
    assert shape(c) == [("0", 0, 3, 1), ("1", 1, 5, 3)]
    assert shape(d) == [("0", 0, 4, 1), ("1", 1, 8, 1)]
    assert [r.decode for r in d.rows] == [True, False]  # one token of a prompt is not a decode
    assert [r.samples for r in d.rows] == [True, True]
    engine.finish()


def test_completions_of_one_prompt_compute_it_once():
    prompt = tuple(range(20))
    engine, requests = make(*(Spec(prompt, seed=i) for i in range(4)), budget=64, lag=0)
    engine.step()
    assert engine.scheduler.num_running == 1
    engine.step()
    assert engine.scheduler.num_running == 4
    engine.finish()
    # limit: one token of each must be computed, and 16 of 20 stand in full blocks before it
    assert engine.chunk_tokens == 20 + 3 * 4
    assert [r.num_cached_tokens for r in requests] == [0, 16, 16, 16]
    assert engine.scheduler.num_passed_over == 3


def test_those_behind_a_passed_over_request_go_on():
    shared = tuple(range(8))
    engine, _ = make(Spec((*shared, 1)), Spec((*shared, 2)), Spec((9, 9, 9, 9, 9)), budget=64, lag=3)
    assert [r.request.request_id for r in engine.launch().rows] == ["0", "2"]
    engine.launch()
    engine.commit()
    assert [r.request.request_id for r in engine.launch().rows if r.joins] == ["1"]
    engine.finish()


def test_a_prefix_shorter_than_a_block_is_not_waited_for():
    engine, _ = make(Spec((1, 2, 3)), Spec((1, 2, 3)), Spec((1, 2, 3, 4)), budget=64)
    assert len(engine.launch().rows) == 3
    engine.finish()


@pytest.mark.parametrize("lag", [0, 2])
def test_a_request_that_waits_for_a_prefix_goes_on_when_its_owner_is_aborted(lag):
    prompt = tuple(range(12))
    engine, (_, second) = make(Spec(prompt), Spec(prompt), budget=4, lag=lag)
    engine.step()
    assert second.status is RequestStatus.WAITING
    engine.scheduler.abort("0")
    assert [r.request for r in engine.launch().rows] == [second]
    engine.finish()
    assert second.output_token_ids == run_alone(Spec(prompt).request("x")).output_token_ids


def test_a_vacated_row_leaves_with_the_next_step_unless_someone_joins_it():
    specs = [Spec((i,), max_tokens=9) for i in range(3)]
    engine, _ = make(*specs, max_num_seqs=3, ladder=(3,), lag=0)
    engine.step()
    engine.scheduler.abort("0")
    engine.scheduler.abort("1")
    engine.add(Spec((7,), max_tokens=9).request("new"))
    schedule = engine.launch()
    assert [(r.request.request_id, r.row, r.joins) for r in schedule.rows] == [
        ("2", 2, False),
        ("new", 0, True),
    ]
    assert schedule.leaves == (1,)
    engine.commit()
    assert engine.launch().leaves == ()
    engine.finish()


def test_compaction_moves_the_highest_rows_only_where_the_step_becomes_smaller():
    engine, requests = make(*(Spec((i,), max_tokens=20) for i in range(6)), max_num_seqs=6, lag=0)
    engine.step()
    for i in (0, 4):
        engine.scheduler.abort(str(i))
    schedule = engine.launch()  # four requests, highest row 5: a step of 4 instead of 8
    assert schedule.moves == ((5, 0),)
    assert schedule.leaves == (4,)  # not 0, which is in use again, nor 5, which the move emptied
    assert shape(schedule) == [("5", 0, 1, 1), ("1", 1, 1, 1), ("2", 2, 1, 1), ("3", 3, 1, 1)]
    engine.commit()
    engine.scheduler.abort("1")
    schedule = engine.launch()
    assert (schedule.moves, schedule.num_seqs) == ((), 4)  # three requests pad to 4 as well
    engine.commit()
    engine.add(Spec((1, 2, 3)).request("new"))
    engine.step()
    assert engine.requests[-1].row == 1
    assert requests[5].row == 0
    engine.finish()


def test_compaction_waits_while_a_prompt_is_being_computed():
    specs = [*(Spec((i,), max_tokens=20) for i in range(4)), Spec(tuple(range(40)), max_tokens=2)]
    engine, requests = make(*specs, max_num_seqs=8, budget=8, num_blocks=100, lag=0)
    engine.step()
    for i in range(3):
        engine.scheduler.abort(str(i))
    while requests[4].num_computed < 40:
        assert engine.launch().moves == ()
        engine.commit()
    assert engine.launch().moves == ((4, 0), (3, 1))
    engine.finish()


def test_the_latest_request_is_preempted_and_computed_again():
    specs = [Spec((i, i, i), max_tokens=12) for i in range(3)]
    engine, requests = make(*specs, num_blocks=8, lag=2, blocks_ahead=1, caching=False)
    engine.finish()
    assert [r.num_preemptions > 0 for r in requests] == [False, False, True]
    assert requests[2].epoch == requests[2].num_preemptions
    check_answers(engine, specs, requests)
    order = [r.request.request_id for s in engine.schedules for r in s.rows if r.joins]
    assert order[:3] == ["0", "1", "2"]
    assert set(order[3:]) == {"2"}


def test_the_latest_request_keeps_its_blocks_while_it_waits_for_one():
    engine, requests = make(Spec((1,), max_tokens=8), Spec((2,), max_tokens=8), num_blocks=4, lag=0)
    while not engine.scheduler.num_block_stalls:
        engine.step()
    assert engine.scheduler.num_preemptions == 0
    assert requests[1].status is RequestStatus.RUNNING
    assert (requests[0].delays, requests[1].delays) == ({}, {Delay.NO_FREE_BLOCK: 1})
    engine.finish()


def test_a_preempted_request_goes_before_later_arrivals():
    specs = [Spec((i, i, i), max_tokens=12) for i in range(3)]
    engine, requests = make(*specs, num_blocks=8, lag=1, blocks_ahead=1, caching=False)
    while not requests[2].num_preemptions:
        engine.step()
    engine.add(Spec((5,), max_tokens=1).request("late"))
    engine.finish()
    joins = [r.request.request_id for s in engine.schedules for r in s.rows if r.joins]
    assert joins.index("late") > max(i for i, name in enumerate(joins) if name == "2")


def test_a_preempted_request_finds_its_own_blocks_in_the_cache():
    specs = [Spec(tuple(range(i, i + 9)), max_tokens=20) for i in range(3)]
    engine, requests = make(*specs, num_blocks=18, budget=64, lag=0, blocks_ahead=1)
    engine.finish()
    assert requests[2].num_preemptions
    assert engine.scheduler.prefix_cache_hits > 0
    assert requests[2].num_cached_tokens == 0  # of the first admission
    check_answers(engine, specs, requests)


def test_blocks_are_handed_out_ahead_while_many_are_free():
    engine, (request,) = make(Spec((1, 2, 3, 4), max_tokens=30), num_blocks=100, blocks_ahead=4, lag=0)
    engine.finish()
    new = [len(r.new_blocks) for s in engine.schedules for r in s.rows]
    assert [n for n in new if n] == [1, 4, 4]  # 33 tokens are computed, in 9 blocks
    assert request.finish_reason is FinishReason.LENGTH


def test_host_dependent_requests_hold_back_only_themselves():
    words = tuple((i, i + 1) for i in range(VOCAB))
    specs = [Spec((1,), bad_words=words), Spec((2,))]
    engine, requests = make(*specs, lag=1)
    for _ in range(6):
        engine.step()
    names = [[r.request.request_id for r in s.rows] for s in engine.schedules]
    assert names == [["0", "1"], ["1"], ["0", "1"], ["1"], ["0", "1"], ["1"]]
    engine.finish()
    assert engine.scheduler.num_host_dependency > 0
    assert (
        requests[0].delays[Delay.HOST_DEPENDENCY]
        == engine.scheduler.delayed_steps[Delay.HOST_DEPENDENCY]
        >= 3
    )
    assert requests[1].delays == {}
    check_answers(engine, specs, requests)


def test_tokens_after_a_stop_are_dropped():
    want = run_alone(Spec((3, 1), max_tokens=9).request("x")).output_token_ids
    stop = next(t for i, t in enumerate(want) if t and t not in want[:i] and i >= 2)
    spec = Spec((3, 1), max_tokens=9, stop_ids=frozenset({stop, 0}))
    engine, (request,) = make(spec, lag=3)
    engine.finish()
    assert request.output_token_ids == want[: want.index(stop) + 1]
    assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, stop)


def test_end_of_sequence_has_no_stop_reason():
    alone = [run_alone(Spec((i,), max_tokens=30).request("x")).output_token_ids for i in range(20)]
    prompt = next(i for i, tokens in enumerate(alone) if 0 in tokens[:-1])
    engine, (request,) = make(Spec((prompt,), max_tokens=30, stop_ids=frozenset({0})), lag=2)
    engine.finish()
    assert (request.output_token_ids[-1], request.stop_reason) == (0, None)
    assert request.finish_reason is FinishReason.STOP


def test_a_stop_string_before_min_tokens_does_not_end_the_request():
    request = Spec((1,), max_tokens=6, min_tokens=4).request("0")

    class Eager(FakeSink):
        open = True

        def push(self, token_id):
            self.tokens.append(token_id)
            return "stop!"

    request.sink = Eager((0, 0))
    engine = Engine(World(lag=1))
    engine.add(request)
    engine.finish()
    assert len(request.output_token_ids) == 4
    assert request.stop_reason == "stop!"


@pytest.mark.parametrize("watches", [False, True])
@pytest.mark.parametrize("prompts", [(3,), (1, 3, 7)], ids=["alone", "several"])
def test_tokens_that_begin_no_stop_string_are_not_turned_into_text(watches, prompts):
    """Nor is any where none is watched for; a request that watches is looked at when it joins a group."""
    asked = []

    class Patient(FakeSink):
        def catch_up(self, token_ids):
            asked.append(len(token_ids))
            return super().catch_up(token_ids)

        def push(self, token_id):
            assert watches, "nobody wanted the text"
            return super().push(token_id)

    Patient.watches = watches
    specs = [Spec((i,), max_tokens=40, seed=i, stop_ids=frozenset({0})) for i in prompts]
    requests = [spec.request(f"{spec.seed}") for spec in specs]
    engine = Engine(World(lag=1))
    looked = []
    for request in requests:
        request.sink = Patient((VOCAB, 0))  # which no token begins
        engine.add(request)
    look_at = engine.scheduler._look_at
    engine.scheduler._look_at = lambda *args: (looked.append(args[3]), look_at(*args))
    engine.finish()
    assert len(looked) < engine.scheduler.num_steps / 2, "steady steps look at no row"
    assert len(looked) > 0
    assert bool(asked) == watches
    assert len(asked) < sum(len(request.output_token_ids) for request in requests) / 2
    for request in requests:
        assert request.silent_end == (request.finish_reason is FinishReason.STOP)
        assert request.output_token_ids == run_alone(Spec(request.prompt_token_ids, max_tokens=40, seed=request.seed,
                                                          stop_ids=frozenset({0})).request("x")).output_token_ids  # fmt: skip


def test_prompt_logprobs_do_not_use_cached_blocks_and_are_complete():
    prompt = tuple(range(11))
    specs = [Spec(prompt), Spec(prompt, prompt_logprobs=2), Spec((4,), prompt_logprobs=0)]
    engine, requests = make(*specs, budget=5, lag=1)
    engine.finish()
    assert requests[1].num_cached_tokens == 0
    assert len(requests[1].prompt_logprobs) == 11
    assert requests[2].prompt_logprobs == [None]
    check_answers(engine, specs, requests)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_abort_in_every_state(lag):
    specs = [Spec(tuple(range(i, i + 9)), max_tokens=9) for i in range(4)]
    engine, requests = make(*specs, max_num_seqs=3, budget=12, lag=lag)
    engine.step()
    engine.step()
    states = [(r.status, r.on_device) for r in requests]
    assert states[0] == (RequestStatus.RUNNING, True)
    assert (RequestStatus.RUNNING, False) in states
    assert states[3] == (RequestStatus.WAITING, False)
    for request in requests[:3]:
        assert engine.scheduler.abort(request.request_id) is request
    assert engine.scheduler.abort("3", FinishReason.ERROR) is requests[3]
    assert engine.scheduler.abort("3") is None
    assert engine.scheduler.abort("unknown") is None
    assert [r.finish_reason for r in requests] == [FinishReason.ABORT] * 3 + [FinishReason.ERROR]
    assert not engine.scheduler.has_unfinished
    assert engine.launch() is None
    engine.finish()


def test_an_id_can_be_used_again_while_its_old_steps_are_in_flight():
    spec = Spec((1, 2, 3), max_tokens=5)
    engine, (old,) = make(spec, lag=3)
    engine.launch()
    engine.launch()
    engine.scheduler.abort("0")
    new = spec.request("0")
    engine.add(new)
    engine.finish()
    assert old.output_token_ids == []
    assert new.output_token_ids == run_alone(spec.request("x")).output_token_ids


def test_requests_that_cannot_run_are_refused():
    engine, (first,) = make(Spec((1,)), num_blocks=4)
    with pytest.raises(RequestError, match="in use"):
        engine.scheduler.add(Spec((1,)).request("0"))
    with pytest.raises(RequestError, match="0 < prompt length"):
        engine.scheduler.add(Spec(()).request("1"))
    with pytest.raises(RequestError, match="max_model_len"):
        engine.scheduler.add(Spec((1,), max_tokens=2000).request("1"))
    with pytest.raises(KVCacheError, match="needs 4 KV blocks for 14 tokens, the cache has 3"):
        engine.scheduler.add(Spec((1,), max_tokens=13).request("1"))
    engine.add(Spec((1,), max_tokens=12).request("1"))  # 12 computed tokens just fit
    engine.finish()
    with pytest.raises(RequestError, match="scheduled before"):
        engine.scheduler.add(first)


def test_config_that_cannot_work_is_refused():
    good = SchedulerConfig(2, 8, 100, 4)
    with pytest.raises(ConfigError, match="at least max_num_seqs"):
        replace(good, max_num_seqs=9)
    with pytest.raises(ConfigError, match="blocks_ahead must be at least 1"):
        replace(good, blocks_ahead=0)
    with pytest.raises(ConfigError, match="max_lag"):
        replace(good, max_lag=-1)
    with pytest.raises(ConfigError, match="block_size is 4 for the scheduler but 8"):
        Scheduler(good, BlockAllocator(9, 8), int)
    with pytest.raises(ConfigError, match="enable_prefix_caching"):
        Scheduler(good, BlockAllocator(9, 4, False), int)


def test_commit_refuses_a_wrong_order_and_a_missing_token():
    engine, _ = make(Spec((1,)), lag=3)
    first, second = engine.launch(), engine.launch()
    with pytest.raises(RuntimeError, match="oldest one in flight"):
        engine.scheduler.commit(second, StepResult([1]))
    with pytest.raises(RuntimeError, match="no token for live request '0'"):
        engine.scheduler.commit(first, StepResult([-1]))


@pytest.mark.parametrize("field_", ["logprobs", "prompt_logprobs"])
def test_commit_refuses_missing_logprobs(field_):
    engine, _ = make(Spec((1, 2), **{field_: 1}))
    with pytest.raises(RuntimeError, match=r"logprobs"):
        engine.scheduler.commit(engine.launch(), StepResult([1]))


def test_the_prefix_cache_is_reset_only_when_nothing_runs():
    prompt = tuple(range(9))
    engine, _ = make(Spec(prompt), lag=0)
    engine.step()
    assert not engine.scheduler.reset_prefix_cache()
    engine.finish()
    assert engine.scheduler.reset_prefix_cache()
    engine.add(Spec(prompt).request("again"))
    engine.finish()
    assert engine.requests[-1].num_cached_tokens == 0


@pytest.mark.parametrize("lag", [0, 3])
def test_reset_ends_everything_and_leaves_a_working_scheduler(lag):
    prompt = tuple(range(9))
    engine, requests = make(*(Spec(prompt, seed=i) for i in range(6)), max_num_seqs=3, lag=lag)
    for _ in range(3):
        engine.step()
    engine.launch()
    engine.allocator.allocate(1)  # as if an interrupt came before the block reached its request
    assert engine.scheduler.reset(FinishReason.ERROR) == requests
    assert {r.finish_reason for r in requests} == {FinishReason.ERROR}
    engine.inflight.clear()
    engine.check_idle()
    assert engine.allocator.num_cached == 0
    spec = Spec(prompt)
    engine.add(spec.request("0"))
    schedule = engine.scheduler.schedule()
    assert (schedule.rows[0].row, schedule.leaves) == (0, (1, 2))
    engine.device.rows = {row: Row(requests[0], 0) for row in schedule.leaves}
    engine.inflight.append((schedule, schedule, engine.device.run(schedule)))
    engine.schedules = [None] * (schedule.step + 1)
    engine.finish()
    assert engine.requests[-1].output_token_ids == run_alone(spec.request("x")).output_token_ids


def test_a_queue_that_cannot_move_costs_nothing(monkeypatch):
    """The head does not fit: it is looked up again only after blocks were released."""
    specs = [Spec((1,) * 30, max_tokens=9), *(Spec((i,) * 30, max_tokens=9) for i in range(2, 200))]
    engine, _ = make(*specs, num_blocks=13, budget=64, max_num_seqs=8, lag=0)
    engine.step()
    looked_up = []
    lookup = BlockAllocator.lookup
    monkeypatch.setattr(BlockAllocator, "lookup", lambda *args: looked_up.append(1) or lookup(*args))
    for _ in range(6):
        engine.step()
    assert engine.scheduler.num_running == 1
    assert len(looked_up) <= 1


def test_a_prompt_takes_blocks_from_a_later_decode_of_the_same_step():
    """The earlier request was passed over, so the later one decodes already; it leaves the step again."""
    shared = tuple(range(8))
    specs = [
        Spec((*shared, 1), max_tokens=25, seed=1),
        Spec((*shared, *range(20)), max_tokens=3, seed=1),
        Spec((1,), max_tokens=25, logprobs=1),
    ]
    engine, requests = make(*specs, num_blocks=10, max_num_seqs=3, budget=12, blocks_ahead=1, lag=0)
    engine.step()
    engine.step()
    engine.config = engine.scheduler.config = replace(engine.config, max_num_batched_tokens=3)
    engine.finish()
    assert requests[2].num_preemptions
    check_answers(engine, specs, requests)
