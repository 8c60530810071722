"""Rows of tables.json -> plotly figures. No model, no file, no arithmetic beyond scaling an axis.

A figure answers the question in its title. Every function accepts no rows: it then returns an empty figure that still
has its title. Sites stand on the axis as their index in graph order, with a tick where a block starts; the name is in
the hover text. Text is escaped, because plotly reads labels as HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

Row = Mapping[str, Any]
Rows = Sequence[Row]

FLOAT, INTEGER, TIE, WRONG = "#8b929c", "#2f7bd9", "#d9a032", "#cf4257"
PALETTE = ("#2f7bd9", "#e07b39", "#3a9d6e", "#9065c9", "#c9507f", "#2799a8", "#a38536", "#7a8290")
RULE = "rgba(128,128,128,0.25)"
SITES = "site in graph order (ticks: blocks)"
MANY_TICKS = 20
MANY_POINTS = 10  # more are a line, their labels would touch
TITLE_ROOM = 24  # pixels of the top margin that hold the title


# 1. What all figures share ------------------------------------------------------------------------------------------


def text(value: object) -> str:
    """A string that plotly shows as it is; it would read tags in it otherwise."""
    return html.escape(str(value), quote=False)


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
    kept: list[int] = []
    for start in sorted(starts, key=lambda start: (-length[start], start)):
        if all(abs(start - other) * MANY_TICKS >= len(names) for other in kept):
            kept.append(start)
    return sorted(kept), [text(blocks[i]) for i in sorted(kept)]


def styled(figure: go.Figure, title: str, *, height: int, above: int = 8, x: str = "", y: str = "", **layout: Any) -> go.Figure:
    """The one look: no background (the page has one), thin rules, legend above, title and units in place.

    `above` is what a legend or the panels' titles need between the title and the plot.
    """
    figure.update_layout(
        template="none",
        title={"text": title, "font": {"size": 15}},
        height=height,
        margin={"l": 56, "r": 12, "t": TITLE_ROOM + above, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 12, "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"align": "left", "namelength": -1},
        bargap=0.12,
    )
    axis = {"gridcolor": RULE, "linecolor": RULE, "zerolinecolor": RULE, "automargin": True, "title": {"standoff": 8}}
    figure.update_xaxes(**axis).update_yaxes(**axis)
    figure.update_annotations(font_size=12.5)
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure.update_layout(**layout)


def _names(rows: Rows) -> list[str]:
    return [str(row.get("block") or row["site"]) for row in rows]


def _grouped(rows: Rows, key: Callable[[Row], str]) -> dict[str, list[tuple[int, Row]]]:
    """(index, row) per group, groups in the order in which they first appear."""
    groups: dict[str, list[tuple[int, Row]]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(key(row), []).append((index, row))
    return groups


def _site_bars(rows: Rows, value: str, key: Callable[[Row], str], hover: str) -> go.Figure:
    """One bar per site, coloured by group; `hover` is appended to the site's name, grid and method."""
    figure = go.Figure()
    for colour, (name, members) in enumerate(_grouped(rows, key).items()):
        figure.add_bar(
            x=[index for index, _ in members],
            y=[row.get(value) for _, row in members],
            width=0.88,
            name=text(name),
            marker={"color": PALETTE[colour % len(PALETTE)], "line": {"width": 0}},
            customdata=[[text(row.get(k) or "none") for k in ("site", "grid", "method")] for _, row in members],
            hovertemplate="<b>%{customdata[0]}</b><br>" + hover + "<br>%{customdata[1]}<br>%{customdata[2]}<extra></extra>",
        )
    starts, labels = block_ticks(_names(rows))
    return figure.update_xaxes(tickvals=starts, ticktext=labels, showgrid=False, range=[-0.7, len(rows) - 0.3])


# 2. Sites -----------------------------------------------------------------------------------------------------------


