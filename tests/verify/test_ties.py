"""Ties. Oracles: float64, onnxruntime's own functions over their range, closed forms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from conftest import captured
from fewbit.choose import Context, Recipe
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.ranges import MinMax, Ranges
from fewbit.core.checks import Checks, Gap, SiteCheck
from fewbit.core.fx import aten
from fewbit.core.grid import QParams
from fewbit.core.plan import Plan
from fewbit.execute.executor import Executor
from fewbit.execute.simulate import SiteTrace, simulate
from fewbit.realize import realize
from fewbit.report.answers import answers
from fewbit.report.tables import verify as summary
from fewbit.target import load_target
from fewbit.verify import compare
from fewbit.verify.compare import added
from fewbit.verify.outputs import gaps
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
    turned = [SiteTrace(ours.codes, position + torch.tensor([0, move, 0.1, 0.1, 0.5])) for move in (-0.31, 7.0)]
    torch.testing.assert_close(reach(ours, turned), far)  # a threshold that one way alone turns is not of the error's size
    assert checked("s", ours, theirs, far) == SiteCheck("s", 5, 5, 2, 3, 2)


def test_a_tie_is_a_code_that_some_position_within_reach_is_rounded_to():
    """Oracle: what the lowest and the highest of them are rounded to."""
    generator = torch.Generator().manual_seed(0)
    position, far = 10 * torch.rand(200, generator=generator), 3 * torch.rand(200, generator=generator)
    ours, theirs = SiteTrace(position.round().int(), position), torch.randint(0, 11, (200,), generator=generator).int()
    possible = ((position - far).round() <= theirs) & (theirs <= (position + far).round()) & (ours.codes != theirs)
    found = checked("s", ours, theirs, far)
    assert found.ties == int(possible.sum())
    assert found.ties > 30
    assert checked("s", SiteTrace(torch.tensor([11]), torch.tensor([10.5 + TIE / 2])), torch.tensor([12])).ties == 0


class Tail(nn.Module):
    """A SiLU of about -9 or less alone: its results have steps of a few millionths, or a ten thousandth of that."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.first.weight.mul_(0.1)
            self.first.bias.fill_(mean)
            self.last.weight.mul_(1e3)

    def forward(self, x):
        return self.last(torch.nn.functional.silu(self.first(x))).mean((2, 3))


@pytest.mark.parametrize(("mean", "most", "share"), [(-9.0, 1, 0.05), (-14.0, 2, 1.0)])
def test_the_error_of_a_function_is_no_wrong_code_where_steps_are_smaller(tmp_path, monkeypatch, mean, most, share):
    torch.manual_seed(0)
    net = captured(Tail(mean))
    plan = plan_for(net.graph, net.stats, load_target("ort-x86-vnni"), Recipe("", (Ranges(MinMax(), MinMax()),)))
    (site,) = (site.name for site in net.graph.sites if site.tensor.startswith("silu"))
    assert float(plan.choices[site].qparams.scale) < 1e-5
    path = tmp_path / "model.onnx"
    realize(net.graph, plan, path, **load_target("ort-x86-vnni").file_format)
    images = list(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(16))
    off = {check.site: check for check in compare(net.graph, plan, path, images).off}
    assert off[site].wrong == 0 < off[site].ties < share * off[site].compared
    assert off[site].max_difference >= most
    monkeypatch.setattr("fewbit.verify.ties.OFF", 0.0)
    assert {check.site: check for check in compare(net.graph, plan, path, images).off}[site].wrong > 0


