"""Lint's rules against what the runtimes really do: every case is built, predicted, loaded and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from typer.testing import CliRunner

from conftest import Captured, Realized
from fewbit import quantize
from fewbit.choose import Bits
from fewbit.cli import app
from fewbit.deploy.python.session import session
from fewbit.errors import BadFile, FewbitError
from fewbit.lint import disagreements, lint, truth
from fewbit.lint.truth import RAN
from fewbit.realize import realize
from fewbit.runtimes import RUNNABLE, open_session, runtime_names
from fewbit.target import load_target

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


def on(runtime: str, base: str = "ort-x86-vnni") -> object:
    """A shipped target under the name of another runtime."""
    return load_target(base).model_copy(update={"runtime": runtime, "name": runtime})


@pytest.mark.parametrize("net", [pytest.param("conv_net", marks=pytest.mark.slow), "vit"])
@pytest.mark.parametrize(
    ("made_for", "runs_on"),
    [
        ("ort-x86-vnni", "ort-x86-vnni"),
        ("openvino-x86", "openvino-x86"),
        pytest.param("ort-x86-vnni", "openvino-x86", marks=pytest.mark.slow),
        pytest.param("openvino-x86", "ort-x86-vnni", marks=pytest.mark.slow),
    ],
)
def test_prediction_and_truth_agree_on_files_of_fewbit(
    request: pytest.FixtureRequest, realized: Callable[..., Realized], net: str, made_for: str, runs_on: str
) -> None:
    target = load_target(runs_on)
    if target.runtime not in runtime_names():
        pytest.skip(f"{target.runtime} is not installed")
    made = realized(request.getfixturevalue(net), made_for, everything=True)
    found = lint(made.path, target)
    assert disagreements(made.path, found, target) == []
    if made_for == runs_on:
        assert found.integer_share == 1
        assert (found.idle_pairs, found.idle_weights) == (0, 0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("net", [pytest.param("realized_conv_net", marks=pytest.mark.slow), "realized_vit"])
def test_prediction_and_truth_agree_on_files_of_onnxruntimes_own_quantizer(
    request: pytest.FixtureRequest, tmp_path: Path, net: str, signed: bool
) -> None:
    class Reader(CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{"images": np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    path, kind = tmp_path / "static.onnx", QuantType.QInt8 if signed else QuantType.QUInt8
    quantize_static(
        str(request.getfixturevalue(net).float_path), str(path), Reader(), per_channel=not signed,
        activation_type=kind, weight_type=QuantType.QInt8,
    )  # fmt: skip
    found = lint(path, ORT)
    assert found.pairs > 5
    assert disagreements(path, found, ORT) == []


def test_convolutions_made_for_openvino_are_float_in_onnxruntime_and_lint_says_why(
    conv_net: Captured, realized: Callable[..., Realized]
) -> None:
    found = lint(realized(conv_net, "openvino-x86").path, ORT)
    convolutions = [row for row in found.rows if row.op == "Conv"]
    assert len(convolutions) == 4
    for row in convolutions:
        assert not row.integer
        assert "QLinearConv has no float result" in row.rule or "stands between" in row.rule or "read by" in row.rule
        assert row.change
    assert [row.op for row in found.rows if row.integer] == ["MatMul"]
    assert found.integer_share < 0.1
    assert found.idle_pairs == found.pairs - 1
    assert found.idle_weights == 4


def test_multiply_accumulates_are_counted(tmp_path: Path) -> None:
    net, output = fused_conv()
    assert lint(net.save(tmp_path / "a.onnx", output), ORT).rows[0].macs == 4 * 8 * 8 * 4 * 3 * 3
    net, output = product(quantized=False)()
    assert lint(net.save(tmp_path / "b.onnx", output), ORT).rows[0].macs == 5 * 16 * 8


def symmetric(dtype: type, zero: int, width: int = 16) -> tuple[Net, str]:
    net = Net(("batch", 5, width))
    return net, net.node("MatMul", net.qdq("x", zero, dtype), net.weight(width, 32, axis=1))


@pytest.mark.parametrize(
    ("dtype", "zero", "width", "words"),
    [(S8, 0, 16, ""), (S8, 3, 16, "symmetric only"), (U8, 128, 16, "takes int8"), (S8, 0, 8, "16 at least")],
)
def test_tensorrt(tmp_path: Path, dtype: type, zero: int, width: int, words: str) -> None:
    net, output = symmetric(dtype, zero, width)
    row = lint(net.save(tmp_path / "net.onnx", output), on("tensorrt")).rows[0]
    assert row.integer == (not words)
    assert words in row.rule


@pytest.mark.parametrize(("dtype", "zero", "words"), [(U8, 7, ""), (S8, 0, "not unsigned"), (S16, 0, "int16 codes")])
def test_a_machine_that_only_its_file_describes(tmp_path: Path, dtype: type, zero: int, words: str) -> None:
    net, output = symmetric(dtype, zero)
    row = lint(net.save(tmp_path / "net.onnx", output), on("other")).rows[0]
    assert row.integer == (not words)
    assert words in row.rule


def test_on_arm_signed_codes_need_signed_weights(tmp_path: Path) -> None:
    target = ORT.model_copy(update={"machine": "aarch64"})
    for weight, integer in ((S8, True), (U8, False)):
        net = tokens()
        made = net.node("MatMul", net.qdq("x", 0, S8), net.weight(16, 8, axis=1, dtype=weight))
        row = lint(net.save(tmp_path / "net.onnx", made), target).rows[0]
        assert row.integer == integer
        assert integer or "int8 weights" in row.rule


def test_a_runtime_without_rules_is_named(tmp_path: Path) -> None:
    net, output = fused_conv()
    with pytest.raises(FewbitError, match=r"no rules for runtime 'abacus'.*onnxruntime, openvino, other, tensorrt"):
        lint(net.save(tmp_path / "net.onnx", output), on("abacus"))


def test_every_runtime_that_runs_here_is_looked_at_and_deployed(tmp_path: Path) -> None:
    assert set(RAN) == set(RUNNABLE)
    net, output = fused_conv()
    path, x = net.save(tmp_path / "net.onnx", output), {one.name: one for one in onnx.load(tmp_path / "net.onnx").graph.input}
    feeds = {name: np.ones([size.dim_value for size in one.type.tensor_type.shape.dim], np.float32) for name, one in x.items()}
    for runtime in runtime_names():
        (mine,) = session(path, [output], runtime)(feeds)
        (theirs,) = open_session(runtime, path).run(*feeds.values()).values()
        assert np.array_equal(mine, theirs)


def test_a_file_that_is_no_onnx(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(BadFile, match="not an ONNX file"):
        lint(tmp_path / "a.onnx", ORT)
    with pytest.raises(BadFile, match="does not exist"):
        lint(tmp_path / "b.onnx", ORT)


def test_the_command(tmp_path: Path) -> None:
    net, output = open_conv()
    path, found = str(net.save(tmp_path / "net.onnx", output)), tmp_path / "lint.json"
    run = CliRunner().invoke
    good = run(app, ["lint", path, "--target", "ort-x86-vnni", "--check", "--json", str(found)])
    assert good.exit_code == 0, good.output
    assert "onnxruntime runs 1 of 1 nodes as predicted" in good.output
    assert '"integer_share": 0' in found.read_text()
    assert run(app, ["lint", path, "--target", "ort-x86-vnni", "--min-integer", "0.9"]).exit_code == 1
    assert run(app, ["lint", path, "--target", "abacus"]).exit_code == 2
    assert run(app, ["lint", str(tmp_path / "none.onnx"), "--target", "ort-x86-vnni"]).exit_code == 2


@pytest.mark.parametrize(
    ("made", "target", "says"),
    [
        ('{"target": "openvino-x86"}', "openvino-x86", "openvino-x86 is the one that the file says it was made for"),
        ('{"target": "ort-x86-vnni"}', "ort-x86-vnni", "ort-x86-vnni is the one that the file says it was made for"),
        ("[1]", "ort-arm64", "ort-arm64 is the one that fits this machine"),
        ("{}", "ort-arm64", "ort-arm64 is the one that fits this machine"),
        (None, "ort-arm64", "ort-arm64 is the one that fits this machine"),
    ],
)
def test_without_a_target_the_one_that_the_file_was_made_for_is_taken(made, target, says, tmp_path, monkeypatch) -> None:
    """Oracle: what lint says where that target is named; a convolution without a QuantizeLinear behind it is in integers in
    openvino alone.
    """
    monkeypatch.setattr("fewbit.target.detect", lambda: "ort-arm64")
    net, output = open_conv()
    path = net.save(tmp_path / "net.onnx", output)
    if made is not None:
        model = onnx.load(str(path))
        model.metadata_props.add(key="fewbit.made", value=made)
        onnx.save(model, str(path))
    chosen, asked = (CliRunner().invoke(app, ["lint", str(path), *more]) for more in ((), ("--target", target)))
    assert (chosen.exit_code, asked.exit_code) == (0, 0)
    assert f"No --target was given: {says}." in chosen.output
    assert chosen.output.replace(f"No --target was given: {says}.\n", "") == asked.output
    assert ("100.0 % of" in chosen.output) == (target == "openvino-x86")


def test_a_file_that_was_made_for_a_target_of_somebody_asks_for_its_file(tmp_path) -> None:
    net, output = open_conv()
    path = net.save(tmp_path / "net.onnx", output)
    model = onnx.load(str(path))
    model.metadata_props.add(key="fewbit.made", value='{"target": "my-chip"}')
    onnx.save(model, str(path))
    done = CliRunner().invoke(app, ["lint", str(path)])
    assert done.exit_code == 2
    assert isinstance(done.exception, FewbitError) or "made for my-chip" in done.output


SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models").exists(), reason="needs ../shared/models beside the checkout")
@pytest.mark.parametrize("made_for", ["ort-x86-vnni", "openvino-x86"])
@pytest.mark.parametrize(
    ("model", "images"),
    [("demo", None), ("demo:resnet20", None), ("vit_s14_tiny200", "tiny200/val"), ("efficientnet_lite0", "ilsvrc_val")],
)
def test_prediction_and_truth_agree_on_whole_models(tmp_path: Path, model: str, images: str | None, made_for: str) -> None:
    source = model if images is None else f"{SHARED}/models/{model}.py:model"
    found = None if images is None else str(SHARED / "data" / images)
    options = {"recipe": "minmax", "calibration": 8, "scored": 8, "labels": False, "threads": 1}
    quantize(source, found, target=made_for, out=tmp_path / "run", **options)
    for name in ("ort-x86-vnni", "openvino-x86"):
        target = load_target(name)
        found = lint(tmp_path / "run/model.onnx", target)
        if any("onnxruntime's own" in row.rule for row in found.rows):  # a transformer's file for onnxruntime
            with pytest.raises(FewbitError, match="which openvino does not compute as that one does"):
                disagreements(tmp_path / "run/model.onnx", found, target)
        else:
            assert disagreements(tmp_path / "run/model.onnx", found, target) == []


@pytest.mark.parametrize("net", ["conv_net", pytest.param("vit", marks=pytest.mark.slow)])
def test_prediction_and_truth_agree_where_codes_have_fewer_bits_than_their_bytes(
    request: pytest.FixtureRequest, tmp_path: Path, net: str
) -> None:
    target = load_target("openvino-x86")
    if target.runtime not in runtime_names():
        pytest.skip(f"{target.runtime} is not installed")
    made = request.getfixturevalue(net)
    realize(made.graph, made.plan(target.name, bits=Bits(5, 5)), tmp_path / "model.onnx", **target.file_format)
    found = lint(tmp_path / "model.onnx", target)
    assert sum(row.op == "Clip" for row in found.rows) > 2
    assert disagreements(tmp_path / "model.onnx", found, target) == []


@pytest.mark.slow
def test_a_fused_file_has_the_multiplications_of_the_one_with_standard_nodes(vit: Captured, tmp_path: Path) -> None:
    plan = vit.plan(ORT.name, everything=False)
    found = {}
    for name, fuse in (("standard", ()), ("fused", ORT.fuse)):
        path = tmp_path / f"{name}.onnx"
        realize(vit.graph, plan, path, opset=ORT.opset, fuse=fuse)
        found[name] = lint(path, ORT)
        assert not disagreements(path, found[name], ORT)
    macs = {name: sum(row.macs for row in rows.rows) for name, rows in found.items()}
    assert macs["fused"] == macs["standard"] == vit.graph.macs
    assert found["fused"].integer_share == pytest.approx(found["standard"].integer_share)
    assert found["fused"].integer_share < 1  # attention is float
    elsewhere = [
        row for row in lint(tmp_path / "fused.onnx", load_target("openvino-x86")).rows if "onnxruntime's own" in row.rule
    ]
    assert {row.op for row in elsewhere} == {"MatMulIntegerToFloat", "QAttention"}
    target = load_target("openvino-x86")
    with pytest.raises(FewbitError, match=r"own \(MatMulIntegerToFloat, QAttention\), which openvino does not compute"):
        disagreements(tmp_path / "fused.onnx", lint(tmp_path / "fused.onnx", target), target)


def test_what_is_no_file_that_lint_reads_says_what_to_type(tmp_path: Path) -> None:
    target, junk = load_target("ort-x86-vnni"), tmp_path / "junk.onnx"
    with pytest.raises(BadFile, match=r"is a folder; lint reads one ONNX file, .* fewbit lint .*model\.onnx"):
        lint(tmp_path, target)
    junk.write_text("junk")
    with pytest.raises(BadFile, match=r"junk\.onnx is not an ONNX file that lint can read: .*\. Give an ONNX file"):
        lint(junk, target)
