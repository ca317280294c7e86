"""The types that travel along the step. Pure Python: no tensors, no torch.

`SamplingParams` (user) -> `Request` (engine) -> `Schedule` (scheduler) -> `Route` (plan)
-> `Batch` (inputs) -> `Pending` (runner) -> `RequestOutput`. `Batch` and `Pending` hold
tensors and live in `inputs.py` and `graphs/results.py`. Nobody changes
them but `Request` and the counts of `Members`, which the scheduler does.
"""

from __future__ import annotations

import functools
import math
import operator
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from numbers import Real
from typing import Any, NamedTuple, Protocol, TypeVar, overload

from .errors import RequestError, SamplingParamsError, UnknownOptionError

C = TypeVar("C")

MAX_LOGPROBS = 20
"""Most alternatives a token can report; the device buffers are this wide."""
MAX_STOP_IDS = 64
"""Most stop token ids a request can have, end-of-sequence ids included; a power of two, for the kernels."""
MAX_LOGIT_BIAS = 512
"""Most `logit_bias` entries a request can have; a power of two, for the kernels."""

MAX_TEMPERATURE = 1e4
"""The distribution is flat long before."""
MAX_REPETITION_PENALTY = 1e3
"""Its inverse is the smallest."""
MAX_LOGIT_BIAS_VALUE = 1e9
"""Both ways; 100 already decides everything."""
MAX_MIN_TOKENS = 2**30
"""A prompt and this many tokens still have an int32 position."""

_ID_LIMIT = 2**31
_SEED_LIMIT = 2**63

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def shown(value: Any) -> str:
    """`repr` for an error message: short, and it never raises."""
    try:
        return _REPR.repr(value)
    except Exception:  # an int of 5000 digits, or a `__repr__` of the caller's
        return f"a value of type {type(value).__name__}"


def whole(value: Any) -> int:
    """An integer of any library as Python's; a TypeError for everything else, booleans too."""
    if isinstance(value, bool):
        raise TypeError("a boolean is no number")
    return operator.index(value)


def real(value: Any) -> float:
    """A real number of any library as Python's float, inf where it is too large; else a TypeError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError("not a real number")
    try:
        return float(value)
    except OverflowError:
        return math.inf * (1 if value > 0 else -1)  # type: ignore[operator]  # Real has no order with int for mypy


def check_names(values: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Refuse the first option that does not exist; the error names the nearest that does."""
    known = tuple(known)
    for name in values:
        if name not in known:
            raise UnknownOptionError(name if isinstance(name, str) else shown(name), known, where)


def named_fields(cls: type[C]) -> type[C]:
    """Have a dataclass refuse a field that does not exist as everything here does: by the nearest that does."""
    make = cls.__init__
    known = frozenset(f.name for f in fields(cls))  # type: ignore[arg-type]  # a dataclass

    @functools.wraps(make)
    def init(self: Any, *args: Any, **values: Any) -> None:
        if not values.keys() <= known:
            check_names(values, known, cls.__name__)
        make(self, *args, **values)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


class RequestOutputKind(Enum):
    """What a stream of `RequestOutput` carries."""

    CUMULATIVE = 0
    """Each output repeats everything so far."""
    DELTA = 1
    """Each output holds only what is new."""
    FINAL_ONLY = 2
    """One output, when the request ends."""


class SamplerVariant(IntEnum):
    """Which sampler a step needs; each includes the ones before it. Part of the graph key."""

    GREEDY = 0
    """argmax; the lowest index wins a tie."""
    SAMPLE = 1
    """temperature, min-p, top-k, top-p."""
    FULL = 2
    """penalties, bias, masks, logprobs on top."""


