"""Oracles: the same layer written out by hand with numpy or torch.nn.functional."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewbit.core.plan import Bias, Plan
from fewbit.execute.simulate import simulate, trace


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(x.flatten(1, 2))


class Residual(nn.Module):
    """An addition that reads the same tensor as the linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(x)


class Padded(nn.Module):
    """Zeros on two sides, then a convolution; the tensor before the padding has a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        x = x.sigmoid()
        return self.conv(F.pad(x, (0, 2, 1, 1))) + x


def build(capture_net, net: nn.Module, target: str = "openvino-x86"):
    torch.manual_seed(0)
    captured = capture_net(net)
    return captured, captured.plan(target, "mse")


def with_everyone(plan: Plan, site: str, all_readers: bool) -> Plan:
    choice = dataclasses.replace(plan.choices[site], all_readers=all_readers)
    return dataclasses.replace(plan, choices={**plan.choices, site: choice})


def numpy_fake(x: np.ndarray, plan: Plan, site: str) -> np.ndarray:
    """fake(x) of an activation site, per tensor, u8: float32 division as everywhere, then float64."""
    a = plan.choices[site].qparams
    scale, zero = a.scale.numpy(), float(a.zero)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * np.float64(scale)


def weight(plan: Plan, site: str) -> np.ndarray:
    """Codes times the step of their channel, float64."""
    choice = plan.choices[site]
    steps = choice.qparams.scale.double().numpy().reshape(-1, *[1] * (choice.codes.ndim - 1))
    return choice.codes.double().numpy() * steps


def faked(x: torch.Tensor, plan: Plan, site: str) -> torch.Tensor:
    return torch.from_numpy(numpy_fake(x.numpy(), plan, site)).float()


def run(net, plan: Plan) -> torch.Tensor:
    with torch.no_grad():
        return simulate(net.graph, plan)(net.images)


def close(found: torch.Tensor, expected: np.ndarray | torch.Tensor) -> None:
    """Float32 sums of a few dozen products of size 1: 1e-6 for their order."""
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(expected), rtol=0, atol=3e-6)


def test_one_linear_is_the_product_of_its_codes_by_hand(capture_net):
    net, plan = build(capture_net, OneLinear())
    x = numpy_fake(net.images.flatten(1, 2).numpy(), plan, "fc:input")
    expected = x @ weight(plan, "fc:weight").T + net.module.fc.bias.detach().double().numpy()
    close(run(net, plan), expected)
    assert np.abs(expected - net.module(net.images).detach().numpy()).max() > 1e-4  # and quantizing is not nothing


def test_the_graphs_own_module_is_left_alone(conv_net):
    before, text = copy.deepcopy(conv_net.graph.module.state_dict()), str(conv_net.graph.module.graph)
    with torch.no_grad():
        answer = conv_net.graph.module(conv_net.images)
        run(conv_net, conv_net.plan("ort-x86-vnni", "mse"))
        assert torch.equal(conv_net.graph.module(conv_net.images), answer)
    assert str(conv_net.graph.module.graph) == text
    after = conv_net.graph.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_plan_of_nothing_simulates_the_float_model(conv_net):
    nothing = dataclasses.replace(conv_net.plan("ort-x86-vnni"), choices={}, integer_ops=(), biases={})
    with torch.no_grad():
        assert torch.equal(run(conv_net, nothing), conv_net.graph.module(conv_net.images))


def test_a_residual_reads_the_float_tensor_where_only_integer_ops_read_the_codes(capture_net):
    net, plan = build(capture_net, Residual())
    assert not plan.choices["fc:input"].all_readers
    x, bias = net.images, net.module.fc.bias.detach()
    product = faked(x, plan, "fc:input") @ torch.from_numpy(weight(plan, "fc:weight")).float().T + bias
    close(run(net, plan), x + product)
    close(run(net, with_everyone(plan, "fc:input", True)), faked(x, plan, "fc:input") + product)


@pytest.mark.parametrize("all_readers", [False, True])
def test_codes_are_taken_before_the_padding_of_a_convolution(capture_net, all_readers):
    net, plan = build(capture_net, Padded())
    plan = with_everyone(plan, "conv:input", all_readers)
    x = net.images.sigmoid()
    quantized = faked(x, plan, "conv:input")
    w = torch.from_numpy(weight(plan, "conv:weight")).float()
    expected = F.conv2d(F.pad(quantized, (0, 2, 1, 1)), w, net.module.conv.bias.detach())
    close(run(net, plan), expected + (quantized if all_readers else x))


def test_biases_of_a_plan_replace_those_of_the_float_model(capture_net):
    net, plan = build(capture_net, Padded(), "ort-x86-vnni")
    integer = plan.biases["conv"].integer
    doubled = Bias(plan.biases["conv"].real, dataclasses.replace(integer, codes=2 * integer.codes))
    quantized = faked(net.images.sigmoid(), plan, "conv:input")
    w = torch.from_numpy(weight(plan, "conv:weight")).float()
    b = (2 * integer.codes).double() * integer.qparams.scale.double()
    for bias, added in ((doubled, b.float()), (Bias(torch.full_like(doubled.real, 0.3)), torch.full_like(doubled.real, 0.3))):
        out = F.conv2d(F.pad(quantized, (0, 2, 1, 1)), w, added)
        changed = dataclasses.replace(plan, biases={"conv": bias})
        close(run(net, changed), faked(out, plan, "conv:output") + quantized)


def test_a_trace_has_the_codes_and_the_output_of_the_simulation(conv_net):
    plan = conv_net.plan("ort-x86-vnni", "mse")
    module = simulate(conv_net.graph, plan)
    output, traces = trace(module, conv_net.images)
    with torch.no_grad():
        assert torch.equal(output[0], module(conv_net.images))
    assert set(traces) == {name for name, choice in plan.choices.items() if choice.codes is None}
    for name, found in traces.items():
        grid = plan.choices[name].grid
        expected = found.position.round().clamp(grid.low, grid.high)
        # position adds the zero point before rounding, codes after: a tie may fall either way
        tie = (found.position - found.position.floor() - 0.5).abs() < 1e-4
        assert torch.equal(found.codes[~tie], expected[~tie].int())


def test_forcing_the_codes_that_a_trace_found_reproduces_it(vit):
    module = simulate(vit.graph, vit.plan("ort-x86-vnni", "mse", everything=True))
    output, traces = trace(module, vit.images)
    again, forced = trace(module, vit.images, forced={name: found.codes for name, found in traces.items()})
    assert torch.equal(again[0], output[0])
    assert all(torch.equal(forced[name].codes, found.codes) for name, found in traces.items())


def test_what_follows_a_site_computes_with_the_forced_codes_and_the_site_itself_does_not(capture_net):
    net, plan = build(capture_net, OneLinear())
    module = simulate(net.graph, plan)
    _, own = trace(module, net.images)
    zero = torch.full_like(own["fc:input"].codes, int(plan.choices["fc:input"].qparams.zero))
    (output,), forced = trace(module, net.images, forced={"fc:input": zero})
    close(output, net.module.fc.bias.detach().expand_as(output))
    assert torch.equal(forced["fc:input"].codes, own["fc:input"].codes)
