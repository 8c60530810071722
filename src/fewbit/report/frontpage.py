"""report.json of a search -> one HTML page: the picture of its points; a click on one shows the command that makes the run."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from fewbit.report.figures import Axis, Points
from fewbit.report.pieces import Json, paragraphs
from fewbit.report.views import Table

SCRIPT = """
const rows = JSON.parse(document.getElementById("points").textContent);
const figure = document.getElementById("front");
function pick(k) {
  document.getElementById("command").textContent = rows[k].command;
  document.getElementById("picked").textContent = rows[k].said;
  document.querySelectorAll("tr[data-point]").forEach(tr => tr.classList.toggle("picked", tr.dataset.point == k));
}
figure.on("plotly_click", event => pick(rows.findIndex(row => row.said === event.points[0].customdata)));
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

FRONT = Points(
    Axis("score", "{measure}, %"), Axis("bytes", "ONNX file, MB (10⁶ bytes)", 1e-6), group="{place}", label="{point}",
    hover="{said}", mark="unsearched", line="float",
)  # fmt: skip
TABLE = Table((
    "point", "accuracy:quantized:%", "agreement:agreement:%", "time:ms:ms", "predicted:predicted_ms:ms",
    "predicted / measured:predicted_ratio:#", "times as fast as float:faster:#", "file:bytes:MB", "bits a weight:weight_bits:#",
    "integer ops:integer_ops:#", "on the front:front",
))  # fmt: skip


def goodness(row: Json) -> float:
    """Accuracy with labels, agreement with the float model without."""
    return float(row["agreement"] if row["quantized"] is None else row["quantized"])


def drawn(row: Json) -> dict[str, Any]:
    """A point with what the page shows of it."""
    labelled = row["quantized"] is not None
    words = "{point}: {quantized:.2f} % {measure}, " if labelled else "{point}: "
    words += "{agreement:.2f} % {agreement_measure}, {ms:.3g} ms ({faster:.2f} × float), {mb:.2f} MB"
    return {
        **row,
        "score": goodness(row),
        "measure": f"{row['measure' if labelled else 'agreement_measure']} on held-out images",
        "float": row["float"] if labelled else None,
        "place": "no other point is better in all three" if row["front"] else "others",
        "unsearched": not row["searched"],
        "predicted_ratio": row["predicted_ms"] / row["ms"] if row["predicted_ms"] else None,
        "said": words.format(mb=row["bytes"] / 1e6, **row),
    }


def render(summary: Json) -> str:
    """The page."""
    rows = [drawn(row) for row in summary["points"]]
    best = max((row for row in rows if row["searched"]), key=goodness, default=None)
    data = [{"command": row["command"], "said": row["said"], "first": row is best} for row in rows]
    quiet = {"full_html": False, "include_plotlyjs": False, "div_id": "front", "config": {"displayModeBar": False}}
    picture = FRONT(rows).update_layout(height=460).to_html(**quiet) if rows else paragraphs("No candidate was evaluated.")
    floats = ", ".join(summary["left_float"]) or "none"
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
        f"<h1>Search: {escape(summary['model'])}</h1><p>{about}</p><h3>Click a point to see its command</h3>",
        picture,
        '<p class="note">A diamond came without a search.</p>',
        '<div id="chosen"><b id="picked"></b><code id="command"></code><button id="copy">copy</button></div>',
        TABLE(rows),
        f"<p>Ops that are slower in integers on this machine and begin in float: {escape(floats)}.</p>",
        f"<p>Made by <code>{escape(summary['command'])}</code>.</p>",
        f"<p>Latency table: {escape(json.dumps(summary['latency_table']))}.</p>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fewbit search</title>'
        f"<style>{css}{STYLE}</style><script>{get_plotlyjs()}</script></head><body><main>{''.join(body)}</main>"
        f'<script type="application/json" id="points">{embedded}</script><script>{SCRIPT}</script></body></html>\n'
    )
