"""What a section shows, each a value that says which keys of a row it shows: Table, Facts, Gallery, and Each of a view.

A view gives a block: a mapping of plain values whose `kind` names the macro that draws it (templates/blocks.html.j2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fewbit.report.words import (
    UNIT,
    Json,
    Rows,
    ends_of,
    fall,
    fill,
    grouped,
    interval,
    measured,
    megabytes,
    number,
    percent,
    places,
    share,
)

Block = Mapping[str, Any]
View = Callable[[Rows], Block | None]

FOLDED = 12  # a table of more rows opens with a click


def fixed(digits: int, unit: str) -> Callable[[Any], str]:
    """Numbers with a fixed number of decimals, and a unit."""

    def shown(value: Any) -> str:
        finite = isinstance(value, (int, float)) and math.isfinite(value)
        return f"{value:,.{digits}f}{UNIT if unit else ''}{unit}".replace("-", "−") if finite else number(value)

    return shown


KEY = re.compile(r"{(\w+)")  # what a line shows of a row
TEXT = ("", "sites", "range", "ends")  # formats of columns that stand on the left
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
    "sites": number,
    "range": interval,
}
MEASURES: Mapping[str, Callable[[Any, str], str]] = {"measure": measured, "fall": fall, "ends": ends_of}  # with the row's unit


@dataclass(frozen=True)
class Column:
    """A column from `heading`, `heading:key` or `heading:key:format`, the key of the row and one of FORMATS or MEASURES."""

    heading: str
    key: str
    format: str = ""

    @staticmethod
    def of(words: str) -> Column:
        heading, *rest = words.split(":")
        return Column(heading, *rest) if rest else Column(heading, heading)

    def cell(self, row: Json, rows: Rows) -> Block:
        """The text, the number by which the column is sorted, and the names where there are several. Sizes are in one unit in
        all `rows`.
        """
        value: Any = row.get(self.key)
        many = self.format == "sites" and isinstance(value, (list, tuple)) and len(value) > 1
        if many:
            return {"text": places(value), "sort": len(value), "names": list(map(number, value))}
        plain = isinstance(value, (int, float)) and math.isfinite(value)
        unit = str(row.get("unit", "%"))
        if self.format == "MB":
            text = megabytes(value, [one.get(self.key) for one in rows])
        else:
            text = MEASURES[self.format](value, unit) if self.format in MEASURES else FORMATS[self.format](value)
        return {"text": text, "sort": value if plain else None, "names": ()}


def _every(rows: Rows) -> list[Column]:
    """A column for each key of the rows."""
    keys = dict.fromkeys(key for row in rows for key in row)
    numeric = {key: all(isinstance(row.get(key), (int, float, type(None))) for row in rows) for key in keys}
    return [Column(str(key).replace("_", " "), key, "#" if numeric[key] else "") for key in keys]


@dataclass(frozen=True)
class Table:
    """`columns` as in Column.of, or every key of the rows; those that no row has are left out. Rows that are equal in `group`
    are one; with `where` only those that are true there are shown; `least` is the key of which the smallest come first; with
    `search` a field above filters them.
    """

    columns: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    where: str = ""
    least: str = ""
    search: bool = False

    def __call__(self, rows: Rows) -> Block | None:
        rows = [row for row in rows if not self.where or row.get(self.where)]
        rows = grouped(rows, self.group) if self.group else rows
        if self.least:
            rows = sorted(rows, key=lambda row: (row.get(self.least) is None, row.get(self.least)))
        columns = [Column.of(words) for words in self.columns] or _every(rows)
        columns = [c for c in columns if any(row.get(c.key) not in (None, "", []) for row in rows)]
        if not rows or not columns:
            return None
        head = [{"text": c.heading, "right": c.format not in TEXT} for c in columns]
        cells = [[c.cell(row, rows) for c in columns] for row in rows]
        return {"kind": "table", "head": head, "rows": cells, "search": self.search, "folded": len(rows) > FOLDED}


@dataclass(frozen=True)
class Facts:
    """The first row as names and values: `columns`, or every key, those of mappings in it one by one."""

    columns: tuple[str, ...] = ()

    def __call__(self, rows: Rows) -> Block | None:
        row: dict[str, Any] = {}
        for key, value in rows[0].items():
            row.update(value if isinstance(value, Mapping) and not self.columns else {key: value})
        columns = [Column.of(words) for words in self.columns] or [Column(str(key), key) for key in row]
        pairs = [(c.heading, FORMATS[c.format](row[c.key])) for c in columns if row.get(c.key) not in (None, "", [], {})]
        return {"kind": "facts", "pairs": pairs} if pairs else None


@dataclass(frozen=True)
class Gallery:
    """Thumbnails with lines below them, each where the row has its keys; marked where two values at `differs` are not equal;
    `wide` for pictures side by side.
    """

    lines: tuple[str, ...]
    differs: tuple[str, str] = ("", "")
    wide: bool = False

    def __call__(self, rows: Rows) -> Block | None:
        images = []
        for row in rows:
            lines = [fill(line, row) for line in self.lines if all(key in row for key in KEY.findall(line))]
            uri = row.get("thumbnail")
            inside = uri if isinstance(uri, str) and uri.startswith("data:image/") else ""  # nothing is loaded
            images.append({"lines": lines, "uri": inside, "differs": row.get(self.differs[0]) != row.get(self.differs[1])})
        return {"kind": "gallery", "images": images, "wide": self.wide}


@dataclass(frozen=True)
class Each:
    """A view of each row, or of all rows that are equal in `key`, side by side unless they are `wide`; at most `most`, then a
    line says how many more there are.
    """

    view: View
    heading: str
    key: str = ""
    most: int = 24
    wide: bool = False

    def __call__(self, rows: Rows) -> Block | None:
        groups: dict[Any, list[Any]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.get(self.key) if self.key else index, []).append(row)
        visible = list(groups.values())[: self.most]
        blocks = [{**block, "title": fill(self.heading, group[0])} for group in visible if (block := self.view(group))]
        return {"kind": "each", "blocks": blocks, "wide": self.wide, "more": len(groups) - len(visible)} if blocks else None
