"""Verify: float.onnx is the model that was given (twin), the files of a finished run are what its plan gives (files), and
model.onnx computes the codes and outputs of the simulation (verify).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram
from torch.nn.functional import interpolate

from fewbit import verify as proofs
from fewbit.core.checks import Checks, Deviation, OutputCheck
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, image_among, images_of, one_and_parts, parts, rows
from fewbit.core.plan import Plan
from fewbit.core.record import Record
from fewbit.deploy import as_stored, made, stamped
from fewbit.errors import AGAIN, BadFile, FewbitFailed
from fewbit.files import read_json
from fewbit.folder import MODEL, RECORD, REPORT, TABLES, TWIN, scratch
from fewbit.load.program import fingerprint
from fewbit.onnx_file import load_proto
from fewbit.progress import Progress
from fewbit.runtimes import AS_WRITTEN
from fewbit.stages.realize import write_model, write_twin


def twin_of(exact: Graph, given: ExportedProgram, twin: Path, sample: Batch, runtime: str) -> tuple[OutputCheck, ...]:
    """The outputs of float.onnx in the runtime, compared with the given model's before anything is compared with them.

    Raises FewbitFailed where they differ by more than float32 rounding explains.
    """
    groups = {"": _batches(exact, sample), **at_other_sizes(exact, sample)}

    def checked_in(name: str) -> tuple[OutputCheck, ...]:
        sizes = (proofs.twin_checks(given, exact.inputs, twin, name, batches, where) for where, batches in groups.items())
        behind = proofs.tail_checks(exact, twin, None, groups[""], "float.onnx, ")
        return (*(check for checks in sizes for check in checks), *behind)

    checks = checked_in(runtime)
    wrong = next((check for check in checks if check.wrong), None)
    if wrong is None:
        return checks
    differs = f"{wrong.output} {wrong.said}"
    differs = differs if math.isfinite(wrong.difference) else f"{wrong.output} has another shape or is not there"
    again = () if runtime == AS_WRITTEN else checked_in(AS_WRITTEN)
    if again and not any(check.wrong for check in again):
        raise FewbitFailed(
            f"{runtime} computes the float model wrongly ({differs}; {AS_WRITTEN} computes it rightly), so nothing can be "
            f"compared with it. Choose a target of another runtime: --target NAME, see `fewbit targets`."
        )
    raise FewbitFailed(
        f"{twin} in {runtime} is not the model that was given: {differs}, so nothing can be compared with it. "
        "Was the file changed? Write the run again with fewbit quantize --force."
    )


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
    batches, place = _batches(graph, sample), None if stands_in(plan) else runtime
    try:
        checks = proofs.compare(
            graph, plan, model, batches, runtime=place,
            others=at_other_sizes(graph, sample), progress=lambda text: progress.advance(1, text),
        )  # fmt: skip
        behind = proofs.tail_checks(graph, model, place, batches)
    except (LookupError, RuntimeError, ValueError) as error:
        if not deviations:
            raise
        first = deviations[0]
        raise FewbitFailed(f"The run is not right. {first.file}: {first.name} {first.what}; {AGAIN}") from error
    return replace(checks, outputs=(*trusted, *checks.outputs, *behind), file=deviations)


def stands_in(plan: Plan) -> bool:
    """Whether the plan is for a runtime that cannot run here, and another one computes its file as written."""
    return any(fallback.kind == "runtime" for fallback in plan.fallbacks)


def at_other_sizes(graph: Graph, sample: Batch) -> dict[str, list[Batch]]:
    """An image of each other size, where a model takes any, by what is said of it; their numbers are some of the sample's, so
    that a file that takes pixels or float16 can hold them.
    """
    image, few = image_among(graph.inputs), rows(sample, slice(graph.in_a_file(1)))
    groups = dict[str, list[Batch]]()
    for _, *sides in image.others:
        images = interpolate(images_of(few), tuple(sides), mode="nearest")
        groups[", {} x {}".format(*sides)] = [(images, *few[1:]) if isinstance(few, tuple) else images]
    return groups


def _batches(graph: Graph, sample: Batch) -> list[Batch]:
    """The sample in the batches in which files are compared: those that are written in the model, or one image and several."""
    return parts(sample, graph.batch) if graph.batch else one_and_parts(sample, graph.in_a_file(4))
