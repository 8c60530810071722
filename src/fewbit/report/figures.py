"""Four kinds of figure, each a value that says which keys of a row it draws: rows in, a block for the templates out.

Bars, Points (and curves), Heatmap and Histogram know nothing of what they show; sections.py says it. Sites stand on an axis
as their index in graph order, with a tick where a block starts; the name is in the words that the mouse finds.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from PIL import Image

from fewbit.core.colours import dark_to_bright
from fewbit.report.scale import MANY_POINTS, Axis, Scale, in_order, linear, logarithmic, most_pixels
from fewbit.report.views import Block
from fewbit.report.words import Json, Rows, fill, number, plural

FLOAT, INTEGER = "#8b929c", "#2f7bd9"
PALETTE = ("#2f7bd9", "#e07b39", "#3a9d6e", "#9065c9", "#c9507f", "#2799a8", "#a38536", "#7a8290")
COLOURS = {"float": FLOAT, "integer": INTEGER, "ties": "#d9a032", "wrong": "#cf4257", "each evaluation": FLOAT}
SITES = "site in graph order (ticks: blocks)"


@dataclass(frozen=True)
class Mark:
    """A point; with `base` a bar from there to `y`, as wide as from `x` to `to`. `ends` are those of its interval."""

    x: float
    y: float
    words: str = ""
    base: float | None = None
    to: float = 0.0
    size: float = 4.0
    diamond: bool = False
    label: str = ""
    ends: tuple[float, float] | None = None
    index: int = 0  # of its row


@dataclass(frozen=True)
class Series:
    """Marks of one colour; the line through them is drawn where it is one."""

    name: str
    colour: str
    marks: tuple[Mark, ...]
    line: bool = False


def _figure(series: Sequence[Series], x: Scale, y: Scale, height: int, **more: Any) -> Block:
    """The block of a figure, with what it shows in words."""
    values = [mark.y for one in series for mark in one.marks]
    seen = f"from {number(min(values))} to {number(max(values))}" if values else "none"
    alt = f"{y.title}, by {x.title}: {plural(len(values), 'value')}, {seen}"
    plain = {"title": "", "most_pixels": 0, "across": None, "diagonal": False, "band": None}
    return {"kind": "figure", "series": series, "x": x, "y": y, "height": height, "alt": alt, **plain, **more}


def _grouped(rows: Rows, y: Axis, group: str) -> Iterator[tuple[str, str, str, list[tuple[int, Json]]]]:
    """(key, name, colour, indexed rows) for each series, and in it for each `group` in order of appearance."""
    groups: dict[str, list[tuple[int, Json]]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(fill(group, row), []).append((index, row))
    count = 0
    for key, series in y.series().items():
        for value, members in groups.items():
            name = series or value
            yield key, name, COLOURS.get(name, PALETTE[count % len(PALETTE)]), members
            count += 1


@dataclass(frozen=True)
class Bars:
    """Upright bars in graph order where `along` is the key of a name; else flat ones with a label and the number at the end.

    A series or group (a template of its name) has a colour. With `varies` there is no figure where all bars are equal.
    """

    y: Axis
    along: str = ""
    x_title: str = SITES
    label: str = ""
    number: str = "{value:.2f}"
    group: str = ""
    hover: str = ""
    stacked: bool = False
    varies: bool = False

    def __call__(self, rows: Rows) -> Block | None:
        if self.varies and all(len({row.get(key) for row in rows}) == 1 for key in self.y.series()):
            return None
        return self._upright(rows) if self.along else self._flat(rows)

    def _upright(self, rows: Rows) -> Block:
        series, below = [], [0.0] * len(rows)
        for key, name, colour, members in _grouped(rows, self.y, self.group):
            marks = []
            for i, row in members:
                if (value := self.y.of(row, key)) is not None:
                    base = below[i] if self.stacked else 0.0
                    marks.append(Mark(i - 0.44, base + value, fill(self.hover, row), base, i + 0.44, index=i))
                    below[i] += value
            series.append(Series(name, colour, tuple(marks)))
        y = linear([0.0, *(mark.y for one in series for mark in one.marks)], self.y.title, left=0.0)
        x = in_order([str(row.get(self.along)) for row in rows], self.x_title)
        return _figure(series, x, y, 260, most_pixels=most_pixels(len(rows)))

    def _flat(self, rows: Rows) -> Block:
        longest = max(self.y.values(rows), default=1.0) or 1.0
        lines = []
        for row in rows:
            bars = []
            for key, name in self.y.series().items():
                if (value := self.y.of(row, key)) is not None:
                    words = fill(self.number, {**row, "value": value})
                    bars.append(
                        {"width": round(100 * value / longest, 2), "colour": COLOURS.get(name, INTEGER), "words": words}
                    )
            lines.append({"label": fill(self.label, row), "bars": bars, "words": fill(self.hover, row)})
        legend = [(name, COLOURS.get(name, INTEGER)) for name in self.y.series().values() if name]
        return {"kind": "bars", "lines": lines, "legend": legend, "title": self.y.title}


@dataclass(frozen=True)
class Points:
    """Points over `x`, or in graph order where `along` is the key of a name; series and groups that `lines` names are curves.

    `label` is the text beside a point where there are few and no line, `interval` the key of a pair of ends, `mark` a key that
    makes a point a diamond where it is true, `line` a key whose first value is a dotted line across.
    """

    y: Axis
    x: Axis = Axis("", "")
    along: str = ""
    x_title: str = SITES
    group: str = ""
    lines: tuple[str, ...] = ()
    label: str = ""
    hover: str = ""
    interval: str = ""
    mark: str = ""
    line: str = ""
    diagonal: bool = False

    def __call__(self, rows: Rows) -> Block:
        groups = list(_grouped(rows, self.y, self.group))
        if len(groups) > len(PALETTE):  # more than there are colours
            groups = list(_grouped(rows, self.y, ""))
        series = [self._series(*group) for group in groups]
        across = next((row[self.line] * self.y.scale for row in rows if row.get(self.line) is not None), None)
        ends = [end for one in series for mark in one.marks for end in mark.ends or ()]
        ys = [*(mark.y for one in series for mark in one.marks), *ends, *([] if across is None else [across])]
        title = fill(self.y.title, rows[0])
        y = logarithmic(ys, title) if self.y.log else linear(ys, title)
        if self.along:
            x = in_order([str(row.get(self.along)) for row in rows], self.x_title)
        elif self.x.log:
            x = logarithmic(self.x.values(rows), self.x.title, few=True)
        else:
            x = linear(self.x.values(rows), self.x.title, right=0.25 if self.label else 0.06)
        if self.diagonal:
            x, y = (linear([0.0, *ys, *self.x.values(rows)], each.title, left=0.0) for each in (x, y))
        line = (across, self.line) if across is not None else None
        most = most_pixels(len(rows)) if self.along else 0
        return _figure(series, x, y, 300, across=line, diagonal=self.diagonal, most_pixels=most)

    def _series(self, key: str, name: str, colour: str, members: Sequence[tuple[int, Json]]) -> Series:
        is_line = name in self.lines
        few = bool(self.label) and not is_line and len(members) <= MANY_POINTS
        marks = []
        for index, row in members:
            x, y = index if self.along else self.x.of(row), self.y.of(row, key)
            if x is None or y is None:
                continue
            pair, mark = row.get(self.interval), row.get(self.mark)
            marked = key in mark if isinstance(mark, (list, tuple)) else bool(mark)
            ends = (pair[0] * self.y.scale, pair[1] * self.y.scale) if pair else None
            size = 7.0 if marked else 2.0 if len(members) > 10 * MANY_POINTS else 4.0
            label = fill(self.label, row) if few else ""
            words = fill(self.hover, {**row, "x": x, "y": y})
            marks.append(Mark(x, y, words, size=size, diamond=marked, label=label, ends=ends, index=index))
        return Series(name, colour, tuple(sorted(marks, key=lambda mark: mark.x)), is_line)


@dataclass(frozen=True)
class Heatmap:
    """Cells of `z` at columns `x` and rows `y`, with their numbers; or, with `panels`, whole matrices of the first row as
    pictures on one scale.
    """

    z: Axis
    x: str = ""
    y: str = ""
    hover: str = ""
    panels: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, rows: Rows) -> Block:
        return self._panels(rows[0]) if self.panels else self._cells(rows)

    def _cells(self, rows: Rows) -> Block:
        names, columns = (list(dict.fromkeys(row[key] for row in rows)) for key in (self.y, self.x))
        at = {(row[self.y], row[self.x]): row for row in rows}
        top = max(self.z.values(rows), default=1.0) or 1.0
        lines = []
        for name in names:
            values = [self.z.of(at.get((name, column), {})) for column in columns]
            cells = [None if v is None else {"text": f"{v:.1f}", "share": round(v / top, 3)} for v in values]
            lines.append({"name": str(name), "cells": cells})
        return {"kind": "heat", "columns": columns, "lines": lines, "x": self.x, "y": self.y}

    def _panels(self, row: Json) -> Block:
        top = max((value for key in self.panels for line in row[key] for value in line), default=1.0) or 1.0
        pictures = [{"name": name, "uri": picture(row[key], top)} for key, name in self.panels.items()]
        words = f"across: {fill(f'{{{self.x}}}', row)}, down: {fill(f'{{{self.y}}}', row)}, dark 0 to bright {number(top, 2)}"
        return {"kind": "panels", "title": "", "pictures": pictures, "words": words}


def picture(matrix: Sequence[Sequence[float]], top: float) -> str:
    """A matrix as a PNG of a pixel for each number in a data URI, dark where it is 0 and bright where it is `top`."""
    image = Image.new("P", (len(matrix[0]), len(matrix)))
    image.putpalette([part for colour in dark_to_bright() for part in colour])
    image.putdata([round(255 * min(max(value / top, 0.0), 1.0)) for line in matrix for value in line])
    image.save(file := io.BytesIO(), "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Histogram:
    """Counts between edges on a log axis (keys `edges` and `counts` of the first row); the pair at `band` is shaded."""

    band: str
    title: str = "value"

    def __call__(self, rows: Rows) -> Block:
        edges, counts = rows[0]["edges"], rows[0]["counts"]
        y = logarithmic([0.7, *counts], "values (log)")
        marks = tuple(
            Mark(low, float(count), f"from {number(low)}: {count:,} values", y.low, high)
            for (low, high), count in zip(pairwise(edges), counts, strict=True)
            if count
        )
        band = rows[0].get(self.band)
        x = linear([*edges, *(band or ())], self.title, left=0.02, right=0.02)
        return _figure([Series("", FLOAT, marks)], x, y, 150, band=band, band_colour=INTEGER)
