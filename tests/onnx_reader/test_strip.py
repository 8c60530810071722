"""Files of other tools without their Q/DQ nodes. Oracle: the same network with the numbers that its codes stand for."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from fewbit.errors import BadModel, FewbitError
from fewbit.load import load_model
from fewbit.onnx_reader import read_onnx
from fewbit.request import Request
from onnx_reader.test_files import SIZE, constant, drawn, net, of_runtime, written


def paired(node: onnx.NodeProto, place: int) -> list[onnx.NodeProto]:
    """QuantizeLinear and DequantizeLinear in front of an operand of a node."""
    name = node.input[place]
    node.input[place] = f"{name}.real"
    return [
        helper.make_node("QuantizeLinear", [name, "step", "middle"], [f"{name}.codes"], name=f"{name}.q"),
        helper.make_node("DequantizeLinear", [f"{name}.codes", "step", "middle"], [f"{name}.real"], name=f"{name}.dq"),
    ]


def in_codes(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A network with its weights as int8 codes and Q/DQ in front of its products, and the float network that it stands for."""
    quantized, exact = copy.deepcopy(model), copy.deepcopy(model)
    stored = {one.name: one for one in quantized.graph.initializer}
    floats = {one.name: one for one in exact.graph.initializer}
    front = []
    for name, axis in (("stem.weight", 0), ("head_weight", 1)):
        weight = numpy_helper.to_array(stored[name])
        codes = np.random.default_rng(0).integers(-100, 100, weight.shape).astype(np.int8)
        scale = np.linspace(0.001, 0.004, weight.shape[axis], dtype=np.float32)
        zero = np.arange(weight.shape[axis], dtype=np.int8)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        stored[name].CopyFrom(numpy_helper.from_array(codes, f"{name}.stored"))
        quantized.graph.initializer.extend([constant(f"{name}.scale", scale), constant(f"{name}.zero", zero, np.int8)])
        operands = [f"{name}.stored", f"{name}.scale", f"{name}.zero"]
        front.append(helper.make_node("DequantizeLinear", operands, [name], axis=axis))
        real = (codes.astype(np.float32) - zero.reshape(shape).astype(np.float32)) * scale.reshape(shape)
        floats[name].CopyFrom(numpy_helper.from_array(real, name))
    quantized.graph.initializer.extend([constant("step", 1.0), constant("middle", 128, np.uint8)])
    nodes = []
    for node in quantized.graph.node:
        nodes += [*(paired(node, 0) if node.op_type in ("Conv", "MatMul") else ()), node]
    del quantized.graph.node[:]
    quantized.graph.node.extend([*front, *nodes])
    return quantized, exact


def outputs(path: Path, images: np.ndarray, *, requantize: bool = False) -> np.ndarray:
    with torch.no_grad():
        return read_onnx(path, requantize=requantize).module(torch.from_numpy(images))["926"].numpy()


def test_what_is_left_is_the_network_of_the_numbers_that_the_codes_stand_for(tmp_path: Path) -> None:
    quantized, exact = in_codes(net())
    images = drawn(4, *SIZE)
    want = outputs(written(exact, tmp_path), images)
    path = written(quantized, tmp_path)
    assert np.abs(of_runtime(path, images) - want).max() > 1e-3  # activations were rounded there
    np.testing.assert_array_equal(outputs(path, images, requantize=True), want)
    loaded = load_model(str(path), requantize=True)
    assert loaded.notes == (f"{path} was quantized before; its weights keep the rounding that they have.",)


def test_codes_that_are_only_moved_and_an_output_of_codes(tmp_path: Path) -> None:
    quantized, exact = in_codes(net())
    (mean,) = [node for node in quantized.graph.node if node.op_type == "ReduceMean"]
    mean.output[0] = "mean"
    steps = (("QuantizeLinear", "mean", "a"), ("Unsqueeze", "a", "b"), ("Squeeze", "b", "c"), ("DequantizeLinear", "c", "926"))
    for kind, source, result in steps:
        extra = ["step", "middle"] if kind.endswith("Linear") else ["axes"]
        quantized.graph.node.append(helper.make_node(kind, [source, *extra], [result]))
    quantized.graph.initializer.append(constant("axes", [1], np.int64))
    images = drawn(4, *SIZE)
    want = outputs(written(exact, tmp_path), images)
    np.testing.assert_array_equal(outputs(written(quantized, tmp_path), images, requantize=True), want)


