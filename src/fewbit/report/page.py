"""report.json and tables.json -> report.html: one file, no network, the same bytes for the same two files.

The four answers come first, then the sections that have something to show (sections.py), part by part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2

from fewbit.report.answers import advice, answers, chosen_and_refused
from fewbit.report.sections import PASSES, SECTIONS, passes
from fewbit.report.tables import around, headline
from fewbit.report.views import Block
from fewbit.report.words import Json, Rows, measured, megabytes, plural, share, title_of, titled

APART = ("classes", "preprocess", "assumed", "metadata")  # of run.json: a section of their own, or too long for a page
WORST = 10  # modules in the table of those that lose most


@cache
def templates() -> jinja2.Environment:
    """The templates of this room; every value is escaped where it is shown."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fewbit.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def of_sections(title: str, sections: Sequence[Block]) -> str:
    """A page of nothing but sections."""
    return templates().get_template("sections.html.j2").render(title=title, sections=sections)


def joined(report: Json, tables: Json) -> dict[str, Any]:
    """tables.json, plus the parts of report.json that sections show, as rows."""
    curve = []
    for row in tables.get("curve") or ():
        measure, score, unit = headline(row)
        said = f"{plural(row['images'], 'image')}: {measured(score, unit)}"
        shown = {"score": score, "unit": unit, "title": titled(measure, unit), "said": said}
        curve.append({**row, **shown, "interval": around(row)})
    run = tables.get("run") or {}
    chosen, refused = chosen_and_refused(report.get("fallbacks") or ())
    losing = tables.get("sensitivity") or ()
    modules = {op: {"module": row["module"], "module_share": row["loss_share"]} for row in losing for op in row["ops"]}
    files = tables.get("size") or ()
    rows = {
        "fallbacks": refused,
        "chosen": chosen,
        "sites": [{**row, **modules.get(row["op"], {})} for row in tables.get("sites") or ()],
        "sensitivity": losing[:WORST],
        "closeness": (report.get("accuracy") or {}).get("outputs"),
        "measures": (report.get("accuracy") or {}).get("rows"),
        "calibration": [row] if (row := report.get("calibration")) else [],
        "seconds": [{"stage": stage, "seconds": value} for stage, value in (report.get("seconds") or {}).items()],
        "run": [{**run, "peak memory, bytes": report.get("peak_memory_bytes"), **dict.fromkeys(APART)}] if run else [],
        "kernels": [row] if (row := tables.get("kernels")) else [],
        "size": [{**row, "weighs": megabytes(row["bytes"], [one["bytes"] for one in files])} for row in files],
        "runs": [_run(row) for row in tables.get("runs") or ()],
        **{key: _flipped(tables.get(key) or ()) for key in ("attention", "flips")},
    }
    return {**tables, **rows, "curve": curve}


def _run(row: Json) -> dict[str, Any]:
    """A run of the figure of several, with its words."""
    said = measured(row["accuracy"], row["unit"])
    return {**row, "title": titled(row["measure"], row["unit"]), "said": said, "weighs": megabytes(row["bytes"])}


def _flipped(rows: Rows) -> Rows:
    return [{**row, "flipped": share(row["flipped_share"])} for row in rows]


def render(report: Json, tables: Json) -> str:
    """The whole page."""
    data = joined(report, tables)
    parts = {name: [section.shown(data) for section in sections] for name, sections in SECTIONS.items()}
    parts[PASSES] = passes(tables.get("log") or ())
    filled = {name: shown for name, sections in parts.items() if (shown := [one for one in sections if one])}
    about = {key: str(report.get(key, "?")) for key in ("model", "target", "recipe", "bits")}
    return templates().get_template("report.html.j2").render(
        about, title=title_of(about["model"]), cards=answers(report, tables), parts=filled,
        advice=advice(report, tables),
    )  # fmt: skip
