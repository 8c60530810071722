"""Four kinds of figure, each a value that says which keys of a row it draws: rows in, a plotly figure out.

Bars, Points (and curves), Heatmap and Histogram know nothing of what they show; sections.py says it. Sites stand on an axis
as their index in graph order, with a tick where a block starts; the name is in the hover text. Text is escaped, because
plotly reads labels as HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fewbit.report.pieces import Json, Rows, fill, text

FLOAT, INTEGER = "#8b929c", "#2f7bd9"
PALETTE = ("#2f7bd9", "#e07b39", "#3a9d6e", "#9065c9", "#c9507f", "#2799a8", "#a38536", "#7a8290")
COLOURS = {"float": FLOAT, "integer": INTEGER, "ties": "#d9a032", "wrong": "#cf4257", "each evaluation": FLOAT}
RULE = "rgba(128,128,128,0.25)"
MANY_TICKS = 20
MANY_POINTS = 10  # more have no labels, which would touch
SITES = "site in graph order (ticks: blocks)"


@dataclass(frozen=True)
class Axis:
    """What stands on an axis: a key of the row, or several keys with their names in the legend; the title has the unit."""

    keys: str | Mapping[str, str]
    title: str
    scale: float = 1.0
    log: bool = False

    def series(self) -> Mapping[str, str]:
        return {self.keys: ""} if isinstance(self.keys, str) else self.keys

    def of(self, row: Json, key: str = "") -> float | None:
        value = row.get(key or str(self.keys))
        return None if value is None else value * self.scale


# What all figures share -----------------------------------------------------------------------------------------------


def block_of(name: str) -> str:
    """A short name for the block of a site or op: `blocks.3.mlp.fc1:weight` -> `3`, `layer1.0.conv2` -> `layer1.0`."""
    parts = name.split(":")[0].split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    if last is None:
        return parts[0]
    return ".".join(part for part in parts[: last + 1] if any(map(str.isdigit, part)))


def block_ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Where a new block starts, and its short name. Where labels would touch, the longer block keeps its label."""
    blocks = [block_of(name) for name in names]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    length = {start: end - start for start, end in pairwise([*starts, len(names)])}
    ticks: list[int] = []
    for start in sorted(starts, key=lambda start: (-length[start], start)):
        if all(abs(start - other) * MANY_TICKS >= len(names) for other in ticks):
            ticks.append(start)
    return sorted(ticks), [text(blocks[i]) for i in sorted(ticks)]


