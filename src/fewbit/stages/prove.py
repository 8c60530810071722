"""Realize, verify, evaluate, bench: write the files, and compare them in the runtime with simulation and float model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch.utils._pytree as pytree
from onnx import TensorProto
from torch.export import ExportedProgram
from torch.nn.functional import interpolate

from fewbit import verify as proofs
from fewbit.core.checks import Checks, Deviation, OutputCheck
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, image_among, images_of, joined, one_and_parts, parts, rows
from fewbit.core.plan import Plan
from fewbit.core.record import Record
from fewbit.data.images import Images, whole_batches
from fewbit.deploy import made, stamped
from fewbit.errors import BadFile, FewbitFailed
from fewbit.fields import Batches, Seconds, Threads, checked
from fewbit.files import read_json, read_tensors, write_tensors
from fewbit.folder import scratch
from fewbit.load.program import fingerprint
from fewbit.progress import Progress
from fewbit.realize import rendered, rendered_float, save, with_metadata
from fewbit.request import Request
from fewbit.runtimes import AS_WRITTEN, read_onnx
from fewbit.stages.load import AGAIN, Inputs
from fewbit.task import task_of
from fewbit.verify import Latency, Load, Score
from fewbit.workers import Workers

REPORT, TABLES = "report.json", "tables.json"
MODEL, TWIN, SAMPLE = "model.onnx", "float.onnx", "images.safetensors"
CHECKED = 8  # images on which codes are compared


def realize(
    graph: Graph, exact: Graph, plan: Plan, scored: Images, inputs: Inputs, request: Request, folder: Path, progress: Progress
) -> tuple[Path, Path, Batch]:
    """model.onnx, float.onnx, and the few images to compare codes on."""
    progress.expect(2)
    form, (model, twin) = request.hardware.file_format, (folder / MODEL, folder / TWIN)
    if not model.exists():
        write_model(graph, plan, model, form, inputs.record)
    progress.advance()
    if not twin.exists():
        save(_twin(exact, form, inputs.record), twin, twin=True)
    progress.advance()
    sample = sample_of(exact, scored)
    columns = sample if isinstance(sample, tuple) else (sample,)
    tensors = dict(zip(_columns(exact), columns, strict=True))
    write_tensors(folder / SAMPLE, tensors)
    return model, twin, sample


def write_model(graph: Graph, plan: Plan, path: Path, form: Mapping[str, Any], said: Record) -> None:
    """Write model.onnx."""
    save(_model(graph, plan, form, said), path)


def _model(graph: Graph, plan: Plan, form: Mapping[str, Any], said: Record) -> ir.Model:
    """model.onnx."""
    place = [one.is_image for one in graph.inputs].index(True)
    return with_metadata(rendered(graph, plan, **form), said.entries(said.inside, type_of(graph)), place)


def _twin(exact: Graph, form: Mapping[str, Any], said: Record) -> ir.Model:
    """float.onnx."""
    return with_metadata(
        rendered_float(exact, opset=form["opset"], ir_version=form["ir_version"]), said.entries(dtype=type_of(exact))
    )


def realized(exact: Graph, folder: Path) -> tuple[Path, Path, Batch]:
    """The same, loaded from the files."""
    tensors = read_tensors(folder / SAMPLE)
    images, *others = (tensors[name] for name in _columns(exact))
    return folder / MODEL, folder / TWIN, (images, *others) if others else images


def _columns(exact: Graph) -> list[str]:
    """What the parts of a batch are called in a file."""
    return ["images", *(f"with.{one.name}" for one in exact.inputs if one.each)]


def sample_of(graph: Graph, images: Images) -> Batch:
    """The first few images, in whole batches where the model has one, as its file's type can hold them. Raises BadImages for
    too few.
    """
    size = graph.at_a_time(CHECKED)
    batches = whole_batches(images, graph.batch).batches(size)
    sample = joined(list(islice(batches, max(CHECKED // size, 1))))
    if type_of(graph) != "float16":
        return sample
    return pytree.tree_map(lambda x: x.half().float() if x.is_floating_point() else x, sample)  # type: ignore[no-any-return]


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


def type_of(graph: Graph) -> str:
    """numpy's name of the type in which the files of a graph take normalized images."""
    kinds = (port.type for port in graph.ports if port.name == graph.input_name and port.type != TensorProto.BFLOAT16)
    return str(onnx.helper.tensor_dtype_to_np_dtype(next(kinds, TensorProto.FLOAT)))


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
    differs = f"{wrong.output} differs by {wrong.difference:.3g}, where float32 rounding explains {wrong.limit:.2g}"
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
        raise BadFile(f"{folder / 'run.json'} has no {error}; {AGAIN}") from error
    try:
        entry = made(plan, record, report)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"{folder}: run.json or report.json has no {error}; {AGAIN}") from error
    if recorded != fingerprint(given):
        raise BadFile(f"{folder}: exported.pt2 is not the model that run.json is of; {AGAIN}")
    with scratch(folder) as place:
        again, folders = Path(place), (folder, Path(place))
        write_model(graph, plan, again / MODEL, form, said)
        expected = stamped(read_onnx(again / MODEL, data=False), entry, again / MODEL)
        found = proofs.deviations(MODEL, read_onnx(model, data=False), expected, folders)
        progress.advance()
        save(_twin(exact, form, said), again / TWIN, twin=True)
        found += proofs.deviations(TWIN, read_onnx(twin, data=False), read_onnx(again / TWIN, data=False), folders)
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


def evaluate(
    exact: Graph, model: Path, twin: Path, trusted: object, scored: Images, runtime: str, threads: int, progress: Progress,
    workers: Workers, asked: Request | None = None,
) -> Score:  # fmt: skip
    """How good model.onnx is beside float.onnx, which was looked at, in the runtime, on images not used for calibration.

    A quick run has no pictures of predictions.
    """
    threads = checked("threads", threads, Threads)
    progress.expect(len(scored))
    return proofs.evaluate(
        twin, model, scored, exact.outputs, task_of(exact), inputs=exact.inputs, inside=exact.inside, behind=exact.behind,
        runtime=runtime, batch=exact.in_a_file(16), threads=threads, progress=progress.advance, workers=workers,
        drawn=asked is None or not asked.quick,
    )  # fmt: skip


def bench(
    exact: Graph, model: Path, twin: Path, threads: int, seconds: float, progress: Progress,
    runtimes: Sequence[str] | None = None, batches: Sequence[int] = (1, 8), repeats: int = 1,
) -> tuple[list[Latency], list[Load]]:  # fmt: skip
    """Latency and load time in the installed runtimes, or in `runtimes`.

    Each runtime and batch is measured for `seconds`; each file is loaded by `repeats` processes. A file with a batch written
    in it is measured with that one, a file with a tail with one image.
    """
    batches, threads = checked("batch", batches, Batches), checked("threads", threads, Threads)
    seconds = checked("seconds", seconds, Seconds)
    batches = [exact.in_a_file(1)] if exact.batch or exact.tail else batches
    timed = list(proofs.timed(model)) if runtimes is None else list(runtimes)
    whole = [name for name in proofs.runtimes_for(model) if runtimes is None or name in timed]
    progress.expect(len(timed) * len(batches) + len(whole))
    shared: dict[str, Any] = {"threads": threads, "progress": lambda text: progress.advance(1, text)}
    times = proofs.bench(twin, model, exact.inputs, runtimes=timed, batches=batches, seconds=seconds, **shared)
    batch = exact.at_a_time(1)
    return times, proofs.loads(twin, model, exact.inputs, runtimes=whole, batch=batch, runs=repeats, **shared)
