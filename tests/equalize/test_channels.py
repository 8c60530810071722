"""Oracles: brute force over all powers of two, the float function bit for bit, onnxruntime with and without factors."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewbit.choose import Context, choose
from fewbit.equalize import Equalize, replaced
from fewbit.equalize.channels import evened, places, steps
from fewbit.equalize.replaced import same_function
from fewbit.execute.executor import Executor
from fewbit.execute.simulate import simulate
from fewbit.observe import observe
from fewbit.realize.fuse import fuse
from fewbit.realize.qdq import realize
from fewbit.recipes import CHANNELS, RECIPES
from fewbit.target import load_target
from fewbit.target.allowed import allowed

TARGET = load_target("ort-x86-vnni")


class Uneven(nn.Module):
    """SiLU and ReLU before depthwise convolutions, channels of the first a hundred times apart, and one that two ops read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d, self.e = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.a.weight *= torch.logspace(-3, 1, 8).view(-1, 1, 1, 1)
            self.b.weight /= torch.logspace(-3, 1, 8).view(-1, 1, 1, 1)
            self.c.weight *= torch.logspace(-2, 1, 8).view(-1, 1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.b(F.silu(self.a(x))))
        return self.e(self.d(F.relu(self.c(x)))).mean((2, 3))


@pytest.fixture(scope="module")
def net(capture_net):
    torch.manual_seed(3)
    return capture_net(Uneven().eval())


@pytest.fixture(scope="module")
def batches():
    return [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]


@pytest.fixture(scope="module")
def even(net, batches):
    return CHANNELS(net.graph, batches, allowed(net.graph, TARGET).grids)


def test_a_depthwise_convolution_with_several_outputs_of_each_channel(capture_net, batches):
    torch.manual_seed(3)
    stem = nn.Conv2d(3, 8, 3, padding=1)
    with torch.no_grad():
        stem.weight *= torch.logspace(-2, 1, 8).view(-1, 1, 1, 1)
    given = capture_net(nn.Sequential(stem, nn.ReLU(), nn.Conv2d(8, 24, 3, groups=8), nn.Flatten(2)).eval())
    found = CHANNELS(given.graph, batches, allowed(given.graph, TARGET).grids)
    assert "0" in {row["op"] for row in found.record if row["moved"]}
    assert same_function(given.graph, found.graph) == 0


def test_what_has_a_step_for_each_channel(net):
    found = {
        p.site.name: (p.writer and p.writer.name, [r.name for r in p.readers]) for p in places(net.graph, _sites(net.graph))
    }
    assert found == {
        "a:output": ("a", []), "b:input": (None, ["b"]), "b:output": ("b", []), "c:output": ("c", ["d"]), "e:output": ("e", []),
    }  # fmt: skip


def _sites(graph):
    return allowed(graph, TARGET).grids


def test_the_float_function_is_the_same_bit_for_bit(net, even):
    assert same_function(net.graph, even.graph) == 0
    assert {row["op"] for row in even.record if row["moved"]} == {"a", "b", "c"}
    assert all(row["after"] < row["before"] for row in even.record)
    again = replaced(net.graph, {name: value.clone() for name, value in even.constants.items()})
    assert [node.name for node in again.module.graph.nodes] == [node.name for node in even.graph.module.graph.nodes]


def test_the_powers_of_two_are_the_best_of_all():
    low, high = torch.tensor([-0.3, -0.3, -4.0]), torch.tensor([9.0, 0.4, 4.0])
    squares = torch.full((3,), 100.0)  # no tails: the extremes count
    found = evened(low, high, squares)
    assert bool((found.log2() == found.log2().round()).all())
    assert abs(float(found.log2().mean())) <= 0.5  # the tensor as a whole stays as large as it was
    error = steps(low, high, found)["after"]
    powers = [torch.tensor(p, dtype=torch.float32).exp2() for p in itertools.product(range(-5, 6), repeat=3)]
    assert error <= 4 * min(steps(low, high, one)["after"] for one in powers)  # rounding costs a factor of two at most
    assert error < steps(low, high, found)["before"] / 2


def test_channels_without_values_and_tails_do_no_harm():
    assert evened(torch.zeros(2), torch.zeros(2), torch.zeros(2)).tolist() == [1, 1]
    tails = evened(torch.zeros(2), torch.tensor([256.0, 1.0]), torch.tensor([(2**-7) ** 2, 1.0]))
    assert tails[0] / tails[1] < 256  # a tail of 256 over a body of 1/16 does not make the step of the body


