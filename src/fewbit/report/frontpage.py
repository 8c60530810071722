"""report.json of a search -> one HTML page: the picture of its points; one that is chosen shows the command that makes it."""

from __future__ import annotations

from typing import Any

from fewbit.report.figures import Points
from fewbit.report.page import templates
from fewbit.report.scale import Axis
from fewbit.report.tables import around, headline
from fewbit.report.views import Facts, Table
from fewbit.report.words import Json, is_noise, measured, megabytes, paired_speed, percent, plural, speed, title_of, titled

FRONT = Points(
    Axis("score", "{title}"), Axis("bytes", "ONNX file, MB (10⁶ bytes)", 1e-6), group="{place}", label="{point}",
    hover="{said}", interval="ends", mark="unsearched", line="float",
)  # fmt: skip
TABLE = Table((
    "point", "score:score:measure", "95 % interval:ends:ends", "agreement:agreement:%", "time:ms:ms", "beside float:beside",
    "file:bytes:MB", "budget:kept", "on the front:front", "predicted:predicted_ms:ms", "bits a weight:weight_bits:#",
    "integer ops:integer_ops:#",
))  # fmt: skip
BEST = "no other point is better in accuracy, time and size"
MEASURED = {"runtime": "{}", "version": "{}", "processor": "{}", "threads": "{} threads", "date": "measured on {}"}


def goodness(row: Json) -> float:
    """Accuracy with labels, agreement with the float model without; more is better."""
    return float(headline(row)[1])


def drawn(row: Json) -> dict[str, Any]:
    """A point with what the page shows of it."""
    labelled = row["quantized"] is not None
    measure, score, unit = headline(row)
    times = row["float_ms"], row["ms"], row["faster"]
    beside = paired_speed(*times) if is_noise(*times) else speed(row["faster"])
    scores = [f"{measured(score, unit)} {measure}"] if labelled else []
    scores += [f"{percent(row['agreement'])} {row['agreement_measure']}"]
    said = f"{row['point']}: {', '.join(scores)}, {row['ms']:.3g} ms ({beside}), {megabytes(row['bytes'])}"
    return {
        **row,
        "score": score,
        "unit": unit,
        "ends": around(row),
        "title": titled(f"{measure} on held-out images", unit),
        "float": row["float"] if labelled else None,
        "kept": row["over"] or "kept",
        "place": "over the budget" if row["over"] else BEST if row["front"] else "others",
        "unsearched": not row["searched"],
        "beside": beside,
        "said": said + (f"; over the budget: {row['over']}" if row["over"] else ""),
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
        "candidates": f"{summary['evaluated']}, judged on {plural(images['calibration'], 'calibration image')}",
        "loss that judged them": summary["measure"],
        "points": f"judged on {plural(images['scored'], 'other image')} in {where['runtime']}",
        "left in float": ", ".join(summary["left_float"]) or "none",
        "times of single ops": ", ".join(said.format(where[key]) for key, said in MEASURED.items() if key in where),
        "command": summary["command"],
    }
    return templates().get_template("search.html.j2").render(
        title=title_of(summary["model"]), stopped=summary["stopped"], data=data, facts=Facts()([facts]),
        front=FRONT(rows) if rows else None, table=TABLE(rows),
    )  # fmt: skip
