"""Simulation = runtime in integer codes, one op kind at a time. The oracle is onnxruntime, and openvino's outputs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewbit.choose import Bits
from fewbit.core.checks import Checks
from fewbit.core.grid import QParams
from fewbit.core.plan import Fallback
from fewbit.errors import BadFile
from fewbit.lint.truth import truth
from fewbit.realize.qdq import clamp_bounds
from fewbit.report.tables import integer_share
from fewbit.runtimes import open_session, runtime_names
from fewbit.stages.kernels import as_run, fused, linted
from fewbit.target import load_target
from fewbit.verify.compare import compare, kernels

needs_openvino = pytest.mark.skipif("openvino" not in runtime_names(), reason="openvino is not installed")


class Tokens(nn.Module):
    """(b, 3, 8, 8) as 24 tokens of width 8, through two linears with GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 4, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x.flatten(1, 2))))


class FlatHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(192, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.hidden(x.flatten(1)).relu())


class ConvRelu6(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.after(F.relu6(self.conv(x)))


class NoBias(nn.Module):
    """Convolutions whose results nothing is added to, behind ReLUs that codes make."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 3, bias=False)

    def forward(self, x):
        return self.after(F.relu(F.relu6(F.relu(self.conv(x))))).relu()


class Cropped(nn.Module):
    """A padding that takes places away in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.after(F.pad(self.conv(x).relu(), (-1, -1, 1, -1)))


class PaddedDepthwise(nn.Module):
    """Zeros on the right and below only, as TensorFlow's SAME padding has them; the tensor has a zero point."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, stride=2, groups=8)

    def forward(self, x):
        return self.depth(F.pad(self.conv(x), (0, 1, 0, 1)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.a(x).relu()
        return (x + self.b(x)).relu()


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.conv(x), 1).flatten(1))


class MaxPooled(nn.Module):
    """A pooling of maxima between two convolutions, which moves codes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.conv(F.max_pool2d(self.stem(x).relu(), 3, 2, 1))


class Concat(nn.Module):
    """A convolution and a pooling of one tensor side by side, read by a convolution (SqueezeNet, Inception)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.last = (
            nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(16, 4, 1),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x).relu()
        return self.last(torch.cat([self.a(x), F.max_pool2d(x, 3, 1, 1), self.b(x).relu()], 1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(1, 2)).view(-1, 24, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


KINDS = {
    "linear": (Tokens, {"MatMulIntegerToFloat": 2}),
    "flat linear": (FlatHead, {"MatMulIntegerToFloat": 2}),
    "conv": (ConvRelu6, {"QLinearConv": 2}),
    "no bias": (NoBias, {"QLinearConv": 2}),
    "cropped": (Cropped, {"QLinearConv": 2}),
    "depthwise": (PaddedDepthwise, {"QLinearConv": 2}),
    "add": (Residual, {"QLinearConv": 2, "QLinearAdd": 1}),
    "avgpool": (Pooled, {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "MatMulIntegerToFloat": 1}),
    "max pool": (MaxPooled, {"QLinearConv": 2, "NhwcMaxPool": 1}),
    "concat": (Concat, {"QLinearConv": 4, "QLinearConcat": 1, "NhwcMaxPool": 1}),
    "attention": (Attention, {"MatMulIntegerToFloat": 5, "QLinearMatMul": 1}),
}


def verified(run):
    return compare(run.net.graph, run.plan, run.path, run.net.images.split(8))


def assert_agree(run, checks) -> None:
    """No code differs but ties, with and without graph optimisations, and the whole model gives the simulation's output."""
    for table in (checks.off, checks.on):
        assert {check.site for check in table} == {n for n, c in run.plan.choices.items() if c.codes is None}
        assert all(check.compared > 0 for check in table)
        assert [(check.site, check.wrong) for check in table if check.wrong] == []
    # these images hold no tie, and float32 rounds sums of a few dozen products of size 1
    assert sum(check.differing for check in checks.off + checks.on) == 0
    assert next(check.place for check in checks.outputs) == "as written"
    assert all(check.difference < 3e-6 and not check.wrong for check in checks.outputs)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def of_kind(kind, capture_net, realized):
    torch.manual_seed(0)
    return realized(capture_net(KINDS[kind][0]()), recipe="mse", everything=True)


def test_simulation_and_runtime_agree_in_codes(of_kind):
    assert_agree(of_kind, verified(of_kind))


def test_every_op_of_the_plan_has_become_an_integer_kernel(kind, of_kind):
    found = kernels(of_kind.plan, of_kind.path)
    assert found["found"] == found["expected"] == len(of_kind.plan.integer_ops)
    assert {name: found["ops"].get(name, 0) for name in KINDS[kind][1]} == KINDS[kind][1]


def test_kernels_of_onnxruntime_are_told_of_no_other_runtime_and_no_other_processor(conv_net, realized, ort_target):
    counted = Checks((), (), (), {"found": 7, "expected": 7, "ops": {}})
    own = realized(conv_net, ort_target)
    assert fused(own.plan, counted, linted(own.path, target := load_target(ort_target)), target) == {"kernels": counted.kernels}
    away = dataclasses.replace(own.plan, fallbacks=(Fallback("this machine", "another", "this one", "", kind="machine"),))
    assert "by_rules" in fused(away, counted, linted(own.path, target := load_target(ort_target)), target)
    run = realized(conv_net, "openvino-x86", everything=True)
    tables = fused(run.plan, counted, linted(run.path, target := load_target("openvino-x86")), target)
    (row,) = tables["by_rules"]
    ran = truth(run.path, "openvino")  # openvino's own words
    assert (row["integer"], row["nodes"]) == (sum(one.integer for one in ran.values()), len(ran))
    assert (row["expected"], tables["kernels"]) == (len(run.plan.integer_ops), {})
    assert "for openvino, held against" in row["rules"]
    unheld = fused(run.plan, counted, linted(run.path, target := load_target("tensorrt")), target)["by_rules"][0]
    assert "for tensorrt, which nobody has held against it" in unheld["rules"]


def test_what_the_runtime_leaves_in_float_is_not_in_the_share(capture_net, realized, ort_target):
    torch.manual_seed(0)
    run = realized(capture_net(ConvRelu6()), recipe="mse", everything=True)
    target, graph = load_target(ort_target), run.net.graph
    assert as_run(graph, run.plan, linted(run.path, target), target) is run.plan
    model = onnx.load(str(run.path))
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    others = [node for node in model.graph.node if first.output[0] in node.input]
    between = onnx.helper.make_node("Neg", [first.output[0]], ["negative"], name="between")
    for node in others:
        node.input[:] = ["negative" if name == first.output[0] else name for name in node.input]
    model.graph.node.insert([*model.graph.node].index(first) + 1, between)
    path = run.path.with_name("negative.onnx")
    onnx.save(model, str(path))
    assert kernels(run.plan, path)["ops"]["QLinearConv"] == 1  # the runtime's own words: one of two is left
    plan = as_run(graph, run.plan, linted(path, target), target)
    (lost,) = [one for one in plan.fallbacks if one.kind == "kernels"]
    macs = {op.name: op.macs for op in graph.ops if op.macs}
    assert (lost.site, lost.actual) == (first.name, "float")
    assert lost.macs_share == pytest.approx(macs["conv"] / sum(macs.values()))
    assert integer_share(graph, plan) == pytest.approx(macs["after"] / sum(macs.values()))


@pytest.mark.parametrize(
    ("net", "kernels"), [("realized_conv_net", 7), pytest.param("realized_vit", 10, marks=pytest.mark.slow)]
)
def test_whole_nets_agree_in_codes_and_have_all_of_their_kernels(request, net, kernels):
    run = request.getfixturevalue(net)
    checks = verified(run)
    assert_agree(run, checks)
    assert checks.kernels["found"] == checks.kernels["expected"] == kernels


@pytest.mark.parametrize(("net", "kernels"), [("conv_net", 7), pytest.param("vit", 10, marks=pytest.mark.slow)])
def test_codes_of_fewer_bits_than_their_container_agree_and_keep_the_kernels(request, realized, net, kernels):
    run = realized(request.getfixturevalue(net), recipe="mse", everything=True, bits=Bits(4, 6))
    checks = verified(run)
    assert_agree(run, checks)
    assert checks.kernels["found"] == checks.kernels["expected"] == kernels


@pytest.mark.parametrize(("net", "kernels"), [("conv_net", 7), pytest.param("vit", 10, marks=pytest.mark.slow)])
def test_one_step_for_a_whole_weight_agrees_and_keeps_the_kernels(request, realized, ort_target, tmp_path, net, kernels):
    mine = tmp_path / "mine.toml"
    mine.write_text(f'schema = 1\nname = "mine"\nabout = "one scale for a weight"\nextends = "{ort_target}"\n')
    for name in {"w8", "w7"} & set(load_target(ort_target).types):
        mine.write_text(mine.read_text() + f"[types.{name}]\nbits = {name[1]}\nsigned = true\nnarrow = true\n")
    run = realized(request.getfixturevalue(net), str(mine), recipe="mse", everything=True)
    assert all(c.qparams.scale.ndim == 0 for c in run.plan.choices.values() if c.role == "weight")
    checks = verified(run)
    assert_agree(run, checks)
    assert checks.kernels["found"] == checks.kernels["expected"] == kernels


@needs_openvino
@pytest.mark.parametrize(("net", "bits"), [pytest.param("conv_net", Bits(4, 6), marks=pytest.mark.slow), ("vit", Bits(8, 8))])
def test_openvino_gives_the_output_of_the_simulation(request, realized, openvino_target, net, bits):
    run = realized(request.getfixturevalue(net), openvino_target, recipe="mse", everything=True, bits=bits)
    checks = compare(run.net.graph, run.plan, run.path, run.net.images.split(8), runtime="openvino")
    assert {check.site for check in checks.on} == {n for n, c in run.plan.choices.items() if c.codes is None}
    assert not checks.wrong
    assert all(check.difference < 3e-6 and not check.wrong for check in checks.outputs)


@pytest.mark.parametrize("site", ["stem:input", "depth:output", "add:output", "head:input"])
def test_a_step_changed_by_hand_is_caught_at_its_site_and_nowhere_before(realized_conv_net, site):
    run = realized_conv_net
    choice = run.plan.choices[site]
    changed = dataclasses.replace(choice, qparams=QParams(choice.qparams.scale * 1.02, choice.qparams.zero))
    plan = dataclasses.replace(run.plan, choices={**run.plan.choices, site: changed})
    checks = compare(run.net.graph, plan, run.path, [run.net.images])
    for table in (checks.off, checks.on):
        assert next(check.site for check in table if check.wrong) == site


def test_a_weight_changed_by_hand_is_caught_at_the_result_of_its_op_and_does_not_spread(realized_conv_net):
    run = realized_conv_net
    choice = run.plan.choices["a:weight"]
    changed = dataclasses.replace(choice, qparams=QParams(choice.qparams.scale * 1.1, choice.qparams.zero))
    plan = dataclasses.replace(run.plan, choices={**run.plan.choices, "a:weight": changed})
    checks = compare(run.net.graph, plan, run.path, [run.net.images])
    assert [check.site for check in checks.wrong] == ["a:output", "a:output"]


def clips(path) -> int:
    count = Counter(node.op_type for node in onnx.load(path).graph.node)
    return count["Clip"] + count["Relu"]


def test_clamps_whose_limits_are_those_of_the_codes_are_left_out(realized_conv_net):
    assert clips(realized_conv_net.path) == 0
    assert clips(realized_conv_net.float_path) == 4


@pytest.mark.parametrize(
    "clamp",
    [F.relu, F.relu6, F.hardtanh, torch.ops.aten.hardtanh, lambda x: F.hardtanh(x, -2, 3),
     lambda x: x.clamp(min=0.5), lambda x: x.clamp(max=2.0),
     lambda x: x.clamp(-1, 4), lambda x: x.clamp(2), lambda x: x.relu_()],
    ids=["relu", "relu6", "hardtanh", "hardtanh of nothing", "hardtanh of two",
         "clamp min", "clamp max", "clamp", "clamp of one", "in place"],
)  # fmt: skip
def test_the_limits_of_a_clamp_are_what_it_makes_of_the_infinities(clamp):
    class Net(nn.Module):
        def forward(self, x):
            return clamp(x + 0)

    program = torch.export.export(Net(), (torch.zeros(1, 4),))
    (found,) = (clamp_bounds(node) for node in program.graph.nodes if clamp_bounds(node) is not None)
    assert found == tuple(clamp(torch.tensor([-torch.inf, torch.inf])).tolist())


@pytest.mark.parametrize(("scale", "zero"), [(12 / 255, 7), (12 / 255, 0), (6 / 248, 7)], ids=["both", "above", "below"])
def test_a_clamp_that_cuts_inside_of_the_codes_stays_and_agrees(capture_net, realized, monkeypatch, scale, zero):
    torch.manual_seed(0)
    net = capture_net(ConvRelu6())
    plan = net.plan("ort-x86-vnni")
    choice = plan.choices["conv:output"]
    twice = dataclasses.replace(choice, qparams=QParams(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)))
    wide = dataclasses.replace(plan, choices={**plan.choices, "conv:output": twice})
    monkeypatch.setattr(type(net), "plan", lambda *_, **__: wide)
    run = realized(net)
    assert clips(run.path) == 1
    assert_agree(run, verified(run))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_that_was_removed_is_told_from_one_that_cannot_be_loaded(tmp_path: Path, runtime: str) -> None:
    with pytest.raises(BadFile, match=rf"gone\.onnx is not there, which {runtime} was to load: .* Run the same command again"):
        open_session(runtime, tmp_path / "gone.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(BadFile, match=rf"^{runtime} cannot load .*text\.onnx"):
        open_session(runtime, tmp_path / "text.onnx")
