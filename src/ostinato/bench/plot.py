"""Plots of results, as PNG by matplotlib or as a page of inline SVG that fetches nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, OstinatoError

SUFFIXES = (".png", ".html")
_COLOURS = (
    *("#2463a8", "#c4591d", "#3c8a3f", "#8a4fa3", "#a8861f"),
    *("#b03a5b", "#2a9aa0", "#6b6b6b", "#8fb4e3", "#e3a98f"),
)
_WIDTH, _HEIGHT = 680, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 160, 34, 48


@dataclass(frozen=True)
class Series:
    """Points of one line, or heights of one group of bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: Literal["line", "stack"] = "line"
    """"stack": bars on top of each other, one for each of `ticks`."""
    ticks: Sequence[str] = ()
    log_x: bool = False
    top: float | None = None
    """Upper end of the y axis; None: from the values."""


def check(path: str | None) -> None:
    """Raise now what `save` would raise after minutes of measuring.

    Raises:
        ConfigError: the name ends in neither .png nor .html, or matplotlib is missing.
    """
    if path is None:
        return
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: the name must end in {' or '.join(SUFFIXES)}")
    if suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ConfigError(
                "a .png needs matplotlib: pip install 'ostinato[bench]', or use --plot FILE.html"
            ) from None


def save(path: str, title: str, panels: Sequence[Panel]) -> None:
    """Write the panels, two to a row.

    Raises:
        OstinatoError: the file cannot be written.
    """
    check(path)
    try:
        if Path(path).suffix.lower() == ".png":
            _png(path, title, panels)
        else:
            Path(path).write_text(page(title, panels), encoding="utf-8")
    except OSError as error:
        raise OstinatoError(f"{path} cannot be written: {error.strerror}") from error


def _png(path: str, title: str, panels: Sequence[Panel]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.4 * columns, 4.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        below = [0.0] * len(panel.ticks)
        for colour, series in _coloured(panel):
            if panel.kind == "stack":
                axes.bar(panel.ticks, series.y, bottom=below, label=series.name, color=colour)
                below = [a + b for a, b in zip(below, series.y, strict=True)]
            else:
                axes.plot(series.x, series.y, marker="o", markersize=4, label=series.name, color=colour)
        if panel.log_x:
            xs = sorted({x for s in panel.series for x in s.x})
            axes.set_xscale("log", base=2)
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
            axes.minorticks_off()
        axes.set_ylim(0, panel.top)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=130)


def page(title: str, panels: Sequence[Panel]) -> str:
    """An HTML page with each panel as inline SVG."""
    drawings = "\n".join(svg(panel) for panel in panels)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>body{{font:14px system-ui,sans-serif;margin:2em;background:#fff;color:#222}}
svg{{max-width:100%;margin:0 1em 1em 0}} text{{font:11px system-ui,sans-serif;fill:#222}}</style></head>
<body><h1>{escape(title)}</h1>
{drawings}
</body></html>
"""


def svg(panel: Panel) -> str:
    """One panel as an SVG element."""
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    top = panel.top or _nice(_highest(panel)) or 1.0
    xs = sorted({x for s in panel.series for x in s.x})

    def place_y(value: float) -> float:
        return _TOP + height * (1 - value / top)

    def place_x(value: float) -> float:
        low, high, at = (math.log2(v) if panel.log_x else v for v in (xs[0], xs[-1], value))
        return _LEFT + width * (0.5 if high == low else 0.03 + 0.94 * (at - low) / (high - low))

    parts = [_text(_LEFT + width / 2, 14, panel.title, bold=True)]
    for step in range(6):
        y = place_y(top * step / 5)
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{top * step / 5:.4g}", anchor="end"))
    if panel.kind == "stack":
        slot = width / max(len(panel.ticks), 1)
        below = [0.0] * len(panel.ticks)
        for colour, series in _coloured(panel):
            for i, value in enumerate(series.y):
                y, tall = place_y(below[i] + value), height * value / top
                hint = escape(f"{panel.ticks[i]}, {series.name}: {value:.4g}")
                parts.append(
                    f'<rect x="{_LEFT + slot * (i + 0.2):.1f}" y="{y:.1f}" width="{slot * 0.6:.1f}" '
                    f'height="{tall:.1f}" fill="{colour}"><title>{hint}</title></rect>'
                )
                below[i] += value
        parts.extend(
            _text(_LEFT + slot * (i + 0.5), _TOP + height + 15, tick) for i, tick in enumerate(panel.ticks)
        )
    else:
        for colour, series in _coloured(panel):
            points = [(place_x(x), place_y(y)) for x, y in zip(series.x, series.y, strict=True)]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for (x, y), a, b in zip(points, series.x, series.y, strict=True):
                hint = escape(f"{series.name}: {b:.4g} at {a:g}")
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{hint}</title></circle>'
                )
        shown = xs if len(xs) <= 12 else xs[:: -(-len(xs) // 12)]
        parts.extend(_text(place_x(x), _TOP + height + 15, f"{x:g}") for x in shown)
    parts.append(_text(_LEFT + width / 2, _HEIGHT - 12, panel.x_label))
    parts.append(f'<g transform="rotate(-90 14 {_HEIGHT / 2})">{_text(14, _HEIGHT / 2, panel.y_label)}</g>')
    beside = _LEFT + width + 10
    for i, (colour, series) in enumerate(_coloured(panel)):
        y = _TOP + 17 * i
        parts.append(f'<rect x="{beside}" y="{y}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(beside + 15, y + 9, series.name, anchor="start"))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{"".join(parts)}</svg>'


def _coloured(panel: Panel) -> list[tuple[str, Series]]:
    return [(_COLOURS[i % len(_COLOURS)], series) for i, series in enumerate(panel.series)]


def _highest(panel: Panel) -> float:
    if panel.kind == "stack":
        return max((sum(heights) for heights in zip(*(s.y for s in panel.series), strict=True)), default=0.0)
    return max((y for s in panel.series for y in s.y), default=0.0)


def _nice(value: float) -> float:
    """The next number that an axis can end with."""
    if value <= 0:
        return 0.0
    scale = 10.0 ** math.floor(math.log10(value))
    return next(scale * m for m in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if scale * m >= value * 0.999)


def _text(x: float, y: float, text: str, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
