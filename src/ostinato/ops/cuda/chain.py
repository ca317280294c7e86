"""All products between two attentions in one kernel: `chain.cu`, how it is cut, when it can serve, and how it is launched.

Its blocks wait for each other, so what `FusedDecode` says about one such kernel at a time on a GPU holds here too.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import KernelError
from .. import LayerWeights, NextNorm, Scratch, Stack
from .fused import unsupported as unsupported_for_one
from .linear import Maps
from .program import POINTERS, Kernel, addresses, build

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("chain.cu")
THREADS = 384
TEAM = 4
"""Blocks that share a tile's inner dimension"""
ROWS = (64, 128)
"""Of x in a tile. Fewer are faster op by op; the kernel knows 16 and 32 too."""
MOST_TILE = 144
"""Rows of weights in a tile: `MOST_ROWS` in `chain.cu`."""
LINE = 32
"""int32 words from one word that blocks poll to the next"""


@dataclass(frozen=True)
class Tuning:
    """What `chain.cu` leaves open, as measured on an H200."""

    x_stages: int
    flight: int
    lead: int
    bound: int
    shared_bytes: int
    teams: int = 1
    """In a cluster"""
    hold: int = 1
    """Stages of down's weights under way until its x has been asked for"""
    pace: int = 800


TUNING = {
    16: Tuning(12, 4, 16, 512, 212 << 10),
    32: Tuning(10, 4, 16, 512, 212 << 10),
    64: Tuning(7, 5, 8, 512, 212 << 10, teams=2),
    128: Tuning(5, 4, 8, THREADS, 222 << 10, teams=2),
}
"""By rows of x. Up to 64 a block of the attention behind finds room beside it."""


@dataclass(frozen=True)
class Sizes:
    """Of a model."""

    hidden: int
    queries: int
    qkv: int
    inner: int

    @classmethod
    def of(cls, stack: Stack) -> Sizes:
        first = stack.layers[0]
        return cls(
            first.output.out_features,
            first.output.in_features,
            first.qkv.out_features,
            first.down.in_features,
        )


@dataclass(frozen=True)
class Layout:
    """Rows of the tiles, and what of shared memory is whose."""

    narrow: int
    """Rows of a tile of output and of down"""
    gate: int
    qkv: int
    stages: int
    """Of weights"""
    shared_bytes: int


