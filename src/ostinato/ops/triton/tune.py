"""Which version of a product serves which shape: rules, and measurements that overrule them.

The rules (`default`) need no GPU. `measure` times a few candidates for every shape of a model over
its own weights, once for each GPU, and keeps the winners in the cache folder. It runs while an engine
is built and never later: what a step launches is fixed before its first capture. Knows nothing of
kernels: it is handed a function that launches one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path

import torch
import triton
from triton import cdiv, next_power_of_2

from ...paths import cache_dir
from .. import Linear
from ..cuda.chain import SOURCE as CHAIN
from ..cuda.linear import SOURCE as TILES
from ..cuda.program import compile_apart
from .compile import compile_ahead

logger = logging.getLogger(__name__)

BUCKETS = (1, 16, 32, 64, 128)
"""Rows that a version is chosen for; fewer rows share the choice, more are the library's."""
MOST_TILES = 136
"""Blocks of a product whose inner dimension is shared, up to 16 rows: about one for each multiprocessor."""
ENOUGH = 120
"""Programs that keep most multiprocessors of a large GPU busy."""
BUDGET_SECONDS = 10.0
"""Of measuring; shapes that it does not reach keep their default, at later starts too."""
_SHARED = 100 << 10
"""Bytes of shared memory a program: two fit a multiprocessor."""
SEMAPHORES = 1 << 18
"""int32 words that every kernel finds at zero, and leaves so."""
PARTIALS = 1 << 22
"""float32 words for the parts of a product whose inner dimension is split."""
_WARMTH_BYTES = 256 << 20
"""Weights that a measurement goes through, where there are as many: no cache holds them."""


class Kind(str, Enum):
    """What computes a product."""

    LIBRARY = "library"
    """cuBLAS, or tiles for FP8 weights; norm and activation are kernels of their own."""
    GEMV = "gemv"
    STREAM = "stream"
    TILE = "tile"
    """CUDA C++ on Hopper; begins and ends norms"""
    CHAIN = "chain"
    """All products between two attentions in one kernel; LIBRARY stands for one by one"""
    ATTEND = "attend"
    """The QKV product and attention in one kernel; LIBRARY stands for one by one"""


@dataclass(frozen=True)
class Version:
    """A kernel and its sizes; those of the library are its own."""

    kind: Kind
    norms: bool = False
    """The norm is part of the kernel."""
    rows: int = 1
    columns: int = 0
    """Outputs of a program; of `norm_gate_up` as many gates and as many ups."""
    depth: int = 0
    """Inputs at a time"""
    splits: int = 1
    """Programs that share a block's inputs"""
    warps: int = 4
    stages: int = 3
    share: int = 1
    """Neighbouring tiles that read the activations once"""

    def __str__(self) -> str:
        if self.kind is Kind.LIBRARY:
            return "library"
        if self.kind is Kind.CHAIN:
            return "one kernel between two attentions"
        if self.kind is Kind.ATTEND:
            return "QKV and attention in one kernel"
        norm = "norm + " if self.norms else ""
        if self.kind is Kind.TILE:
            split = f", {self.splits} blocks share a tile" if self.splits > 1 else ""
            share = f", {self.share} tiles share x" if self.share > 1 else ""
            return f"tile {self.columns}x{self.depth}{split}{share}"
        if self.kind is Kind.GEMV:
            return f"{norm}gemv, {self.columns} outputs, {self.warps} warps"
        split = f", {self.splits} splits" if self.splits > 1 else ""
        return (
            f"{norm}stream, tile {self.rows}x{self.columns}x{self.depth}{split}, {self.warps} warps, "
            f"{self.stages} stages"
        )


LIBRARY = Version(Kind.LIBRARY)


