"""Float: float.onnx, the twin that every comparison is paired with, and the few images to compare on. Twin: that it computes in
the runtime what the model that was given does, and that its outputs say something, before anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.nn.functional import interpolate

from fewbit import verify as proofs
from fewbit.capture.sites import about_zeros
from fewbit.core.checks import OutputCheck
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, arrays_of, image_among, images_of, joined, one_and_parts, parts, rows
from fewbit.core.record import Record
from fewbit.data.images import Images
from fewbit.data.shares import whole_batches
from fewbit.errors import BadFile, BadImages, BadModel, CannotRun, FewbitFailed
from fewbit.files import read_tensors, write_tensors
from fewbit.folder import SAMPLE, TWIN
from fewbit.onnx_file import load_proto
from fewbit.onnx_reader.file import opsets
from fewbit.realize import rendered_float, save, with_metadata
from fewbit.realize.older import OLDEST
from fewbit.request import Request
from fewbit.runtimes import AS_WRITTEN, OnnxRuntime
from fewbit.stages.evaluate import options_of
from fewbit.stages.load import Inputs
from fewbit.stages.realize import type_of
from fewbit.target.versions import OPSETS
from fewbit.task import task_of
from fewbit.verify.evaluate import LEAVE_OUT

BY_OPTIMISING = f"{AS_WRITTEN} runs it where it does not optimise it, so its own optimisations are what fails there."
CHECKED = 8  # images on which codes are compared
LOOKED_AT = 16  # scored images of which something has to be said, before more are asked


def float_model(exact: Graph, scored: Images, inputs: Inputs, asked: Request, folder: Path) -> tuple[Path, Batch]:
    """float.onnx, and the few images to compare codes and outputs on. Raises BadModel for an operator that the opset lacks."""
    twin, sample = folder / TWIN, sample_of(exact, scored)
    if not twin.exists():
        write_twin(exact, twin, asked.hardware.file_format, inputs.record)
    columns = sample if isinstance(sample, tuple) else (sample,)
    write_tensors(folder / SAMPLE, dict(zip(_columns(exact), columns, strict=True)))
    return twin, sample


def reopened(exact: Graph, folder: Path) -> tuple[Path, Batch]:
    """The same, loaded from the files."""
    tensors = read_tensors(folder / SAMPLE)
    images, *others = (tensors[name] for name in _columns(exact))
    return folder / TWIN, (images, *others) if others else images


def write_twin(exact: Graph, path: Path, form: Mapping[str, Any], said: Record) -> None:
    """Write float.onnx."""
    model = rendered_float(exact, opset=form["opset"], ir_version=form["ir_version"])
    save(with_metadata(model, said.entries(dtype=type_of(exact))), path, twin=True)


def check_opset(graph: Graph, form: Mapping[str, Any]) -> None:
    """Raise BadModel where the opset of the files is too old for an operator of the model: what torch.onnx makes of it, which
    it writes in no older opset than OLDEST, is only known when it is made.
    """
    if form["opset"] < OLDEST:
        rendered_float(graph, opset=form["opset"], ir_version=form["ir_version"])


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


def trusted(
    exact: Graph, given: ExportedProgram, twin: Path, sample: Batch, scored: Images, runtime: str, threads: int
) -> tuple[OutputCheck, ...]:  # fmt: skip
    """What `twin_of` gives. Raises BadImages as well, or BadValues, where the outputs of float.onnx say nothing of any scored
    image, which evaluate would find behind all of the work.
    """
    checks = twin_of(exact, given, twin, sample, runtime)
    options, size = options_of(exact, runtime, threads), exact.at_a_time(LOOKED_AT)
    first = math.ceil(LOOKED_AT / size) * size  # one image alone differs from nothing
    try:
        proofs.refuse_silent(twin, scored, exact.outputs, task_of(exact), first=first, **options)
    except BadImages as error:
        zeros = about_zeros(exact, [site.name for site in exact.sites])
        raise BadImages(" ".join([str(error), *zeros])) from error
    return checks


def twin_of(exact: Graph, given: ExportedProgram, twin: Path, sample: Batch, runtime: str) -> tuple[OutputCheck, ...]:
    """The outputs of float.onnx in the runtime, compared with the given model's before anything is compared with them.

    Raises FewbitFailed where they differ by more than float32 rounding explains, and BadModel where the runtime does not take
    the file.
    """
    groups = {"": batches_of(exact, sample), **at_other_sizes(exact, sample)}

    def checked_in(name: str) -> tuple[OutputCheck, ...]:
        sizes = (proofs.twin_checks(given, exact.inputs, twin, name, batches, where) for where, batches in groups.items())
        behind = proofs.tail_checks(exact, twin, None if name == AS_WRITTEN else name, groups[""], "float.onnx, ")
        return (*(check for checks in sizes for check in checks), *behind)

    try:
        checks = checked_in(runtime)
    except CannotRun as error:
        where = f"on some of the first {CHECKED} images that are scored"
        said = str(error).replace(str(twin), twin.name).replace("on some of the images", where, 1)
        if not _runs_as_written(exact, twin, groups[""]):
            raise CannotRun(f"{said} {LEAVE_OUT}") from error
        older = _older_opset(exact, twin)
        do = f"Try --opset {older}, that of the file that was given, whose nodes are not converted then. {LEAVE_OUT}"
        raise CannotRun(f"{said} {BY_OPTIMISING} {do if older else LEAVE_OUT}") from error
    except BadFile as error:
        raise BadModel(str(error).replace(str(twin), twin.name)) from error
    wrong = next((check for check in checks if check.wrong), None)
    if wrong is None:
        return checks
    other = runtime != AS_WRITTEN and wrong.output in exact.behind and proofs.other_rows(exact, twin, runtime, groups[""])
    if other:
        raise FewbitFailed(
            f"{runtime} runs the nodes that stay behind the layers, as the file has them, otherwise than {AS_WRITTEN}: "
            f"{other}. So nothing can be compared with it. Choose a target of {AS_WRITTEN}: --target ort-x86-vnni, "
            "or let the file give what stands in front of these nodes."
        )
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


def _runs_as_written(exact: Graph, twin: Path, batches: Sequence[Batch]) -> bool:
    """Whether onnxruntime runs a file where it changes nothing of it first."""
    session = OnnxRuntime(twin, optimise=False)
    try:
        for batch in batches:
            session.run(*arrays_of(exact.inputs, batch))
    except CannotRun:
        return False
    return True


def _older_opset(exact: Graph, twin: Path) -> int:
    """The opset of the file that the tail is of, where float.onnx is of a later one and files can be of it; else 0."""
    versions = (row["opset"] for row in (exact.tail.nodes if exact.tail else ()) if "." not in row["operator"])
    opset = max(versions, default=0)
    return opset if OPSETS[0] <= opset < opsets(load_proto(twin, data=False))[""] else 0


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


def batches_of(graph: Graph, sample: Batch) -> list[Batch]:
    """The sample in the batches in which files are compared: those that are written in the model, or one image and several."""
    return parts(sample, graph.batch) if graph.batch else one_and_parts(sample, graph.in_a_file(4))