@pytest.mark.slow
def test_less_is_lost_and_onnxruntime_gives_the_codes_of_the_simulation(net, even, batches, tmp_path):
    wanted = torch.cat([_float(net.graph, x) for x in batches])
    errors = {}
    for name, graph in (("plain", net.graph), ("even", even.graph)):
        stats = observe(graph, batches)
        plan = choose(Context(graph, stats, TARGET, images=batches), RECIPES["mse"])
        errors[name] = float((torch.cat([simulate(graph, plan)(x) for x in batches]) - wanted).square().mean())
        realize(graph, plan, tmp_path / f"{name}.onnx", **TARGET.file_format)
        session = ort.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: batches[0].numpy()})
        assert np.allclose(found, simulate(graph, plan)(batches[0]), atol=0.02 * float(wanted.abs().max()))
    assert errors["even"] < errors["plain"] / 10
    realize(graph, plan, tmp_path / "scales.onnx", **(TARGET.file_format | {"fuse": ("scale_by_channel",)}))
    models = [ir.load(tmp_path / f"{name}.onnx") for name in ("even", "scales")]
    factors = [[x.name for n in m.graph for x in n.inputs if x is not None and str(x.name).endswith("_factor")] for m in models]
    assert factors[0]
    assert not factors[1]  # all of them are scales


def _float(graph, x):
    with torch.no_grad():
        return Executor(graph)(x)[0]


def test_only_products_by_channel_with_powers_of_two_become_scales():
    def built(factor):
        x = ir.val("x", ir.DataType.FLOAT, (1, 2, 4, 4))
        scale, zero = (
            ir.Value(name=n, const_value=ir.tensor(v, name=n)) for n, v in (("s", np.float32(0.1)), ("z", np.uint8(3)))
        )
        other = ir.Value(name="f", const_value=ir.tensor(factor, name="f"))
        mul = ir.node("Mul", [x, other])
        q = ir.node("QuantizeLinear", [mul.outputs[0], scale, zero])
        graph = ir.Graph([x], [q.outputs[0]], nodes=[mul, q], initializers=[scale, zero, other], opset_imports={"": 20})
        q.outputs[0].name, mul.outputs[0].name = "y", "m"
        q.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        q.outputs[0].shape = x.shape
        return ir.Model(graph, ir_version=10)

    x = np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32) * 4
    for numbers, left in (([4, 0.5], 0), ([3, 0.5], 1)):
        factor = np.array(numbers, np.float32).reshape(1, 2, 1, 1)
        model = built(factor)
        before = _run(model, x)
        fuse(model, ["scale_by_channel"])
        assert [n.op_type for n in model.graph].count("Mul") == left
        assert (_run(model, x) == before).all()


def _run(model, x):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_a_product_by_channel_must_bring_a_bit_and_what_costs_nothing_need_not(capture_net, batches):
    torch.manual_seed(0)
    net = Uneven().eval()
    with torch.no_grad():  # channels of the ReLU's map 3 times apart, all others alike: squared steps 1 to 4 times smaller
        for conv, apart in ((net.a, 1.0), (net.b, 1.0), (net.c, 3.0)):
            flat = conv.weight.flatten(1)
            size = torch.linspace(1, apart, len(flat)).log().exp()
            conv.weight.copy_((flat / flat.abs().sum(1, keepdim=True) * size.view(-1, 1)).view_as(conv.weight))
            conv.bias.zero_()
    graph = capture_net(net).graph
    even = CHANNELS(graph, batches, allowed(graph, TARGET).grids)
    assert {row["op"] for row in even.record} == {"c"}
    assert float(even.record[0]["before"] / even.record[0]["after"]) < 4
    assert not any(node.name.startswith("mul") for node in even.graph.module.graph.nodes)


def test_silu_of_codes_and_factors_in_rows_give_the_same_numbers_in_fewer_nodes(net, even, batches, tmp_path):
    found, nodes = {}, {}
    for name, graph in (("plain", net.graph), ("even", even.graph)):
        plan = choose(Context(graph, observe(graph, batches), TARGET, images=batches), RECIPES["mse"])
        for forms in ((), ("quick_gelu", "factors_in_rows")):
            place = tmp_path / f"{name}{len(forms)}.onnx"
            realize(graph, plan, place, **(TARGET.file_format | {"fuse": forms}))
            options = ort.SessionOptions()
            options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
            session = ort.InferenceSession(place, options, providers=["CPUExecutionProvider"])
            found[name, len(forms)] = session.run(None, {session.get_inputs()[0].name: batches[0].numpy()})[0]
            optimized = ir.load(tmp_path / "optimized.onnx").graph
            nodes[name, len(forms)] = Counter(node.op_type for node in optimized)
            sizes = {tuple(x.const_value.shape) for n in optimized if n.op_type == "Mul" for x in n.inputs if x.const_value}
            assert {size[2] for size in sizes} == (
                {8} if forms else {1}
            ) or name == "plain"  # channels last: (1, 1, width, channels)
        np.testing.assert_array_equal(found[name, 2], found[name, 0])
    assert nodes["plain", 0]["QuickGelu"] == 0  # onnxruntime by itself
    assert nodes["plain", 0]["DequantizeLinear"] == nodes["plain", 2]["DequantizeLinear"] + 2
    assert nodes["plain", 2]["QuickGelu"] == nodes["even", 2]["QuickGelu"] == 2
    assert nodes["even", 2]["Expand"] == 0  # made when the file is loaded


def test_a_recipe_that_leaves_channels_alone_leaves_the_graph_alone(net, batches):
    off = Equalize(channels=False, norms=False, values=False, keys=False, convolutions=False)
    assert off(net.graph, batches, _sites(net.graph)).graph is net.graph