def styled(figure: go.Figure, *, height: int, x: str = "", y: str = "", legend: bool = False, **layout: Any) -> go.Figure:
    """The one look: no background (the page has one), thin rules, legend above, titles with units on the axes."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 12, "t": 36 if legend else 12, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 12, "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        showlegend=legend,
        hoverlabel={"align": "left", "namelength": -1},
        bargap=0.12,
    )
    axis = {"gridcolor": RULE, "linecolor": RULE, "zerolinecolor": RULE, "automargin": True, "title": {"standoff": 8}}
    figure.update_xaxes(**axis, title_text=x).update_yaxes(**axis, title_text=y)
    return figure.update_annotations(font_size=12.5).update_layout(**layout)


def _traces(rows: Rows, y: Axis, group: str) -> Iterator[tuple[str, str, str, list[tuple[int, Json]]]]:
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


def _graph_order(figure: go.Figure, rows: Rows, along: str) -> None:
    """The x axis of sites or modules: ticks where a block starts."""
    starts, labels = block_ticks([str(row.get(along)) for row in rows])
    figure.update_xaxes(tickvals=starts, ticktext=labels, showgrid=False, zeroline=False, range=[-0.7, len(rows) - 0.3])


# The kinds ------------------------------------------------------------------------------------------------------------


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

    def __call__(self, rows: Rows) -> go.Figure | None:
        if self.varies and all(len({row.get(key) for row in rows}) == 1 for key in self.y.series()):
            return None
        figure, traces = go.Figure(), list(_traces(rows, self.y, self.group))
        for key, name, colour, members in traces:
            values = [self.y.of(row, key) for _, row in members]
            hover = [fill(self.hover or self.label, row) for _, row in members]
            ink = {"color": colour, "line": {"width": 0}}
            if self.along:
                figure.add_bar(
                    x=[i for i, _ in members], y=values, width=0.88, name=name, marker=ink, customdata=hover,
                    hovertemplate="%{customdata}<extra></extra>",
                )  # fmt: skip
                continue
            numbers = [fill(self.number, {**row, "value": value}) for value, (_, row) in zip(values, members, strict=True)]
            labels = [fill(self.label, row) for _, row in members]
            figure.add_bar(
                y=labels, x=values, orientation="h", text=numbers, textposition="outside", cliponaxis=False, name=name,
                marker=ink, customdata=hover, hovertemplate="%{customdata}<extra>" + name + "</extra>",
            )  # fmt: skip
        if self.along:
            _graph_order(figure, rows, self.along)
            mode = "stack" if self.stacked else "overlay"
            if max((value or 0 for trace in figure.data for value in trace.y), default=0) <= 5:
                figure.update_yaxes(tickformat="d", dtick=1)  # codes, a few
            return styled(figure, height=300, x=self.x_title, y=self.y.title, legend=len(traces) > 1, barmode=mode)
        longest = max((value for trace in figure.data for value in trace.x if value is not None), default=1.0)
        figure.update_xaxes(range=[0, 1.3 * longest]).update_yaxes(autorange="reversed", showgrid=False, ticks="")
        height = 84 + 34 * len(rows) * len(self.y.series())
        return styled(figure, height=height, x=self.y.title, legend=len(traces) > 1, barmode="group", bargap=0.25)


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

    def __call__(self, rows: Rows) -> go.Figure:
        figure, traces = go.Figure(), list(_traces(rows, self.y, self.group))
        if len(traces) > len(PALETTE):  # more than there are colours
            traces = list(_traces(rows, self.y, ""))
        for key, name, colour, members in traces:
            if not self.along:
                members = sorted(members, key=lambda member: self.x.of(member[1]) or 0.0)
            self._trace(figure, key, name, colour, members)
        if self.along:
            _graph_order(figure, rows, self.along)
        else:
            figure.update_xaxes(**_range(rows, self.x, 0.25 if self.label else 0.06))
        if self.y.log:
            figure.update_yaxes(type="log", exponentformat="power", dtick=_decades(rows, self.y))
        across = next((row[self.line] for row in rows if row.get(self.line) is not None), None) if self.line else None
        if across is not None:
            height = across * self.y.scale
            figure.add_hline(y=height, line={"dash": "dot", "color": FLOAT})
            place = {"x": 1, "xref": "paper", "xanchor": "right", "y": math.log10(height) if self.y.log else height}
            figure.add_annotation(text=self.line, showarrow=False, yanchor="bottom", **place)
        if self.diagonal:
            top = 1.05 * max((value for trace in figure.data for value in (*trace.x, *trace.y)), default=1.0)
            figure.add_shape(type="line", x0=0, y0=0, x1=top, y1=top, line={"color": FLOAT, "width": 1, "dash": "dot"})
            figure.update_xaxes(range=[0, top]).update_yaxes(range=[0, top])
        x, y = self.x_title if self.along else self.x.title, fill(self.y.title, rows[0])
        return styled(figure, height=360, x=x, y=y, legend=len(traces) > 1)

    def _trace(self, figure: go.Figure, key: str, name: str, colour: str, members: Sequence[tuple[int, Json]]) -> None:
        rows = [row for _, row in members]
        is_line = name in self.lines
        few = bool(self.label) and not is_line and len(rows) <= MANY_POINTS
        x = [index if self.along else self.x.of(row) for index, row in members]
        y = [self.y.of(row, key) for row in rows]
        figure.add_scatter(
            x=x,
            y=y,
            mode="+".join(["lines"] * is_line + ["markers"] + ["text"] * few),
            text=[fill(self.label, row) for row in rows] if few else None,
            textposition="top right",
            cliponaxis=False,
            name=name,
            line={"color": colour, "width": 1.5},
            marker={
                "color": colour,
                "size": [14 if row.get(self.mark) else 3 if len(rows) > 10 * MANY_POINTS else 8 for row in rows],
                "symbol": ["diamond" if row.get(self.mark) else "circle" for row in rows],
            },
            customdata=[fill(self.hover, {**row, "x": a, "y": b}) for row, a, b in zip(rows, x, y, strict=True)],
            hovertemplate="%{customdata}<extra></extra>",
        )
        if any(row.get(self.interval) for row in rows):
            ends = [row.get(self.interval) or [row.get(key)] * 2 for row in rows]
            down, up = ([abs(end[i] * self.y.scale - v) for end, v in zip(ends, y, strict=True)] for i in (0, 1))
            bars = {"array": up, "arrayminus": down, "symmetric": False, "thickness": 1, "width": 4}
            figure.data[-1].error_y = bars


def _decades(rows: Rows, axis: Axis) -> int | str:
    """Ticks of a log axis: every decade, or 1, 2 and 5 in each where there are few."""
    values = [v for row in rows for key in axis.series() if (v := axis.of(row, key)) is not None and 0 < v < math.inf]
    return 1 if values and max(values) > 1000 * min(values) else "D2"


def _range(rows: Rows, axis: Axis, right: float) -> dict[str, Any]:
    """An x axis with room for the last label; on a log axis every value that is there has a tick if they are few."""
    values = sorted({v for row in rows if (v := axis.of(row)) is not None})
    if axis.log:
        ticks = {"tickvals": values, "ticktext": [f"{v:g}" for v in values]} if len(values) <= MANY_POINTS else {}
        return {"type": "log", **ticks}
    span = (values[-1] - values[0] or abs(values[-1]) or 1.0) if values else 1.0
    return {"range": [values[0] - 0.06 * span, values[-1] + right * span]} if values else {}


@dataclass(frozen=True)
class Heatmap:
    """Cells of `z` at columns `x` and rows `y`; or, with `panels`, whole matrices of the first row on one colour scale."""

    z: Axis
    x: str = ""
    y: str = ""
    hover: str = ""
    panels: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, rows: Rows) -> go.Figure:
        return self._panels(rows[0]) if self.panels else self._cells(rows)

    def _cells(self, rows: Rows) -> go.Figure:
        names, columns = (list(dict.fromkeys(row[key] for row in rows)) for key in (self.y, self.x))
        cells = {(row[self.y], row[self.x]): row for row in rows}
        at = [[cells.get((name, column), {}) for column in columns] for name in names]
        z = [[self.z.of(row) for row in line] for line in at]
        figure = go.Figure()
        figure.add_heatmap(
            z=z,
            x=columns,
            y=list(range(len(names))),
            customdata=[[fill(self.hover, row) for row in line] for line in at],
            colorscale="Viridis",
            zmin=0,
            zmax=max((value for line in z for value in line if value is not None), default=1) or 1,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": self.z.title}, "thickness": 10, "outlinewidth": 0},
            hovertemplate="%{customdata}<extra></extra>",
        )
        starts, labels = block_ticks([str(name) for name in names])
        figure.update_xaxes(dtick=1 if len(columns) <= MANY_TICKS else 4, showgrid=False, zeroline=False)
        figure.update_yaxes(tickvals=starts, ticktext=labels, autorange="reversed", showgrid=False, zeroline=False)
        return styled(figure, height=100 + 22 * min(len(names), 24), x=self.x, y=f"{self.y} (its block)")

    def _panels(self, row: Json) -> go.Figure:
        figure = make_subplots(cols=len(self.panels), subplot_titles=list(self.panels.values()), horizontal_spacing=0.08)
        top = max((value for key in self.panels for line in row[key] for value in line), default=1.0)
        for column, key in enumerate(self.panels, start=1):
            last = column == len(self.panels)
            figure.add_heatmap(
                z=row[key], zmin=0, zmax=top, colorscale="Viridis", showscale=last,
                colorbar={"thickness": 8, "len": 0.9, "nticks": 4, "outlinewidth": 0, "title": {"text": self.z.title}},
                hovertemplate=f"{self.y} %{{y}}, {self.x} %{{x}}: %{{z:.4f}}<extra></extra>", row=1, col=column,
            )  # fmt: skip
        x, y = (text(row.get(key) or "") for key in (self.x, self.y))
        styled(figure, height=200, x=x, margin={"l": 32, "r": 8, "t": 24, "b": 32})
        bare = {"showgrid": False, "showticklabels": False, "ticks": "", "constrain": "domain", "zeroline": False}
        figure.update_xaxes(**bare, title_standoff=2).update_yaxes(**bare, autorange="reversed")
        for column in range(1, len(self.panels) + 1):
            figure.update_yaxes(scaleanchor=f"x{column}" if column > 1 else "x", row=1, col=column)
        return figure.update_yaxes(title_text=y, row=1, col=1)


@dataclass(frozen=True)
class Histogram:
    """Counts between edges on a log axis (keys `edges` and `counts` of the first row); the pair at `band` is shaded."""

    band: str
    title: str = "value"

    def __call__(self, rows: Rows) -> go.Figure:
        edges, counts = rows[0]["edges"], rows[0]["counts"]
        figure = go.Figure()
        figure.add_bar(
            x=edges[:-1], y=counts, width=[high - low for low, high in pairwise(edges)], offset=0,
            marker={"color": FLOAT, "line": {"width": 0}}, hovertemplate="from %{x:.4g}: %{y:,} values<extra></extra>",
        )  # fmt: skip
        if rows[0].get(self.band):
            low, high = rows[0][self.band]
            figure.add_vrect(x0=low, x1=high, fillcolor=INTEGER, opacity=0.16, line_width=0)
            for bound in (low, high):
                figure.add_vline(x=bound, line={"color": INTEGER, "width": 1.5})
        top = math.log10(max([*counts, 10])) + 0.15
        figure.update_yaxes(type="log", range=[-0.3, top], dtick=1 if top < 5 else 2, exponentformat="SI")
        return styled(figure.update_xaxes(nticks=6), height=190, x=self.title, y="values (log)", bargap=0)
