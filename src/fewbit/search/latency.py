"""Milliseconds of single ops: float and integer, measured once for each runtime and machine, and kept with their provenance.

An op is measured as an ONNX graph with one node in the form that fewbit realizes: the integer one reads codes and, where its
kernel has a quantized result, gives codes. What turns real numbers into codes and back is measured apart, by elements. Weights
below 8 bits are unpacked when a file is loaded and run as int8, so an op has one integer time whatever its width.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.fx import Node

from fewbit.capture.fx import argument
from fewbit.core.values import Graph, Op
from fewbit.files import read_json, write_json
from fewbit.target.spec import Target
from fewbit.verify.bench import paired
from fewbit.verify.runtimes import open_session

SECONDS = 0.25  # of measuring one op, all of its forms together
ROUNDS = 30  # at least
SCHEMA = 1


@dataclass(frozen=True)
class Work:
    """What decides the time of one op: its kind, the shapes of what it reads (batch 1), and a convolution's attributes.

    `codes`: its integer kernel gives codes. `inside`: what makes codes of its inputs is measured with it, as openvino fuses it.
    `attributes` are strides, paddings, dilations and groups; of a max pooling those of `pooling`.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    attributes: tuple[tuple[int, ...], ...] = ()
    codes: bool = False
    inside: bool = False

    def __str__(self) -> str:
        parts = [self.kind, *("x".join(map(str, shape)) for shape in self.shapes)]
        parts += [
            f"{letter}{','.join(map(str, v))}"
            for letter, v in zip("kspdc" if self.kind == "maxpool" else "spdg", self.attributes, strict=False)
        ]
        return " ".join(parts) + (" -> codes" if self.codes else "") + (" quantizes" if self.inside else "")


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's value for one image."""
    return tuple(node.meta["tensor_meta"].shape)


def work_of(graph: Graph, target: Target, op: Op, nodes: Mapping[str, Node]) -> Work:
    """The work of an op of a graph."""
    node, rule = nodes[op.node], target.rule(op.kind)
    codes, inside = rule is not None and rule.output == "integer", target.runtime == "openvino"
    if op.kind in ("conv", "depthwise"):
        weight = graph.site(op.operands["weight"]).shape
        pairs = [
            argument(node, i, name, default) for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
        ]
        attributes = [tuple(v) if isinstance(v, list | tuple) else (v, v) for v in pairs]
        return Work(op.kind, (shape_of(node.args[0]), weight), (*attributes, (argument(node, 6, "groups", 1),)), codes, inside)
    if op.kind == "linear":
        return Work(op.kind, (shape_of(node.args[0]), graph.site(op.operands["weight"]).shape), (), codes, inside)
    if op.kind == "maxpool":
        return Work(op.kind, (shape_of(node.args[0]),), pooling(node), codes, inside)
    inputs: Any = node.args[0] if op.kind == "concat" else node.args[: 1 if op.kind == "avgpool" else 2]
    return Work(op.kind, tuple(shape_of(read) for read in inputs), (), codes, inside)


def pooling(node: Node) -> tuple[tuple[int, ...], ...]:
    """Kernel, strides, paddings, dilations of a max pooling, and whether its sizes are rounded up."""
    kernel = argument(node, 1, "kernel_size")
    given = [
        kernel, argument(node, 2, "stride", None) or kernel, argument(node, 3, "padding", 0), argument(node, 4, "dilation", 1)
    ]  # fmt: skip
    pairs = [tuple(v) * (2 if len(v) == 1 else 1) if isinstance(v, list | tuple) else (v, v) for v in given]
    return (*pairs, (int(argument(node, 5, "ceil_mode", False)),))


def quantizer(kind: str, shape: tuple[int, ...]) -> Work:
    """`quantize` real numbers, or `dequantize` codes, of a shape."""
    return Work(kind, ((math.prod(shape),),))


