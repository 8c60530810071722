"""Ties. Oracles: float64, onnxruntime's own functions over their range, closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from conftest import captured
from fewbit.choose import Recipe
from fewbit.choose.ranges import MinMax, Ranges
from fewbit.core.checks import SiteCheck
from fewbit.core.fx import aten
from fewbit.execute.executor import Executor
from fewbit.execute.simulate import SiteTrace
from fewbit.realize import realize
from fewbit.target import load_target
from fewbit.verify import compare
from fewbit.verify.compare import added
from fewbit.verify.ties import FUNCTIONS, OFF, TIE, checked, off_by, reach
from planning import plan_for


@pytest.mark.parametrize("name", ["Sigmoid", "Tanh", "Erf"])
def test_a_function_of_onnxruntime_is_off_by_less_than_is_said(name):
    ort = pytest.importorskip("onnxruntime")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
    graph = helper.make_graph([helper.make_node(name, ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = np.linspace(-20, 20, 400_001, dtype=np.float32)
    (found,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    exact = getattr(torch, name.lower())(torch.from_numpy(x).double()).numpy()
    assert 2**-26 < np.abs(found - exact).max() <= OFF * (1 if name == "Sigmoid" else 2)


@pytest.mark.parametrize("target", FUNCTIONS)
def test_a_function_that_is_off_has_the_polynomial_off(target):
    x = torch.linspace(-9, 9, 37, dtype=torch.float64)
    one = torch.ones_like(x)
    share = {aten.silu.default: x, aten.gelu.default: x, aten.sigmoid.default: one}.get(target, 2 * one)
    torch.testing.assert_close(FUNCTIONS[target](OFF, x) - target(x), OFF * share, rtol=0, atol=1e-12)


def test_what_counts_as_a_tie():
    position = torch.tensor([3.5 + TIE / 2, 3.8, 3.8, 7.0, 3.5])
    ours = SiteTrace(position.round().int(), position)
    theirs = torch.tensor([3, 3, 3, 8, 6]).int()
    assert checked("s", ours, theirs) == SiteCheck("s", 5, 5, 1, 4, 2)
    far = reach(ours, [SiteTrace(ours.codes, position + torch.tensor([0, 0.31, -0.1, 0.1, 0.5]))])
    torch.testing.assert_close(far, TIE + torch.tensor([0, 0.31, 0.1, 0.1, 0.5]))
    assert checked("s", ours, theirs, far) == SiteCheck("s", 5, 5, 2, 3, 2)


class Tail(nn.Module):
    """A SiLU of about -9 alone: its results have steps of a few millionths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.first.weight.mul_(0.1)
            self.first.bias.fill_(-9.0)
            self.last.weight.mul_(1e3)

    def forward(self, x):
        return self.last(torch.nn.functional.silu(self.first(x))).mean((2, 3))


def test_the_error_of_a_function_is_no_wrong_code_where_steps_are_smaller(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = captured(Tail())
    plan = plan_for(net.graph, net.stats, load_target("ort-x86-vnni"), Recipe("", (Ranges(MinMax(), MinMax()),)))
    (site,) = (site.name for site in net.graph.sites if site.tensor.startswith("silu"))
    assert float(plan.choices[site].qparams.scale) < 1e-5
    path = tmp_path / "model.onnx"
    realize(net.graph, plan, path, **load_target("ort-x86-vnni").file_format)
    images = list(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(16))
    off = {check.site: check for check in compare(net.graph, plan, path, images).off}
    assert off[site].wrong == 0 < off[site].ties < off[site].compared / 20
    monkeypatch.setattr("fewbit.verify.ties.OFF", 0.0)
    assert {check.site: check for check in compare(net.graph, plan, path, images).off}[site].wrong > 0


def test_checks_of_several_batches_are_summed_and_the_largest_difference_is_that_of_any():
    tables = [
        (SiteCheck("a", 10, 3, 2, 1, 1), SiteCheck("b", 20, 0, 0, 0, 0)),
        (SiteCheck("a", 30, 4, 1, 3, 9), SiteCheck("b", 60, 5, 5, 0, 1)),
        (SiteCheck("a", 5, 1, 0, 1, 7), SiteCheck("b", 10, 0, 0, 0, 0)),
    ]
    assert added(tables) == (SiteCheck("a", 45, 8, 3, 5, 9), SiteCheck("b", 90, 5, 5, 0, 1))


def test_only_nodes_of_such_functions_are_off():
    net = captured(Tail())
    executor = Executor(net.graph)
    up, down = off_by(executor)
    (name,) = up
    assert name.startswith("silu")
    assert list(down) == [name]
    seen = []
    with torch.no_grad():
        for calls in ({}, up, down):
            executor(net.images, {name: seen.append}, calls=calls)
    x = torch.nn.functional.conv2d(net.images, net.module.first.weight, net.module.first.bias).double()
    for moved, sign in zip(seen[1:], (1, -1), strict=True):
        torch.testing.assert_close((moved - seen[0]).double(), sign * OFF * x, rtol=1e-2, atol=1e-9)
