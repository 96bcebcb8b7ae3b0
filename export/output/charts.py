"""Charts of a report as SVG to embed in a page: no scripts, no fonts, the page's own colours.

The same numbers give the same bytes. Colours are placeholders for matplotlib that become CSS variables, so that one
drawing serves light and dark pages; text stays text, in the page's font. matplotlib is imported late.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colours while drawing, and the page's variables for them (see templates/report.html). None is black:
# matplotlib omits it, as SVG's default.
_VARIABLES = ("ink", "muted", "track", "before", "after", "part0", "part1", "part2", "part3", "part4", "miss")
COLORS = {name: f"#0000{index:02x}" for index, name in enumerate(_VARIABLES, start=1)}
_WIDTH_IN = 3.9  # narrow, so that the text is readable on a phone
_TEXT, _SMALL = 10.5, 9.5
_ROW_IN, _LINE_IN = 0.48, 0.17
# Characters in a line, if each is as wide as 0.6 of the text's size, the widest fonts.
_LINE_CHARACTERS = 43
_MOST_LINES = 3
_STYLE = {"svg.fonttype": "none", "text.parse_math": False, "path.simplify": False}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Row:
    """One bar: label above it on the left, value on the right, segments as (share of the width, colour)."""

    label: str
    value: str
    segments: Sequence[tuple[float, str]]


def bars(name: str, description: str, rows: Sequence[Row]) -> str:
    """Bars below each other, each on a track of the full width. name: unique among the page's charts.

    A long label takes several lines; the value is in the last one.
    """
    wrapped = [_lines(row) for row in rows]
    tops = [0.0, *accumulate(_ROW_IN + (len(lines) - 1) * _LINE_IN for lines in wrapped)]
    with _style(name):
        figure, axes = _canvas(tops[-1])
        axes.set_xlim(0, 1)
        axes.set_ylim(tops[-1], 0)
        for row, lines, bottom in zip(rows, wrapped, tops[1:], strict=True):
            text, bar = bottom - 0.62 * _ROW_IN, bottom - 0.36 * _ROW_IN
            for below, line in zip(reversed(range(len(lines))), lines, strict=True):
                axes.text(0, text - below * _LINE_IN, line, color=COLORS["ink"], size=_TEXT)
            axes.text(1, text, row.value, color=COLORS["ink"], size=_TEXT, ha="right")
            axes.barh(bar, 1, 0.24 * _ROW_IN, color=COLORS["track"])
            begin = 0.0
            for share, color in row.segments:
                axes.barh(bar, share, 0.24 * _ROW_IN, left=begin, color=COLORS[color])
                begin += share
        return _svg(figure, name, description)


def _lines(row: Row) -> list[str]:
    """The label in at most `_MOST_LINES` lines; the last one leaves room for the value."""
    room = _LINE_CHARACTERS - len(row.value) - 2
    if len(row.label) <= room:
        return [row.label]
    most = _LINE_CHARACTERS * (_MOST_LINES - 1)
    label = row.label if len(row.label) <= most else f"{row.label[: most // 2 - 1]}…{row.label[-most // 2 :]}"
    lines = [""]
    # Names break in front of dots and plus signs; anywhere only if a part fills a line.
    for part in re.findall(r"[\s.+]?[^\s.+]*", label):
        for piece in textwrap.wrap(part, _LINE_CHARACTERS, drop_whitespace=False):
            if len(lines[-1]) + len(piece) > _LINE_CHARACTERS:
                lines.append("")
            lines[-1] += piece
    return lines if len(lines[-1]) <= room else [*lines, ""]


def squares(name: str, description: str, percent: float) -> str:
    """A hundred squares, one filled for each whole percent."""
    with _style(name):
        columns, rows, side = 20, 5, 0.8
        figure, axes = _canvas(_WIDTH_IN * rows / columns)
        axes.set_xlim(0, columns)
        axes.set_ylim(rows, 0)
        for index in range(columns * rows):
            row, column = divmod(index, columns)
            color = COLORS["after" if index < int(percent) else "miss"]
            axes.bar(column + 0.5, side, side, row + 0.1, color=color)
        return _svg(figure, name, description)


def lines(name: str, description: str, stop: int, series: Sequence[tuple[str, float, float, str]], unit: str) -> str:
    """Straight lines from 0 to `stop` tokens. series: label, value at 0, value at `stop` (in `unit`), colour; the
    highest first."""
    with _style(name):
        figure, axes = _canvas(2.2, (0.0, 0.16, 1.0, 0.84))
        top = max(end for _, _, end, _ in series)
        axes.set_xlim(0, stop)
        axes.set_ylim(0, 1.22 * top)
        for share in (0, 0.5, 1):
            axes.axhline(share * top, color=COLORS["track"], linewidth=0.8, zorder=0)
        for index, (label, begin, end, color) in enumerate(series):
            axes.fill_between([0, stop], [begin, end], color=COLORS[color], alpha=0.18, linewidth=0)
            axes.plot([0, stop], [begin, end], color=COLORS[color], linewidth=2.2)
            words = f"{label}: {begin:,.1f} to {end:,.1f} {unit}"
            # The upper label is above its line. The lower one is above its line if that is low, else below it.
            offset, side = (4, "bottom") if index == 0 or end < 0.3 * top else (-5, "top")
            place = (1, end / axes.get_ylim()[1])
            _label(axes, words, place, (-2, offset), alignment=("right", side), color="ink", size=_TEXT)
        for share, words, side in (
            (0, "empty", "left"),
            (0.5, "half full", "center"),
            (1, f"{stop:,} tokens", "right"),
        ):
            _label(axes, words, (share, 0), (0, -6), alignment=(side, "top"), color="muted", size=_SMALL)
        return _svg(figure, name, description)


def curves(
    name: str, description: str, stop: int, series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]]
) -> str:
    """Values over the steps of a training, 0 to `stop`, the description above them. series: label, colour, and places
    (step, value), two or more."""
    values = [value for _, _, places in series for _, value in places]
    low, high = min(values), max(values)
    room = (high - low) or abs(high) or 1.0
    with _style(name):
        figure, axes = _canvas(2.4, (0.0, 0.14, 1.0, 0.62))
        axes.set_xlim(0, stop)
        axes.set_ylim(low - 0.1 * room, high + 0.1 * room)
        for height in (low, high):
            axes.axhline(height, color=COLORS["track"], linewidth=0.8, zorder=0)
        for _, color, places in series:
            axes.plot(*zip(*places, strict=True), color=COLORS[color], linewidth=2.2, marker="o", markersize=3.5)
        _label(axes, description, (0, 1), (0, 30), alignment=("left", "bottom"), color="ink", size=_TEXT)
        for index, (label, color, places) in enumerate(series):
            words = f"{label}: {places[0][1]:.4g} to {places[-1][1]:.4g}"
            side = ("left", "right")[index % 2]
            _label(axes, words, (float(index % 2), 1), (0, 12), alignment=(side, "bottom"), color=color, size=_SMALL)
        for share, words, side in ((0, "step 0", "left"), (1, f"step {stop:,}", "right")):
            _label(axes, words, (share, 0), (0, -6), alignment=(side, "top"), color="muted", size=_SMALL)
        return _svg(figure, name, description)


def _label(
    axes: Axes,
    words: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    *,
    alignment: tuple[str, str],
    color: str,
    size: float,
) -> None:
    """Write a text at a position (in shares of the axes), with an offset in points and an alignment (horizontal,
    vertical)."""
    axes.annotate(
        words,
        place,
        offset,
        xycoords="axes fraction",
        textcoords="offset points",
        ha=alignment[0],
        va=alignment[1],
        color=COLORS[color],
        size=size,
    )


def _style(name: str) -> AbstractContextManager[None]:
    """Draw and write with matplotlib's defaults and ours, whatever the user's settings are."""
    from matplotlib import style

    context: AbstractContextManager[None] = style.context(["default", {**_STYLE, "svg.hashsalt": name}])
    return context


def _canvas(height_in: float, box: tuple[float, float, float, float] = (0, 0, 1, 1)) -> tuple[Figure, Axes]:
    """An empty drawing without axes. Not by pyplot, which would start a window system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in))
    axes = figure.add_axes(box)
    axes.set_axis_off()
    return figure, axes


def _svg(figure: Figure, name: str, description: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    text = re.sub(r"^.*?(?=<svg )", "", out.getvalue(), flags=re.DOTALL)
    # Such a style would apply to the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' width="[^"]*" height="[^"]*"', f' role="img" aria-label="{description}"', text, count=1)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, color in COLORS.items():
        text = text.replace(color, f"var(--{variable})")
    return text
