"""Report: report.html from report.json and tables.json. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.files import read_json, write_atomic, write_json
from fewbit.folder import PAGE, RECORD, REPORT, TABLES, seal
from fewbit.report import page


def draw(folder: Path, beside: Mapping[str, tuple[Any, Any]] | None = None) -> Path:
    """Draw the page of a run's folder, and give its path.

    `beside` has report.json and run.json of runs of the same model by folder, this one included; they are stored in
    tables.json, so that a later page has them too.
    """
    summary, rows = read_json(folder / REPORT), read_json(folder / TABLES)
    if beside:
        from fewbit.report import tables

        rows["runs"] = tables.runs(beside)
    html = page.render(summary, rows)
    if beside:
        write_json(folder / TABLES, rows)
    path = folder / PAGE
    write_atomic(path, lambda part: part.write_text(html, encoding="utf-8", errors="backslashreplace"))
    if "digest" in read_json(folder / RECORD):  # a finished run, whose hashes follow
        seal(folder, only=(PAGE, TABLES))
    return path