def layout(sizes: Sizes, rows: int, teams: int) -> Layout:
    """How a model's layer is cut, for `rows` of x (a key of TUNING) and so many teams of `TEAM` blocks in all."""
    narrow = tile_rows(sizes.hidden, teams, 8)
    gate = tile_rows(2 * sizes.inner, teams * TEAM, 16)
    qkv = tile_rows(sizes.qkv, teams, 8)
    tuning = TUNING[rows]
    stage = max(narrow, gate, qkv) * 128
    # Tiles of x; parts of sums come to the same place. A product reads 64 rows of x even where there are fewer.
    parts = max(-(-size // 16) | 1 for size in (narrow, qkv)) * 16 * 4 * rows
    x = max(tuning.x_stages * rows * 128 + max(0, 64 - rows) * 128, parts)
    stages = min(16, (tuning.shared_bytes - 1024 - x) // stage)
    return Layout(narrow, gate, qkv, stages, stages * stage + x + 1024)


def tile_rows(size: int, owners: int, unit: int) -> int:
    """Rows of a tile where `owners` share out `size` rows in units: `Op::R` in `chain.cu`."""
    units, turns = size // unit, 1
    while -(-units // (owners * turns)) * unit > MOST_TILE:
        turns += 1
    return -(-units // (owners * turns)) * unit


def unsupported(stack: Stack, teams: int, counts: Sequence[int] = ROWS) -> str | None:
    """Why a model's layers cannot go through it with so many teams; None if they can. Looks at shapes and dtypes alone.

    Args:
        stack: the model.
        teams: of `TEAM` blocks.
        counts: rows of x that are asked for.
    """
    why = unsupported_for_one(stack)
    if why is not None:
        return why
    sizes = Sizes.of(stack)
    if stack.layers[0].qkv.scale is not None:
        return "weights are quantised"
    for what, size in (
        ("hidden_size", sizes.hidden),
        ("query size", sizes.queries),
        ("intermediate_size", sizes.inner),
    ):
        if size % (128 * TEAM):
            return f"{what} {size} is no multiple of {128 * TEAM}"
    if sizes.qkv % 8:
        return f"query, key and value size {sizes.qkv} is no multiple of 8"
    if teams < 1:
        return "no cluster of blocks fits"
    if -(-(sizes.hidden // 8) // teams) * 8 > MOST_TILE:
        return f"hidden_size {sizes.hidden} is more than {teams} tiles"
    for size, owners, unit in (
        (sizes.hidden, teams, 8), (sizes.qkv, teams, 8), (2 * sizes.inner, teams * TEAM, 16),
    ):  # fmt: skip
        rows = tile_rows(size, owners, unit)
        turns = -(-size // (owners * rows))
        if size // unit < owners * turns or rows < 32:
            return f"{size} rows of weights are too few for {owners} tiles"
    if any(layout(sizes, rows, teams).stages <= TUNING[rows].flight for rows in counts):
        return "too few tiles of weights fit into shared memory"
    return None


class Chain:
    """Runs everything from one layer's attention to the next layer's queries in one kernel.

    Its words count launches and arrivals; nobody else may write to them. All launches are ordered by one stream.
    """

    def __init__(self, device: torch.device, stack: Stack) -> None:
        """Nothing is compiled yet but what tells how many blocks fit at once.

        Raises:
            KernelError: the model is not one that it serves, or the kernel cannot be compiled or loaded here.
        """
        self._device, self._stack, self._sizes = device, stack, Sizes.of(stack)
        self._maps = Maps()
        self._kernels: dict[int, Kernel] = {}
        self._teams: dict[int, int] = {}
        teams = torch.cuda.get_device_properties(device).multi_processor_count // TEAM
        for rows in reversed(ROWS):
            self._teams[rows] = teams = self._fit(rows, teams)
        # Numbers of teams may differ, and words count them.
        self._words = {rows: torch.zeros(3 + TEAM, LINE, dtype=torch.int32, device=device) for rows in ROWS}
        self._squares = torch.zeros(max(self._teams[rows] * rows for rows in ROWS), device=device)

    def serves(self, stack: Stack, rows: int) -> bool:
        """Whether this is the model that it was made for, in a step of so many tokens that it may be worth it."""
        return stack is self._stack and ROWS[0] // 2 < rows <= ROWS[-1]

    def run(self, index: int, scratch: Scratch) -> NextNorm:
        """Everything from `scratch.attn` and `scratch.x` to `scratch.x` and, but behind the last layer, `scratch.qkv`.

        Args:
            index: of the layer.
            scratch: of a step with at most 128 tokens; `normed` and `act` are written too.

        Returns:
            The norm behind the layer, as it has been begun.

        Raises:
            KernelError: it does not compile, load or start.
        """
        s, layers = scratch, self._stack.layers
        rows = next(size for size in ROWS if len(s.x) <= size)
        teams = self._teams[rows]
        kernel, cut = self._kernel(rows, teams), layout(self._sizes, rows, teams)
        shared = rows // TUNING[rows].teams
        layer = layers[index]
        following: LayerWeights | None = layers[index + 1] if index + 1 < len(layers) else None
        norm = self._stack.final_norm if following is None else following.input_norm
        qkv = (following or layer).qkv  # behind the last layer it is not read
        kernel.launch(
            pack(
                (s.x, s.normed, s.act, s.qkv, layer.output.bias, qkv.bias, layer.mlp_norm, norm, self._squares, self._words[rows]),
                len(s.x),
                3 if following is None else 4,
                self._stack.norm_eps,
            )
            + self._maps.rows(layer.output.weight, cut.narrow)
            + self._maps.pairs(layer.gate_up.weight, cut.gate)
            + self._maps.rows(layer.down.weight, cut.narrow)
            + self._maps.rows(qkv.weight, cut.qkv)
            + self._maps.rows(s.attn, shared)
            + self._maps.rows(s.act, shared)
            + self._maps.rows(s.normed, shared)
            + self._maps.rows(s.normed, max(8, rows // TEAM))
        )  # fmt: skip
        return NextNorm(norm, s.normed, self._squares, teams)

    def workspaces(self) -> dict[str, torch.Tensor]:
        """All that it keeps on the device, by name."""
        return {f"words.{rows}": words for rows, words in self._words.items()} | {"squares": self._squares}

    def reset(self) -> None:
        """Forget what a failed step left: arrivals without a launch."""
        for words in self._words.values():
            words.zero_()

    def _fit(self, rows: int, guess: int) -> int:
        """How many teams run at once."""
        each = TUNING[rows].teams
        teams = guess // each * each
        while (why := unsupported(self._stack, teams, (rows,))) is None:
            fit = self._kernel(rows, teams).clusters_at_once() * each
            if fit == teams:
                return teams
            del self._kernels[rows]
            teams = fit
        raise KernelError(why)

    def _kernel(self, rows: int, teams: int) -> Kernel:
        found = self._kernels.get(rows)
        if found is None:
            cut, cluster = layout(self._sizes, rows, teams), TEAM * TUNING[rows].teams
            found = self._kernels[rows] = build(
                SOURCE, "chain", macros(self._sizes, rows, teams), device=self._device,
                grid=teams * TEAM, block=THREADS, shared_bytes=cut.shared_bytes, cluster=cluster,
            )  # fmt: skip
            POINTERS[found.handle] = 10
        return found


def macros(sizes: Sizes, rows: int, teams: int) -> dict[str, int]:
    """What is compiled in."""
    tuning, stages = TUNING[rows], layout(sizes, rows, teams).stages
    return {
        "HID": sizes.hidden, "QSIZE": sizes.queries, "QKVN": sizes.qkv, "INTER": sizes.inner, "TOK": rows,
        "TEAM": TEAM, "TEAMS": tuning.teams, "CLUSTERS": teams // tuning.teams, "STAGES": stages, "X_STAGES": tuning.x_stages,
        "FLIGHT": tuning.flight, "HOLD": tuning.hold, "PACE": tuning.pace, "LEAD": tuning.lead, "SPINS": 1 << 24, "BOUND": tuning.bound,
    }  # fmt: skip


def pack(pointers: Sequence[torch.Tensor | None], rows: int, ops: int, eps: float) -> bytes:
    """`struct Params` up to its maps."""
    return addresses(pointers) + struct.pack("<2if36x", rows, ops, eps)
