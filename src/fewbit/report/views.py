"""What a section shows, each a value that says which keys of a row it shows: Table, Facts, Gallery, and Each of a figure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from fewbit.report.pieces import (
    UNIT,
    Rows,
    fill,
    grouped,
    interval,
    megabytes,
    number,
    percent,
    plot,
    plural,
    share,
    table,
    text,
    thumbnail,
)

FOLDED = 12  # a table of more rows opens with a click


def sites(value: Any) -> str:
    """One name as it is, several behind their number."""
    names = [value] if isinstance(value, str) else list(value or ())
    if len(names) < 2:
        return number(names)
    return f"<details><summary>{plural(len(names), 'site')}</summary>{'<br>'.join(map(number, names))}</details>"


def fixed(digits: int, unit: str) -> Callable[[Any], str]:
    """Numbers with a fixed number of decimals, and a unit."""

    def shown(value: Any) -> str:
        finite = isinstance(value, (int, float)) and math.isfinite(value)
        return f"{value:,.{digits}f}{UNIT if unit else ''}{unit}".replace("-", "−") if finite else number(value)

    return shown


KEY = re.compile(r"{(\w+)")  # what a line shows of a row
TEXT = ("", "sites", "range")  # formats of columns that stand on the left
FORMATS: Mapping[str, Callable[[Any], str]] = {
    "": number,
    "#": number,
    "cosine": fixed(7, ""),
    "%": percent,
    "share": share,
    "MB": megabytes,
    "dB": fixed(1, "dB"),
    "ms": fixed(2, "ms"),
    "s": fixed(3, "s"),
    "sites": sites,
    "range": interval,
}


@dataclass(frozen=True)
class Column:
    """A column from `heading`, `heading:key` or `heading:key:format`, the key of the row and one of FORMATS."""

    heading: str
    key: str
    format: str = ""

    @staticmethod
    def of(words: str) -> Column:
        heading, *rest = words.split(":")
        return Column(heading, *rest) if rest else Column(heading, heading)


def _every(rows: Rows) -> list[Column]:
    """A column for each key of the rows."""
    keys = dict.fromkeys(key for row in rows for key in row)
    numeric = {key: all(isinstance(row.get(key), (int, float, type(None))) for row in rows) for key in keys}
    return [Column(str(key).replace("_", " "), key, "#" if numeric[key] else "") for key in keys]


@dataclass(frozen=True)
class Table:
    """`columns` as in Column.of, or every key of the rows. Rows that are equal in `group` are one; with `where` only those that
    are true there are shown; with `search` a field above filters them.
    """

    columns: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    where: str = ""
    search: bool = False

    def __call__(self, rows: Rows) -> str:
        rows = [row for row in rows if not self.where or row.get(self.where)]
        rows = grouped(rows, self.group) if self.group else rows
        if not rows:
            return ""
        columns = [Column.of(words) for words in self.columns] or _every(rows)
        cells = ([FORMATS[c.format](row.get(c.key)) for c in columns] for row in rows)
        numeric = [i for i, c in enumerate(columns) if c.format not in TEXT]
        long = len(rows) > FOLDED
        html = table([text(c.heading) for c in columns], cells, numeric=numeric, box="box tall" if long else "box")
        if self.search:
            html = f'<input type="search" placeholder="filter: fc2 weight" aria-label="filter the rows">{html}'
        return f"<details><summary>All {len(rows):,} rows</summary>{html}</details>" if long else html


@dataclass(frozen=True)
class Facts:
    """The first row as names and values: `columns`, or every key, those of mappings in it one by one."""

    columns: tuple[str, ...] = ()

    def __call__(self, rows: Rows) -> str:
        row: dict[str, Any] = {}
        for key, value in rows[0].items():
            row.update(value if isinstance(value, Mapping) and not self.columns else {key: value})
        columns = [Column.of(words) for words in self.columns] or [Column(str(key), key) for key in row]
        pairs = [(c.heading, FORMATS[c.format](row[c.key])) for c in columns if row.get(c.key) not in (None, [], {})]
        return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{value}</dd>' for name, value in pairs)}</dl>"


@dataclass(frozen=True)
class Gallery:
    """Thumbnails with lines below them, each where the row has its keys; marked where two values at `differs` are not equal;
    `wide` for pictures side by side.
    """

    lines: tuple[str, ...]
    differs: tuple[str, str] = ("", "")
    wide: bool = False

    def __call__(self, rows: Rows) -> str:
        cells = []
        for row in rows:
            mark = " differs" if row.get(self.differs[0]) != row.get(self.differs[1]) else ""
            lines = (line for line in self.lines if all(key in row for key in KEY.findall(line)))
            words = "<br>".join(fill(line, row) for line in lines)
            cells.append(f'<div class="image{mark}">{thumbnail(row.get("thumbnail"))}<div>{words}</div></div>')
        return f'<div class="images{" wide" * self.wide}">{"".join(cells)}</div>'


@dataclass(frozen=True)
class Each:
    """A figure for each row, or for all rows that are equal in `key`, side by side unless they are `wide`; at most `most`, then
    a line says how many more there are.
    """

    view: Callable[[Rows], go.Figure | None]
    heading: str
    key: str = ""
    most: int = 24
    wide: bool = False

    def __call__(self, rows: Rows) -> str:
        groups: dict[Any, list[Any]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.get(self.key) if self.key else index, []).append(row)
        visible = list(groups.values())[: self.most]
        figures = [(figure, fill(self.heading, group[0])) for group in visible if (figure := self.view(group)) is not None]
        more = f'<p class="note">{len(groups) - self.most} more are in tables.json.</p>' if len(groups) > self.most else ""
        box = "".join(plot(figure, head) for figure, head in figures)
        return (f'<div class="many">{box}</div>' if box and not self.wide else box) + more