@dataclass(frozen=True)
class Problem:
    """All that a choice depends on."""

    op: str
    """Name in `OpSet`: norm_linear, linear_add, norm_gate_up or norm_head; chain, whose product is down's; or attend, whose product is QKV"""
    columns: int
    """Of the result"""
    depth: int
    rows: int
    """One of BUCKETS"""
    dtype: torch.dtype
    """Of the activations"""
    fp8: bool

    @property
    def gate(self) -> bool:
        return self.op == "norm_gate_up"

    @property
    def has_norm(self) -> bool:
        return self.op != "linear_add"

    @property
    def weight_bytes(self) -> int:
        size = 1 if self.fp8 else self.dtype.itemsize
        return self.columns * self.depth * size * (2 if self.gate else 1)


def bucket(rows: int) -> int | None:
    """The bucket that serves `rows`; None above the largest."""
    return next((size for size in BUCKETS if rows <= size), None)


@cache
def default(problem: Problem, tiles: bool = False) -> Version:
    """The version that rules choose: what did best on an H200, scaled to the shape.

    `tiles`: `Kind.TILE` is to be had.
    """
    if problem.op == "chain":
        return Version(Kind.CHAIN, True, problem.rows) if problem.rows > 64 else LIBRARY
    if problem.op == "attend":
        return Version(Kind.ATTEND, True, problem.rows)
    if tiles and (tile := _tile(problem)):
        return tile
    if problem.rows == 1:
        return _gemv(problem, _gemv_columns(problem)) or LIBRARY
    if problem.fp8 and problem.dtype is not torch.float32:
        gate, rows = problem.gate, problem.rows
        plain = problem.op == "norm_head" or (problem.has_norm and rows == 64) or (gate and rows == 32)
        return (None if plain else _stream(problem, 64, 128, False)) or LIBRARY
    if problem.rows > 64 or problem.dtype is torch.float32:  # no tensor cores for it that are exact enough
        return LIBRARY
    blocks = {16: (64, 32, 16), 32: (64, 32), 64: (128, 64)}[problem.rows]
    made = [_stream(problem, block, 256 if block <= 32 else 128, _can_norm(problem)) for block in blocks]
    # The widest tile that needs no splitting, else the narrowest.
    unsplit = (v for v in made if v is not None and v.splits == 1 and _programs(problem, v) >= ENOUGH)
    return next(unsplit, None) or next((v for v in reversed(made) if v is not None), LIBRARY)


