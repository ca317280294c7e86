"""What is known about the graphs of one engine, and three ways to read it. No torch.

A `GraphReport` is plain data: it is written to JSON on the machine with the GPU and read
anywhere. `table` and `explain` are text, `html` is one page that fetches nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from html import escape
from importlib import resources
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import ConfigError, GraphError, suggest
from ..types import Delay, Reason

VERSION = 2
"""Of the JSON; raised when a field changes its meaning or goes."""

REASONS: dict[str, str] = {
    **{reason.value: reason.text for reason in Reason},
    **{delay.value: delay.text for delay in Delay},
}
"""One line for each reason code; a report of another release may have others."""

STATES = {
    "captured": "its graph is replayed",
    "waiting": "runs eagerly: seen, not captured yet",
    "checking": "runs eagerly: captured, and being compared with eager",
    "quarantined": "runs eagerly: its graph once differed from eager",
    "failed": "runs eagerly: its capture failed",
    "dropped": "runs eagerly: its graph was slower than eager",
    "evicted": "runs eagerly: the graph memory budget has no room for its graph",
}
"""What a step of a key in each state does."""


@dataclass(frozen=True)
class ConfigValue:
    """One option after resolution."""

    name: str
    value: str
    source: str
    """Where it came from: "user", "default", "model", "device"."""


@dataclass(frozen=True)
class BufferInfo:
    """One static buffer that graphs read or write."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class KernelUse:
    """What runs an op, and in which steps."""

    op: str
    shape: str
    """Outputs x inputs of a product; empty for the rest"""
    kernel: str
    why: str = ""
    """Where there was a choice: "measured", or "by rule" and why"""
    decode: tuple[tuple[int, int], ...] = ()
    """Decode steps, by their rows, padding included: (first, last), ascending"""
    prompts: tuple[tuple[int, int], ...] = ()
    """Steps with prompts, by their tokens; of head and sampling, by their sequences"""

    def __str__(self) -> str:
        return f"{self.name}: {self.chosen}"

    @property
    def name(self) -> str:
        """The op, and its shape where it has one."""
        return f"{self.op} {self.shape}".rstrip()

    @property
    def chosen(self) -> str:
        """The kernel, and why where there was a choice."""
        return f"{self.kernel} ({self.why})" if self.why else self.kernel


@dataclass(frozen=True)
class ChainNode:
    """One node of a captured step, in order of launch."""

    index: int
    kernel: str
    op: str
    layer: int | None = None
    """None: before the first layer or after the last."""
    grid: tuple[int, int, int] = (1, 1, 1)
    block: tuple[int, int, int] = (1, 1, 1)
    us: float | None = None
    """Time on the device; None: not measured."""


@dataclass(frozen=True)
class KeyReport:
    """One graph key: what it is, what it cost, what it brought."""

    key: str
    kind: str
    """"decode", "prefill" or "mixed"."""
    num_tokens: int
    num_seqs: int
    sampler: str
    state: str
    """One of `STATES`."""
    note: str = ""
    """Why it is in that state."""
    nodes: int = 0
    kernels: int = 0
    edges: int = 0
    programmatic_edges: int = 0
    """Edges of dependent launch: the next kernel starts before this one has ended."""
    bytes: int = 0
    """Device memory that the executable holds now; 0 once it is destroyed."""
    predicted_bytes: int = 0
    capture_ms: float = 0.0
    instantiate_ms: float = 0.0
    verify_ms: float = 0.0
    hits: int = 0
    """Steps that were routed to this key, on its graph or not."""
    replays: int = 0
    padding_waste: float = 0.0
    """Mean share of rows that were padding, 0 to 1."""
    eager_us: float | None = None
    replay_us: float | None = None
    checks: int = 0
    """Comparisons of the graph with eager."""
    mismatches: int = 0
    chain: tuple[ChainNode, ...] = ()

    @property
    def gain(self) -> float | None:
        """Eager time over replay time; None if either was not measured."""
        return self.eager_us / self.replay_us if self.eager_us is not None and self.replay_us else None


