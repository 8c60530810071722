"""How a runtime really runs each node of a file: the oracle of the rules.

The file is loaded with its nodes and tensors renamed, so that the name of a fused node tells its parts.
onnxruntime: the kernels of one profiled inference on zeros, with the types of their inputs, and the optimised graph.
openvino: layer type and precision of the compiled model (`get_runtime_model`), with fused attention opened
(`SNIPPETS_MODE`), because a fused subgraph does not say what each of its products runs in.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fewbit.errors import BadFile, UnknownName
from fewbit.lint.graph import Graph, Node, read
from fewbit.said import said

TOKEN = re.compile(r"lint\d{6}")
INTEGER_OPS = re.compile(r"QLinear|QGemm|MatMulInteger|ConvInteger|MatMulNBits|QuantizeLinear$")
HELPERS = frozenset(("Transpose", "Reshape", "DequantizeLinear", "QuantizeLinear", "ReorderInput", "ReorderOutput", "Cast"))


@dataclass(frozen=True)
class Ran:
    """How a node ran: in integers or not, and by which kernel."""

    integer: bool
    kernel: str


def truth(path: Path, runtime: str) -> Mapping[int, Ran]:
    """Every computing node of a file, by index, as `runtime` runs it on this machine.

    A node that was removed or fused counts as the first later node that is still there.
    Raises BadFile where the runtime cannot run the file, UnknownName for other runtimes.
    """
    if runtime not in RAN:
        raise UnknownName("runtime to check with", runtime, tuple(RAN))
    graph = Graph(path)
    with tempfile.TemporaryDirectory() as folder:
        renamed = Path(folder) / "renamed.onnx"
        _rename(path, renamed)
        kernels = RAN[runtime](renamed)
    return {node.index: _follow(graph, node, kernels) for node in graph.computing}


def _rename(path: Path, out: Path) -> None:
    """The file with node i called lint<i> and its result j lint<i>.<j>; inputs and outputs of the model keep their names."""
    model = read(path)
    graph = model.graph
    keep = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}
    for i, node in enumerate(graph.node):
        node.name = f"lint{i:06d}"
        names |= {o: o if o in keep else f"lint{i:06d}.{j}" for j, o in enumerate(node.output) if o}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    del graph.value_info[:]
    onnx.save(model, str(out))


def _follow(graph: Graph, node: Node, kernels: Mapping[str, Ran]) -> Ran:
    """The kernel of a node, or of the first later node that is still there."""
    visited, queue = set(), [node]
    while queue:
        at = queue.pop(0)
        kernel = kernels.get(f"lint{at.index:06d}")
        if kernel is not None and (at is node or not at.moves):
            return kernel
        for reader in graph.consumers.get(at.outputs[0], ()):
            if reader.index not in visited:
                visited.add(reader.index)
                queue.append(reader)
    return Ran(False, "not found")


def _onnxruntime(path: Path) -> dict[str, Ran]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_name("profile"))
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {value.name: _zeros(value.shape, value.type) for value in session.get_inputs()}
        session.run(None, feeds)
    except Exception as error:
        raise BadFile(f"onnxruntime cannot run this file: {said(error, path)}") from error
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels: dict[str, Ran] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            op, inputs = event["args"]["op_name"], event["args"].get("input_type_shape", [])
            first = next(iter(inputs[0])) if inputs else ""
            integer = bool(INTEGER_OPS.search(op)) and op != "DequantizeLinear"
            integer = integer or (first in ("int8", "uint8") and op != "DequantizeLinear")
            kernels[event["name"].removesuffix("_kernel_time")] = Ran(integer, op)
    by_token: dict[str, Ran] = {}
    for node in onnx.load(str(path.with_name("optimised.onnx"))).graph.node:
        kernel = kernels.get(node.name)
        if kernel is None:
            continue
        helper = node.op_type in HELPERS
        for name in (node.name, *node.output):
            for token in TOKEN.findall(name):
                if token not in by_token or (by_token[token].kernel in HELPERS and not helper):
                    by_token[token] = kernel
    return by_token


def _zeros(shape: list[Any], kind: str) -> Any:
    dims = [dim if isinstance(dim, int) else 1 for dim in shape]
    types = {"float": np.float32, "float16": np.float16, "double": np.float64, "int64": np.int64, "int32": np.int32,
             "uint8": np.uint8, "int8": np.int8, "bool": np.bool_}  # fmt: skip
    return np.zeros(dims, types[kind.removeprefix("tensor(").removesuffix(")")])


def _openvino(path: Path) -> dict[str, Ran]:
    try:
        import openvino as ov
    except ImportError as error:
        raise BadFile("openvino is not installed: pip install 'fewbit[openvino]'.") from error

    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "SNIPPETS_MODE": "DISABLE"}
    core = ov.Core()
    try:
        compiled = core.compile_model(core.read_model(str(path)), "CPU", config)
    except Exception as error:
        raise BadFile(f"openvino cannot load this file: {str(error).strip().splitlines()[0]:.300}") from error
    by_token: dict[str, Ran] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind, precision, layers = (
            info[key].astype(str) if key in info else "" for key in ("layerType", "runtimePrecision", "originalLayersNames")
        )
        if kind in ("Const", "Reorder", "Convert"):
            continue
        kernel = Ran(precision in ("u8", "i8"), f"{kind} {precision}")
        for token in TOKEN.findall(layers):
            if token not in by_token or by_token[token].kernel.split()[0] in HELPERS:
                by_token[token] = kernel
    return by_token


RAN: Mapping[str, Callable[[Path], dict[str, Ran]]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