def candidates(problem: Problem, tiles: bool = False) -> list[Version]:
    """Versions worth a measurement; the default and the library are among them."""
    if problem.op == "chain":
        return [LIBRARY, Version(Kind.CHAIN, True, problem.rows)]
    if problem.op == "attend":
        return [Version(Kind.ATTEND, True, problem.rows), LIBRARY]
    found: list[Version | None] = [default(problem, tiles), LIBRARY]
    if tiles and problem.fp8 and (tile := _tile(problem)):
        found += _fp8_candidates(problem, tile)
    elif tiles and (tile := _tile(problem)):
        if problem.op in ("norm_linear", "linear_add"):
            stages = cdiv(problem.depth, tile.depth)  # each block has one at least
            for n in (tile.splits * 2, tile.splits // 2):
                if 1 <= n <= min(8, stages):
                    found.append(replace(tile, splits=n, share=tile.share if n * tile.share <= 8 else 1))
            if problem.rows <= 64 and 1 < tile.splits * 2 <= min(8, stages):
                found.append(replace(tile, columns=128, depth=64, splits=tile.splits * 2, share=1))
        elif problem.gate:
            found.append(replace(tile, columns=128 if tile.columns == 64 else 64, depth=64, share=2))
        else:
            found.append(replace(tile, columns=64 if problem.rows > 64 else 384 - tile.columns))
    elif problem.rows == 1:
        best = _gemv_columns(problem)
        found += [
            _gemv(problem, max(best // 2, 1)),
            _gemv(problem, best * 2),
            _gemv(problem, best, double=True),
        ]
    elif problem.fp8 and problem.dtype is not torch.float32:
        # Widening a weight costs more than loading it: wide tiles, so that each is widened for many rows of x at once,
        # and many programs on a multiprocessor, as a program waits for each of its products.
        wide = ((64, 128), (128, 128)) if problem.rows <= 32 else ((64, 128), (64, 64), (128, 64))
        made = [_stream(problem, *shape, False, double) for shape in wide for double in (False, True)]
        found += [v for v in made if v is not None and v.splits <= 8]  # adding 16 parts spills registers
        if problem.rows == 16 and _can_norm(problem):
            found += [_stream(problem, *shape, True) for shape in wide]
    elif problem.rows <= 64 and problem.dtype is not torch.float32:
        fused = _can_norm(problem)
        shapes = {
            16: ((16, 256), (32, 128), (64, 128)),
            32: ((32, 128), (64, 128)),
            64: ((64, 64), (128, 64)),
        }[problem.rows]
        found += [_stream(problem, block, depth, fused) for block, depth in shapes]
        found.append(_stream(problem, *shapes[0], fused, double=True))
        if fused:
            found.append(_stream(problem, *shapes[1], False))
    return list(dict.fromkeys(v for v in found if v is not None))


def _tile(problem: Problem) -> Version | None:
    """None where `linear.cu` does not multiply this."""
    if problem.rows == 1 or problem.dtype is not torch.bfloat16:
        return None
    if problem.depth % (64 if problem.has_norm else 16 if problem.fp8 else 8) or problem.columns % (
        8 if problem.has_norm else 64
    ):
        return None
    rows = problem.rows
    if problem.fp8:
        return _fp8_tile(problem)
    if problem.op == "norm_head":
        return Version(Kind.TILE, False, rows, 256 if rows in (32, 64) else 128, 64, share=2)
    depth = 128 if rows <= 16 or (rows == 32 and (problem.gate or problem.depth >= 4096)) else 64
    if problem.gate:
        return Version(Kind.TILE, False, rows, 64 if rows < 64 else 128, depth, share=1 if rows == 32 else 2)
    splits = _tile_splits(problem, depth, MOST_TILES if rows <= 16 else MOST_TILES * 3 // 2)
    return Version(Kind.TILE, False, rows, 64, depth, splits, share=2 if rows >= 64 and splits < 8 else 1)


def _tile_splits(problem: Problem, depth: int, most: int) -> int:
    """Blocks that share the inner dimension of tiles of 64 columns: at most so many in all, each with two stages at least."""
    blocks, splits = cdiv(problem.columns, 64), 1
    while splits < 8 and blocks * splits * 2 <= most and problem.depth >= 4 * splits * depth:
        splits *= 2
    return splits


def _fp8_tile(problem: Problem) -> Version:
    """The same of FP8 weights, of which a stage has at least 128 inner indices."""
    rows = problem.rows
    if problem.op == "norm_head":
        return Version(Kind.TILE, False, rows, 256 if rows <= 64 else 128, 128, share=2)
    if problem.gate:
        return Version(Kind.TILE, False, rows, 64 if rows == 64 else 128, 128, share=2)
    splits = _tile_splits(problem, 128, MOST_TILES * 3 // 2)
    return Version(Kind.TILE, False, rows, 64, 128, splits, share=2 if rows >= 32 and splits < 8 else 1)


def _fp8_candidates(problem: Problem, tile: Version) -> list[Version]:
    rows = problem.rows
    if problem.op == "norm_head":
        return [replace(tile, depth=256)] + ([replace(tile, columns=128)] if rows <= 32 else [])
    if problem.gate:
        return [replace(tile, depth=256), replace(tile, columns=192 - tile.columns), replace(tile, share=1)]
    stages = cdiv(problem.depth, 128)  # each block has one at least
    made = [replace(tile, splits=n) for n in (tile.splits * 2, tile.splits // 2) if 1 <= n <= min(8, stages)]
    made.append(replace(tile, depth=256))
    if rows <= 64:
        made.append(replace(tile, columns=128, splits=tile.splits * 2, share=1))
    made = [v if v.splits * v.share <= 8 else replace(v, share=1) for v in made]
    return [v for v in made if v.splits <= min(8, cdiv(problem.depth, v.depth))]


def _can_norm(problem: Problem) -> bool:
    """x times the norm's weight, not yet divided by the norm, may be too large for float16."""
    return problem.has_norm and problem.dtype is not torch.float16


def _gemv_columns(problem: Problem) -> int:
    """Outputs of a program, so that about 32 KiB of weights are on their way to it."""
    row: int = next_power_of_2(problem.depth) * (1 if problem.fp8 else problem.dtype.itemsize)
    row *= 2 if problem.gate else 1
    most = max(1, (64 << 10) // row)
    wanted = 2 if problem.gate else 8 if problem.columns > 2048 else 4
    return min(wanted, most)


def _gemv(problem: Problem, columns: int, double: bool = False) -> Version | None:
    """None where a program's weights do not fit its registers."""
    row = next_power_of_2(problem.depth)
    warps = (4 if row <= 4096 else 8) * (2 if double else 1)
    item = 1 if problem.fp8 else problem.dtype.itemsize
    registers = columns * row * item * (2 if problem.gate else 1) // (128 * warps)
    return Version(Kind.GEMV, problem.has_norm, 1, columns, row, warps=warps) if registers <= 128 else None


def _stream(problem: Problem, columns: int, depth: int, norms: bool, double: bool = False) -> Version | None:
    """A tile of about `columns` weights by `depth`; `double`: twice the splits. None if it fits nowhere."""
    if problem.gate:
        columns = max(16, columns // 2)
    if norms or problem.gate or problem.rows > 16:
        # Every warp holds all rows of x, and their squares.
        depth = min(depth, 64 if norms and problem.rows > 16 else 128)
    fits = [size for size in (256, 128, 64, 32) if size <= depth and problem.depth % size == 0]
    depth = fits[0] if fits else min(depth, 64, max(32, next_power_of_2(problem.depth)))
    blocks, splits = cdiv(problem.columns, columns), 1
    while depth > 64 and blocks * (problem.depth // (2 * depth)) < ENOUGH:  # else too few can share
        depth //= 2
    while blocks * splits < ENOUGH and problem.depth >= 4 * splits * depth:
        splits *= 2
    if double:
        if problem.depth < 4 * splits * depth:
            return None
        splits *= 2
    width = columns * (2 if problem.gate else 1)
    item = problem.dtype.itemsize
    stage = depth * (width * (1 if problem.fp8 else item) + problem.rows * item)
    stages = min(8, _SHARED // stage)
    parts = blocks * splits * problem.rows * (width + 1) if splits > 1 else 0
    if stages < 2 or blocks > SEMAPHORES or parts > PARTIALS:
        return None
    warps = 8 if problem.rows * width >= 8192 else 4
    return Version(Kind.STREAM, norms, problem.rows, columns, depth, splits, warps, stages)


def _programs(problem: Problem, version: Version) -> int:
    blocks: int = cdiv(problem.columns, version.columns)
    return blocks * version.splits


class Table:
    """The versions in use: what was measured, and rules for the rest."""

    def __init__(
        self,
        decided: Mapping[Problem, Version] | None = None,
        unmeasured: Collection[Problem] = (),
        *,
        tiles: bool = False,
    ) -> None:
        """Versions that overrule the rules; `unmeasured` are those that time was up for.

        `tiles`: `Kind.TILE` is to be had.
        """
        self.decided, self._unmeasured = dict(decided or {}), frozenset(unmeasured)
        self._tiles = tiles
        self._asked: dict[Problem, Version] = {}

    def __call__(self, op: str, linear: Linear, rows: int, dtype: torch.dtype) -> Version:
        """The version for `rows` rows of activations in `dtype`; always the same for the same arguments."""
        size = bucket(rows)
        if size is None:
            return LIBRARY
        problem = problem_of(op, linear, size, dtype)
        found = self._asked.get(problem)
        if found is None:
            found = self._asked[problem] = self.decided.get(problem) or default(problem, self._tiles)
        return found

    def add(self, other: Table) -> None:
        """What another one has decided holds here too."""
        self.decided |= other.decided
        self._unmeasured |= other._unmeasured

    def why(self, op: str, linear: Linear, rows: int, dtype: torch.dtype) -> str:
        """How the version was chosen, for people."""
        size = bucket(rows)
        if size is None:
            return f"by rule: more than {BUCKETS[-1]} rows"
        problem = problem_of(op, linear, size, dtype)
        if problem in self._unmeasured:
            return "by rule: the time to measure was up"
        return "measured" if problem in self.decided else "by rule"


def problem_of(op: str, linear: Linear, rows: int, dtype: torch.dtype) -> Problem:
    """The problem of a product with `linear` in a bucket."""
    columns = linear.out_features // (2 if op == "norm_gate_up" else 1)
    return Problem(op, columns, linear.in_features, rows, dtype, linear.scale is not None)


# --- measuring -----------------------------------------------------------------------------

Launch = Callable[[Version, Linear], None]
"""Launches a product on the current stream, with operands of its own."""


@dataclass(frozen=True)
class Timing:
    """What was seen of one problem: microseconds a launch, by version; the fastest first.

    No times: nothing could be measured, or the time was up, and the rules decide.
    """

    problem: Problem
    times: Mapping[Version, float]
    tiles: bool = False
    """`Kind.TILE` was to be had"""

    @property
    def best(self) -> Version:
        return next(iter(self.times), None) or default(self.problem, self.tiles)


def choose(
    work: Mapping[Problem, Sequence[Linear]],
    launcher: Callable[[Problem], Launch],
    store: Store,
    *,
    tiles: bool = False,
) -> Table:
    """The fastest versions, measured unless the store has them.

    What is decided once stays: shapes that the time did not suffice for are kept as such, so that two
    starts compute the same bits.

    Args:
        work: problems, and the weights of every layer that has them.
        launcher: makes the operands of a problem; what it returns launches a version.
        store: where earlier results are.
        tiles: `Kind.TILE` is to be had.
    """
    known, unmeasured = store.load(), store.unmeasured()
    missing = {problem: linears for problem, linears in work.items() if problem not in known}
    if missing:
        timings = measure(missing, launcher, tiles=tiles)
        store.save(timings)
        kept = store.load()  # another process may have been first
        known |= {timing.problem: timing.best for timing in timings} | kept
        late = {timing.problem for timing in timings if not timing.times}
        unmeasured |= store.unmeasured() | (late - kept.keys())
    return Table({problem: known[problem] for problem in work}, unmeasured.intersection(work), tiles=tiles)


def measure(
    work: Mapping[Problem, Sequence[Linear]],
    launcher: Callable[[Problem], Launch],
    *,
    tiles: bool = False,
    seconds: float = BUDGET_SECONDS,
    repeats: int = 3,
) -> list[Timing]:
    """Time the candidates of each problem, on the current stream, which must not be the default one.

    Each candidate is captured over several layers' weights, so that they come from memory. One that
    cannot be compiled or launched here is left out. Stops `seconds` after all are compiled: the
    problems that are left have no times.
    """
    compiling = time.perf_counter()
    launchers = {problem: launcher(problem) for problem in work}
    with compile_ahead(), compile_apart([TILES, CHAIN]):
        for problem, linears in work.items():
            for version in candidates(problem, tiles):
                _try(launchers[problem], version, linears[0])
    torch.cuda.synchronize()
    begun = time.perf_counter()
    found: list[Timing] = []
    for problem, linears in work.items():
        if time.perf_counter() - begun > seconds:
            left = list(work)[len(found) :]
            logger.warning(
                "choosing kernels was stopped after %.0f s; %d shapes keep their defaults", seconds, len(left)
            )
            found += [Timing(late, {}, tiles) for late in left]
            break
        enough = max(8, _WARMTH_BYTES // problem.weight_bytes)
        times = {}
        for version in candidates(problem, tiles):
            if _try(launchers[problem], version, linears[0]):
                try:
                    times[version] = time_launches(launchers[problem], version, linears[:enough], repeats)
                except RuntimeError as error:
                    logger.warning("%s: %s cannot be captured and is left out: %r", problem, version, error)
        found.append(Timing(problem, dict(sorted(times.items(), key=lambda item: item[1]))))
    logger.info(
        "%d kernels chosen: %.1f s to compile candidates, %.1f s to time them",
        sum(bool(timing.times) for timing in found),
        begun - compiling,
        time.perf_counter() - begun,
    )
    return found


def _try(launch: Launch, version: Version, linear: Linear) -> bool:
    """Whether a version can be launched on this GPU."""
    try:
        launch(version, linear)
    except Exception as error:  # too little shared memory, for one; other candidates remain
        logger.debug("%s cannot be launched: %r", version, error)
        return False
    return True


def time_launches(launch: Launch, version: Version, linears: Sequence[Linear], repeats: int) -> float:
    """Microseconds a launch, the least of `repeats` replays."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for linear in linears:
            launch(version, linear)
    finally:
        graph.capture_end()
    graph.replay()
    best = float("inf")
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / len(linears))
    graph.reset()
    return best


class Store:
    """Winners in a JSON file for each GPU and version of the software; one that cannot be read is ignored."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"versions-{digest}.json"
        self._identity = dict(identity)

    @classmethod
    def here(cls, *, tiles: bool) -> Store:
        """For the current GPU, in the cache folder; another one where `Kind.TILE` is not to be had."""
        folder = cache_dir() / "kernels"
        names = (
            "__init__.py",
            "decode.py",
            "matmul.py",
            "tune.py",
            "../cuda/linear.cu",
            "../cuda/linear.py",
            "../cuda/chain.cu",
            "../cuda/chain.py",
            "../cuda/attend.cu",
            "../cuda/attend.py",
            "../cuda/attention.cu",
            "../cuda/attention.py",
            "../cuda/common.cuh",
            "../cuda/heads.cuh",
            "../cuda/ring.cuh",
            "../cuda/tiles.cuh",
        )
        sources = b"".join((Path(__file__).parent / name).read_bytes() for name in names)
        return cls(
            folder,
            {
                "gpu": torch.cuda.get_device_name(),
                "torch": str(torch.__version__),
                "triton": triton.__version__,
                "tiles": str(tiles),
                "source": hashlib.sha256(sources).hexdigest()[:16],
            },
        )

    def load(self) -> dict[Problem, Version]:
        return {_problem(entry["problem"]): _version(entry["version"]) for entry in self._entries()}

    def unmeasured(self) -> set[Problem]:
        """What was decided by rules, as nothing was measured."""
        return {_problem(entry["problem"]) for entry in self._entries() if not entry["us"]}

    def _entries(self) -> list[dict[str, dict[str, object]]]:
        """Entries that can be read."""
        try:
            entries = json.loads(self.path.read_text())["versions"]
            for entry in entries:
                _problem(entry["problem"]), _version(entry["version"]), dict(entry["us"])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read and is ignored: %r", self.path, error)
            return []
        return list(entries)

    def save(self, timings: Iterable[Timing]) -> None:
        """Add winners of problems that have none in the file yet: what two processes find at once may differ."""
        from filelock import FileLock

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock")):
                kept = self._entries()
                known = {_problem(entry["problem"]) for entry in kept}
                kept += [as_json(timing) for timing in timings if timing.problem not in known]
                draft = self.path.with_suffix(f".{os.getpid()}.tmp")
                draft.write_text(json.dumps({"identity": self._identity, "versions": kept}, indent=1))
                draft.replace(self.path)
        except OSError as error:
            logger.warning("the choice of kernels cannot be written to %s: %s", self.path, error)


def as_json(timing: Timing) -> dict[str, dict[str, object]]:
    """A timing as plain data."""
    problem = asdict(timing.problem) | {"dtype": str(timing.problem.dtype).removeprefix("torch.")}
    return {
        "problem": problem,
        "version": asdict(timing.best) | {"kind": timing.best.kind.value},
        "us": {str(version): round(us, 2) for version, us in timing.times.items()},
    }


def _problem(entry: Mapping[str, object]) -> Problem:
    dtype = getattr(torch, str(entry["dtype"]))
    return Problem(**{**entry, "dtype": dtype})


def _version(entry: Mapping[str, object]) -> Version:
    return Version(**{**entry, "kind": Kind(entry["kind"])})  # type: ignore[arg-type]
