"""Building blocks of pages: values as text, and pieces of HTML. User input is escaped where it enters."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

Json = Mapping[str, Any]
Rows = Sequence[Json]

UNIT = "\u00a0"  # a unit stays on the line of its number

# Values as text -------------------------------------------------------------------------------------------------------


def number(value: Any, digits: int = 4) -> str:
    """Any value of a table as HTML: floats with significant digits, {min, max} as a range, None as a dash."""
    if isinstance(value, Mapping):
        if value.keys() == {"min", "max"}:
            return f"{number(value['min'], digits)} to {number(value['max'], digits)}"
        return ", ".join(f"{escape(str(key))}: {number(part, digits)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(number(part, digits) for part in value) or "–"
    if value is None or isinstance(value, (str, bool)):
        return ("yes" if value else "no") if isinstance(value, bool) else escape(value or "–")
    if not math.isfinite(value):
        return "∞" if value > 0 else "–∞" if value < 0 else "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}".replace("-", "−")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}{UNIT}%"


def share(value: float | None) -> str:
    return percent(None if value is None else 100 * value)


def megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f}{UNIT}MB"


def interval(value: Sequence[Any] | None) -> str:
    return " to ".join(map(number, value)) if value else "–"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def text(value: object) -> str:
    """A string that browsers and plotly show as it is; they would read tags in it otherwise."""
    return escape(str(value), quote=False)


class _Words(string.Formatter):
    def get_value(self, key: Any, args: Any, kwargs: Any) -> Any:
        return kwargs.get(key)

    def format_field(self, value: Any, spec: str) -> str:
        if spec and value is not None:
            return text(format(value, spec))
        return text(value) if isinstance(value, str) else number(value)


def fill(template: str, row: Json) -> str:
    """A format string with the values of a row, escaped."""
    return _Words().vformat(template, (), row)


def grouped(rows: Rows, keys: Sequence[str]) -> list[dict[str, Any]]:
    """One row for all rows with equal `keys`, in order of appearance: numbers are added, other values listed."""
    groups: dict[str, list[Json]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.get(key) for key in keys]), []).append(row)
    sums = []
    for members in groups.values():
        lists = {key: [row[key] for row in members if key in row] for row in members for key in row}
        merged = {k: sum(v) if all(isinstance(x, (int, float)) for x in v) else v for k, v in lists.items()}
        sums.append({**merged, **{key: members[0].get(key) for key in keys}})
    return sums


# Pieces of HTML -------------------------------------------------------------------------------------------------------


def paragraphs(*lines: str) -> str:
    return "".join(f"<p>{line}</p>" for line in lines if line)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Iterable[int] = (), box: str = "box") -> str:
    """Cells are HTML already; `numeric` are the columns that stand on the right."""
    right = set(numeric)
    mark = [' class="n"' if i in right else "" for i in range(len(head))]
    top = "".join(f"<th{m}>{h}</th>" for m, h in zip(mark, head, strict=True))
    body = "".join("<tr>" + "".join(f"<td{m}>{c}</td>" for m, c in zip(mark, row, strict=True)) + "</tr>" for row in rows)
    return f'<div class="{box}" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(figure: go.Figure, title: str = "") -> str:
    """A figure with its title as a heading that wraps and its JSON in the page."""
    data = figure.to_json(validate=False)  # plotly writes < as \u003c, so that no label can end the script
    head = f"<h4>{title}</h4>" if title else ""
    return (
        f'<figure>{head}<div class="plot" style="height:{figure.layout.height:.0f}px"></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def thumbnail(uri: Any) -> str:
    """An image that is inside the page; anything that would have to be loaded is left out."""
    return f'<img alt="" src="{escape(uri)}">' if isinstance(uri, str) and uri.startswith("data:image/") else ""


def card(question: str, big: str, *lines: str, word: str = "", mood: str = "") -> str:
    tag = f'<span class="word {mood}">{word}</span>' if word else ""
    return f'<article class="card"><h2>{question} {tag}</h2><p class="big">{big}</p>{paragraphs(*lines)}</article>'
