"""Capture: the graph of the model, and what the target may quantize of it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fewbit.capture import capture as graph_of
from fewbit.capture.mapped import mapped
from fewbit.capture.sites import about_zeros, tensor_of
from fewbit.choose import Context
from fewbit.choose.choose import check_pass
from fewbit.choose.context import set_aside
from fewbit.core.bits import Bits
from fewbit.core.graph import Graph, Port
from fewbit.data.images import Images
from fewbit.errors import AGAIN, BadFile, FewbitError
from fewbit.files import read_tensors, write_stream, write_tensors
from fewbit.folder import EXPORTED, RECORD
from fewbit.load import load_model
from fewbit.load.contexts import unwarned
from fewbit.load.inputs import Given
from fewbit.load.sizes import Sizes
from fewbit.observe import Stats, refuse_extremes
from fewbit.request import Options
from fewbit.stages import task
from fewbit.stages.limit import check_memory_limit
from fewbit.stages.load import Inputs
from fewbit.stages.tail import read_tail, write_tail
from fewbit.stages.twin import check_opset

OTHERS = "inputs.safetensors"  # what the inputs are given that are no image, where there are any


def capture(inputs: Inputs, asked: Options, folder: Path) -> tuple[Inputs, Graph, ExportedProgram, Container[str]]:
    """The inputs, with the model's weights in its file; the graph of the model as it was loaded, the model, and the names of
    the sites that the target may quantize.

    Raises FewbitError for what is known to fail now: a name in `keep_float` or `bits` that the model lacks, a pass that cannot
    work on the target, an operator that the opset of the files lacks. The exported program is written for whoever opens the
    run.
    """
    if not (folder / EXPORTED).exists():
        with unwarned():
            write_stream(folder / EXPORTED, lambda file: torch.export.save(inputs.loaded.program, file))
    inputs = replace(inputs, loaded=replace(inputs.loaded, program=mapped(inputs.loaded.program, folder / EXPORTED)))
    graph, images = replace(graph_of(inputs.loaded), task=inputs.task), inputs.calibration
    if isinstance(images, Images):
        count, labels = len(images), images.labels
    else:
        count, labels = images.count, torch.zeros(images.count)
    check_memory_limit(getattr(asked, "memory", None), inputs.loaded.program, graph, asked.method)
    bits = getattr(asked, "widths", None)
    apart = set_aside(count)
    context = Context(
        graph, Stats({}, 0), asked.hardware, bits if isinstance(bits, Bits) else Bits(), images=[torch.empty(count, 0)],
        labels=labels, aside=[torch.empty(apart, 0)] if apart else (), keep_float=tuple(asked.keep_float),
        everything=getattr(asked, "everything", False), name=asked.recipe_name,
    )  # fmt: skip
    quantized = frozenset(context.allowed.sites)
    if asked.keep_float and not context.allowed.integer_ops:
        raise FewbitError(
            f"--keep-float {' '.join(asked.keep_float)} leaves nothing to quantize: all {len(graph.ops)} ops would stay "
            "float. Name fewer, as in --keep-float 'head*'."
        )
    if not context.allowed.integer_ops and not graph.macs:
        raise FewbitError(
            f"{inputs.loaded.ref} has no layer with weights and no other sums of products, so no target has anything to "
            "quantize in it. Give the model with such layers, or use it as it is."
        )
    if not context.allowed.integer_ops:
        reasons = "; ".join([*dict.fromkeys(f"{one.site}: {one.why}" for one in context.allowed.fallbacks)][:3])
        raise FewbitError(
            f"{asked.hardware.name} would leave all {len(graph.ops)} ops of {inputs.loaded.ref} float, so there is nothing to "
            f"quantize{f' ({reasons})' if reasons else ''}. Choose another target: fewbit targets."
        )
    weights = [site for site in graph.sites if site.role == "weight" and site.name in quantized]
    refuse_extremes({site.name: float(tensor_of(graph, site).abs().amax()) for site in weights})
    inputs = replace(inputs, notes=(*inputs.notes, *about_zeros(graph, quantized)))
    for one_pass in asked.method.passes:
        check_pass(one_pass, context)
    check_opset(graph, asked.hardware.file_format)
    values = {one.name: one.value for one in graph.inputs if one.value is not None}
    if values:
        write_tensors(folder / OTHERS, values)
    write_tail(graph.tail, folder)
    return inputs, graph, inputs.loaded.program, quantized


def reopened(folder: Path, record: Mapping[str, Any]) -> tuple[Graph, ExportedProgram]:
    """The same of a finished run. Raises BadFile where its record does not say what its files take and give."""
    values = read_tensors(folder / OTHERS) if (folder / OTHERS).exists() else {}
    try:
        each = {one["name"] for one in record["inputs"] if one["kind"] == "each image"}
        given = Given({n: v for n, v in values.items() if n not in each}, {n: values[n][0] for n in each})
        ports = tuple(Port(str(name), int(kind), tuple(dims)) for name, kind, dims in record["ports"])
        batch = record["batch"]
        others = {one["name"]: tuple(map(tuple, one["others"])) for one in record["inputs"] if "others" in one}
        size = {"input_size": tuple(record["preprocess"]["size"])}
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{folder / RECORD}: its ports cannot be read ({error}); {AGAIN}") from error
    loaded = load_model(str(folder / EXPORTED), given=given, overrides=size, sizes=Sizes.ONE)
    loaded = replace(loaded, program=mapped(loaded.program, folder / EXPORTED))
    inputs = tuple(replace(one, others=others.get(one.name, ())) for one in loaded.inputs)
    loaded = replace(loaded, batch=batch, ports=ports, inputs=inputs, tail=read_tail(folder))
    return replace(graph_of(loaded), task=task.reopened(record, loaded.outputs)), loaded.program
