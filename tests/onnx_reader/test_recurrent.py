"""LSTM, GRU and RNN in ONNX files: each as onnxruntime runs it, and a recogniser of text with one between its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bench.ablations import ABLATIONS
from onnx import TensorProto, helper, numpy_helper

from fewbit.capture import capture
from fewbit.choose import Context, choose
from fewbit.errors import BadModel
from fewbit.load import load_model
from fewbit.observe import observe
from fewbit.onnx_reader import read_onnx
from fewbit.realize import float_onnx, realize
from fewbit.target import allowed, load_target
from fewbit.verify import compare
from onnx_reader.cases import module_of, run
from onnx_reader.test_microsoft import drawn, of_runtime
from onnx_reader.test_tail import outputs_of, ports_of

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
TIME, BATCH, INPUTS, HIDDEN = 5, 2, 3, 4
WAYS = [(op, {}) for op in GATES] + [("GRU", {"linear_before_reset": 1}), ("RNN", {"activations": ["Relu"]})]


def alone(op: str, given: dict[str, Any], *, optional: bool = True) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """A model of one node that gives all that it can, and what it reads: the rest are constants."""
    ways = 2 if given.get("direction") == "bidirectional" else 1
    if ways == 2 and "activations" in given:
        given = {**given, "activations": 2 * given["activations"]}
    rows = GATES[op] * HIDDEN
    stored = {"w": drawn(ways, rows, INPUTS), "r": drawn(ways, rows, HIDDEN)}
    if optional:
        stored |= {"b": drawn(ways, 2 * rows), "h": drawn(ways, BATCH, HIDDEN)}
        stored |= {"c": drawn(ways, BATCH, HIDDEN)} if op == "LSTM" else {}
    names = ["x", "w", "r", *(["b", "steps", "h", "c"] if optional else [])][: 7 if op == "LSTM" else 6]
    out = ["y", "y_h", "y_c"][: 3 if op == "LSTM" else 2]
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    tensors += [numpy_helper.from_array(np.full(BATCH, TIME, dtype=np.int32), "steps")] if optional else []
    graph = helper.make_graph(
        [helper.make_node(op, names, out, "/cell", hidden_size=HIDDEN, **given)], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [TIME, BATCH, INPUTS])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in out], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), [drawn(TIME, BATCH, INPUTS)]


@pytest.mark.parametrize("optional", [True, False], ids=["all inputs", "few inputs"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op", "given"), WAYS, ids=str)
def test_a_recurrent_node_computes_what_onnxruntime_does(
    op: str, given: dict[str, Any], direction: str, optional: bool
) -> None:  # fmt: skip
    model, inputs = alone(op, {**given, "direction": direction}, optional=optional)
    for got, want in zip(run(model, inputs)[2], of_runtime(model, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def with_peepholes(model: onnx.ModelProto) -> None:
    model.graph.node[0].input.append("p")
    model.graph.initializer.append(numpy_helper.from_array(drawn(1, 3 * HIDDEN), "p"))


def with_fewer_steps(model: onnx.ModelProto) -> None:
    steps = next(one for one in model.graph.initializer if one.name == "steps")
    steps.CopyFrom(numpy_helper.from_array(np.array([TIME, TIME - 1], dtype=np.int32), "steps"))


def with_attribute(name: str, value: object) -> Any:
    return lambda model: model.graph.node[0].attribute.append(helper.make_attribute(name, value))


OTHERS = {
    "clip": ("LSTM", with_attribute("clip", 2.0), "with clip 2"),
    "activations": ("GRU", with_attribute("activations", ["HardSigmoid", "Tanh"]), "with activations HardSigmoid, Tanh"),
    "gates": ("LSTM", with_attribute("input_forget", 1), "with input_forget"),
    "peepholes": ("LSTM", with_peepholes, "peepholes"),
    "steps": ("LSTM", with_fewer_steps, r"sequence_lens are \[5, 4\], and only all 5 steps"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_recurrent_node_that_torch_has_not_is_refused(name: str) -> None:
    op, edit, message = OTHERS[name]
    model, inputs = alone(op, {})
    edit(model)
    with pytest.raises(BadModel, match=rf"node {op} '/cell' .* cannot be run: .*{message}"):
        module_of(model, {})(*map(torch.from_numpy, inputs))


def recogniser(op: str, batch: object, folder: Path, **given: Any) -> Path:
    """Two convolutions, their mean over the height, a recurrent layer over the 8 columns, time first, and a linear layer."""
    rows = GATES[op] * 5
    weights = {
        "v": 0.5 * drawn(6, 1, 3, 3), "u": 0.3 * drawn(6, 6, 3, 3), "w": 0.4 * drawn(2, rows, 6), "r": 0.4 * drawn(2, rows, 5),
        "head": drawn(10, 7),
    }  # fmt: skip
    start = [batch] if isinstance(batch, int) else []
    weights |= {"h": np.zeros((2, 1, 5), np.float32)} if start else {}
    nodes = [
        helper.make_node("Conv", ["image", "v"], ["a"], "/stem", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "/relu"),
        helper.make_node("Conv", ["b", "u"], ["c"], "/second", pads=[1] * 4),
        helper.make_node("ReduceMean", ["c"], ["d"], "/mean", axes=[2], keepdims=0),
        helper.make_node("Transpose", ["d"], ["e"], "/columns", perm=[2, 0, 1]),
        helper.make_node(
            op, ["e", "w", "r", *(["", "", "h"] if start else [])], ["f"], "/cell", direction="bidirectional", hidden_size=5,
            **given,
        ),
        helper.make_node("Transpose", ["f"], ["g"], "/ways", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["g", "joined"], ["i"], "/joined"),
        helper.make_node("Transpose", ["i"], ["j"], "/rows", perm=[1, 0, 2]),
        helper.make_node("MatMul", ["j", "head"], ["letters"], "/head"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 1, 8, 16])],
        [helper.make_tensor_value_info("letters", TensorProto.FLOAT, [batch, 8, 7])],
        [numpy_helper.from_array(np.float32(value), name) for name, value in weights.items()]
        + [numpy_helper.from_array(np.array([0, 0, -1]), "joined")],
    )  # fmt: skip
    path = folder / "given.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def work(op: str) -> int:
    """Products of the recurrent layer for one image: both ways, 8 steps."""
    return 2 * 8 * GATES[op] * 5 * (6 + 5)


@pytest.mark.parametrize("batch", ["N", 1])
@pytest.mark.parametrize(("op", "given"), [("LSTM", {}), ("GRU", {"linear_before_reset": 1})], ids=["LSTM", "GRU"])
def test_a_recogniser_is_quantized_about_its_recurrent_layer(
    op: str, given: dict[str, Any], batch: object, tmp_path: Path, ort_target: str
) -> None:  # fmt: skip
    path, out = recogniser(op, batch, tmp_path, **given), tmp_path / "out.onnx"
    loaded, images = load_model(str(path)), torch.from_numpy(drawn(4, 1, 8, 16))
    assert loaded.batch is None if batch == "N" else loaded.tail is None
    graph, target = capture(loaded), load_target(ort_target)
    (product,) = graph.float_products
    assert (product.function, product.macs) == (op.lower(), work(op))
    assert graph.macs == work(op) + sum(one.macs for one in graph.ops)
    (fallback,) = (one for one in allowed(graph, target).fallbacks if op.lower() in one.why)
    assert fallback.macs_share == work(op) / graph.macs
    float_onnx(graph, tmp_path / "float.onnx", opset=20)
    assert ports_of(tmp_path / "float.onnx") == ports_of(path)
    for image in images.split(1):
        for a, b in zip(
            outputs_of(path, image=image.numpy()), outputs_of(tmp_path / "float.onnx", image=image.numpy()), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    plan = choose(Context(graph, observe(graph, images.split(1)), target, images=images.split(1)), ABLATIONS["minmax"])
    realize(graph, plan, out, **target.file_format)
    assert ports_of(out) == ports_of(path)
    assert op in {node.op_type for node in onnx.load(out).graph.node}
    checks = compare(graph, plan, out, images.split(1), runtime="onnxruntime")
    assert (len(plan.integer_ops), list(checks.wrong), [one for one in checks.outputs if one.wrong]) == (3, [], [])


def test_a_recurrent_layer_of_another_kind_is_carried_or_named(tmp_path: Path) -> None:
    """Behind the layers it stays as it is; between them it is refused, with what it has that torch has not."""
    path = recogniser("LSTM", "N", tmp_path, clip=3.0)
    with pytest.raises(BadModel, match=r"between its layers: LSTM '/cell' \(opset 17\) with clip 3\. "):
        read_onnx(path)
    model = onnx.load(path)
    del model.graph.node[-1]
    model.graph.output[0].name, model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = "j", 10
    onnx.save(model, path)
    tail = read_onnx(path).tail
    assert tail is not None
    assert {"/columns", "/cell"} <= {row["node"] for row in tail.nodes}
