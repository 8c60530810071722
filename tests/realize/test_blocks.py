"""Files with weights in blocks. Oracles: onnx's reference evaluator, bytes counted by hand, numpy, the simulation."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

from fewbit.choose import Bits
from fewbit.core.grid import values
from fewbit.execute.simulate import simulate
from fewbit.realize import load_plan, realize, save_plan
from fewbit.runtimes import OnnxRuntime, OpenVino, runtime_names
from fewbit.target import load_target
from fewbit.target.load import HERE
from fewbit.verify.compare import compare, kernels

needs_openvino = pytest.mark.skipif("openvino" not in runtime_names(), reason="openvino is not installed")


class Mlp(nn.Module):
    """Patches of 48 numbers, which blocks of 32 do not divide, a wide layer and a narrow one."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.fc1, self.fc2 = nn.Conv2d(3, 64, 4, 4), nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(self.patch(x).flatten(2).transpose(1, 2)))).mean(1)


@pytest.fixture(scope="module")
def mlp(capture_net):
    torch.manual_seed(0)
    return capture_net(Mlp())


@pytest.fixture(scope="module")
def made(mlp, tmp_path_factory):
    """The plan and the file of the net on a target, once for this module."""
    cache = {}

    def build(target: str, bits: int = 4):
        if (target, bits) not in cache:
            plan = mlp.plan(target, bits=Bits(bits, 8))
            path = tmp_path_factory.mktemp("blocks") / "model.onnx"
            realize(mlp.graph, plan, path, **load_target(target).file_format)
            cache[target, bits] = plan, path
        return cache[target, bits]

    return build


def test_the_file_holds_the_codes_and_the_steps_of_the_plan_in_4_bits(made):
    plan, path = made("ort-x86-w4")
    graph = onnx.load(str(path)).graph
    stored = {t.name: t for t in graph.initializer}
    reads = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for name in ("fc1", "fc2"):
        choice, codes = plan.choices[f"{name}:weight"], stored[f"{name}__weight"]
        assert codes.data_type == TensorProto.INT4
        assert len(codes.raw_data) == choice.codes.numel() // 2
        np.testing.assert_array_equal(numpy_helper.to_array(codes).astype(int), choice.codes.t().numpy())
        node = reads[codes.name]
        assert {a.name: a.i for a in node.attribute} == {"axis": 0, "block_size": 32}
        np.testing.assert_array_equal(numpy_helper.to_array(stored[node.input[1]]), choice.qparams.scale.t().numpy())


def test_onnx_itself_gives_the_real_numbers_of_the_plan(made, mlp):
    plan, path = made("ort-x86-w4")
    model = onnx.load(str(path))
    for node in [node for node in model.graph.node if node.op_type == "DequantizeLinear"]:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    names = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    part = onnx.helper.make_graph(nodes, "weights", [], [onnx.helper.make_empty_tensor_value_info(n) for n in names.values()],
                                  model.graph.initializer)  # fmt: skip
    found = ReferenceEvaluator(onnx.helper.make_model(part, opset_imports=model.opset_import)).run(None, {})
    for value, stored in zip(found, names, strict=True):
        choice = plan.choices[stored.replace("__", ":")]
        np.testing.assert_array_equal(value, values(choice.codes.int(), choice.qparams, choice.grid).t().numpy())


def test_weights_alone_run_as_matmulnbits_and_as_written_give_the_simulation(made, mlp):
    plan, path = made("ort-x86-w4")
    found = kernels(plan, path)
    assert (found["expected"], found["found"], found["ops"]["MatMulNBits"]) == (3, 3, 3)
    expected = simulate(mlp.graph, plan)(mlp.images).detach().numpy()
    written = OnnxRuntime(path, optimise=False).run(mlp.images.numpy())["logits"]
    np.testing.assert_allclose(written, expected, atol=1e-6)
    shipped = OnnxRuntime(path).run(mlp.images.numpy())["logits"]  # rounds what it reads to 8 bits
    assert 0 < np.abs(shipped - expected).max() < 0.03 * np.abs(expected).max()