def error_by_site(sites: Rows) -> go.Figure:
    """One bar per site in graph order: signal over quantization noise, coloured by role; a low bar is a bad site."""
    figure = _site_bars(sites, "sqnr_db", lambda row: str(row.get("role") or "other"), "%{y:.1f} dB")
    return styled(
        figure,
        "Where does quantization hurt? Signal over error at every site (low is bad)",
        height=360,
        above=28,
        x=SITES,
        y="SQNR, dB",
        barmode="overlay",
        showlegend=True,
    )


def bits_by_site(sites: Rows) -> go.Figure:
    """One bar per site: the bits of its codes, coloured by the bits. A float site has no bar."""
    rows = [{**row, "bits": row.get("bits")} for row in sites]
    figure = _site_bars(rows, "bits", lambda row: f"{row['bits']} bits" if row["bits"] else "float", "%{y} bits")
    figure.update_yaxes(rangemode="tozero", dtick=2)
    title = "How many bits does every site get?"
    return styled(figure, title, height=260, above=28, x=SITES, y="bits of a code", barmode="overlay", showlegend=True)


def outliers_by_site(rows: Rows, limit: float) -> go.Figure:
    """The largest channel and the largest token of each site over the median one, on a log axis; what is over the line stands
    out.
    """
    figure = go.Figure()
    kinds = (
        ("channel_ratio", "largest channel", PALETTE[0], "circle"),
        ("token_ratio", "largest token", PALETTE[1], "diamond"),
    )
    for key, name, colour, symbol in kinds:
        members = [(i, row) for i, row in enumerate(rows) if row.get(key) is not None]
        figure.add_scatter(
            x=[i for i, _ in members],
            y=[row[key] for _, row in members],
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": [10 if row[key] > limit else 6 for _, row in members]},
            customdata=[[text(row["site"]), text(row["done"])] for _, row in members],
            hovertemplate="<b>%{customdata[0]}</b><br>%{y:.1f} times the median<br>%{customdata[1]}<extra></extra>",
        )
    if rows:
        figure.add_hline(y=limit, line={"dash": "dot", "color": FLOAT})
        starts, labels = block_ticks(_names(rows))
        figure.update_xaxes(tickvals=starts, ticktext=labels, showgrid=False, range=[-0.7, len(rows) - 0.3])
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[str(n) for n in ticks])
    title = "Do a few channels or tokens stand out?"
    return styled(figure, title, height=340, above=28, x=SITES, y="times the median", showlegend=True)


def bits_by_unit(units: Rows) -> go.Figure:
    """One bar per module of mixed precision in graph order: its bits, coloured by kind."""
    figure = go.Figure()
    colours = {"attention": PALETTE[0], "mlp": PALETTE[1]}
    for kind, members in _grouped(units, lambda row: str(row["kind"])).items():
        hover = [
            [
                text(row["unit"]),
                f"{row['weights']:,}",
                "none" if row.get("nuclear") is None else f"{row['nuclear']:.4g}",
                "<br>".join(f"loss at {text(bits)} bits: {loss:.3g}" for bits, loss in row["losses"].items()),
            ]
            for _, row in members
        ]
        figure.add_bar(
            x=[index for index, _ in members],
            y=[row["bits"] for _, row in members],
            width=0.88,
            name=text(kind) if kind in colours else "other",
            text=[row["bits"] for _, row in members],
            textposition="outside",
            cliponaxis=False,
            marker={"color": colours.get(kind, FLOAT), "line": {"width": 0}},
            customdata=hover,
            hovertemplate="<b>%{customdata[0]}</b>: %{y} bits<br>%{customdata[1]} weights"
            "<br>nuclear norm: %{customdata[2]}<br>%{customdata[3]}<extra></extra>",
        )
    starts, labels = block_ticks([str(row["unit"]) for row in units])
    figure.update_xaxes(tickvals=starts, ticktext=labels, showgrid=False, zeroline=False, range=[-0.7, len(units) - 0.3])
    figure.update_yaxes(range=[0, 1.15 * max((row["bits"] for row in units), default=8)], dtick=2)
    title, x = "Which module gets how many bits?", SITES.replace("site", "module")
    return styled(figure, title, height=280, above=28, x=x, y="bits of a weight", barmode="overlay", showlegend=True)


