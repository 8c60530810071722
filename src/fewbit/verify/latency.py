"""Milliseconds of single ops: float and integer, measured once for each runtime and machine, and cached with their provenance.

An op is measured as an ONNX graph with one node in the form that fewbit realizes: the integer one reads codes and, where its
kernel has a quantized result, writes codes. Quantizers and dequantizers are measured apart, by number of elements. Weights
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

from fewbit.capture.kinds import KINDS
from fewbit.core.graph import Graph, Op
from fewbit.files import read_json, write_json
from fewbit.runtimes import RUNTIMES, open_session
from fewbit.target.spec import Target
from fewbit.verify.bench import paired

SECONDS = 0.25  # to measure one op, all of its forms together
ROUNDS = 30  # at least
SCHEMA = 1


@dataclass(frozen=True)
class Work:
    """What decides the time of one op: its kind, the shapes of what it reads (batch 1), and a convolution's attributes.

    `codes`: its integer kernel writes codes. `inside`: quantizers of its inputs are measured with it, as openvino fuses them.
    `attributes` are strides, paddings, dilations and groups; of a max pooling also its kernel (capture/kinds.py).
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
            for letter, v in zip("spdg" if len(self.attributes) == 4 else "kspdc", self.attributes, strict=False)
        ]
        return " ".join(parts) + (" -> codes" if self.codes else "") + (" quantizes" if self.inside else "")


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's value for one image."""
    return tuple(node.meta["tensor_meta"].shape)


def work_of(graph: Graph, target: Target, op: Op, nodes: Mapping[str, Node]) -> Work:
    """The work of an op of a graph."""
    node, rule, kind = nodes[op.node], target.rule(op.kind), KINDS[op.kind]
    codes, inside = rule is not None and rule.output == "integer", RUNTIMES[target.runtime].quantizes_inside
    operands = [node.args[0], kind.reads(node)["weight"]] if kind.weighted else list(kind.reads(node).values())
    shapes = [graph.site(op.operands["weight"]).shape if kind.weighted and i else shape_of(x) for i, x in enumerate(operands)]
    return Work(op.kind, tuple(shapes), kind.attributes(node), codes, inside)


def quantizer(kind: str, shape: tuple[int, ...]) -> Work:
    """`quantize` real numbers, or `dequantize` codes, of a shape."""
    return Work(kind, ((math.prod(shape),),))


@dataclass
class Table:
    """Milliseconds by work: (float, integer) of an op, (0, ms) of a quantizer; `provenance`: how and where measured."""

    provenance: Mapping[str, Any]
    ms: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __getitem__(self, work: Work) -> tuple[float, float]:
        return self.ms[str(work)]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "provenance": dict(self.provenance), "ms": {k: list(v) for k, v in self.ms.items()}}


def cache_folder() -> Path:
    """FEWBIT_CACHE, or `fewbit` in XDG_CACHE_HOME, or in ~/.cache."""
    if folder := os.environ.get("FEWBIT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbit"


def table(
    works: Iterable[Work], runtime: str, processor: str, threads: int, *, folder: Path | None = None,
    measure: Callable[[Work, str, int], tuple[float, float]] | None = None, progress: Callable[[str], None] = lambda text: None,
) -> Table:  # fmt: skip
    """The times of `works`: from the cache, or measured and added to it.

    Each runtime version, processor and number of threads has its own cache file.
    """
    about = {"runtime": runtime, "version": version(runtime), "processor": processor, "threads": threads}
    digest = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:12]
    path = (folder or cache_folder()) / f"latency-{runtime}-{digest}.json"
    times = Table({**about, "date": datetime.date.today().isoformat(), "seconds": SECONDS, "rounds": ROUNDS})
    if path.is_file():
        cached = read_json(path)
        if cached.get("schema") == SCHEMA:
            times = Table(cached["provenance"], {k: (float(a), float(b)) for k, (a, b) in cached["ms"].items()})
    missing = [work for work in dict.fromkeys(works) if str(work) not in times.ms]
    for work in missing:
        progress(str(work))
        times.ms[str(work)] = (measure or measured)(work, runtime, threads)
    if missing:
        write_json(path, times.to_json())
    return times


def measured(work: Work, runtime: str, threads: int) -> tuple[float, float]:
    """(float ms, integer ms) of one call, less that of an empty graph: medians of paired warm rounds."""
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
        calls = [partial(session.call, x) for session, x in zip(sessions, inputs, strict=True)]
        times = paired(calls, SECONDS, ROUNDS)
    nothing, *rest = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    milliseconds = [max(ms - nothing, 0.0) for ms in rest]
    return (0.0, milliseconds[0]) if len(milliseconds) == 1 else (milliseconds[0], milliseconds[1])


def _random(rng: np.random.Generator, value: onnx.ValueInfoProto, shape: Sequence[int]) -> NDArray[Any]:
    if value.type.tensor_type.elem_type == TensorProto.UINT8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape).astype(np.float32)


def empty() -> onnx.ModelProto:
    """A graph that only passes its input on."""
    return _model([helper.make_node("Identity", ["x"], ["y"])], [("x", TensorProto.FLOAT, (1,))], TensorProto.FLOAT, {})


