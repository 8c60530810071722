"""Realize: model.onnx."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from fewbit.core.graph import Graph
from fewbit.core.plan import Plan
from fewbit.core.record import Record
from fewbit.folder import MODEL
from fewbit.progress import Progress
from fewbit.realize import rendered, save, with_metadata
from fewbit.request import Request
from fewbit.stages.load import Inputs


def realize(graph: Graph, plan: Plan, inputs: Inputs, request: Request, folder: Path, progress: Progress) -> Path:
    """model.onnx."""
    progress.expect(1)
    write_model(graph, plan, folder / MODEL, request.hardware.file_format, inputs.record)
    progress.advance()
    return folder / MODEL


def realized(folder: Path) -> Path:
    """The same, written before."""
    return folder / MODEL


def write_model(graph: Graph, plan: Plan, path: Path, form: Mapping[str, Any], said: Record) -> None:
    """Write model.onnx."""
    place = [one.is_image for one in graph.inputs].index(True)
    save(with_metadata(rendered(graph, plan, **form), said.entries(said.inside, type_of(graph)), place), path)


def type_of(graph: Graph) -> str:
    """numpy's name of the type in which the files of a graph take normalized images."""
    kinds = (port.type for port in graph.ports if port.name == graph.input_name and port.type != TensorProto.BFLOAT16)
    return str(onnx.helper.tensor_dtype_to_np_dtype(next(kinds, TensorProto.FLOAT)))