def range_kept(row: Row) -> go.Figure:
    """The histogram of one site (log counts), with the range that its grid covers shaded; the rest is clipped."""
    edges, counts = row["edges"], row["counts"]
    figure = go.Figure()
    figure.add_bar(
        x=edges[:-1],
        y=counts,
        width=[high - low for low, high in pairwise(edges)],
        offset=0,
        marker={"color": FLOAT, "line": {"width": 0}},
        hovertemplate="from %{x:.4g}: %{y:,} values<extra></extra>",
    )
    if row.get("kept"):
        low, high = row["kept"]
        figure.add_vrect(x0=low, x1=high, fillcolor=INTEGER, opacity=0.16, line_width=0)
        for bound in (low, high):
            figure.add_vline(x=bound, line={"color": INTEGER, "width": 1.5})
    top = math.log10(max([*counts, 10])) + 0.15
    figure.update_yaxes(type="log", range=[-0.3, top], dtick=1 if top < 5 else 2, exponentformat="SI")
    figure.update_xaxes(nticks=6)
    return styled(figure, text(row["site"]), height=200, x="value", y="values (log)", showlegend=False, bargap=0)


def codes_by_site(checks: Rows) -> go.Figure:
    """Codes that differ between simulation and runtime per site, ties and wrong stacked; a panel for each setting."""
    most = {row["optimisations"]: 0 for row in checks}
    for row in checks:
        most[row["optimisations"]] = max(most[row["optimisations"]], row["differing"])
    panels = [name for name in ("off", "on") if most.get(name)]
    titles = [f"graph optimisations {name}" for name in panels]
    figure = make_subplots(rows=max(len(panels), 1), shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.14)
    sites = list(dict.fromkeys(row["site"] for row in checks))
    for panel, name in enumerate(panels, start=1):
        rows = [row for row in checks if row["optimisations"] == name]
        for kind, colour in (("ties", TIE), ("wrong", WRONG)):
            figure.add_bar(
                x=[sites.index(row["site"]) for row in rows],
                y=[row[kind] for row in rows],
                name=kind,
                legendgroup=kind,
                showlegend=panel == 1,
                marker={"color": colour, "line": {"width": 0}},
                customdata=[[text(row["site"]), row["compared"], row["max_difference"]] for row in rows],
                hovertemplate="<b>%{customdata[0]}</b><br>%{y:,} of %{customdata[1]:,} codes"
                "<br>off by at most %{customdata[2]}<extra>" + kind + "</extra>",
                row=panel,
                col=1,
            )
        step = 1 if most[name] < 6 else None
        figure.update_yaxes(range=[0, 1.08 * most[name]], dtick=step, row=panel, col=1)
    starts, labels = block_ticks(sites)
    figure.update_xaxes(tickvals=starts, ticktext=labels, showgrid=False, range=[-0.7, len(sites) - 0.3])
    title = "At which sites do simulation and runtime disagree?"
    height = 120 + 170 * max(len(panels), 1)
    styled(figure, title, height=height, above=50, y="codes", barmode="stack")
    return figure.update_layout(legend={"y": 1 + 24 / (height - 120)}).update_xaxes(
        title_text=SITES, row=max(len(panels), 1), col=1
    )


# 3. Attention -------------------------------------------------------------------------------------------------------


def attention_map(matrix: Sequence[Sequence[float]], row: Row) -> tuple[list[list[float]], str, str]:
    """(map, x title, y title): the class token's look at the patch grid if there is one, else all queries by keys."""
    if row.get("class_token") and row.get("grid"):
        height, width = row["grid"]
        look = list(matrix[0])[-height * width :]
        return [look[i * width : (i + 1) * width] for i in range(height)], "patch column", "patch row"
    return [list(line) for line in matrix], "key", "query"


