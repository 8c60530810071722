"""Verify: the files of a finished run are what its plan gives (files), and model.onnx computes the codes and outputs of the
simulation (verify).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from fewbit import verify as proofs
from fewbit.core.checks import Checks, Deviation, OutputCheck
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch
from fewbit.core.plan import Plan
from fewbit.core.record import Record
from fewbit.deploy import as_stored, made, stamped
from fewbit.errors import AGAIN, BadFile, CannotRun, FewbitFailed
from fewbit.files import read_json
from fewbit.folder import MODEL, RECORD, REPORT, TABLES, TWIN, scratch
from fewbit.load.program import fingerprint
from fewbit.onnx_file import load_proto
from fewbit.progress import Progress
from fewbit.stages.realize import write_model
from fewbit.stages.twin import at_other_sizes, batches_of, write_twin


def files(
    graph: Graph, exact: Graph, given: ExportedProgram, plan: Plan, model: Path, twin: Path, folder: Path,
    record: Mapping[str, Any], progress: Progress,
) -> tuple[Deviation, ...]:  # fmt: skip
    """Where the files of a finished run are not what its model and its plan give when they are realized again.

    Raises BadFile where the plan or the model is not the one that the run's own records are of.
    """
    progress.expect(2)
    report = read_json(folder / REPORT)
    for name in ("model", "target", "recipe", "bits"):
        if report.get(name) != getattr(plan, name):
            raise BadFile(f"{folder}: plan.json has {name} {getattr(plan, name)!r}, report.json {report.get(name)!r}; {AGAIN}")
    tables = read_json(folder / TABLES)
    for name, value in tables.get("run", {}).items():
        if record.get(name) != value:
            raise BadFile(f"{folder}: run.json has {name} {record.get(name)!r:.80}, tables.json {value!r:.80}; {AGAIN}")
    try:
        recorded, form, said = record["hashes"]["model"], record["file_format"], Record.from_json(record)
    except (KeyError, TypeError) as error:
        raise BadFile(f"{folder / RECORD} has no {error}; {AGAIN}") from error
    try:
        entry = made(plan, record, report)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"{folder}: run.json or report.json has no {error}; {AGAIN}") from error
    if recorded != fingerprint(given):
        raise BadFile(f"{folder}: exported.pt2 is not the model that run.json is of; {AGAIN}")
    with scratch(folder) as place:
        again, folders = Path(place), (folder, Path(place))
        write_model(graph, plan, again / MODEL, form, said)
        shipped = load_proto(model, data=False)
        expected = stamped(load_proto(again / MODEL, data=False), as_stored(entry, shipped), again / MODEL)
        found = proofs.deviations(MODEL, shipped, expected, folders)
        progress.advance()
        write_twin(exact, again / TWIN, form, said)
        found += proofs.deviations(TWIN, load_proto(twin, data=False), load_proto(again / TWIN, data=False), folders)
        progress.advance()
    return found


def verify(
    graph: Graph, plan: Plan, model: Path, sample: Batch, runtime: str, trusted: tuple[OutputCheck, ...], progress: Progress,
    deviations: tuple[Deviation, ...] | None = None,
) -> Checks:  # fmt: skip
    """Compare codes and outputs of model.onnx on a few images: as written and, if the plan's runtime is here, as it ships.

    Raises FewbitFailed for a file of another model, whose codes have other shapes.
    """
    progress.expect(5)
    batches, place = batches_of(graph, sample), None if stands_in(plan) else runtime
    try:
        checks = proofs.compare(
            graph, plan, model, batches, runtime=place,
            others=at_other_sizes(graph, sample), progress=lambda text: progress.advance(1, text),
        )  # fmt: skip
        behind = proofs.tail_checks(graph, model, place, batches)
    except (LookupError, RuntimeError, ValueError, CannotRun) as error:
        if not deviations:
            raise
        first = deviations[0]
        raise FewbitFailed(f"The run is not right. {first.file}: {first.name} {first.what}; {AGAIN}") from error
    return replace(checks, outputs=(*trusted, *checks.outputs, *behind), file=deviations)


def stands_in(plan: Plan) -> bool:
    """Whether the plan is for a runtime that cannot run here, and another one computes its file as written."""
    return any(fallback.kind == "runtime" for fallback in plan.fallbacks)
