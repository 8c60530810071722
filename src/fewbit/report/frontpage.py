"""report.json of a search -> one HTML page: the picture of its points; a click on one shows the command that makes the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fewbit.report.figures import FLOAT, INTEGER, PALETTE, styled
from fewbit.report.pieces import megabytes, nothing, number, percent, table

SCRIPT = """
const rows = JSON.parse(document.getElementById("points").textContent);
const figure = document.getElementById("front");
function pick(k) {
  document.getElementById("command").textContent = rows[k].command;
  document.getElementById("picked").textContent = rows[k].said;
  document.querySelectorAll("tr[data-point]").forEach(tr => tr.classList.toggle("picked", tr.dataset.point == k));
}
figure.on("plotly_click", event => pick(event.points[0].customdata));
document.querySelectorAll("tbody tr").forEach((tr, k) => {
  tr.dataset.point = k;
  tr.addEventListener("click", () => pick(k));
});
document.getElementById("copy").addEventListener("click", () => {
  navigator.clipboard.writeText(document.getElementById("command").textContent);
});
pick(rows.findIndex(row => row.first));
"""

STYLE = """
#chosen { border: 1px solid rgba(128,128,128,.4); border-radius: 6px; padding: .8em 1em; margin: 1em 0; }
#chosen code { display: block; overflow-x: auto; white-space: pre; padding: .4em 0; }
tbody tr { cursor: pointer; }
tr.picked td { background: rgba(47,123,217,.15); }
"""

Row = Mapping[str, Any]


def goodness(row: Row) -> float:
    """Top-1 with labels, agreement with the float model without."""
    return float(row["agreement"] if row["quantized"] is None else row["quantized"])


def front(summary: Row) -> go.Figure:
    """Megabytes of the file against accuracy on held-out images, coloured by milliseconds; a diamond came without a search."""
    rows = summary["points"]
    figure = go.Figure()
    labelled = any(row["quantized"] is not None for row in rows)
    if rows:
        kept = sorted((row for row in rows if row["front"]), key=lambda row: row["bytes"])
        figure.add_scatter(
            x=[row["bytes"] / 1e6 for row in kept], y=[goodness(row) for row in kept], mode="lines", hoverinfo="skip",
            line={"color": FLOAT, "width": 1, "dash": "dot"}, name="no other point is better in all three",
        )  # fmt: skip
        times = [row["ms"] for row in rows]
        figure.add_scatter(
            x=[row["bytes"] / 1e6 for row in rows],
            y=[goodness(row) for row in rows],
            mode="markers+text",
            text=[row["point"] for row in rows],
            textposition="bottom center",
            customdata=list(range(len(rows))),
            hovertext=[_said(row) for row in rows],
            hoverinfo="text",
            showlegend=False,
            marker={
                "size": [15 if row["front"] else 10 for row in rows],
                "symbol": ["circle" if row["searched"] else "diamond" for row in rows],
                "color": times,
                "colorscale": [[0, PALETTE[2]], [0.5, INTEGER], [1, PALETTE[1]]],
                "colorbar": {"title": "ms", "thickness": 12},
                "line": {"width": 1, "color": FLOAT},
            },
        )
        exact = rows[0]["float"]
        if labelled and exact is not None:
            figure.add_hline(y=exact, line={"dash": "dot", "color": FLOAT}, annotation_text="float")
    y = "top-1 on held-out images, %" if labelled else "agreement with the float model, %"
    title = "Which point do you want? Click it."
    return styled(figure, title, height=460, above=28, x="megabytes of the file (10⁶ bytes)", y=y, showlegend=True)


def render(summary: Row) -> str:
    """The page."""
    rows = summary["points"]
    best = max((row for row in rows if row["searched"]), key=goodness, default=None)
    data = [{"command": row["command"], "said": _said(row).replace("<br>", ", "), "first": row is best} for row in rows]
    picture = front(summary).to_html(full_html=False, include_plotlyjs=False, div_id="front", config={"displayModeBar": False})
    head = ("point", "top-1", "agreement", "ms", "predicted ms", "predicted / measured", "faster than float", "MB",
            "bits a weight", "integer ops", "front")  # fmt: skip
    cells = [
        (
            escape(row["point"]), percent(row["quantized"]), percent(row["agreement"]), number(row["ms"], 3),
            number(row["predicted_ms"], 3), number(row["predicted_ms"] / row["ms"], 3) if row["predicted_ms"] else "–",
            f"{row['faster']:.2f} ×", megabytes(row["bytes"]), number(row["weight_bits"], 3), str(row["integer_ops"]),
            "yes" if row["front"] else "",
        )
        for row in rows
    ]  # fmt: skip
    left = ", ".join(summary["left_float"]) or "none"
    stopped = f" It was ended early ({escape(summary['stopped'])}): these are the best so far." if summary["stopped"] else ""
    about = (
        f"{escape(summary['model'])} on {escape(summary['target'])}, ranges of {escape(summary['recipe'])}, strategy "
        f"{escape(summary['strategy'])}, budget {escape(', '.join(summary['budgets']) or 'none')}: "
        f"{summary['evaluated']} candidates by {escape(summary['measure'])} on {summary['images']['calibration']} calibration "
        f"images; points judged on "
        f"{summary['images']['scored']} other images in {escape(summary['latency_table']['runtime'])}.{stopped}"
    )
    css = files("fewbit.report").joinpath("page.css").read_text(encoding="utf-8")
    embedded = json.dumps(data).replace("<", "\\u003c")
    body = [
        f"<h1>Search: {escape(summary['model'])}</h1><p>{about}</p>",
        picture if rows else nothing("No candidate was evaluated."),
        '<div id="chosen"><b id="picked"></b><code id="command"></code><button id="copy">copy</button></div>',
        table(head, cells, numeric=range(1, 10)),
        f"<p>Ops that are slower in integers on this machine and begin in float: {escape(left)}.</p>",
        f"<p>Made by <code>{escape(summary['command'])}</code>.</p>",
        f"<p>Latency table: {escape(json.dumps(summary['latency_table']))}.</p>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fewbit search</title>'
        f"<style>{css}{STYLE}</style><script>{get_plotlyjs()}</script></head><body><main>{''.join(body)}</main>"
        f'<script type="application/json" id="points">{embedded}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _said(row: Row) -> str:
    """A point in one line of HTML text."""
    good = percent(row["agreement"]) + " agreement"
    if row["quantized"] is not None:
        good = percent(row["quantized"]) + " top-1, " + good
    return f"{escape(row['point'])}: {good}<br>{row['ms']:.3g} ms ({row['faster']:.2f} × float), {megabytes(row['bytes'])}"