def attention_pair(row: Row, head: int) -> go.Figure:
    """One head, float beside quantized on one colour scale."""
    maps = [attention_map(row[kind][head], row) for kind in ("float", "quantized")]
    top = max((value for values, _, _ in maps for line in values for value in line), default=1.0)
    figure = make_subplots(cols=2, subplot_titles=("float", "quantized"), horizontal_spacing=0.08)
    for column, (values, x, y) in enumerate(maps, start=1):
        figure.add_heatmap(
            z=[[round(value, 5) for value in line] for line in values],
            zmin=0,
            zmax=top,
            colorscale="Viridis",
            showscale=column == 2,
            colorbar={"thickness": 8, "len": 0.9, "nticks": 4, "outlinewidth": 0},
            hovertemplate=f"{y} %{{y}}, {x} %{{x}}: %{{z:.4f}}<extra></extra>",
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text=x, row=1, col=column)
    shares = row.get("flipped_share") or []
    title = f"head {head}" + (f": {100 * shares[head]:.2f} % of ranks flipped" if head < len(shares) else "")
    styled(figure, title, height=200, margin={"l": 32, "r": 8, "t": TITLE_ROOM + 24, "b": 32})
    figure.update_xaxes(showgrid=False, showticklabels=False, ticks="", constrain="domain", zeroline=False, title_standoff=2)
    figure.update_yaxes(
        showgrid=False, showticklabels=False, ticks="", constrain="domain", zeroline=False, autorange="reversed"
    )
    figure.update_yaxes(scaleanchor="x", row=1, col=1).update_yaxes(scaleanchor="x2", row=1, col=2)
    return figure.update_yaxes(title_text=maps[0][2], row=1, col=1)


def flips_by_head(flips: Rows) -> go.Figure:
    """Op by head: the share of key pairs whose order changed, in percent."""
    ops = list(dict.fromkeys(row["op"] for row in flips))
    heads = sorted({row["head"] for row in flips})
    share = {(row["op"], row["head"]): 100 * row["flipped_share"] for row in flips}
    figure = go.Figure()
    figure.add_heatmap(
        z=[[share.get((op, head)) for head in heads] for op in ops],
        x=heads,
        y=list(range(len(ops))),
        customdata=[[text(op)] * len(heads) for op in ops],
        colorscale="Viridis",
        zmin=0,
        zmax=max(share.values(), default=1) or 1,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "flipped, %"}, "thickness": 10, "outlinewidth": 0},
        hovertemplate="<b>%{customdata}</b>, head %{x}<br>%{z:.2f} % of key pairs changed order<extra></extra>",
    )
    starts, labels = block_ticks([str(op) for op in ops])
    figure.update_xaxes(dtick=1 if len(heads) <= MANY_TICKS else 4, showgrid=False, zeroline=False)
    figure.update_yaxes(tickvals=starts, ticktext=labels, autorange="reversed", showgrid=False, zeroline=False)
    title = "Which heads change the order of what they look at?"
    return styled(figure, title, height=100 + 22 * min(len(ops), 24), x="head", y="attention op (its block)")


def ranking(rows: Rows) -> go.Figure:
    """One point per head: the share of key pairs that flip, without the ranking term against with it; and the diagonal."""
    figure = go.Figure()
    top = 105 * max((max(row["with"], row["without"]) for row in rows), default=0.01)
    figure.add_scatter(x=[0, top], y=[0, top], mode="lines", line={"color": FLOAT, "width": 1, "dash": "dot"}, hoverinfo="skip")
    figure.data[0].update(name="no difference", showlegend=True)
    ops = _grouped(rows, lambda row: str(row["op"]))
    if len(ops) > len(PALETTE):
        ops = {"a head": list(enumerate(rows))}
    for colour, (op, members) in enumerate(ops.items()):
        figure.add_scatter(
            x=[100 * row["without"] for _, row in members],
            y=[100 * row["with"] for _, row in members],
            mode="markers",
            name=text(f"block {block_of(op)}" if op != "a head" else op),
            marker={"size": 8, "color": PALETTE[colour]},
            customdata=[[text(row["op"]), row["head"]] for _, row in members],
            hovertemplate="<b>%{customdata[0]}</b>, head %{customdata[1]}"
            "<br>%{x:.2f} % flipped without ranking<br>%{y:.2f} % with it<extra></extra>",
        )
    figure.update_xaxes(range=[0, top]).update_yaxes(range=[0, top])
    title = "Does the ranking term keep the order of attention scores?"
    x, y = "flipped without ranking, %", "flipped with ranking, %"
    return styled(figure, title, height=420, above=46, x=x, y=y, showlegend=True)