def one_op(work: Work, *, integer: bool) -> onnx.ModelProto | None:
    """The ONNX graph of a work in float or in integers; None for the float form of a quantizer."""
    if work.kind in ("quantize", "dequantize"):
        return _one_quantizer(work) if integer else None
    graph = _OneOp(work, integer)
    kind = KINDS[work.kind]
    if work.kind == "linear":
        graph.nodes += [
            helper.make_node("MatMul", graph.operands, ["product"]),
            helper.make_node("Add", ["product", "bias"], ["result"]),
        ]
    else:
        attributes = ATTRIBUTES.get(kind.onnx[0], lambda *values: {})(*work.attributes)
        graph.nodes.append(helper.make_node(kind.onnx[0], graph.operands, ["result"], **attributes))
    return graph.model()


ATTRIBUTES: Mapping[str, Callable[..., dict[str, Any]]] = {  # of an ONNX operator, from those of a work
    "Conv": lambda strides, pads, dilations, groups: {
        "strides": strides, "pads": (*pads, *pads), "dilations": dilations, "group": groups[0],
    },
    "MaxPool": lambda kernel, strides, pads, dilations, up: {
        "kernel_shape": kernel, "strides": strides, "pads": (*pads, *pads), "dilations": dilations, "ceil_mode": up[0],
    },
    "Concat": lambda: {"axis": 1},
}  # fmt: skip


class _OneOp:
    """The graph of one op as it grows: inputs, what dequantizes them, its weight and bias."""

    def __init__(self, work: Work, integer: bool) -> None:
        self.work, self.integer, weighted = work, integer, KINDS[work.kind].weighted
        self.constants: dict[str, NDArray[Any]] = {}
        self.nodes: list[onnx.NodeProto] = []
        names = ["a"] if weighted else [chr(ord("a") + i) for i in range(len(work.shapes))]
        dtype = TensorProto.UINT8 if integer and not work.inside else TensorProto.FLOAT
        # the batch is dynamic, as in a realized file: onnxruntime makes other products of fixed shapes, and fuses no Q/DQ there
        self.inputs: list[tuple[str, int, Sequence[int | str]]] = [
            (name, dtype, ("batch", *shape[1:])) for name, shape in zip(names, work.shapes, strict=False)
        ]
        self.operands = [self._activation(name) if integer else name for name in names]
        if weighted:
            self._weight(linear=work.kind == "linear")

    def _weight(self, *, linear: bool) -> None:
        rng, shape = np.random.default_rng(1), self.work.shapes[1]
        codes = rng.integers(-127, 128, shape[::-1] if linear else shape).astype(np.int8)
        bias, channels = rng.standard_normal(shape[0]).astype(np.float32), shape[0]
        if self.integer:
            self.constants["w"] = codes
            self.operands.append(self._dequantize("w", np.zeros(channels, np.int8), _scales(channels), 1 if linear else 0))
        else:
            self.constants["w"] = codes.astype(np.float32) * np.float32(0.01)
            self.operands.append("w")
        self.constants["bias"] = (bias / 0.0002).astype(np.int32) if self.integer and not linear else bias
        if self.integer and not linear:
            scale = np.full(channels, 0.0002, np.float32)
            self.operands.append(self._dequantize("bias", np.zeros(channels, np.int32), scale, 0))
        elif not linear:
            self.operands.append("bias")

    def _dequantize(self, name: str, zero: NDArray[Any], scale: NDArray[np.float32], axis: int = 1) -> str:
        self.constants[f"{name}.scale"], self.constants[f"{name}.zero"] = scale, zero
        attributes: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        inputs = [name, f"{name}.scale", f"{name}.zero"]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.real"], **attributes))
        return f"{name}.real"

    def _activation(self, name: str) -> str:
        zero, scale = np.array(128, np.uint8), _scales()
        if not self.work.inside:
            return self._dequantize(name, zero, scale)
        inputs = [name, f"{name}.codes.scale", f"{name}.codes.zero"]
        self.nodes.append(helper.make_node("QuantizeLinear", inputs, [f"{name}.codes"]))
        return self._dequantize(f"{name}.codes", zero, scale)

    def model(self) -> onnx.ModelProto:
        if not self.integer or not self.work.codes:
            self.nodes[-1].output[0] = "y"
            return _model(self.nodes, self.inputs, TensorProto.FLOAT, self.constants)
        self.constants |= {"out.scale": _scales(), "out.zero": np.array(128, np.uint8)}
        self.nodes.append(helper.make_node("QuantizeLinear", ["result", "out.scale", "out.zero"], ["y"]))
        return _model(self.nodes, self.inputs, TensorProto.UINT8, self.constants)


def _scales(count: int | None = None) -> NDArray[np.float32]:
    return np.full((), 0.02, np.float32) if count is None else np.full(count, 0.01, np.float32)


def _one_quantizer(work: Work) -> onnx.ModelProto:
    types, quantizes = (TensorProto.FLOAT, TensorProto.UINT8), work.kind == "quantize"
    source, result = types if quantizes else types[::-1]
    op = "QuantizeLinear" if quantizes else "DequantizeLinear"
    constants: dict[str, NDArray[Any]] = {"scale": _scales(), "zero": np.array(128, np.uint8)}
    return _model([helper.make_node(op, ["x", "scale", "zero"], ["y"])], [("x", source, work.shapes[0])], result, constants)


def _model(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[tuple[str, int, Sequence[int | str]]], output_type: int,
    constants: Mapping[str, NDArray[Any]],
) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "one_op",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info("y", output_type, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
