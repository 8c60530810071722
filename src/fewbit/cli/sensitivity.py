"""`fewbit sensitivity`."""

from __future__ import annotations

from fewbit.cli.app import command
from fewbit.cli.options import options
from fewbit.cli.table import Table
from fewbit.cli.terminal import PLAIN, drawn, out
from fewbit.request import SensitivityRequest

SHOWN = 12  # rows on the terminal; the page has all
COMMANDS = 3


@command
@options(SensitivityRequest)
def sensitivity(request: SensitivityRequest) -> None:
    """What each module loses and gains in integers, and which to leave float first."""
    from fewbit import run
    from fewbit.report.sensitivity import NOTHING, note
    from fewbit.report.words import share

    with drawn() as progress:
        summary = run.sensitivity(request, progress)
    rows, timed = summary["rows"], summary["milliseconds"]
    table = Table("", "module", "loss alone", "regained", *(["ms gained"] if timed else []), "work", title=summary["by"])
    for row in rows[:SHOWN]:
        ms = [f"{row['ms']:.3f}"] if timed else []
        table.add_row(
            str(row["place"]),
            row["module"],
            f"{row['loss']:.3g}",
            f"{row['regained']:.3g}",
            *ms,
            share(row["macs_share"]).translate(PLAIN),
        )
    out.print(table)
    if len(rows) > SHOWN:
        out.print(f"... and {len(rows) - SHOWN} more modules, in {request.out}/sensitivity.html.")
    out.print(note(summary), soft_wrap=True)
    out.print("To leave the first in float, then the first two, and so on (the page has one for each row):", soft_wrap=True)
    for row in rows[:COMMANDS]:
        out.print(f"  {row['command'] or NOTHING}", soft_wrap=True)
    out.print(f"Report: {request.out}/sensitivity.html")
