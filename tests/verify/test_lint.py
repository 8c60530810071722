"""Lint's rules against what the runtimes really do: every case is built, predicted, loaded and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Captured, Realized
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from fewbit.cli import app
from fewbit.errors import BadFile, FewbitError
from fewbit.target import load_target
from fewbit.verify.lint import disagreements, lint, truth
from fewbit.verify.runtimes import runtime_names

ORT = load_target("ort-x86-vnni")
U8, S8, S16, S32 = np.uint8, np.int8, np.int16, np.int32


@dataclass
class Net:
    """A graph under construction; each method gives the name of a result. The input x is (batch, 4, 8, 8) or (batch, 5, 16)."""

    shape: tuple[int | str, ...] = ("batch", 4, 8, 8)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def const(self, value: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def q(self, x: str, zero: int = 128, dtype: type = U8, scale: float = 0.05) -> str:
        return self.node("QuantizeLinear", x, self.const(scale), self.const(zero, dtype))

    def dq(self, x: str, zero: int = 128, dtype: type = U8, scale: float = 0.05) -> str:
        return self.node("DequantizeLinear", x, self.const(scale), self.const(zero, dtype))

    def qdq(self, x: str, zero: int = 128, dtype: type = U8, scale: float = 0.05) -> str:
        return self.dq(self.q(x, zero, dtype, scale), zero, dtype, scale)

    def weight(self, *shape: int, dtype: type = S8, axis: int | None = 0) -> str:
        codes = self.const(np.random.default_rng(0).integers(-60, 60, shape).clip(np.iinfo(dtype).min), dtype)
        if axis is None:
            return self.dq(codes, 0, dtype, 0.01)
        scale, zero = np.full(shape[axis], 0.01), np.zeros(shape[axis])
        return self.node("DequantizeLinear", codes, self.const(scale), self.const(zero, dtype), axis=axis)

    def save(self, path: Path, *outputs: str, opset: int = 20) -> Path:
        dims = [f"d{i}" for i in range(len(self.shape))]
        made = [helper.make_tensor_value_info(o, TensorProto.FLOAT, dims) for o in outputs]
        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)]
        graph = helper.make_graph(self.nodes, "net", given, made, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.save(model, str(path))
        return path


def conv(net: Net, x: str, *bias: str, weight: str | None = None) -> str:
    return net.node("Conv", x, weight or net.weight(4, 4, 3, 3), *bias, pads=[1, 1, 1, 1])


def int_bias(net: Net) -> str:
    codes, scale = net.const([1, 2, 3, 4], S32), net.const(np.full(4, 0.0005))
    return net.node("DequantizeLinear", codes, scale, net.const(np.zeros(4), S32), axis=0)


def tokens() -> Net:
    return Net(("batch", 5, 16))


def fused_conv() -> tuple[Net, str]:
    net = Net()
    return net, net.qdq(conv(net, net.qdq("x"), int_bias(net)))


def open_conv() -> tuple[Net, str]:
    net = Net()
    return net, conv(net, net.qdq("x"))


def conv_with_addition() -> tuple[Net, str]:
    net = Net()
    return net, net.qdq(net.node("Add", conv(net, net.qdq("x")), net.const(np.ones((1, 4, 1, 1)))))


def conv_float_bias() -> tuple[Net, str]:
    net = Net()
    return net, net.qdq(conv(net, net.qdq("x"), net.const(np.ones(4))))


def conv_float_bias_open() -> tuple[Net, str]:
    net = Net()
    return net, conv(net, net.qdq("x"), net.const(np.ones(4)))


def conv_relu(zero: int) -> Callable[[], tuple[Net, str]]:
    def build() -> tuple[Net, str]:
        net = Net()
        return net, net.qdq(net.node("Relu", conv(net, net.qdq("x"))), zero)

    return build


def conv_two_readers() -> tuple[Net, str]:
    net = Net()
    made = conv(net, net.qdq("x"))
    return net, net.node("Sub", net.qdq(made), made)


def conv_other_type() -> tuple[Net, str]:
    net = Net()
    return net, net.qdq(conv(net, net.qdq("x")), 0, S8)


def conv_signed(readers: int) -> Callable[[], tuple[Net, str]]:
    def build() -> tuple[Net, str]:
        net = Net()
        x = net.qdq("x", 0, S8)
        made = net.qdq(conv(net, x), 0, S8)
        return net, made if readers == 1 else net.node("Sub", made, x)

    return build


def conv_float_weight() -> tuple[Net, str]:
    net = Net()
    return net, net.qdq(conv(net, net.qdq("x"), weight=net.const(np.ones((4, 4, 3, 3)))))


def transposed_conv() -> tuple[Net, str]:
    net = Net()
    return net, net.qdq(net.node("ConvTranspose", net.qdq("x"), net.weight(4, 4, 3, 3, axis=1)))


def product(*, quantized: bool) -> Callable[[], tuple[Net, str]]:
    def build() -> tuple[Net, str]:
        net = tokens()
        made = net.node("MatMul", net.qdq("x"), net.weight(16, 8, axis=1))
        return net, net.qdq(made) if quantized else made

    return build


def product_wide() -> tuple[Net, str]:
    net = tokens()
    return net, net.node("MatMul", net.qdq("x", 0, S16), net.weight(16, 8, axis=1, dtype=S16))


def product_weights_only() -> tuple[Net, str]:
    net = tokens()
    return net, net.node("MatMul", "x", net.weight(16, 8, axis=1))


def product_static() -> tuple[Net, str]:
    net = Net((2, 5, 16))
    made = net.node("MatMul", net.qdq("x"), net.weight(16, 8, axis=1))
    return net, net.node("Add", made, net.const(np.ones(8)))


def product_dynamic() -> tuple[Net, str]:
    net = tokens()
    made = net.node("MatMul", net.qdq("x"), net.weight(16, 8, axis=1))
    return net, net.node("Add", made, net.const(np.ones(8)))


def product_behind_moves() -> tuple[Net, str]:
    net = tokens()
    moved = net.node("Transpose", net.qdq("x"), perm=[0, 2, 1])
    return net, net.node("MatMul", moved, net.weight(5, 8, axis=1))


def two(op: str, second: type = U8) -> Callable[[], tuple[Net, str]]:
    def build() -> tuple[Net, str]:
        net = Net()
        left, right = net.qdq("x"), net.qdq(net.node("Abs", "x"), 0 if second is S8 else 128, second)
        return net, net.qdq(net.node(op, left, right, **({"axis": 1} if op == "Concat" else {})))

    return build


def one(op: str, *, behind: bool = True, zero: int = 128, **attributes: object) -> Callable[[], tuple[Net, str]]:
    def build() -> tuple[Net, str]:
        net = Net()
        made = net.node(op, net.qdq("x"), **attributes)
        return net, net.qdq(made, zero) if behind else made

    return build


POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
CASES = {
    "conv": (fused_conv, "Conv", True, "runs as QLinearConv"),
    "conv, float result": (open_conv, "Conv", False, "QLinearConv has no float result"),
    "conv, bias added behind it": (conv_with_addition, "Conv", False, "read by Add"),
    "conv, float bias": (conv_float_bias, "Conv", True, "runs as QLinearConv"),
    "conv, float bias and result": (conv_float_bias_open, "Conv", False, "the bias is float"),
    "conv, relu that the codes do": (conv_relu(0), "Conv", True, "Relu included"),
    "relu that the codes do": (conv_relu(0), "Relu", True, "removed"),
    "conv, relu that stays": (conv_relu(128), "Conv", False, "Relu"),
    "relu that stays": (conv_relu(128), "Relu", False, "reaches further"),
    "conv, result read twice": (conv_two_readers, "Conv", False, "nobody else"),
    "conv, another type behind": (conv_other_type, "Conv", True, "runs as QLinearConv"),
    "conv, signed": (conv_signed(1), "Conv", True, "runs as QLinearConv"),
    "conv, signed with two readers": (conv_signed(2), "Conv", False, "int8 codes with more than one reader"),
    "conv, float weight": (conv_float_weight, "Conv", True, "runs as QLinearConv"),
    "transposed conv": (transposed_conv, "ConvTranspose", False, "no integer kernel"),
    "product": (product(quantized=True), "MatMul", True, "runs as QLinearMatMul"),
    "product, float result": (product(quantized=False), "MatMul", True, "MatMulIntegerToFloat"),
    "product, weights only": (product_weights_only, "MatMul", True, "MatMulNBits"),
    "product and addition, batch fixed": (product_static, "MatMul", False, "Gemm"),
    "product and addition, batch dynamic": (product_dynamic, "MatMul", True, "MatMulIntegerToFloat"),
    "product behind a transpose": (product_behind_moves, "MatMul", True, "MatMulIntegerToFloat"),
    "add": (two("Add"), "Add", True, "QLinearAdd"),
    "mul": (two("Mul"), "Mul", True, "QLinearMul"),
    "concat": (two("Concat"), "Concat", True, "QLinearConcat"),
    "sub": (two("Sub"), "Sub", False, "no integer kernel"),
    "softmax": (one("Softmax"), "Softmax", True, "QLinearSoftmax"),
    "softmax, float result": (one("Softmax", behind=False), "Softmax", False, "needs one QuantizeLinear behind"),
    "sigmoid": (one("Sigmoid"), "Sigmoid", True, "QLinearSigmoid"),
    "gelu": (one("Gelu"), "Gelu", False, "no integer kernel"),
    "average": (one("GlobalAveragePool"), "GlobalAveragePool", True, "QLinearGlobalAveragePool"),
    "largest": (one("MaxPool", behind=False, **POOL), "MaxPool", True, "codes"),
    "largest, other zero point": (one("MaxPool", zero=7, **POOL), "MaxPool", False, "same scale"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rule_is_what_onnxruntime_does(tmp_path: Path, case: str) -> None:
    build, op, integer, words = CASES[case]
    net, output = build()
    path = net.save(tmp_path / "net.onnx", output)
    found = lint(path, ORT)
    row = next(row for row in found.rows if row.op == op)
    assert truth(path, "onnxruntime")[row.index].integer == integer, truth(path, "onnxruntime")[row.index]
    assert row.integer == integer, row
    assert words in row.rule
    assert disagreements(path, found, ORT) == []