@dataclass
class Table:
    """Milliseconds by work: (float, integer) of an op, (0, ms) of what quantizes; `provenance` says how and where."""

    provenance: Mapping[str, Any]
    ms: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __getitem__(self, work: Work) -> tuple[float, float]:
        return self.ms[str(work)]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "provenance": dict(self.provenance), "ms": {k: list(v) for k, v in self.ms.items()}}


def cache_folder() -> Path:
    """FEWBIT_CACHE, or `fewbit` in XDG_CACHE_HOME, or in ~/.cache."""
    if given := os.environ.get("FEWBIT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbit"


def table(
    works: Iterable[Work], runtime: str, processor: str, threads: int, *, folder: Path | None = None,
    measure: Callable[[Work, str, int], tuple[float, float]] | None = None, progress: Callable[[str], None] = lambda text: None,
) -> Table:  # fmt: skip
    """The times of some works: those that the cache has, and what is missing measured and added to it.

    Another version of the runtime, another processor or number of threads has a file of its own.
    """
    about = {"runtime": runtime, "version": version(runtime), "processor": processor, "threads": threads}
    digest = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:12]
    path = (folder or cache_folder()) / f"latency-{runtime}-{digest}.json"
    found = Table({**about, "date": datetime.date.today().isoformat(), "seconds": SECONDS, "rounds": ROUNDS})
    if path.is_file():
        kept = read_json(path)
        if kept.get("schema") == SCHEMA:
            found = Table(kept["provenance"], {k: (float(a), float(b)) for k, (a, b) in kept["ms"].items()})
    missing = [work for work in dict.fromkeys(works) if str(work) not in found.ms]
    for work in missing:
        progress(str(work))
        found.ms[str(work)] = (measure or measured)(work, runtime, threads)
    if missing:
        write_json(path, found.to_json())
    return found