# 4. Cost ------------------------------------------------------------------------------------------------------------


def _long_bars(figure: go.Figure, labels: Sequence[str], values: Sequence[float], shown: Sequence[str], **bar: Any) -> None:
    """Horizontal bars with the number at the end, first row on top; room for the number on the right."""
    place = {key: bar.pop(key) for key in ("row", "col") if key in bar}
    figure.add_bar(y=labels, x=values, orientation="h", text=shown, textposition="outside", cliponaxis=False, **bar, **place)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", **place)


def latency(rows: Rows) -> go.Figure:
    """Float beside integer per runtime and threads, one panel per batch; `ratio` is float over integer."""
    batches = sorted({row["batch"] for row in rows})
    panels = max(len(batches), 1)
    titles = [f"batch of {batch}" for batch in batches]
    figure = make_subplots(rows=panels, subplot_titles=titles, vertical_spacing=0.3 / panels)
    for panel, batch in enumerate(batches, start=1):
        members = [row for row in rows if row["batch"] == batch]
        labels = [text(f"{row['runtime']}, {row['threads']} thread{'s' * (row['threads'] != 1)}") for row in members]
        for name, key, colour in (("float", "float_ms", FLOAT), ("integer", "quantized_ms", INTEGER)):
            ratios = ["" if name == "float" else f" ({row['ratio']:.2f}×)" for row in members]
            _long_bars(
                figure,
                labels,
                [row[key] for row in members],
                [f"{row[key]:.2f} ms{ratio}" for row, ratio in zip(members, ratios, strict=True)],
                name=name,
                legendgroup=name,
                showlegend=panel == 1,
                marker={"color": colour},
                customdata=[row.get("runs") for row in members],
                hovertemplate="%{y}: %{x:.3f} ms, %{customdata} runs<extra>" + name + "</extra>",
                row=panel,
                col=1,
            )
        longest = max(max(row["float_ms"], row["quantized_ms"]) for row in members)
        figure.update_xaxes(range=[0, 1.45 * longest], row=panel, col=1)
    height = 100 + 70 * panels + 52 * len(rows)
    styled(
        figure,
        "How long does a batch take, float beside integer?",
        height=height,
        above=50,
        barmode="group",
        bargap=0.25,
    )
    figure.update_layout(legend={"y": 1 + 24 / (height - 120), "traceorder": "normal"})
    return figure.update_xaxes(title_text="milliseconds a batch", row=panels, col=1)


def size(rows: Rows) -> go.Figure:
    """One bar per file, in megabytes of 10^6 bytes."""
    figure = go.Figure()
    values = [row["bytes"] / 1e6 for row in rows]
    labels = [text(row["what"]) for row in rows]
    _long_bars(figure, labels, values, [f"{value:.2f} MB" for value in values], marker={"color": INTEGER})
    figure.update_xaxes(range=[0, 1.25 * max(values, default=1)])
    return styled(figure, "How many bytes are on disk?", height=84 + 38 * len(rows), x="megabytes (10⁶ bytes)")


