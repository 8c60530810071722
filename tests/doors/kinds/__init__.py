"""The kinds of bad input, in the order in which they are tried: a function each that gives its cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from doors.case import Case
from doors.kinds import faults, images, injection, kills, markup, models, mutants, options, outs, runs, same, sweeps, verdict

KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "options": options.cases,
    "images": images.cases,
    "models": models.cases,
    "folders": outs.cases,
    "run files": runs.cases,
    "sweeps": sweeps.cases,
    "injection": injection.cases,
    "markup": markup.cases,
    "verdict": verdict.cases,
    "faults": faults.cases,
    "kills": kills.cases,
    "same bytes": same.cases,
    "mutants": mutants.cases,
}
