"""One row of a sweep: a run in a folder of its own, and what the page says of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError, FewbitFailed, InUse, Stopped, stopped
from fewbit.files import read_json, write_json
from fewbit.folder import RECORD, REPORT, checked
from fewbit.report.answers import chosen_and_refused
from fewbit.request import Request
from fewbit.run import execute
from fewbit.sweep.file import Row

PATIENCE = 60.0  # seconds; a worker ends a few after what it works for
Found = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A row and where its files are: the folder of its run, and beside it `<folder>.json` where there is none."""

    row: Row
    folder: Path
    command: str

    @property
    def told(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")


def made(place: Place) -> Found:
    """The row, made unless it lies there already. What ends it is told in words; only a lost worker leaves nothing."""
    about = about_of(place)
    if (place.folder / RECORD).exists():
        return {**about, **_measured(place.folder)}
    if place.told.exists():
        return {**about, **read_json(place.told)}
    try:
        _patiently(place.row.request(place.folder, place.command))
    except Exception as error:
        found = _ended(error)
        if found["end"] == "refused":
            write_json(place.told, found)
        return {**about, **found}
    return {**about, **_measured(place.folder)}


def lost(place: Place, why: str) -> Found:
    """A row whose worker ended each time."""
    return {**about_of(place), "end": "crashed", "why": why}


def about_of(place: Place) -> Found:
    """What was asked."""
    options: Mapping[str, Any] = place.row.options
    return {"row": place.folder.name, **{key: options.get(key) for key in ("model", "target", "recipe", "bits")}}


def _patiently(request: Request) -> None:
    """Make a run, once the process that was at it, of a worker or a sweep that was killed, has ended."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            execute(request)
            return
        except InUse:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def _ended(error: Exception) -> Found:
    """How a row ended that has no run, and why."""
    known = stopped(error) or error
    kinds = {InUse: "stopped", Stopped: "stopped", FewbitError: "refused", FewbitFailed: "wrong", Exception: "crashed"}
    end = next(end for kind, end in kinds.items() if isinstance(known, kind))
    return {"end": end, "why": f"{type(known).__name__}: {known}"}


def _measured(folder: Path) -> Found:
    """What the run's report says, once its files have been compared with their hashes."""
    checked(folder)
    report = read_json(folder / REPORT)
    accuracy, check, size = report["accuracy"], report["verify"], report["size"]
    problems, missed = check["problems"], report["missed"]
    return {
        "end": "wrong" if problems else "missed" if missed else "right",
        "why": "; ".join((*problems, *missed)),
        "bits": report["bits"],
        **{key: accuracy[key] for key in ("measure", "unit", "float", "quantized", "agreement", "interval")},
        "codes_wrong": check["codes_wrong"],
        "codes_compared": check["codes_compared"],
        "bytes": size["onnx_bytes"],
        "float_bytes": size["float_bytes"],
        "faster": {name: row["ratio"] for name, row in report["latency"].items()},
        "ms": {name: row["quantized_ms"] for name, row in report["latency"].items()},
        "integer_share": report["integer_share"],
        "fallbacks": len(chosen_and_refused(report["fallbacks"])[1]),
        "seconds": round(sum(report["seconds"].values()), 1),
    }
