"""What pages are made of: values as text, and pieces of HTML. What came from the user is escaped where it enters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from fewbit.report import figures

Json = Mapping[str, Any]
Rows = Sequence[Json]

UNIT = "\u00a0"  # a unit stays on the line of its number


# Values as text -------------------------------------------------------------------------------------------------------


def number(value: Any, digits: int = 4) -> str:
    """A float with significant digits, a pair or per-channel range joined, nothing as a dash."""
    if isinstance(value, Mapping):
        value = [value["min"], value["max"]]
    if isinstance(value, (list, tuple)):
        return " to ".join(number(v, digits) for v in value)
    if value is None or isinstance(value, str):
        return escape(value or "–")
    if not math.isfinite(value):
        return "∞" if value > 0 else "–∞" if value < 0 else "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}".replace("-", "−")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}{UNIT}%"


def share(value: float | None) -> str:
    return percent(None if value is None else 100 * value)


def megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f}{UNIT}MB"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# Pieces of HTML -------------------------------------------------------------------------------------------------------


def paragraphs(*lines: str) -> str:
    return "".join(f"<p>{line}</p>" for line in lines if line)


def nothing(why: str) -> str:
    return f'<p class="nothing">{escape(why)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Iterable[int] = (), box: str = "box") -> str:
    """Cells are HTML already; `numeric` are the columns that stand on the right."""
    right = set(numeric)
    mark = [' class="n"' if i in right else "" for i in range(len(head))]
    top = "".join(f"<th{m}>{h}</th>" for m, h in zip(mark, head, strict=True))
    body = "".join("<tr>" + "".join(f"<td{m}>{c}</td>" for m, c in zip(mark, row, strict=True)) + "</tr>" for row in rows)
    return f'<div class="{box}" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(figure: go.Figure, caption: str = "", *, level: int = 3) -> str:
    """A figure with its title as a heading that wraps, its JSON in the page and its caption below."""
    title, figure = figure.layout.title.text, go.Figure(figure)
    figure.layout.title = None
    figure.layout.margin.t -= figures.TITLE_ROOM
    data = figure.to_json(validate=False)  # plotly writes < as \u003c, so that no label can end the script
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure><h{level}>{title}</h{level}><div class="plot" style="height:{figure.layout.height:.0f}px"></div>'
        f'<script type="application/json">{data}</script>{below}</figure>'
    )


def thumbnail(uri: Any) -> str:
    """An image that is inside the page; anything that would have to be loaded is left out."""
    return f'<img alt="" src="{escape(uri)}">' if isinstance(uri, str) and uri.startswith("data:image/") else ""


def card(question: str, big: str, *lines: str, word: str = "", mood: str = "") -> str:
    tag = f'<span class="word {mood}">{word}</span>' if word else ""
    return f'<article class="card"><h2>{question} {tag}</h2><p class="big">{big}</p>{paragraphs(*lines)}</article>'
