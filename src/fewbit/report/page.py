"""report.json and tables.json -> report.html: one file, no network, the same bytes for the same two files.

The four answers come first, then the sections that have something to show (sections.py), part by part.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from fewbit.report.answers import good, not_got, right, small_and_fast
from fewbit.report.pieces import Json
from fewbit.report.sections import PASSES, SECTIONS, passes
from fewbit.report.tables import around

APART = ("classes", "preprocess", "assumed", "metadata")  # of run.json: a section of their own, or too long for a page


def joined(report: Json, tables: Json) -> dict[str, Any]:
    """tables.json, plus the parts of report.json that sections show, as rows."""
    curve = []
    for row in tables.get("curve") or ():
        labelled = row["quantized"] is not None
        measure = row["measure" if labelled else "agreement_measure"]
        score = row["quantized" if labelled else "agreement"]
        curve.append({**row, "measure": measure, "score": score, "interval": around(row)})
    run = tables.get("run") or {}
    rows = {
        "fallbacks": report.get("fallbacks"),
        "closeness": (report.get("accuracy") or {}).get("outputs"),
        "measures": (report.get("accuracy") or {}).get("rows"),
        "calibration": [row] if (row := report.get("calibration")) else [],
        "seconds": [{"stage": stage, "seconds": value} for stage, value in (report.get("seconds") or {}).items()],
        "run": [{**run, "peak memory, bytes": report.get("peak_memory_bytes"), **dict.fromkeys(APART)}] if run else [],
        "kernels": [row] if (row := tables.get("kernels")) else [],
    }
    return {**tables, **rows, "curve": curve}


def render(report: Json, tables: Json) -> str:
    """The whole page. User input is escaped where it enters."""
    model, target, recipe, bits = (escape(str(report.get(k, "?"))) for k in ("model", "target", "recipe", "bits"))
    data = joined(report, tables)
    parts = {name: "".join(section.html(data) for section in sections) for name, sections in SECTIONS.items()}
    parts[PASSES] = passes(tables.get("log") or ())
    filled = {name: inner for name, inner in parts.items() if inner}
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in filled)
    body = "".join(f'<section id="{name.lower()}"><h2>{name}</h2>{inner}</section>' for name, inner in filled.items())
    cards = right(report, tables) + good(report) + small_and_fast(report) + not_got(report)
    here = files("fewbit.report")
    css, js = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{model} on {target}: fewbit</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head><body>'
        f'<header><p class="eyebrow">fewbit, post-training quantization</p><h1>{model}</h1><p class="lead">'
        f"Target <b>{target}</b>, recipe <b>{recipe}</b>, bits <b>{bits}</b></p></header>"
        f'<main><div class="cards">{cards}</div><nav>{links}</nav>'
        f"<noscript><p>The figures need JavaScript; their numbers are in tables.json.</p></noscript>{body}</main>"
        f"<script>{get_plotlyjs()}</script><script>{js}</script></body></html>\n"
    )