def seconds(stages: Mapping[str, float]) -> go.Figure:
    """One bar per stage, in the order in which they ran."""
    figure = go.Figure()
    values = list(stages.values())
    _long_bars(figure, [text(s) for s in stages], values, [f"{value:.1f} s" for value in values], marker={"color": INTEGER})
    figure.update_xaxes(range=[0, 1.25 * max(values, default=1)])
    return styled(figure, "Where did the time go?", height=84 + 30 * len(values), x="seconds")


def frontier(rows: Rows) -> go.Figure:
    """Size against accuracy, coloured by kind; the search's own estimate where nothing was scored."""
    scored = any(row.get("accuracy") is not None for row in rows)
    figure = _against_bytes(rows, "accuracy" if scored or not rows else "loss")
    x, y = "megabytes (10⁶ bytes)", "accuracy, %"
    if rows and not scored:
        x, y = "megabytes of weights (10⁶ bytes)", "estimated loss (the sum over modules)"
        figure.update_yaxes(type="log", exponentformat="power", dtick=1)
        for trace in figure.data:  # the frontier falls: room is above what is no better, and below what is on it
            trace.textposition = "bottom left" if trace.name == "this run" else trace.textposition
    return styled(figure, "What does a byte buy?", height=380, above=28, x=x, y=y, showlegend=True)


def curve(rows: Rows) -> go.Figure:
    """Top-1 (agreement without labels) against calibration images, with intervals; dotted is the float model."""
    figure = go.Figure()
    labelled = bool(rows) and rows[0].get("quantized") is not None
    if rows:
        y = [row["quantized" if labelled else "agreement"] for row in rows]
        above = [row["interval"][1] - value for row, value in zip(rows, y, strict=True)]
        below = [value - row["interval"][0] for row, value in zip(rows, y, strict=True)]
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": FLOAT, "thickness": 1}
        x = [row["images"] for row in rows]
        line = {"color": INTEGER, "width": 2}
        figure.add_scatter(x=x, y=y, mode="lines+markers", error_y=bars, line=line, showlegend=False)
        figure.update_xaxes(type="log", tickvals=x, ticktext=[str(n) for n in x])
        if labelled and rows[0].get("float") is not None:
            figure.add_hline(y=rows[0]["float"], line={"dash": "dot", "color": FLOAT}, annotation_text="float")
    figure.update_traces(hovertemplate="%{x} images: %{y:.2f} %<extra></extra>")
    shown = "top-1, %" if labelled else "agreement with the float model, %"
    return styled(figure, "How many calibration images are enough?", height=340, x="calibration images", y=shown)


def joint(rows: Rows) -> go.Figure:
    """The loss of every evaluation of a joint search, a point each, and the best so far, a line in steps."""
    figure = go.Figure()
    x = [row["evaluation"] for row in rows]
    ink = {"size": 4, "color": FLOAT, "opacity": 0.7}
    if rows:
        figure.add_scatter(x=x, y=[row["loss"] for row in rows], mode="markers", name="an evaluation", marker=ink)
        line = {"color": INTEGER, "width": 2, "shape": "hv"}
        figure.add_scatter(x=x, y=[row["best"] for row in rows], mode="lines", name="the best so far", line=line)
        losses = sorted(row["loss"] for row in rows if row["loss"] is not None)
        best, most = rows[-1]["best"], losses[int(0.95 * (len(losses) - 1))]  # what is far off would flatten the rest
        top = max(most, rows[0]["best"] if rows[0]["best"] is not None else most)
        figure.update_yaxes(range=[best - 0.05 * (top - best), top + 0.15 * (top - best)] if top > best else None)
    figure.update_traces(hovertemplate="evaluation %{x}: %{y:.5g}<extra></extra>")
    y = text(rows[0]["what"]) if rows else ""
    title = "How far does the search bring the loss down?"
    return styled(figure, title, height=340, above=28, x="evaluation", y=y, showlegend=True)


