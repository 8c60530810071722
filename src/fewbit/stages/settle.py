"""Settle: from what was asked, with a limit of the drop, to the request whose file is the fastest within it.

Ways are tried from the cheapest to the dearest: the recipe that was asked for and a better one; then modules with 8 bits, or
in float, in the order of sensitivity.py, twice as many each time until it suffices and then halfway between too few and enough;
then a reconstruction, where there is time for one. Each is a file that ran in the
runtime, on images that neither calibrate nor are scored: the score of the run is of others.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fewbit.choose.sensitivity import OutputKL
from fewbit.core.bits import Bits
from fewbit.core.device import on
from fewbit.core.duration import parse_time
from fewbit.core.graph import Graph
from fewbit.data.images import Images
from fewbit.errors import FewbitError, stopped
from fewbit.progress import Progress
from fewbit.report.goals import ROUNDING, drop_of
from fewbit.report.tables import integer_share
from fewbit.report.words import UNIT, fall, plural
from fewbit.request import Options, Request
from fewbit.run import Run
from fewbit.stages.kernels import as_run, linted
from fewbit.stages.sensitivity import FASTER, LIGHTER, Worth, ordered, some, worths
from fewbit.stages.times import context_of, times_here
from fewbit.unfinished import Unfinished, keep_rows, rows_so_far
from fewbit.verify import bench

FILE, FOLDER = "goal.json", "goal"
RUNGS = ("mse", "fast")  # recipes that take about a minute, the quick one first
SLOW = "best"
SECONDS = 1.0  # of timing each file
Row = dict[str, Any]


def settle(run: Run, asked: Options, folder: Path, progress: Progress) -> tuple[Options, Sequence[Row]]:
    """The request that is carried out, and a row for each file that was tried; what was asked where it has no limit.

    Where no file is within the limit the request is that of the nearest one. Rows of a killed run are reused.
    """
    if not isinstance(asked, Request) or asked.max_drop is None:
        return asked, ()
    walk = Walk(run, asked, asked.max_drop, folder, progress)
    base = walk.recipes()
    if not base["within"]:
        walk.raised(base)
    if not walk.reached and asked.time is not None and walk.has_time:
        walk.tried(f"recipe {SLOW}", {"recipe": SLOW, "time": asked.time})
    taken = walk.best()
    taken["taken"] = True
    walk.keep(taken)
    return walk.request(taken["changes"]), walk.rows


class Walk:
    """The files that were tried, in order."""

    def __init__(self, run: Run, asked: Request, limit: float, folder: Path, progress: Progress) -> None:
        self.run, self.asked, self.limit, self.folder, self.progress = run, asked, limit, folder, progress
        self.judged: Images = run["judged"]
        path = folder / FILE
        self.rows: list[Row] = rows_so_far(path)
        self.before = sum(row["seconds"] for row in self.rows)  # in a run that was killed

    @property
    def reached(self) -> bool:
        return any(row["within"] for row in self.rows)

    @property
    def has_time(self) -> bool:
        return self.asked.time is None or self.before + self.progress.spent < parse_time(self.asked.time)

    @property
    def measured(self) -> list[Row]:
        """The rows of files that were made; others were refused."""
        return [row for row in self.rows if "drop" in row]

    def recipes(self) -> Row:
        """The recipe that was asked for, and a better one if that is not within the limit; the row with the smaller drop."""
        first = self.tried(f"recipe {self.asked.recipe_name}", {})
        if first["within"] or self.asked.recipe != RUNGS[0] or not self.has_time:
            return first
        second = self.tried(f"recipe {RUNGS[1]}", {"recipe": RUNGS[1]})
        return second if second.get("drop", math.inf) < first["drop"] else first

    def raised(self, base: Row) -> None:
        """Modules with 8 bits, or in float, on top of a row: as few as will do."""
        bits, changes, stem = self.asked.widths, dict(base["changes"]), base["what"]
        order, by = self.order(base)

        def suffice(how: str, change: Callable[[list[str]], Row], count: int) -> bool:
            ops = [op for row in order[:count] for op in row.ops]
            return bool(self.tried(f"{stem}, {how}: {_names(order[:count])}", {**changes, **change(ops)}, by)["within"])

        if isinstance(bits, Bits) and max(bits.weights, bits.activations) < 8:
            wide = partial(suffice, "8 bits", lambda ops: {"bits": ",".join([str(bits), *(f"{op}=8" for op in ops)])})
            if self.fewest(wide, len(order)):
                return
            changes["bits"], stem = "8", f"{stem}, 8 bits everywhere"
        in_float = partial(suffice, "float", lambda ops: {"keep_float": [*self.asked.keep_float, *ops]})
        self.fewest(in_float, len(order) - 1)  # something stays in integers

    def fewest(self, suffices: Callable[[int], bool], most: int) -> int:
        """The smallest of 1 to `most` that suffices, by doubling and halving; 0 where none does, or there is no time to see."""
        least, enough = 0, min(1, most)
        while enough and not suffices(enough):
            least, enough = enough, min(2 * enough, most) if enough < most and self.has_time else 0
        while enough - least > 1 and self.has_time:
            middle = (least + enough) // 2
            least, enough = (least, middle) if suffices(middle) else (middle, enough)
        return enough

    def order(self, base: Row) -> tuple[list[Worth], str]:
        """The modules in the order in which they are raised, and what that goes by."""
        request = self.request(base["changes"])
        part = self.run.fork(self.folder / FOLDER / str(base["index"]), request)
        graph, plan = part["graph"], part["plan"]
        context = context_of(graph, part["stats"], request)
        times = times_here(context, plan, request.threads, self.folder, self.progress, part["twin"])
        placed, images = on(graph, request.place), some(self.run["calibration"], graph, OutputKL.images)
        rows = worths(placed, plan, images, times, self.progress, self.run["workers"])
        return ordered(rows), LIGHTER if times is None else FASTER

    def tried(self, what: str, changes: Row, by: str = "") -> Row:
        """The row of a file: known from a killed run, or measured now. What is refused is a row too, but for the first."""
        for row in self.rows:
            if row["changes"] == changes:
                return row
        began, index = time.monotonic(), len(self.rows)
        self.progress.begin(f"file {index + 1}, {what}", None)
        row = {"index": index, "what": what, "changes": changes, "limit": self.limit, "within": False, "taken": False, "by": by}
        try:
            row |= self.measure(index, self.request(changes))
        except FewbitError as error:
            if halt := stopped(error):
                raise halt from error
            if not self.rows:
                raise
            row["why"] = str(error)
        self.rows.append({**row, "seconds": round(time.monotonic() - began, 1)})
        keep_rows(self.folder / FILE, self.rows)
        self.forget()
        return self.rows[-1]

    def measure(self, index: int, request: Request) -> Row:
        """A file, on the images that choose: how much it loses, how fast it is, what of it runs in integers."""
        own = self.folder / FOLDER / str(index)
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        part = self.run.fork(own, request)
        accuracy = part.do("evaluate", scored=self.judged, drawn=False).to_json()
        exact: Graph = part["exact"]
        (timed,) = bench(
            part["twin"], part["model"], exact.inputs, runtimes=[request.hardware.runs_in], batches=[exact.in_a_file(1)],
            threads=request.threads, seconds=min(SECONDS, request.seconds),
        )  # fmt: skip
        drop, measure, unit = drop_of(accuracy)
        return {
            "drop": drop,
            "measure": measure,
            "unit": unit,
            "interval": accuracy["interval"],
            "images": len(self.judged),
            "within": drop <= self.limit + ROUNDING,
            "ms": timed.quantized_ms,
            "faster": timed.ratio,
            "share": integer_share(
                part["graph"], as_run(part["graph"], part["plan"], linted(part["model"], request.hardware), request.hardware)
            ),
        }

    def request(self, changes: Mapping[str, Any]) -> Request:
        """What was asked, with changes and without the limit."""
        return self.asked.changed(changes)

    def best(self) -> Row:
        """The fastest row within the limit; where there is none that with the smallest drop."""
        within = [row for row in self.measured if row["within"]]
        return max(within, key=lambda row: row["faster"]) if within else min(self.measured, key=lambda row: row["drop"])

    def forget(self) -> None:
        """Remove the files of all rows but the best of each kind, from which the walk goes on."""
        recipes = [row for row in self.measured if row["changes"].keys() <= {"recipe", "time"}]
        kept = {row["index"] for row in (self.best(), min(recipes, key=lambda row: row["drop"]))}
        for row in self.rows:
            if row["index"] not in kept:
                shutil.rmtree(self.folder / FOLDER / str(row["index"]), ignore_errors=True)

    def keep(self, row: Row) -> None:
        """Give the run the files of a row, so that its stages find them done."""
        own = self.folder / FOLDER / str(row["index"])
        for path in sorted(own.glob("*")):
            if path.is_file() and not (self.folder / path.name).exists():
                os.link(path, self.folder / path.name)
        if self.run.unfinished is not None:
            self.run.unfinished.take(Unfinished(own).digests)
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)


def said(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is to be said of the file that was taken, if files were tried."""
    taken = next((row for row in rows if row["taken"]), None)
    if taken is None:
        return ""
    found = (
        "the fastest within the limit was taken" if taken["within"] else "none is within the limit, so the nearest was taken"
    )
    by = next((row["by"] for row in rows if row["by"]), "")
    order = f" Modules with the most {by} were tried first." if by else ""
    return (
        f"--max-drop {taken['limit']:g}: {plural(len(rows), 'file')} tried; {found}: {taken['what']}. On the {taken['images']} "
        f"images that chose it, {taken['measure']} {'fell' if taken['drop'] >= 0 else 'rose'} by "
        f"{fall(abs(taken['drop']), taken['unit'])}.{order}".replace(UNIT, " ")
    )


def _names(order: Sequence[Worth]) -> str:
    """Modules in words."""
    names = [row.module for row in order]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
