"""report.json of a search -> one HTML page: the picture of its points; one that is chosen shows the command that makes it."""

from __future__ import annotations

from typing import Any

from fewbit.report.figures import Points
from fewbit.report.page import templates
from fewbit.report.scale import Axis
from fewbit.report.tables import around
from fewbit.report.views import Facts, Table
from fewbit.report.words import Json, speed, title_of

FRONT = Points(
    Axis("score", "{measure}, %"), Axis("bytes", "ONNX file, MB (10⁶ bytes)", 1e-6), group="{place}", label="{point}",
    hover="{said}", interval="ends", mark="unsearched", line="float",
)  # fmt: skip
TABLE = Table((
    "point", "score:score:%", "95 % interval:ends:range", "agreement:agreement:%", "time:ms:ms", "beside float:beside",
    "file:bytes:MB", "budget:kept", "on the front:front", "predicted:predicted_ms:ms", "bits a weight:weight_bits:#",
    "integer ops:integer_ops:#",
))  # fmt: skip
BEST = "no other point is better in accuracy, time and size"
MEASURED = {"runtime": "{}", "version": "{}", "processor": "{}", "threads": "{} threads", "date": "measured on {}"}


def goodness(row: Json) -> float:
    """Accuracy with labels, agreement with the float model without."""
    return float(row["agreement"] if row["quantized"] is None else row["quantized"])


def drawn(row: Json) -> dict[str, Any]:
    """A point with what the page shows of it."""
    labelled = row["quantized"] is not None
    words = "{point}: {quantized:.2f} % {measure}, " if labelled else "{point}: "
    words += "{agreement:.2f} % {agreement_measure}, {ms:.3g} ms ({beside}), {mb:.2f} MB"
    words += "; over the budget: {over}" if row["over"] else ""
    beside = speed(row["faster"])
    return {
        **row,
        "score": goodness(row),
        "ends": around(row),
        "measure": f"{row['measure' if labelled else 'agreement_measure']} on held-out images",
        "float": row["float"] if labelled else None,
        "kept": row["over"] or "kept",
        "place": "over the budget" if row["over"] else BEST if row["front"] else "others",
        "unsearched": not row["searched"],
        "beside": beside,
        "said": words.format(mb=row["bytes"] / 1e6, beside=beside, **row),
    }


def render(summary: Json) -> str:
    """The page."""
    rows = [drawn(row) for row in summary["points"]]
    best = max((row for row in rows if row["searched"] and not row["over"]), key=goodness, default=None)
    data = [{"command": row["command"], "said": row["said"], "first": row is best} for row in rows]
    where, images = summary["latency_table"], summary["images"]
    facts = {
        "target": summary["target"],
        "ranges of recipe": summary["recipe"],
        "strategy": summary["strategy"],
        "budget": ", ".join(summary["budgets"]) or "none",
        "candidates": f"{summary['evaluated']}, by {summary['measure']} on {images['calibration']} calibration images",
        "points": f"judged on {images['scored']} other images in {where['runtime']}",
        "left in float": ", ".join(summary["left_float"]) or "none",
        "times of single ops": ", ".join(said.format(where[key]) for key, said in MEASURED.items() if key in where),
        "command": summary["command"],
    }
    return templates().get_template("search.html.j2").render(
        title=title_of(summary["model"]), stopped=summary["stopped"], data=data, facts=Facts()([facts]),
        front=FRONT(rows) if rows else None, table=TABLE(rows),
    )  # fmt: skip
