"""`fewbit show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.cli.answers import show_answers
from fewbit.cli.app import command_without_torch
from fewbit.cli.table import Table
from fewbit.cli.terminal import out
from fewbit.core.record import ENTRY, MADE
from fewbit.errors import FewbitFailed
from fewbit.folder import MODEL, RECORD, REPORT

SHOWN = 3  # class names


@command_without_torch
def show(what: Path) -> None:
    """What a run or an ONNX file says of itself: how it was made, how its images are prepared, what was measured."""
    from fewbit.deploy import read, times
    from fewbit.files import read_json
    from fewbit.folder import check_beside, checked

    if what.is_dir():
        checked(what)
        show_answers(read_json(what / REPORT))
        return
    part = check_beside(what)
    said = read(what)
    entries = dict(said.entries)
    how, images = entries.pop(MADE, None), entries.pop(ENTRY, None)
    measured = how.pop("measured") if how else None
    for title, fields in (("How it was made", how), ("What it takes", images), ("What was measured", measured)):
        _listed(title, fields)
    if how is not None and part == "run" and what.name == MODEL:
        _listed("How fast it was", times(*(read_json(what.with_name(name)) for name in (REPORT, RECORD))))
    elif how is not None:
        out.print("Times are those of a machine and so not in the file: fewbit show RUN has them.", soft_wrap=True)
    _listed("Other entries", entries)
    if how is None:
        out.print(
            f"{what} does not say how it was made: it is not an integer file of a finished run of fewbit.", soft_wrap=True
        )
    if said.as_made is False:
        raise FewbitFailed(
            f"{what}: its metadata entry {MADE}, which says how it was made and what was measured, is not as fewbit wrote it "
            "(SHA-256), so nothing in it can be relied on. Take the file of the run, or make it again."
        )
    if said.intact is False:
        raise FewbitFailed(f"{what} was changed after it was measured (SHA-256), so what it says does not hold for it.")


def _listed(title: str, fields: Any) -> None:
    """A table of names and values, if there are some."""
    if not fields:
        return
    table = Table("", "", show_header=False, title=title, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    for name, value in fields.items():
        if value != "":
            table.add_row(name.replace("_", " "), _text(value))
    out.print(table)


def _text(value: Any) -> str:
    """A value in a line; of long lists the beginning and how many there are."""
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_text(one)}" for name, one in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - SHOWN} more" if len(value) > SHOWN + 1 else ""
        return ", ".join(map(str, value[:SHOWN] if more else value)) + more or "none"
    return "-" if value is None else ("yes" if value else "no") if isinstance(value, bool) else str(value)