@dataclass(frozen=True)
class GraphReport:
    """The graphs of one engine at one moment."""

    model: str
    device: str
    created: str
    """ISO 8601."""
    mode: str
    """`cudagraph_mode`."""
    max_num_seqs: int
    """Largest legal decode step."""
    min_hits: int = 2
    """A key is captured at this hit."""
    versions: dict[str, str] = field(default_factory=dict)
    config: tuple[ConfigValue, ...] = ()
    ladder: tuple[int, ...] = ()
    """Sizes that decode steps are padded to, ascending; empty where nothing is padded."""
    holes: tuple[str, ...] = ()
    kernels: tuple[KernelUse, ...] = ()
    """What runs each op of which steps, in the order of a step."""
    memory: tuple[tuple[str, int], ...] = ()
    """(line, bytes) in the order in which the engine allocates."""
    budget_bytes: int | None = None
    """Most that graphs may hold; None: no bound."""
    graph_bytes: int = 0
    predicted_graph_bytes: int | None = None
    """What graphs of all greedy keys were expected to take, before the KV cache was sized."""
    steps_by_key: dict[str, int] = field(default_factory=dict)
    """Steps that ran on each key's graph."""
    eager_by_reason: dict[str, int] = field(default_factory=dict)
    """Steps that ran eagerly, by reason code."""
    delayed_by_reason: dict[str, int] = field(default_factory=dict)
    """Steps that a running request had to sit out, by reason code; they ran without it."""
    buffers: tuple[BufferInfo, ...] = ()
    keys: tuple[KeyReport, ...] = ()

    @property
    def graph_steps(self) -> int:
        return sum(self.steps_by_key.values())

    @property
    def eager_steps(self) -> int:
        return sum(self.eager_by_reason.values())

    @property
    def reasons(self) -> list[tuple[str, int, str]]:
        """(code, steps, explanation), the most frequent first."""
        ordered = sorted(self.eager_by_reason.items(), key=lambda item: -item[1])
        return [(code, count, explain_reason(code)) for code, count in ordered]

    @property
    def delays(self) -> list[tuple[str, int, str]]:
        """(code, steps, explanation) of the steps that a running request sat out."""
        return [(code, count, explain_reason(code)) for code, count in self.delayed_by_reason.items()]

    @property
    def gain(self) -> float | None:
        """Eager time over replay time of all replays whose key was measured."""
        measured = [
            (k.replays, k.eager_us, k.replay_us) for k in self.keys if k.gain is not None and k.replays
        ]
        replay = sum(n * (r or 0.0) for n, _, r in measured)
        return sum(n * (e or 0.0) for n, e, _ in measured) / replay if replay else None

    def to_json(self) -> str:
        """
        Raises:
            GraphError: a number is not finite.
        """
        return _dump({"version": VERSION, "report": asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> GraphReport:
        """
        Raises:
            GraphError: not a report, or one of another version.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise GraphError(f"not a graph report: {error}") from error
        if not isinstance(data, dict) or not {"version", "report"} <= data.keys():
            raise GraphError('not a graph report: expected an object with "version" and "report"')
        if data["version"] != VERSION:
            raise GraphError(
                f"graph report version {data['version']!r}: this ostinato reads version {VERSION}; "
                "write the report again, or read it with the ostinato that wrote it"
            )
        report: GraphReport = _read(cls, data["report"], "report")
        return report


def explain_reason(code: str) -> str:
    """One line for a reason code."""
    return REASONS.get(code, "no explanation is known for this code")


def findings(report: GraphReport) -> list[str]:
    """What a reader should look at first; empty if nothing stands out."""
    found = [f"Hole in the ladder: {hole}." for hole in report.holes]
    happened = {"quarantined": "is quarantined", "failed": "could not be captured", "dropped": "was dropped"}
    for key in report.keys:
        if key.mismatches and key.state != "quarantined":
            found.append(f"{key.key} differed from eager in {key.mismatches} of {key.checks} checks.")
        if key.state in happened:
            found.append(f"{key.key} {happened[key.state]}{f': {key.note}' if key.note else ''}.")
        if key.state == "captured" and key.gain is not None and key.gain < 1:
            found.append(f"{key.key} is slower than eager ({key.gain:.2f}×) and is replayed all the same.")
    idle = [key for key in report.keys if key.state == "captured" and not key.replays]
    if idle:
        held = _size(sum(key.bytes for key in idle))
        found.append(f"{_count(len(idle), 'captured graph')} never replayed, holding {held}.")
    if report.budget_bytes is not None and report.graph_bytes > report.budget_bytes:
        found.append(
            f"Graphs hold {_size(report.graph_bytes)}, over the budget of {_size(report.budget_bytes)}."
        )
    steps = report.graph_steps + report.eager_steps
    if report.mode != "NONE" and report.reasons and report.eager_steps > 0.1 * steps:
        code, count, text = report.reasons[0]
        share = f"{report.eager_steps / steps:.0%} of steps ran eagerly"
        found.append(f"{share}, {count:,} of {report.eager_steps:,} for {code}: {text}.")
    return found


# --- text ------------------------------------------------------------------------------

HEADINGS = (
    *("key", "state", "nodes", "kernels", "KiB", "capture ms", "instantiate ms"),
    *("hits", "padding %", "eager µs", "replay µs", "gain"),
)


def table(report: GraphReport) -> str:
    """The keys as aligned text, then why steps ran eagerly, then the holes of the ladder."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    rows += [
        (
            *(k.key, k.state, f"{k.nodes:,}", f"{k.kernels:,}", f"{k.bytes / 1024:,.0f}"),
            *(
                f"{k.capture_ms:,.1f}",
                f"{k.instantiate_ms:,.1f}",
                f"{k.hits:,}",
                f"{100 * k.padding_waste:.1f}",
            ),
            *(_number(k.eager_us), _number(k.replay_us), _times(k.gain)),
        )
        for k in report.keys
    ]
    lines = [f"{report.model} on {report.device}, {report.created}, cudagraph_mode {report.mode}"]
    if report.keys:
        keys = report.keys
        hits = sum(k.hits for k in keys)
        waste = sum(k.hits * k.padding_waste for k in keys) / hits if hits else 0.0
        captured = sum(k.state == "captured" for k in keys)
        rows.append(
            (
                *("total", f"{captured} captured of {len(keys)}"),
                *(f"{sum(k.nodes for k in keys):,}", f"{sum(k.kernels for k in keys):,}"),
                *(f"{sum(k.bytes for k in keys) / 1024:,.0f}", f"{sum(k.capture_ms for k in keys):,.1f}"),
                *(f"{sum(k.instantiate_ms for k in keys):,.1f}", f"{hits:,}", f"{100 * waste:.1f}"),
                *("", "", _times(report.gain)),
            )
        )
        lines += ["", *_aligned(rows, left=2)]
        notes = [(f"  {k.key}", k.state, k.note) for k in keys if k.note]
        if notes:
            lines += ["", "notes:", *_aligned(notes, left=3)]
    else:
        lines += ["", "no graph keys: no decode step was routed to one"]
    steps = report.graph_steps + report.eager_steps
    on_graphs = f" ({report.graph_steps / steps:.1%})" if steps else ""
    lines += ["", f"steps: {report.graph_steps:,} of {steps:,} on graphs{on_graphs}", *_why(report)]
    bound = "no budget" if report.budget_bytes is None else f"budget {_size(report.budget_bytes)}"
    lines += [f"graph memory: {_size(report.graph_bytes)} ({bound})", *_predicted(report)]
    lines += ["holes:", *(f"  {hole}" for hole in report.holes)] if report.holes else ["holes: none"]
    return "\n".join(lines) + "\n"


def _predicted(report: GraphReport) -> list[str]:
    """What graphs were expected to take, against what those that are captured took."""
    if report.predicted_graph_bytes is None:
        return []
    held = [k for k in report.keys if k.state in ("captured", "checking")]
    expected = sum(k.predicted_bytes for k in held)
    return [
        f"predicted before the KV cache was sized: {_size(report.predicted_graph_bytes)} for every greedy key; "
        f"of the {_count(len(held), 'captured key')}: {_size(expected)} predicted, {_size(report.graph_bytes)} measured"
    ]


def _why(report: GraphReport) -> list[str]:
    """Why steps ran eagerly, and why requests had to sit steps out."""
    lines = []
    for title, reasons in (
        ("eager steps by reason:", report.reasons),
        ("steps that a running request sat out, by reason:", report.delays),
    ):
        if reasons:
            cells = [(f"  {code}", f"{count:,}", text) for code, count, text in reasons]
            lines += [title, *_aligned(cells, left=1, last_left=True)]
    return lines


def explain(report: GraphReport, batch: int | None = None) -> str:
    """What was decided and where each decision came from.

    Args:
        report: of one engine.
        batch: also say what a decode step of this many sequences does, and why.

    Raises:
        ConfigError: `batch` is not a number of sequences.
    """
    lines = [f"{report.model} on {report.device}, {report.created}"]
    lines += [", ".join(f"{name} {version}" for name, version in report.versions.items())]
    if batch is not None:
        lines += ["", f"a decode step of {_count(batch, 'sequence')}:"]
        lines += [f"  {line}" for line in decide(report, batch)]
    attention = findings(report)
    if attention:
        lines += ["", "look at this first:", *(f"  {line}" for line in attention)]
    lines += ["", "config (value, where it came from):"]
    lines += _aligned([(f"  {c.name}", c.value, f"({c.source})") for c in report.config], left=3)
    lines += ["", f"cudagraph_mode {report.mode}; a key is captured at hit {report.min_hits}"]
    lines += [f"ladder: {', '.join(map(str, report.ladder)) or 'none, steps run at their own size'}"]
    lines += ["holes:", *(f"  {hole}" for hole in report.holes)] if report.holes else ["holes: none"]
    lines += ["", *_what_ran(report)]
    if report.kernels:
        lines += ["", "kernels, by rows of decode steps and tokens of steps with prompts (padding included;"]
        lines += ["head and sampling: sequences):"]
        lines += _aligned(
            [("  op (outputs x inputs)", "decode", "prompts", "kernel")]
            + [(f"  {k.name}", _ranges(k.decode), _ranges(k.prompts), k.chosen) for k in report.kernels],
            left=4,
        )
    lines += ["", "static buffers:"]
    buffers = [(f"  {b.name}", str(list(b.shape)), b.dtype, _size(b.bytes)) for b in report.buffers]
    lines += _aligned(buffers, left=3) or ["  none reported"]
    lines += ["", "memory:"]
    lines += _aligned([(f"  {name}", _size(count)) for name, count in report.memory], left=1) or [
        "  none reported"
    ]
    bound = "no budget" if report.budget_bytes is None else f"of a budget of {_size(report.budget_bytes)}"
    lines += [f"graphs hold {_size(report.graph_bytes)} ({bound})", *_predicted(report)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _what_ran(report: GraphReport) -> list[str]:
    """Which graphs ran, how often, why not, and what each costs and brings."""
    steps = report.graph_steps + report.eager_steps
    lines = [f"steps so far: {report.graph_steps:,} of {steps:,} on graphs", *_why(report)]
    keys = sorted(report.keys, key=lambda k: -k.replays)
    if keys:
        cells = [
            ("  key", "state", "replays", "hits", "bytes", "capture ms", "eager µs", "replay µs", "gain")
        ]
        cells += [
            (
                *(f"  {k.key}", k.state, f"{k.replays:,}", f"{k.hits:,}", _size(k.bytes)),
                *(
                    f"{k.capture_ms + k.instantiate_ms:,.1f}",
                    _number(k.eager_us),
                    _number(k.replay_us),
                    _times(k.gain),
                ),
            )
            for k in keys
        ]
        lines += ["keys, by how often their graph ran:", *_aligned(cells, left=2)]
    return lines


def decide(report: GraphReport, batch: int) -> list[str]:
    """What a decode step of `batch` sequences does, and why.

    Raises:
        ConfigError: `batch` is not a number of sequences.
    """
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
    if batch > report.max_num_seqs:
        return [
            f"never happens: at most {report.max_num_seqs} sequences run at a time (max_num_seqs), the rest wait"
        ]
    return _padding(report, batch) + _outcome(report, batch)


def _rung(report: GraphReport, batch: int) -> int | None:
    """The size that a decode step is padded to; None above the ladder."""
    return next((size for size in report.ladder if size >= batch), None)


def _ranges(ranges: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{low:,}" if low == top else f"{low:,} to {top:,}" for low, top in ranges) or "-"


def _padding(report: GraphReport, batch: int) -> list[str]:
    size = _rung(report, batch)
    if size is None:
        return [f"runs at its own size, {batch}"]
    if size == batch:
        return [f"runs at {size}, which is on the ladder: no padding"]
    return [f"padded to {size}: {size - batch} of {size} rows are padding ({(size - batch) / size:.1%})"]


def _outcome(report: GraphReport, batch: int) -> list[str]:
    """A graph or eager, for each sampler, and the kernels: the same for all batches that are padded alike."""
    rows = _rung(report, batch) or batch
    ran = [k for k in report.kernels if any(low <= rows <= top for low, top in k.decode)]
    return _launched(report, batch) + (["its kernels, by op:", *(f"  {k}" for k in ran)] if ran else [])


def _launched(report: GraphReport, batch: int) -> list[str]:
    if report.mode == "NONE":
        return [f"eager (disabled): {REASONS['disabled']}"]
    size = _rung(report, batch)
    if size is None:
        return [f"eager (over_max): {REASONS['over_max']}", *(f"hole: {hole}" for hole in report.holes)]
    keys = [k for k in report.keys if k.kind == "decode" and k.num_seqs == size]
    lines = []
    for k in keys:
        steps = f", {k.replays:,} replays of {k.hits:,} hits" if k.hits else ""
        speed = (
            f", {k.replay_us:,.1f} µs ({_times(k.gain)} as fast as eager)"
            if k.state == "captured" and k.replay_us
            else ""
        )
        note = f" ({k.note})" if k.note else ""
        lines.append(f"{k.key}: {k.state}, {STATES.get(k.state, 'state unknown')}{steps}{speed}{note}")
    seen = {k.sampler for k in keys}
    rest = [name for name in ("greedy", "sample", "full") if name not in seen]
    if rest:
        lines.append(
            f"with sampler {' or '.join(rest)}: no key yet; the first hit runs eagerly (no_key_yet), "
            f"hit {report.min_hits} is captured"
        )
    return lines


def _aligned(rows: Sequence[Sequence[str]], left: int, last_left: bool = False) -> list[str]:
    """Columns padded to equal width: the first `left` to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left or (last_left and i == len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}×"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(count: int) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:,.1f} {unit}"
    return f"{count} B"


# --- the page --------------------------------------------------------------------------


def html(report: GraphReport, compare: tuple[str, str] | None = None) -> str:
    """One page that fetches nothing.

    Args:
        report: of one engine.
        compare: two keys whose difference the page shows first.

    Raises:
        GraphError: `compare` names a key that the report does not have, or a number is not finite.
    """
    known = [key.key for key in report.keys]
    for name in compare or ():
        if name not in known:
            raise GraphError(f"no graph key {name!r} in this report{suggest(name, known)}")
    data = {
        "report": asdict(report),
        "reasons": report.reasons,
        "delays": report.delays,
        "findings": findings(report),
        "outcomes": _outcomes(report),
        "gain": report.gain,
        "compare": compare,
    }
    # Inside a script element only "<" can end it; the rest is for readers of the source.
    text = _dump(data)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "title": escape(f"{report.model} · ostinato graphs"),
        "text": escape(table(report)),
        "data": text,
    }
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return re.sub(r"@@(\w+)@@", lambda match: parts[match[1]], template)  # one pass: data is never a template


def _outcomes(report: GraphReport) -> list[tuple[int, int, list[str]]]:
    """(first batch, last batch, lines) for every run of batches with the same outcome."""
    tops = [size for size in report.ladder if size <= report.max_num_seqs]
    # What is not padded runs at its own size, which other kernels may serve.
    ends = {report.max_num_seqs, *(top for use in report.kernels for _, top in use.decode)}
    tops += sorted(end for end in ends if (tops[-1] if tops else 0) < end <= report.max_num_seqs)
    starts: Iterable[int] = (1, *(top + 1 for top in tops))
    return [(low, top, _outcome(report, top)) for low, top in zip(starts, tops, strict=False)]


# --- JSON ------------------------------------------------------------------------------


def _dump(data: dict[str, Any]) -> str:
    try:
        return json.dumps(data, allow_nan=False)
    except ValueError as error:
        raise GraphError(f"the graph report has a number that JSON cannot hold: {error}") from error


_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)  # a report has thousands of nodes


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the annotation `kind`; the error names the place."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        hints = _hints(kind)
        unknown = value.keys() - hints.keys()
        missing = {f.name for f in fields(kind)} - value.keys()
        if unknown or missing:
            what = f"unknown {sorted(unknown)}" if unknown else f"missing {sorted(missing)}"
            raise GraphError(f"graph report: {where}: {what}")
        return kind(**{name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})  # type: ignore[operator]
    if origin is UnionType:
        return None if value is None else _read(args[0], value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {str(name): _read(args[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise _wrong(where, f"{len(kinds)} items", value)
        return tuple(
            _read(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True))
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise _wrong(where, kind.__name__, value)
    return value


def _wrong(where: str, expected: str, value: Any) -> GraphError:
    return GraphError(f"graph report: {where}: expected {expected}, got {str(value)[:80]!r}")
