"""The whole of `fewbit sweep`: its rows as tasks, then one table of them as a page, as JSON and as CSV."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fewbit import __version__
from fewbit.core.call import one_call
from fewbit.files import write_atomic, write_json
from fewbit.folder import MARKS, PAGE, REPORT, Workplace
from fewbit.progress import Progress
from fewbit.report import matrix
from fewbit.request import SweepRequest
from fewbit.sweep.file import Row, rows_of
from fewbit.sweep.row import Found, Place, about_of, lost, made
from fewbit.workers import Workers, opened
from fewbit.workers.machines import file_of, refuse_missing

ROWS = MARKS["sweep"]
THREADS = 2  # of a row that says nothing: the default of `fewbit quantize`


def execute(request: SweepRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Make every row, each in a task with a run folder of its own, and write the folder; returns report.json.

    A killed sweep goes on from `<out>.part`: rows that are done are not made again, those of another file are removed. Raises
    FewbitError before any work for what no row can use.
    """
    assert request.out is not None
    rows = rows_of(request.file)
    cpus = max(row.options.get("threads", THREADS) for row in rows)
    with (
        one_call(progress),
        Workplace(request.out, "sweep", force=request.force, by=request.command) as place,
        opened(request.workers, request.ray, cpus) as workers,
    ):
        progress = progress or Progress()
        named = {text for row in rows for text in row.options.values() if isinstance(text, str)}
        refuse_missing(workers, [str(place.part), *(text for text in sorted(named) if os.path.exists(file_of(text)))])
        place.resume({"request": "sweep"}, progress.say)
        _remove_others(place.part / ROWS, rows, progress.say)
        with progress.stage("rows"):
            found = _made(workers, rows, place.part, request.command, progress)
        summary = {
            "schema": 1,
            "command": request.command,
            "file": str(request.file),
            "version": __version__,
            "at once": request.ray or request.workers or 1,
            "rows": found,
        }
        with progress.stage("report"):
            _write(place.part, summary)
        place.publish()
    return summary


def _made(workers: Workers, rows: Sequence[Row], part: Path, command: str, progress: Progress) -> list[Found]:
    """A row each, in the order of the file, from tasks that end in any order."""
    places = [Place(row, part / ROWS / row.name, command) for row in rows]
    found = {k: {**about_of(place), "end": "refused", "why": place.row.refusal} for k, place in enumerate(places)}
    open_ = [k for k, row in enumerate(rows) if not row.refusal]
    progress.expect(len(open_))
    for index, row in workers.map(made, [places[k] for k in open_], lost):
        found[open_[index]] = row
        progress.advance(1, row["row"])
    return [found[k] for k in range(len(rows))]


def _remove_others(folder: Path, rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """Remove what is of no row: of a file that was changed since, or of images that were. That is said."""
    folder.mkdir(exist_ok=True)
    names = {row.name for row in rows}
    others = [path for path in sorted(folder.iterdir()) if re.sub(r"\.(part|json)$", "", path.name) not in names]
    if others:
        few = ", ".join(path.name for path in others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        say(f"{folder} has rows that the file no longer names, or whose images changed: {few}. They are given up and deleted.")
    for path in others:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write(part: Path, summary: Mapping[str, Any]) -> None:
    """report.json, rows.csv and report.html."""
    write_json(part / REPORT, summary)
    lines = [matrix.flat(row) for row in summary["rows"]]
    write_atomic(part / "rows.csv", partial(_write_csv, lines))
    page = matrix.render(summary)
    write_atomic(part / PAGE, lambda file: file.write_text(page, encoding="utf-8"))


def _write_csv(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for line in lines for key in line)), restval="")
        writer.writeheader()
        writer.writerows(lines)
