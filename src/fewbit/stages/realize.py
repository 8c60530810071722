"""Realize: model.onnx, float.onnx, and the few images to compare codes on."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import onnx
import torch.utils._pytree as pytree
from onnx import TensorProto

from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, joined
from fewbit.core.plan import Plan
from fewbit.core.record import Record
from fewbit.data.images import Images, whole_batches
from fewbit.files import read_tensors, write_tensors
from fewbit.folder import MODEL, SAMPLE, TWIN
from fewbit.progress import Progress
from fewbit.realize import rendered, rendered_float, save, with_metadata
from fewbit.realize.older import OLDEST
from fewbit.request import Request
from fewbit.stages.load import Inputs

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
        write_twin(exact, twin, form, inputs.record)
    progress.advance()
    sample = sample_of(exact, scored)
    columns = sample if isinstance(sample, tuple) else (sample,)
    tensors = dict(zip(_columns(exact), columns, strict=True))
    write_tensors(folder / SAMPLE, tensors)
    return model, twin, sample


def write_model(graph: Graph, plan: Plan, path: Path, form: Mapping[str, Any], said: Record) -> None:
    """Write model.onnx."""
    place = [one.is_image for one in graph.inputs].index(True)
    save(with_metadata(rendered(graph, plan, **form), said.entries(said.inside, type_of(graph)), place), path)


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


def type_of(graph: Graph) -> str:
    """numpy's name of the type in which the files of a graph take normalized images."""
    kinds = (port.type for port in graph.ports if port.name == graph.input_name and port.type != TensorProto.BFLOAT16)
    return str(onnx.helper.tensor_dtype_to_np_dtype(next(kinds, TensorProto.FLOAT)))