class Halves(nn.Module):
    """A layer whose weights are -1, 0 or 1, and one that reads its results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([1.0, -1, 0])[torch.arange(24) % 7 % 3].view(8, 3, 1, 1))

    def forward(self, x):
        return self.last(self.first(x)).flatten(1)


@pytest.mark.parametrize("crowded", [True, False], ids=["on boundaries", "beside them"])
def test_where_many_codes_are_ties_it_is_said_how_far_outputs_are_from_the_simulation_by_itself(tmp_path, crowded):
    """The scale is twice the step of the sums, so every odd sum stands between two codes; both roads are run apart here."""
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net, target = captured(Halves()), load_target("ort-x86-vnni")
    plan = plan_for(net.graph, net.stats, target, Recipe("", (Ranges(MinMax(), MinMax()),)))
    choices = plan.choices
    step = choices["first:input"].qparams.scale * choices["first:weight"].qparams.scale[0] * 127
    qparams = QParams(2 * step * (1 if crowded else 1.001), choices["first:output"].qparams.zero)
    plan = replace(plan, choices={**choices, "first:output": replace(choices["first:output"], qparams=qparams)})
    path, images = tmp_path / "model.onnx", torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    realize(net.graph, plan, path, **target.file_format)
    checks = compare(net.graph, plan, path, [images])
    found, (card, *_) = summary(checks), answers({"verify": summary(checks)}, {})
    said = " ".join((*card.lines, *card.loud))
    assert found["problems"] == []
    if not crowded:
        assert (found["tied_sites"], found["gaps"], card.word) == ([], [], "yes")
        assert "the outputs differ no more than float32 rounding explains" in said
        return
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        own = simulate(net.graph, plan)(images).numpy()
    (site,), (gap,) = found["tied_sites"], found["gaps"]
    assert site["site"] == "first:output"
    assert site["ties"] > site["compared"] / 100
    assert (gap["output"], gap["place"]) == ("logits", "onnxruntime, as it ships")
    far, spread = np.abs(logits - own).max(), own.astype(np.float64).std()
    assert far > 0.01
    assert (gap["difference"], gap["spread"]) == (pytest.approx(far, rel=1e-5), pytest.approx(spread, rel=1e-9))
    assert (card.big, card.word, card.mood) == ("0", "yes, but for ties", "unsure")
    assert f"{site['ties']} of {site['compared']:,} codes are ties" in said
    assert f"by up to {far:.3g} in logits, {100 * far / spread:.2f}\u00a0% of its standard deviation" in said
    assert "no more than float32 rounding" not in said


@dataclass(frozen=True)
class OnBoundaries:
    """A pass that gives the result of `first` twice the step of its sums."""

    def __call__(self, plan: Plan, context: Context) -> Plan:
        builder = PlanBuilder(plan, context)
        read, weight, choice = (plan.choices[f"first:{name}"] for name in ("input", "weight", "output"))
        scale = 2 * 127 * read.qparams.scale * weight.qparams.scale[0]
        builder.set(replace(choice, qparams=QParams(scale, choice.qparams.zero)))
        return builder.plan()


def test_a_scale_on_which_many_numbers_are_ties_is_moved_by_a_thousandth_and_no_other(tmp_path):
    """Without images nobody knows that they are: that plan is what the passes gave, and half of the sums are odd."""
    torch.manual_seed(0)
    net, target = captured(Halves()), load_target("ort-x86-vnni")
    recipe = Recipe("", (Ranges(MinMax(), MinMax()), OnBoundaries()))
    before = plan_for(net.graph, net.stats, target, recipe)
    after = plan_for(net.graph, net.stats, target, recipe, images=net.images.split(8))
    moved = {name for name, choice in after.choices.items() if choice.qparams != before.choices[name].qparams}
    assert moved == {"first:output"}
    scale, zero = (getattr(after.choices["first:output"].qparams, name) for name in ("scale", "zero"))
    torch.testing.assert_close(scale, before.choices["first:output"].qparams.scale * 1.001, rtol=1e-7, atol=0)
    assert after.choices["first:output"].why == "scale moved by 0.1 %: many numbers stood exactly between two codes"
    assert torch.equal(zero, before.choices["first:output"].qparams.zero)
    path, fresh = tmp_path / "model.onnx", [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
    tied = []
    for plan in (before, after):
        realize(net.graph, plan, path, **target.file_format)
        checks = compare(net.graph, plan, path, fresh)
        assert not checks.wrong
        tied.append([check.site for check in checks.crowded])
    assert tied == [["first:output"], []]


@pytest.mark.parametrize(("ties", "compared", "crowded"), [(8, 10, False), (9, 900, False), (9, 899, True), (40, 5000, False)])
def test_a_site_has_more_ties_than_chance_brings_from_a_hundredth_of_its_codes_and_a_handful(ties, compared, crowded):
    checks = Checks((SiteCheck("a", compared, 1, 1, 0, 1),), (SiteCheck("a", compared, ties, ties, 0, 1),), ())
    assert [check.ties for check in checks.crowded] == [ties] * crowded


def test_a_gap_has_the_spread_of_the_simulation_and_of_whole_numbers_the_share_of_others():
    free = {"a": torch.tensor([1.0, 3.0, torch.inf]), "b": torch.tensor([1, 2, 3, 4]), "c": torch.zeros(2, 3)}
    found = {"a": torch.tensor([1.0, 2.5, torch.inf]), "b": torch.tensor([1, 2, 4, 3]), "c": torch.zeros(3, 2)}
    inf = float("inf")
    assert gaps("here", free, found) == (
        Gap("here", "a", 0.5, 0.0, 1.0), Gap("here", "b", 0.5, 0.0, None), Gap("here", "c", inf, inf, 0.0)
    )  # fmt: skip


def test_checks_of_several_batches_are_summed_and_the_largest_difference_is_that_of_any():
    tables = [
        (SiteCheck("a", 10, 3, 2, 1, 1), SiteCheck("b", 20, 0, 0, 0, 0)),
        (SiteCheck("a", 30, 4, 1, 3, 9), SiteCheck("b", 60, 5, 5, 0, 1)),
        (SiteCheck("a", 5, 1, 0, 1, 7), SiteCheck("b", 10, 0, 0, 0, 0)),
    ]
    assert added(tables) == (SiteCheck("a", 45, 8, 3, 5, 9), SiteCheck("b", 90, 5, 5, 0, 1))


def test_only_nodes_of_such_functions_are_off():
    net = captured(Tail(-9.0))
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