@pytest.mark.parametrize("shared", [False, True])
def test_codes_that_nodes_unpack_are_computed_first(tmp_path: Path, shared: bool) -> None:
    """Two codes of 4 bits in a byte, taken out with a table, as fewbit's files for openvino hold them; once with another reader
    of the codes than the DequantizeLinear.
    """
    quantized, exact = in_codes(net())
    graph = quantized.graph
    (stored,) = [one for one in graph.initializer if one.name == "stem.weight.stored"]
    (scale,) = [one for one in graph.initializer if one.name == "stem.weight.scale"]
    (zero,) = [one for one in graph.initializer if one.name == "stem.weight.zero"]
    (real,) = [one for one in exact.graph.initializer if one.name == "stem.weight"]
    column = [-1, *[1] * (len(stored.dims) - 1)]
    codes = np.random.default_rng(1).integers(-8, 8, tuple(stored.dims)).astype(np.int8)
    steps, middles = (numpy_helper.to_array(one).astype(np.float32).reshape(column) for one in (scale, zero))
    real.CopyFrom(numpy_helper.from_array((codes - middles) * steps, "stem.weight"))
    pairs = (codes.reshape(-1, 2) + 8).astype(np.uint8)
    table = np.stack((np.arange(256) % 16 - 8, np.arange(256) // 16 - 8), 1).astype(np.int8)
    graph.initializer.remove(stored)
    graph.initializer.extend(
        [
            constant("table", table, np.int8),
            constant("bytes", pairs[:, 0] + 16 * pairs[:, 1], np.uint8),
            constant("whole", codes.shape, np.int64),
        ]
    )
    unpack = [
        helper.make_node("Cast", ["bytes"], ["places"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "places"], ["two"]),
        helper.make_node("Reshape", ["two", "whole"], ["stem.weight.stored"]),
    ]
    nodes = [*unpack, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    if shared:
        for model, name in ((quantized, "two"), (exact, "codes")):
            (last,) = [node for node in model.graph.node if "926" in node.output]
            last.output[0] = "before"
            last.name = "last"
            model.graph.node.extend(
                [
                    helper.make_node("Cast", [name], ["of codes"], to=TensorProto.FLOAT),
                    helper.make_node("ReduceMean", ["of codes"], ["mean of codes"], keepdims=0),
                    helper.make_node("Add", ["before", "mean of codes"], ["926"]),
                ]
            )
        exact.graph.initializer.append(constant("codes", codes, np.int8))
    images = drawn(4, *SIZE)
    want = of_runtime(written(exact, tmp_path), images)
    path = written(quantized, tmp_path)
    assert np.abs(of_runtime(path, images) - want).max() > 1e-3  # activations were rounded there
    np.testing.assert_allclose(outputs(path, images, requantize=True), want, rtol=1e-4, atol=1e-5)


class Reader(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.batches = iter([{"in:put": images}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_a_file_of_onnxruntimes_quantizer(tmp_path: Path, form: QuantFormat) -> None:
    model = net()
    source, path, images = written(model, tmp_path), tmp_path / "quantized.onnx", drawn(4, *SIZE)
    quantize_static(source, path, Reader(images), quant_format=form, per_channel=True, weight_type=QuantType.QInt8)
    with pytest.raises(BadModel, match=r"is quantized already: .* --requantize takes QuantizeLinear and DequantizeLinear out"):
        read_onnx(path)
    if form == QuantFormat.QOperator:
        with pytest.raises(BadModel, match="computes with codes; give the float file"):
            read_onnx(path, requantize=True)
        return
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "Relu"]  # a range that begins at 0 stands for it
    want = of_runtime(source, images)
    assert np.abs(outputs(path, images, requantize=True) - want).max() < 0.02 * np.abs(want).max()  # 8 bits of weights


def test_what_there_is_nothing_to_take_out_of_and_codes_from_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"it is a float file\. Leave out --requantize"):
        read_onnx(written(net(), tmp_path), requantize=True)
    model = net()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.initializer.extend([constant("step", 0.05), constant("middle", 128, np.uint8)])
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["in:put", "step", "middle"], ["real"], name="first"))
    model.graph.node[1].input[0] = "real"
    with pytest.raises(BadModel, match=r"node 'first' .* reads codes that no QuantizeLinear writes"):
        read_onnx(written(model, tmp_path), requantize=True)
    with pytest.raises(FewbitError, match="--requantize is for an ONNX file, and demo is none; leave it out"):
        Request(model="demo", requantize=True)


def test_codes_whose_type_is_an_attribute_have_the_range_of_that_type(tmp_path: Path) -> None:
    """Opset 21: without a zero point `output_dtype` says int8."""
    exact = net(opset=21)
    mean = exact.graph.node[-1]
    mean.attribute.remove(next(one for one in mean.attribute if one.name == "axes"))  # an input since opset 18
    mean.input.append("axes")
    exact.graph.initializer.extend([constant("axes", [1], np.int64), constant("step", 0.01)])
    quantized = copy.deepcopy(exact)
    front = [
        helper.make_node("QuantizeLinear", ["in:put", "step"], ["codes"], name="q", output_dtype=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["codes", "step"], ["real"], name="dq"),
    ]
    quantized.graph.node[0].input[0] = "real"
    for node in reversed(front):
        quantized.graph.node.insert(0, node)
    images = drawn(2, *SIZE)
    want = outputs(written(exact, tmp_path), np.clip(images, -1.28, 1.27))
    got = outputs(written(quantized, tmp_path), images, requantize=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_runtime(tmp_path / "model.onnx", images), want, atol=0.1)