def test_a_code_that_was_changed_in_the_file_is_caught(made, mlp, tmp_path):
    plan, path = made("ort-x86-w4")
    checks = compare(mlp.graph, plan, path, [mlp.images])
    assert [check.site for check in checks.weights] == ["patch:weight", "fc1:weight", "fc2:weight"]  # in the order of the graph
    codes = plan.choices["fc2:weight"].codes.clone()
    codes[3, 5] += 1 if codes[3, 5] < 0 else -1
    changed = dataclasses.replace(plan.choices["fc2:weight"], codes=codes)
    other = dataclasses.replace(plan, choices={**plan.choices, "fc2:weight": changed})
    (wrong,) = compare(mlp.graph, other, path, [mlp.images]).wrong
    assert (wrong.site, wrong.wrong, wrong.max_difference) == ("fc2:weight", 1, 1)


@needs_openvino
def test_openvino_keeps_the_weights_in_4_bits(made, mlp):
    plan, path = made("openvino-x86-w4")
    session = OpenVino(path)
    assert session.precisions()["FullyConnected i4"] == 3
    expected = simulate(mlp.graph, plan)(mlp.images).detach().numpy()
    assert np.abs(session.run(mlp.images.numpy())["logits"] - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [3, 4])
def test_multiples_run_in_int8_kernels_and_give_the_codes_of_the_simulation(made, mlp, bits, ort_target):
    if ort_target != "ort-x86-vnni" and bits == 4:
        pytest.skip("no VNNI: sums of two products with codes of up to 7 * 15 saturate in 16 bits")
    plan, path = made("ort-x86-block", bits)
    checks = compare(mlp.graph, plan, path, [mlp.images])
    assert not checks.wrong
    assert checks.kernels["ops"]["MatMulIntegerToFloat"] == 3
    stored = OnnxRuntime(path, optimise=False, outputs=["fc1__weight"]).run(mlp.images.numpy())["fc1__weight"]
    choice = plan.choices["fc1:weight"]
    step = choice.qparams.scale.amax(1) / 16
    times = (choice.qparams.scale / step[:, None]).round().int().repeat_interleave(32, 1)
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored, (choice.codes * times).t().numpy())


def test_a_weight_takes_its_bits_and_4_for_each_block(made):
    _, path = made("ort-x86-block")
    graph = onnx.load(str(path)).graph
    stored = {t.name: numpy_helper.to_array(t).nbytes for t in graph.initializer}
    parts = {name: size for name, size in stored.items() if name.startswith("fc1__weight")}
    assert parts == {"fc1__weight.bits4": 64 * 96 // 2, "fc1__weight.multiples.bits4": 64 // 32 * 96 // 2}
    (node,) = [n for n in graph.node if "fc1__weight" in n.input]  # its inputs: codes, then steps, no zero points, and a bias
    assert [stored.get(node.input[i]) for i in (3, 5, 6)] == [96 * 4, None, 96 * 4]


def test_quantized_activations_and_steps_of_blocks_run_as_written(mlp, tmp_path):
    """W4A8 with any step for a block: onnxruntime has no integer kernel and computes it in float from the codes."""
    text = (HERE / "ort-x86-w4.toml").read_text()
    text = text.replace("{ weight", '{ input = ["a8"], weight')
    text = text.replace("[types.w4]", "[types.a8]\nbits = 8\nsigned = false\nsymmetric = false\n\n[types.w4]")
    own = tmp_path / "own.toml"
    own.write_text(text)
    plan = mlp.plan(str(own), bits=Bits(4, 8))
    realize(mlp.graph, plan, tmp_path / "model.onnx", **load_target(str(own)).file_format)
    checks = compare(mlp.graph, plan, tmp_path / "model.onnx", [mlp.images])
    assert not checks.wrong
    assert {check.site for check in checks.on} == {"patch:input", "fc1:input", "fc2:input"}
    assert checks.kernels["found"] == 0


@pytest.mark.parametrize("target", ["ort-x86-w4", "ort-x86-block"])
def test_a_plan_with_blocks_comes_back_from_its_files(made, mlp, target, tmp_path):
    plan, _ = made(target)
    save_plan(mlp.graph, plan, tmp_path)
    again = load_plan(mlp.graph, tmp_path)
    for name, choice in plan.choices.items():
        other = again.choices[name]
        assert (other.grid, other.qparams) == (choice.grid, choice.qparams)
        assert choice.codes is None or torch.equal(other.codes.int(), choice.codes.int())
    assert dataclasses.asdict(again)["integer_ops"] == plan.integer_ops