@named_fields
@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens for one request; names and defaults follow vLLM.

    Filters apply in this order: mask (`allowed_token_ids`, `bad_words`, `min_tokens`),
    `logit_bias`, penalties, temperature, min-p, top-k, top-p. Ties at a threshold are kept.
    `temperature=0` is greedy. `logprobs` and `prompt_logprobs` are of the raw distribution,
    before any of these. The random number for the token at position p depends on (`seed`, p)
    alone, so a seed gives the same tokens in whatever batch the request runs.

    Raises:
        SamplingParamsError: a field is out of range; the message names it.
        UnknownOptionError: a field that does not exist; the message names the nearest. It is a TypeError too.
    """

    n: int = 1
    """Completions for the prompt; completion i uses `seed + i`."""
    temperature: float = 1.0
    """0, or a positive number up to `MAX_TEMPERATURE`; below 1e-30 it is as 1e-30."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this mass; (0, 1]."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; [0, 1]."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """From 1 / `MAX_REPETITION_PENALTY` to `MAX_REPETITION_PENALTY`."""
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    """Strings that end the request; they may span tokens."""
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """Most tokens to generate; None: as many as the model's length allows."""
    min_tokens: int = 0
    """No end-of-sequence, stop token id or stop string ends the request before this many tokens;
    at most `MAX_MIN_TOKENS`."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        def check(name: str, rule: Callable[..., Any], *bounds: Any) -> None:
            # What a rule returns is Python's own type and a copy: nothing of the caller's is kept.
            object.__setattr__(self, name, rule(name, getattr(self, name), *bounds))

        check("n", _int, 1, 1024)
        check("temperature", _float, 0.0, MAX_TEMPERATURE)
        check("top_p", _float, 0.0, 1.0, True)
        check("top_k", _int, -1, _ID_LIMIT - 1)
        check("min_p", _float, 0.0, 1.0)
        check("presence_penalty", _float, -2.0, 2.0)
        check("frequency_penalty", _float, -2.0, 2.0)
        check("repetition_penalty", _float, 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        check("seed", _optional_int, -_SEED_LIMIT, _SEED_LIMIT - 1)
        check("max_tokens", _optional_int, 1, _ID_LIMIT - 1)
        check("min_tokens", _int, 0, MAX_MIN_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        check("logprobs", _optional_int, 0, MAX_LOGPROBS)
        check("prompt_logprobs", _optional_int, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingParamsError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise SamplingParamsError(
                f"output_kind must be a RequestOutputKind, got {shown(self.output_kind)}"
            )
        check("stop", _strings)
        check("bad_words", _strings)
        check("stop_token_ids", _ids)
        if self.allowed_token_ids is not None:
            check("allowed_token_ids", _ids)
            if not self.allowed_token_ids:
                raise SamplingParamsError("allowed_token_ids must not be empty; leave it None to allow all")
        if self.logit_bias is not None:
            check("logit_bias", _bias)
        if self.stop_strings and not self.detokenize:
            raise SamplingParamsError("stop strings need detokenize=True; use stop_token_ids instead")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping; an unknown field raises and names the nearest known one."""
        if not isinstance(values, Mapping):
            raise SamplingParamsError(f"SamplingParams.from_dict takes a mapping, got {shown(values)}")
        check_names(values, (f.name for f in fields(cls)), "SamplingParams")
        return cls(**values)

    def stops(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The token ids that end a request of a model with these end-of-sequence ids.

        Raises:
            RequestError: too many, or none of `allowed_token_ids` may come first.
        """
        own = frozenset(self.stop_token_ids or ())
        most = len(own.union(eos_token_ids))
        if most > MAX_STOP_IDS:
            raise RequestError(
                f"stop_token_ids: {most} ids with the end-of-sequence ids, at most {MAX_STOP_IDS} are supported"
            )
        found = own if self.ignore_eos else own.union(eos_token_ids)
        if (
            self.min_tokens
            and self.allowed_token_ids is not None
            and found.issuperset(self.allowed_token_ids)
        ):
            raise RequestError(
                "allowed_token_ids: each of them ends the request, which min_tokens="
                f"{self.min_tokens} forbids; allow another token, or set min_tokens=0"
            )
        return found

    def delivered_as(self, kind: RequestOutputKind) -> SamplingParams:
        """The same but for `output_kind`; nothing is checked again."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, output_kind=kind)
        return other

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self.stop or ()  # type: ignore[return-value]  # a tuple since __post_init__

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def sampler_variant(self) -> SamplerVariant:
        """The smallest variant that serves this request."""
        if (
            self.has_penalties
            or self.logprobs is not None
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words
            or self.min_tokens > 0
        ):
            return SamplerVariant.FULL
        return SamplerVariant.GREEDY if self.temperature == 0.0 else SamplerVariant.SAMPLE


def _int(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = whole(value)
    except TypeError:
        raise SamplingParamsError(f"{name} must be an integer, got {shown(value)}") from None
    if not low <= number <= high:
        raise SamplingParamsError(f"{name} must be at least {low} and at most {high}, got {shown(value)}")
    return number


def _optional_int(name: str, value: Any, low: int, high: int) -> int | None:
    return None if value is None else _int(name, value, low, high)


def _float(name: str, value: Any, low: float, high: float, above: bool = False) -> float:
    try:
        number = real(value)
    except TypeError:
        raise SamplingParamsError(f"{name} must be a number, got {shown(value)}") from None
    if not low <= number <= high or (above and number == low):  # a NaN fails every comparison
        least = "above" if above else "of at least"
        raise SamplingParamsError(
            f"{name} must be a finite number {least} {low:g} and at most {high:g}, got {shown(value)}"
        )
    return number


def _items(name: str, value: Any, what: str) -> tuple[Any, ...]:
    """A list, array or tensor as a tuple; None is empty."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise SamplingParamsError(f"{name} must be a list of {what}, got {shown(value)}")
    return tuple(value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else _items(name, value, "strings")
    if not all(isinstance(item, str) and item for item in items):
        raise SamplingParamsError(f"{name} must be non-empty strings, got {shown(value)}")
    return items


def _ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_int(name, item, 0, _ID_LIMIT - 1) for item in _items(name, value, "token ids"))


def _bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise SamplingParamsError(f"{name} must map token ids to numbers, got {shown(value)}")
    if len(value) > MAX_LOGIT_BIAS:
        raise SamplingParamsError(f"{name} has {len(value)} entries, at most {MAX_LOGIT_BIAS} are supported")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        try:
            token = int(key) if isinstance(key, str) else key  # JSON has only string keys
        except ValueError:
            raise SamplingParamsError(f"{name}: {shown(key)} is not a token id") from None
        token = _int(f"a token id of {name}", token, 0, _ID_LIMIT - 1)
        if token in bias:
            raise SamplingParamsError(f"{name} has token {token} twice, as a number and as a string")
        bias[token] = _float(name, amount, -MAX_LOGIT_BIAS_VALUE, MAX_LOGIT_BIAS_VALUE)
    return bias


# --- one request -----------------------------------------------------------------------


class Logprob(NamedTuple):
    """One candidate token: natural-log probability, rank (1 is the most likely), its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Candidates at one position by token id: the chosen token and the `k` most likely."""


class TextSink(Protocol):
    """Turns the tokens of one request into text; owned by the request."""

    @property
    def watches(self) -> bool:
        """Whether a token may complete a stop string.

        Else nothing is done for a token until somebody wants the text (`catch_up`); the same goes for a
        token that `passes` while the sink is not `open`.
        """
        ...

    @property
    def passes(self) -> Mapping[int, bool]:
        """Of any token: whether it neither holds a stop string nor ends with the beginning of one.

        Requests that watch for the same have the same one.
        """
        ...

    @property
    def open(self) -> bool:
        """Whether the text so far may end within a stop string: then any token may complete it."""
        ...

    @property
    def text(self) -> str:
        """Text so far that no later token can change and no stop string can take back."""
        ...

    def push(self, token_id: int) -> str | None:
        """Add the next token; the stop string that it completed, or None.

        After a match `text` ends before the stop string (or after it, where the request
        asked for that), and no further push is allowed.
        """
        ...

    def catch_up(self, token_ids: Sequence[int]) -> str | None:
        """Add what is new of all tokens so far; the stop string that the last one completed, or None.

        Those before the last complete none: they pass, or no stop string is watched for.
        """
        ...

    def finish(self) -> str:
        """The whole text, held-back characters included; called once, when the request ends.

        A character that was never completed shows as U+FFFD.
        """
        ...


class TokenGrammar(Protocol):
    """What the output of one request has to follow; owned by the request."""

    def fill(self, words: Any) -> None:
        """Set the bits of the tokens that may come next.

        Args:
            words: [ceil(vocab / 32)] int32 numpy array: bit v % 32 of word v // 32 is token v; overwritten.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Take a token that was sampled; False: it does not fit, and the request has to end."""
        ...


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(eq=False)
class Request:
    """One sequence to generate. Made by the engine; afterwards only the scheduler changes it.

    A prompt with n > 1 is n requests with one `prompt_id`. Positions count tokens from the
    start of the prompt. "Launched" tokens are sampled on the device but not yet known here.
    """

    request_id: str
    prompt_id: str
    """Shared by the n completions of one prompt; equals `request_id` where n is 1."""
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    """End-of-sequence ids (unless ignored) and the user's own: at most `MAX_STOP_IDS`."""
    max_total_tokens: int
    """Prompt plus output at the most; never above the model's length."""
    seed: int
    """Resolved: the user's, or drawn by the engine."""
    index: int = 0
    """Which of the n completions."""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not be completed."""
    grammar: TokenGrammar | None = None
    sink: TextSink | None = None

    # Progress: written by the scheduler alone.
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    """Known (committed) tokens."""
    silent_end: bool = False
    """The last of them ended it and is no text: a stop token, or one that the grammar refused."""
    num_launched: int = 0
    """Sampled by steps in flight, so not yet known."""
    num_computed: int = 0
    """Tokens whose KV is in the cache or in flight."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache supplied at first admission."""
    admitted: float = 0.0
    """When it first got a row, as `time.monotonic` has it."""
    row: int = -1
    """Row of the device buffers while running, else -1."""
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[int] = field(default_factory=list)
    """Chained hashes of the full blocks of known tokens, extended as they fill."""
    on_device: bool = False
    """Its last token and position live in `StepState`: the next step is a decode."""
    epoch: int = 0
    """Raised by preemption: tokens launched under an older epoch are dropped."""
    num_preemptions: int = 0
    delays: dict[Delay, int] = field(default_factory=dict)
    """Steps that it sat out, by reason."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def num_known(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known and launched."""
        return self.num_known + self.num_launched

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def host_dependent(self) -> bool:
        """Its next mask depends on its last token, so it must not run ahead of commit."""
        return self.grammar is not None or any(len(word) > 1 for word in self.bad_word_ids)

    @property
    def sampler_variant(self) -> SamplerVariant:
        """The smallest variant that serves it."""
        masked = self.grammar is not None or self.bad_word_ids
        return SamplerVariant.FULL if masked else self.params.sampler_variant

    def token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Known tokens at positions [start, stop)."""
        n = len(self.prompt_token_ids)
        if stop <= n:
            return self.prompt_token_ids[start:stop]
        tail = tuple(self.output_token_ids[max(start - n, 0) : stop - n])
        return self.prompt_token_ids[start:n] + tail if start < n else tail

    def banned_next(self) -> tuple[int, ...]:
        """Tokens that would complete a bad word after the known tokens."""
        banned = []
        for word in self.bad_word_ids:
            need = len(word) - 1
            if need <= self.num_known and self.token_ids(self.num_known - need, self.num_known) == word[:-1]:
                banned.append(word[-1])
        return tuple(banned)


# --- one step --------------------------------------------------------------------------


class StepKind(str, Enum):
    DECODE = "decode"
    """Every row computes one token, which the device already holds."""
    PREFILL = "prefill"
    """Chunks of prompts only."""
    MIXED = "mixed"
    """Chunks of prompts beside decodes."""


class ScheduledRow(NamedTuple):
    """One request's part of a step. A tuple, since hundreds are made at every step."""

    request: Request
    row: int
    """Device row."""
    start: int
    """Position of the first token that this step computes."""
    length: int
    """Tokens that this step computes: 1 for a decode."""
    decode: bool
    """The token comes from `StepState`; otherwise the host supplies `length` known tokens."""
    samples: bool
    """The step samples this request's next token, at position start + length."""
    joins: bool
    """First step since admission: everything about the row has to be written."""
    num_blocks_before: int
    """Blocks already in the row's table on the device."""
    new_blocks: tuple[int, ...]
    """Blocks appended to the row's table before this step runs."""
    epoch: int
    """The request's epoch at launch."""


@dataclass(eq=False, slots=True)
class Members:
    """Requests that decode together, step after step; steps of equal rows share one object.

    What a step does alike for all of them is counted here, once: the scheduler counts, and whoever keeps
    figures of his own brings them up to date from these when somebody asks.
    """

    requests: tuple[Request, ...]
    rows: tuple[int, ...]
    """Device rows, ascending; none of them changes."""
    epochs: tuple[int, ...]
    starts: tuple[int, ...]
    """Position of each one's first token."""
    logprobs: bool
    """One of them wants logprobs."""
    launched: int = 0
    """Steps that were launched."""
    committed: int = 0
    """Steps whose tokens were taken, when the scheduler last brought its counters up to date."""


class SteadyRows(Sequence[ScheduledRow]):
    """The rows of a decode step whose members are those of the step before it.

    Says the same as a tuple of rows, but makes a row only when it is asked for: a step that
    changes nothing costs the host the same whatever its size.
    """

    __slots__ = ("_num_blocks", "grown", "members", "offset")

    def __init__(
        self,
        members: Members,
        offset: int,
        num_blocks: Sequence[int],
        grown: Mapping[int, tuple[int, ...]],
    ) -> None:
        """One step.

        Args:
            members: who decodes.
            offset: tokens since the members' starts.
            num_blocks: blocks that each member had before this step.
            grown: new blocks by place of the member, for those that get any.
        """
        self.members, self.offset, self.grown = members, offset, grown
        self._num_blocks = num_blocks

    def __len__(self) -> int:
        return len(self.members.rows)

    @overload
    def __getitem__(self, index: int) -> ScheduledRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ScheduledRow, ...]: ...
    def __getitem__(self, index: int | slice) -> ScheduledRow | tuple[ScheduledRow, ...]:
        if isinstance(index, slice):
            return tuple(self.row(i) for i in range(*index.indices(len(self))))
        return self.row(range(len(self))[index])

    def at(self, offset: int) -> SteadyRows:
        """The rows of a later step that gave nobody a block."""
        return SteadyRows(self.members, offset, self._num_blocks, {})

    def row(self, place: int) -> ScheduledRow:
        """The row of the member at that place."""
        m = self.members
        return ScheduledRow(
            m.requests[place],
            m.rows[place],
            m.starts[place] + self.offset,
            1,
            True,
            True,
            False,
            self._num_blocks[place],
            self.grown.get(place, ()),
            m.epochs[place],
        )


class Schedule(NamedTuple):
    """What one step runs. No tensors; `to_json` with the parameters can be replayed."""

    step: int
    kind: StepKind
    rows: Sequence[ScheduledRow]
    """A decode step: by device row. Otherwise decodes, chunks that go on, chunks that join, each by arrival."""
    leaves: tuple[int, ...]
    """Device rows that nobody uses any more: written inactive before this step."""
    moves: tuple[tuple[int, int], ...]
    """(from, to) device rows: compaction before this step, before anything else is written."""
    sampler: SamplerVariant

    @property
    def num_tokens(self) -> int:
        return len(self.rows) if self.kind is StepKind.DECODE else sum(row.length for row in self.rows)

    @property
    def num_seqs(self) -> int:
        """Rows the step spans: for a decode step up to the highest device row, holes included."""
        if isinstance(self.rows, SteadyRows):
            return self.rows.members.rows[-1] + 1  # without making a row
        return self.rows[-1].row + 1 if self.kind is StepKind.DECODE else len(self.rows)

    @property
    def needs_prompt_logprobs(self) -> bool:
        return self.kind is not StepKind.DECODE and any(
            r.request.params.prompt_logprobs is not None and r.start < len(r.request.prompt_token_ids)
            for r in self.rows
        )

    def to_json(self) -> dict[str, Any]:
        """A plain-data image of the schedule: requests by id, numbers, strings."""
        return {
            "step": self.step,
            "kind": self.kind.value,
            "rows": [
                {
                    "request_id": r.request.request_id,
                    **{f: getattr(r, f) for f in ("row", "start", "length", "decode", "samples", "joins")},
                    "num_blocks_before": r.num_blocks_before,
                    "new_blocks": list(r.new_blocks),
                    "epoch": r.epoch,
                }
                for r in self.rows
            ],
            "leaves": list(self.leaves),
            "moves": [list(m) for m in self.moves],
            "sampler": self.sampler.name.lower(),
        }


@dataclass(frozen=True, slots=True)
class GraphKey:
    """Everything that captured kernels depend on, and nothing else."""

    kind: StepKind
    num_tokens: int
    num_seqs: int
    sampler: SamplerVariant

    def __hash__(self) -> int:
        # Every step looks its key up several times, and hashing an enum is slow; few keys differ in these alone.
        return hash((self.num_tokens, self.num_seqs))

    def __str__(self) -> str:
        return (
            f"{self.kind.value}[tokens={self.num_tokens}, seqs={self.num_seqs}, {self.sampler.name.lower()}]"
        )


class Reason(str, Enum):
    """Why a step ran without a graph."""

    DISABLED = "disabled"
    NO_KEY_YET = "no_key_yet"
    BEING_CHECKED = "being_checked"
    OVER_MAX = "over_max"
    CAPTURE_FAILED = "capture_failed"
    QUARANTINED = "quarantined"
    OVER_BUDGET = "over_budget"
    SLOWER_THAN_EAGER = "slower_than_eager"
    LARGE_PREFILL = "large_prefill"
    PREFILL_NOT_CAPTURED = "prefill_not_captured"
    NEEDS_PROMPT_LOGPROBS = "needs_prompt_logprobs"

    @property
    def text(self) -> str:
        """For people."""
        return _REASON_TEXTS[self]


class Delay(str, Enum):
    """Why a running request sat out a step: the step ran, on a graph or not, without it."""

    HOST_DEPENDENCY = "host_dependency"
    NO_FREE_BLOCK = "no_free_block"

    @property
    def text(self) -> str:
        """For people."""
        return _DELAY_TEXTS[self]


_DELAY_TEXTS = {
    Delay.HOST_DEPENDENCY: "its next token depends on the last one through bad_words of several tokens, "
    "so it waited until the host knew that",
    Delay.NO_FREE_BLOCK: "the KV cache had no free block for it",
}

_REASON_TEXTS = {
    Reason.DISABLED: "graphs are off: no GPU, enforce_eager=True, cudagraph_mode='NONE' or debug_graphs=True",
    Reason.NO_KEY_YET: "the shape was not captured yet; it is at its cudagraph_min_hits-th step",
    Reason.BEING_CHECKED: "captured, and now compared with eager before it serves",
    Reason.OVER_MAX: "more sequences than the largest captured size",
    Reason.CAPTURE_FAILED: "its capture failed",
    Reason.QUARANTINED: "its graph differed from eager",
    Reason.OVER_BUDGET: "cudagraph_memory_budget has no room for its graph",
    Reason.SLOWER_THAN_EAGER: "its graph was slower than eager, so it was dropped",
    Reason.LARGE_PREFILL: "more prompt tokens than the largest captured size, where eager loses nothing",
    Reason.PREFILL_NOT_CAPTURED: "cudagraph_mode is FULL_DECODE_ONLY, and the step has prompt tokens",
    Reason.NEEDS_PROMPT_LOGPROBS: "prompt_logprobs needs logits of every prompt token",
}


@dataclass(frozen=True, slots=True)
class Route:
    """Where a schedule runs: on a graph, or eagerly and why. Every schedule has exactly one."""

    key: GraphKey
    """The padded shape that the step runs at, on a graph or not."""
    reason: Reason | None
    """None: on the graph of `key`."""
    capture: bool = False
    """The key's graph is to be captured after this step, which runs eagerly."""


@dataclass(slots=True)
class StepResult:
    """What a step produced, on the host. Column of a row: its device row for a decode step,
    its place in `Schedule.rows` otherwise."""

    tokens: Sequence[int]
    """Sampled token by column; -1 where nothing was sampled."""
    logprobs: Mapping[int, tuple[Logprob, TokenLogprobs]] = field(default_factory=dict)
    """By column: the sampled token's own, and the most likely ones, in order, `MAX_LOGPROBS` wide."""
    prompt_logprobs: Mapping[int, Sequence[TokenLogprobs]] = field(default_factory=dict)
    """By column: candidates for positions start + 1 ... of a prompt chunk."""


# --- what the user gets ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the n completions of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """"stop", "length", "abort", "error", or None while it runs."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for end-of-sequence."""


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times are seconds on `time.monotonic()`."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    graph_steps: int = 0
    """Steps that ran on a graph while this request was running."""
    eager_steps: Mapping[str, int] = field(default_factory=dict)
    """Steps that ran eagerly meanwhile, by reason code."""
    delays: Mapping[str, int] = field(default_factory=dict)
    """Steps that its own rows sat out, by reason code."""

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answer to one prompt. Every request ends in one; a refused one carries `error`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: Exception | None = None
    """Why the request was refused or failed; None otherwise."""
