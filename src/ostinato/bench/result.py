"""What a benchmark hands back: figures for JSON, tables for people, a plot on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plot import Panel


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; a column is right-aligned unless it is the first."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def __str__(self) -> str:
        lines = [tuple(self.columns), *map(tuple, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]  # fmt: skip
        text.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([self.title] * bool(self.title) + [line.rstrip() for line in text])


def filled(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A table without the columns in which no row has a value ("-")."""
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] != "-" for row in rows)]
    return Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], title)


@dataclass(frozen=True)
class Result:
    """A finished benchmark."""

    fields: Mapping[str, Any]
    """Plain data: vLLM's names where it has one."""
    tables: Sequence[Table]
    panels: Sequence[Panel]
    notes: Sequence[str] = ()
    """What a reader of the tables has to know."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` per cent of the values lie, interpolated as numpy does."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * share / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