def measured(work: Work, runtime: str, threads: int) -> tuple[float, float]:
    """(float ms, integer ms) of one call, without what a call that does nothing takes: medians of paired warm rounds."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        sessions, inputs = [], []
        for name, integer in (("nothing", None), ("float", False), ("integer", True)):
            path = Path(folder) / f"{name}.onnx"
            model = empty() if integer is None else one_op(work, integer=integer)
            if model is None:
                continue
            onnx.save(model, str(path))
            sessions.append(open_session(runtime, path, threads=threads))
            shapes = [(1,)] if integer is None else work.shapes
            inputs.append([_random(rng, value, shape) for value, shape in zip(model.graph.input, shapes, strict=False)])
        calls = [partial(session.call, given) for session, given in zip(sessions, inputs, strict=True)]
        times = paired(calls, SECONDS, ROUNDS)
    nothing, *rest = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    found = [max(ms - nothing, 0.0) for ms in rest]
    return (0.0, found[0]) if len(found) == 1 else (found[0], found[1])


def _random(rng: np.random.Generator, value: onnx.ValueInfoProto, shape: Sequence[int]) -> NDArray[Any]:
    if value.type.tensor_type.elem_type == TensorProto.UINT8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape).astype(np.float32)


def empty() -> onnx.ModelProto:
    """A call that does nothing."""
    return _model([helper.make_node("Identity", ["x"], ["y"])], [("x", TensorProto.FLOAT, (1,))], TensorProto.FLOAT, {})


def one_op(work: Work, *, integer: bool) -> onnx.ModelProto | None:
    """The ONNX graph of a work in float or in integers; None for the float form of what quantizes."""
    f32, u8 = TensorProto.FLOAT, TensorProto.UINT8
    constants: dict[str, NDArray[Any]] = {}
    nodes: list[onnx.NodeProto] = []
    rng = np.random.default_rng(1)

    def scales(count: int | None = None) -> NDArray[np.float32]:
        return np.full((), 0.02, np.float32) if count is None else np.full(count, 0.01, np.float32)

    def dequantized(name: str, zero: NDArray[Any], scale: NDArray[np.float32], axis: int = 1) -> str:
        constants[f"{name}.scale"], constants[f"{name}.zero"] = scale, zero
        attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        nodes.append(
            helper.make_node("DequantizeLinear", [name, f"{name}.scale", f"{name}.zero"], [f"{name}.real"], **attributes)
        )
        return f"{name}.real"

    def activation(name: str) -> str:
        zero, scale = np.array(128, np.uint8), scales()
        if not work.inside:
            return dequantized(name, zero, scale)
        nodes.append(helper.make_node("QuantizeLinear", [name, f"{name}.codes.scale", f"{name}.codes.zero"], [f"{name}.codes"]))
        return dequantized(f"{name}.codes", zero, scale)

    if work.kind in ("quantize", "dequantize"):
        if not integer:
            return None
        constants |= {"scale": scales(), "zero": np.array(128, np.uint8)}
        kind = "QuantizeLinear" if work.kind == "quantize" else "DequantizeLinear"
        nodes.append(helper.make_node(kind, ["x", "scale", "zero"], ["y"]))
        return _model(nodes, [("x", f32 if work.kind == "quantize" else u8, work.shapes[0])],
                      u8 if work.kind == "quantize" else f32, constants)  # fmt: skip
    weighted = work.kind in ("linear", "conv", "depthwise")
    names = ["a"] if weighted else [chr(ord("a") + i) for i in range(len(work.shapes))]
    taken = u8 if integer and not work.inside else f32
    # the batch is dynamic, as in a realized file: onnxruntime makes other products of fixed shapes, and fuses no Q/DQ there
    inputs: list[tuple[str, int, Sequence[int | str]]] = [
        (name, taken, ("batch", *shape[1:])) for name, shape in zip(names, work.shapes, strict=False)
    ]
    read = [activation(name) if integer else name for name in names]
    if weighted:
        shape = work.shapes[1]
        channels, linear = shape[0], work.kind == "linear"
        w = rng.integers(-127, 128, shape[::-1] if linear else shape).astype(np.int8)
        if integer:
            constants["w"] = w
            read.append(dequantized("w", np.zeros(channels, np.int8), scales(channels), 1 if linear else 0))
        else:
            constants["w"] = w.astype(np.float32) * np.float32(0.01)
            read.append("w")
        bias = rng.standard_normal(channels).astype(np.float32)
        if linear:
            constants["bias"] = bias
            nodes += [helper.make_node("MatMul", read, ["product"]), helper.make_node("Add", ["product", "bias"], ["result"])]
        else:
            if integer:
                constants["bias"] = (bias / 0.0002).astype(np.int32)
                read.append(dequantized("bias", np.zeros(channels, np.int32), np.full(channels, 0.0002, np.float32), 0))
            else:
                constants["bias"] = bias
                read.append("bias")
            strides, pads, dilations, groups = work.attributes
            nodes.append(helper.make_node(
                "Conv", read, ["result"], strides=strides, pads=(*pads, *pads), dilations=dilations, group=groups[0]
            ))  # fmt: skip
    elif work.kind == "maxpool":
        kernel, strides, pads, dilations, (up,) = work.attributes
        nodes.append(helper.make_node(
            "MaxPool", read, ["result"], kernel_shape=kernel, strides=strides, pads=(*pads, *pads), dilations=dilations,
            ceil_mode=up,
        ))  # fmt: skip
    elif work.kind == "concat":
        nodes.append(helper.make_node("Concat", read, ["result"], axis=1))
    else:
        nodes.append(
            helper.make_node({"matmul": "MatMul", "add": "Add", "avgpool": "GlobalAveragePool"}[work.kind], read, ["result"])
        )
    given = f32
    if integer and work.codes:
        constants |= {"out.scale": scales(), "out.zero": np.array(128, np.uint8)}
        nodes.append(helper.make_node("QuantizeLinear", ["result", "out.scale", "out.zero"], ["y"]))
        given = u8
    else:
        nodes[-1].output[0] = "y"
    return _model(nodes, inputs, given, constants)


def _model(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[tuple[str, int, Sequence[int | str]]], given: int,
    constants: Mapping[str, NDArray[Any]],
) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "one_op",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info("y", given, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