def norms(rows: Rows) -> go.Figure:
    """The loss over the norm p that ranges are chosen by, the parabola through it, and where the search starts."""
    figure = go.Figure()
    looks = {
        "measured": {"mode": "markers", "marker": {"size": 8, "color": FLOAT}},
        "parabola": {"mode": "lines", "line": {"width": 1.5, "color": PALETTE[1]}},
        "start": {"mode": "markers", "marker": {"size": 13, "color": INTEGER, "symbol": "diamond"}},
    }
    for kind, members in _grouped(rows, lambda row: str(row["kind"])).items():
        found = [row for _, row in members]
        name = "start of the search" if kind == "start" else text(kind)
        figure.add_scatter(
            x=[row["p"] for row in found], y=[row["loss"] for row in found], name=name, **looks.get(kind, looks["measured"])
        )
    figure.update_traces(hovertemplate="p = %{x:.3g}: %{y:.5g}<extra></extra>")
    y = text(next((row["what"] for row in rows if "what" in row), ""))
    title = "Which norm p makes the best start?"
    return styled(figure, title, height=300, above=28, x="p of mean |x − fake(x)|ᵖ", y=y, showlegend=True)


def runs(rows: Rows) -> go.Figure:
    """Several runs, size against accuracy with its interval, coloured by recipe; the float model is a line across."""
    figure = _against_bytes([row for row in rows if row["kind"] != "float"], "accuracy", joined=True)
    for row in rows:
        if row["kind"] == "float":
            said = f"{text(row['label'])}, {row['accuracy']:.2f} %, {row['bytes'] / 1e6:.2f} MB"
            line = {"color": FLOAT, "width": 1.5, "dash": "dash"}
            figure.add_hline(y=row["accuracy"], line=line, name=said, showlegend=True)
    agreement = any(row.get("measure") == "agreement" for row in rows)
    y = "agreement with the float model, %" if agreement else "accuracy, %"
    title = "How much accuracy does a byte buy?"
    return styled(figure, title, height=420, above=46, x="megabytes of the file (10⁶ bytes)", y=y, showlegend=True)


def _against_bytes(rows: Rows, value: str, *, joined: bool = False) -> go.Figure:
    """Points over megabytes, coloured by kind: a kind of many points is a thin line, one of few has labels."""
    figure = go.Figure()
    for colour, (kind, members) in enumerate(_grouped(rows, lambda row: str(row.get("kind") or "plan")).items()):
        many = len(members) > MANY_POINTS
        found = sorted((row for _, row in members), key=lambda row: row["bytes"])
        ink = PALETTE[colour % len(PALETTE)]
        figure.add_scatter(
            x=[row["bytes"] / 1e6 for row in found],
            y=[row.get(value) for row in found],
            mode="lines+markers" if many else "lines+markers+text" if joined else "markers+text",
            text=[text(":".join(str(row["label"]).split(":")[:2])) for row in found],
            textposition="bottom right" if joined else "top right",
            cliponaxis=False,
            name=text(kind),
            line={"color": ink, "width": 1},
            marker={"size": 3 if many else 10, "color": ink},
            customdata=[[text(row["label"]), "" if row.get("bits") is None else f", {row['bits']:.2f} bits"] for row in found],
            hovertemplate="<b>%{customdata[0]}</b><br>%{x:.3f} MB%{customdata[1]}<br>%{y:.4g}<extra></extra>",
        )
        if any(row.get("interval") for row in found):
            bounds = [row.get("interval") or [row[value]] * 2 for row in found]
            figure.data[-1].error_y = {
                "array": [high - row[value] for row, (_, high) in zip(found, bounds, strict=True)],
                "arrayminus": [row[value] - low for row, (low, _) in zip(found, bounds, strict=True)],
                "symmetric": False,
                "thickness": 1,
                "width": 4,
                "color": f"rgba{(*hex_to_rgb(ink), 0.5)}",
            }
    sizes = [row["bytes"] / 1e6 for row in rows] or [0.0, 1.0]
    span = max(sizes) - min(sizes) or max(sizes)
    right = 0.28 if joined else 0.18  # room for the last label
    return figure.update_xaxes(range=[min(sizes) - 0.06 * span, max(sizes) + right * span])
