"""LAPQ from the search to the file. Oracles: other orders and longer runs, torch's kl_div, simulate, onnxruntime."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewbit.capture.sites import tensor_of
from fewbit.choose import Bits, Recipe
from fewbit.choose.joint_search import JointSearch, Model, thinned
from fewbit.choose.loss import ModelLoss
from fewbit.choose.powell import parabola
from fewbit.choose.ranges import MinMax, MseRange, Ranges
from fewbit.core.grid import codes, of_bias, qparams_from_range
from fewbit.core.plan import SameAs
from fewbit.data.images import Preprocess
from fewbit.demo import model as demo
from fewbit.errors import BadImages, FewbitError
from fewbit.execute.executor import Executor
from fewbit.execute.simulate import simulate
from fewbit.execute.stream import Stream
from fewbit.files import Journal
from fewbit.realize import load_plan, realize, save_plan
from fewbit.recipes import RECIPES
from fewbit.request import Request
from fewbit.stages.sources import open_both, sources_of
from fewbit.target import load_target
from fewbit.verify.compare import compare
from planning import context_for, kl, numbers, plan_for

VNNI, AVX2 = load_target("ort-x86-vnni"), load_target("ort-x86-avx2")
MSE = Ranges(MseRange(), MseRange())
QUICK = JointSearch(MSE, points=4, seconds=None, tolerance=0.05)
W4A4 = Bits(4, 4)


@pytest.fixture(params=["conv_net", "vit"])
def net(request):
    return request.getfixturevalue(request.param)


def searched(net, search=QUICK, target=VNNI, **options):
    options = {"bits": W4A4, "images": net.images.split(8), **options}
    return plan_for(net.graph, net.stats, target, Recipe("", (search,)), **options)


def quick(**changes):
    return dataclasses.replace(QUICK, **changes)


def log_of(plan):
    """The record of the search, and its curve (evaluation, loss, best)."""
    (log,) = plan.logs("joint search")
    return log.summary, [(row["evaluation"], row["loss"], row["best"]) for row in log.rows]


def same(loss):
    """The order of float sums may differ, and a KL divergence is small."""
    return pytest.approx(loss, rel=1e-4, abs=1e-12)


# settings and p -----------------------------------------------------------------------------------------------------


def test_factors_are_the_bounds_of_their_logarithms():
    powell = JointSearch(smallest=0.5, largest=1.5, sweeps=3, method="coordinate").powell
    assert (powell.low, powell.high) == pytest.approx((math.log(0.5), math.log(1.5)))
    assert (powell.step, powell.tolerance, powell.sweeps, powell.method) == (0.1, 0.01, 3, "coordinate")


@pytest.mark.parametrize("bad", [{"low": 0}, {"smallest": 1.5}, {"seconds": -1}, {"images": 0}, {"tolerance": 1}])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="allowed"):
        JointSearch(**bad)


def test_norms_are_those_of_the_grid_and_the_first_few_span_it():
    found = JointSearch().norms
    assert sorted(found) == pytest.approx(np.linspace(2, 4, 10))
    assert found[:2] == [2, 4]
    assert 2.8 < found[2] < 3.2
    assert JointSearch(points=0).norms == []


@pytest.mark.parametrize("losses", [{2.0: 5, 4.0: 3, 3.0: 1}, {2.0: 1, 4.0: 9, 3.0: 5}, {2.0: 3, 4.0: 1, 3.0: 2}])
def test_the_search_starts_where_the_calibration_loss_is_smallest(conv_net, monkeypatch, losses):
    """Whatever each p costs, the vertex as well."""

    def value(self, key, compute):
        p = float(key.removeprefix("p = ")) if key.startswith("p = ") else None
        return losses.get(p, 0.5) if p is not None else 7.0

    monkeypatch.setattr(Journal, "value", value)
    plan = searched(conv_net, JointSearch(MSE, points=3, sweeps=0, seconds=None))
    fit, (record, _) = parabola(list(losses), list(losses.values())), log_of(plan)
    tried = losses if fit.vertex is None else losses | {fit.vertex: 0.5}
    assert record["p"] == min(tried, key=tried.get)
    assert [row["p"] for row in record["norms"]] == pytest.approx(sorted(tried))
    at_p = Recipe("", (Ranges(MseRange(record["p"]), MseRange(record["p"])),))
    assert numbers(plan) == numbers(plan_for(conv_net.graph, conv_net.stats, VNNI, at_p, bits=W4A4))


def test_all_weights_and_all_activations_are_the_two_kinds(net):
    model = a_model(net)
    weights = [name.endswith("weight") for name in model.free]
    assert [[bool(v) for v in kind] for kind in model.kinds] == [weights, [not w for w in weights]]
    assert any(weights)
    assert not all(weights)


# the loss -----------------------------------------------------------------------------------------------------------


def a_model(net, target=VNNI, bits=W4A4, start=MSE):
    batches, context = net.images.split(4), context_for(net.graph, net.stats, target, bits=bits)
    return Model(start(context.start(), context), context, ModelLoss.of(net.graph, batches), batches, "moved")


def points(model, count, seed=0):
    """Random points, some of them one step away from the one before."""
    g = np.random.default_rng(seed)
    x = np.zeros(len(model.free))
    for i in range(count):
        x = g.normal(size=len(x)) * 0.3 if i % 4 == 0 else x.copy()
        x[g.integers(len(x))] = g.normal() * 0.3
        yield x


def test_the_loss_from_a_place_on_is_that_of_the_simulation_of_the_plan(net):
    model = a_model(net)
    places = set()
    for x in points(model, 12):
        loss = model(x)
        places.add(model.walk.place)
        assert loss == same(kl(net.graph, model.plan(x), net.images, 4))
    assert len(places) > 3  # it did start in the middle


def test_the_same_points_in_another_order_have_the_same_losses(net):
    model, other = a_model(net), a_model(net)
    found = list(points(model, 8))
    assert [model(x) for x in found] == [other(x) for x in reversed(found)][::-1]


def test_a_line_search_runs_only_what_is_behind_its_step(vit, monkeypatch):
    model = a_model(vit)
    ran = []
    run = Executor.run
    monkeypatch.setattr(Executor, "run", lambda self, nodes, env, *spent: (ran.extend(nodes), run(self, nodes, env, *spent))[1])
    last = np.zeros(len(model.free))
    counts = []
    for step in (0.1, 0.2, 0.3):
        last[-1] = step  # the weight of the head
        ran.clear()
        model(last.copy())
        counts.append(len(ran))
    assert counts[2] < 0.1 * counts[0]


def test_what_is_held_stays_under_its_limit(vit, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fewbit.execute.stream"), "KEPT_BYTES", 20_000)
    model = a_model(vit)
    for x in points(model, 8):
        assert model(x) == same(kl(vit.graph, model.plan(x), vit.images, 4))
        held = [v for node, values in model.walk._values.items() if node.op != "placeholder" for v in values]
        assert sum(4 * v.numel() for v in held if isinstance(v, torch.Tensor)) <= 20_000


def test_with_labels_the_loss_is_cross_entropy(conv_net):
    labels = torch.randint(4, (16,), generator=torch.Generator().manual_seed(0))
    search = JointSearch(MSE, points=2, sweeps=0, loss="labels", seconds=None)
    plan = searched(conv_net, search, labels=labels)
    with torch.no_grad():
        expected = F.cross_entropy(simulate(conv_net.graph, plan)(conv_net.images), labels).item()
    record, _ = log_of(plan)
    assert record["best"] == pytest.approx(expected, rel=1e-5)
    assert "labels" in record["loss"]
    with pytest.raises(BadImages, match="needs calibration images with labels"):
        searched(conv_net, search)


def test_an_answer_that_is_no_number_is_infinitely_bad(conv_net):
    measure = ModelLoss.of(conv_net.graph, conv_net.images.split(16))
    assert measure.total([(torch.full((16, 4), math.nan),)]) == math.inf


# the plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [W4A4, Bits(8, 8), Bits(3, 5)], ids=str)
def test_the_plan_has_the_smallest_loss_that_was_seen_and_none_is_above_its_start(net, bits):
    plan = searched(net, bits=bits)
    record, curve = log_of(plan)
    losses = [loss for _, loss, _ in curve if loss is not None]
    assert record["best"] == min(losses) <= record["start"] == losses[0]
    assert record["start"] <= min(row["loss"] for row in record["norms"])
    assert kl(net.graph, plan, net.images) == same(record["best"])
    assert bits == Bits(8, 8) or record["best"] < record["start"]


@pytest.mark.parametrize("target", [VNNI, AVX2, load_target("openvino-x86")], ids=lambda t: t.name)
def test_codes_are_the_weights_rounded_at_the_new_steps_and_biases_follow(net, target):
    model = a_model(net, target)
    x = next(point for point in points(model, 50) if np.isfinite(model(point)))
    plan, start = model.plan(x), model.plan(0 * x)
    stored = []
    moved = {c.role for c in plan.choices.values() if c.qparams != start.choices[c.site].qparams}
    assert {"weight", "input"} <= moved
    for op in (net.graph.op(name) for name in plan.integer_ops):
        if "weight" not in op.operands:
            continue
        weight, read = plan.choices[op.operands["weight"]], plan.choices[op.operands["input"]]
        w = tensor_of(net.graph, net.graph.site(weight.site))
        assert torch.equal(weight.codes.int(), codes(w, weight.qparams, weight.grid))
        integer = plan.biases[op.name].integer if op.name in plan.biases else None
        if integer is not None:
            b = tensor_of(net.graph, net.graph.site(op.operands["bias"]))
            assert integer.qparams == of_bias(read.qparams, weight.qparams, len(b))
            assert torch.equal(integer.codes.int(), codes(b, integer.qparams, integer.grid))
            stored.append(op.name)
    sites = model.builder.allowed.sites
    assert stored == [op.name for op in net.graph.ops if "weight" in op.operands and op.operands.get("bias") in sites]
    for choice in plan.choices.values():
        if isinstance(choice.source, SameAs):
            assert choice.qparams == plan.choices[choice.source.site].qparams


class Pooled(nn.Module):
    """A site that has the elements of another: max pooling of codes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.b(x)), 1).flatten(1))


@pytest.fixture(scope="session")
def pooled(capture_net):
    torch.manual_seed(0)
    return capture_net(Pooled())


def test_what_has_the_elements_of_another_moves_with_it(pooled):
    model = a_model(pooled)
    owners = {c.site: c.source.site for c in model.builder.choices.values() if isinstance(c.source, SameAs)}
    assert owners
    assert not set(owners) & set(model.free)
    for x in points(model, 8):
        assert model(x) == same(kl(pooled.graph, model.plan(x), pooled.images, 4))
        for name, owner in owners.items():
            assert model.builder.choices[name].qparams == model.builder.choices[owner].qparams


class Wide:
    """Twice the range: codes so small that any two products are safe."""

    def __call__(self, samples, grid):
        return qparams_from_range(2 * samples.low, 2 * samples.high, grid)


def test_codes_that_are_not_safe_are_infinitely_bad_and_leave_the_model_as_it_was(vit):
    model = a_model(vit, target=AVX2, bits=Bits(8, 8), start=Ranges(MinMax(), Wide()))
    x = np.zeros(len(model.free))
    before = model(x), numbers(model.plan(x))
    role = {i: model.builder.choices[name].role for i, name in enumerate(model.free)}
    for i in range(len(x)):
        point = np.full(len(x), 0.01)
        point[i] = math.log(0.25)
        assert (model(point) == math.inf) == (role[i] == "weight"), model.free[i]
    assert (model(x), numbers(model.plan(x))) == before


@pytest.mark.parametrize("name", ["conv_net", pytest.param("vit", marks=pytest.mark.slow)])
def test_the_runtime_has_the_codes_of_the_plan(request, name, tmp_path, ort_target):
    net = request.getfixturevalue(name)
    target = load_target(ort_target)
    plan = searched(net, target=target)
    save_plan(net.graph, plan, tmp_path)
    again = load_plan(net.graph, tmp_path)
    assert numbers(again) == numbers(plan)
    assert again.log == plan.log
    realize(net.graph, plan, tmp_path / "model.onnx", opset=target.opset)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    checks = compare(net.graph, plan, tmp_path / "model.onnx", net.images.split(4))
    assert not checks.wrong


def test_steps_of_channels_share_a_factor(conv_net):
    target = load_target("ort-x86-channel")
    searches = {"start": quick(points=0, sweeps=0), "end": quick(points=0)}
    found = {name: searched(conv_net, search, target=target) for name, search in searches.items()}
    assert log_of(found["end"])[0]["best"] < log_of(found["start"])[0]["best"]
    for site, choice in found["end"].choices.items():
        ratio = choice.qparams.scale / found["start"].choices[site].qparams.scale
        assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4)
    assert any(c.qparams.scale.ndim and c.role != "weight" for c in found["end"].choices.values())


def test_a_start_without_norms_is_the_recipes_own(conv_net):
    plan = searched(conv_net, JointSearch(Ranges(), points=0, sweeps=0, seconds=None))
    assert numbers(plan) == numbers(plan_for(conv_net.graph, conv_net.stats, VNNI, RECIPES["minmax"], bits=W4A4))
    record, _ = log_of(plan)
    assert (record["norms"], record["p"]) == ([], None)


# time and resuming --------------------------------------------------------------------------------------------------


def test_the_same_request_gives_the_same_plan(conv_net):
    one, two = searched(conv_net), searched(conv_net)
    assert numbers(one) == numbers(two)
    assert one.log == two.log


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 2, 6, 30])
def test_a_killed_search_goes_on_and_computes_nothing_twice(conv_net, tmp_path, monkeypatch, after):
    whole = searched(conv_net, journal=Journal(tmp_path / "whole"))
    count = len((tmp_path / "whole").read_text().splitlines())
    computed, total = [], ModelLoss.total

    def counted(self, outputs):
        if len(computed) == after and not resumed:
            raise Killed
        computed.append(1)
        return total(self, outputs)

    monkeypatch.setattr(ModelLoss, "total", counted)
    resumed = False
    with pytest.raises(Killed):
        searched(conv_net, journal=Journal(tmp_path / "part"))
    if after:
        with (tmp_path / "part").open("ab") as file:
            file.write(b'{"key": "cut o')
    resumed = True
    again = searched(conv_net, journal=Journal(tmp_path / "part"))
    assert len(computed) == count
    assert numbers(again) == numbers(whole)
    assert again.log == whole.log
    lines = [[line.split('"seconds"')[0] for line in (tmp_path / n).read_text().splitlines()] for n in ("part", "whole")]
    assert lines[0] == lines[1]


def test_a_journal_of_other_questions_is_dropped_from_there_on(tmp_path):
    path = tmp_path / "journal"
    first = Journal(path)
    assert [first.value(k, lambda k=k: float(k)) for k in "123"] == [1, 2, 3]
    second = Journal(path)
    assert second.value("1", lambda: 9.0) == 1
    assert second.replaying
    assert second.value("4", lambda: math.inf) == math.inf
    assert not second.replaying
    third = Journal(path)
    assert [third.value(k, lambda: 9.0) for k in "142"] == [1, math.inf, 9]


class Clock:
    """Each evaluation takes a second."""

    def __init__(self, monkeypatch):
        self.now, total = 0.0, ModelLoss.total

        def slow(measure, outputs):
            self.now += 1
            return total(measure, outputs)

        monkeypatch.setattr(ModelLoss, "total", slow)

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("seconds", "norms", "evaluations"), [(0, 1, 1), (3, 2, 1), (20, 5, 15)])
def test_the_search_ends_when_its_time_is_up(vit, monkeypatch, seconds, norms, evaluations):
    plan = searched(vit, quick(seconds=seconds), journal=Journal(clock=Clock(monkeypatch)))
    record, _ = log_of(plan)
    assert record["out_of_time"]
    assert (len(record["norms"]) in (norms, norms - 1), abs(record["evaluations"] - evaluations) <= 1) == (True, True)
    assert record["norms"][0]["p"] == 2
    assert kl(vit.graph, plan, vit.images) == same(record["best"])


@pytest.mark.parametrize("most", [1, 12])
def test_a_search_ends_after_so_many_evaluations_wherever_a_longer_one_was_then(vit, most):
    _, longer = log_of(searched(vit, quick(points=0, evaluations=40)))
    plan = searched(vit, quick(points=0, evaluations=most))
    record, curve = log_of(plan)
    assert (record["evaluations"], record["out_of_time"]) == (most, False)
    assert curve == longer[:most]
    assert kl(vit.graph, plan, vit.images) == same(record["best"])


@pytest.mark.slow
def test_a_search_that_was_killed_has_the_time_that_was_left(vit, monkeypatch, tmp_path):
    search = quick(seconds=20)
    whole = searched(vit, search, journal=Journal(tmp_path / "whole", Clock(monkeypatch)))
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "part").write_bytes(b"".join(lines[:9]))
    again = searched(vit, search, journal=Journal(tmp_path / "part", Clock(monkeypatch)))
    assert again.log == whole.log
    assert numbers(again) == numbers(whole)


def test_time_and_loss_are_for_recipes_that_search_and_a_loss_is_one_of_two():
    def passes(recipe, **options):
        return Request(model="demo", recipe=recipe, **options).method.passes

    assert passes("lapq", time="2min", loss="labels") == (JointSearch(MSE, seconds=120, loss="labels"),)
    assert passes("mse") == RECIPES["mse"].passes
    with pytest.raises(FewbitError, match=r"recipe mse has none, these have: best, best-rotated, .*qdrop, lapq; leave it out"):
        passes("mse", time="2min")
    with pytest.raises(FewbitError, match="recipe mse has none, these have: lapq, fdda"):
        passes("mse", loss="labels")
    with pytest.raises(FewbitError, match=r"allowed are kl .* and labels"):
        passes("lapq", loss="accuracy")


@pytest.mark.parametrize(("loss", "labels", "kept"), [("labels", True, True), ("kl", True, False), ("labels", False, False)])
def test_calibration_images_keep_their_labels_where_the_loss_asks_for_them(loss, labels, kept):
    request = Request(
        model="demo", images=demo.CALIBRATION, score=demo.TEST, recipe="lapq", calibration=4, scored=4, labels=labels, loss=loss
    )
    preprocess = Preprocess.from_timm({"input_size": (3, 32, 32)})
    chosen, _ = open_both(request, sources_of(request), preprocess, 10, labels)
    assert (chosen.labels is not None) == kept


def test_a_walk_gives_what_the_graph_gives(net):
    walk = Stream(Executor(net.graph, ()), net.images.split(4))
    walk.to(len(walk.order) // 2)
    with torch.no_grad():
        expected = net.graph.module(net.images)
    for _ in range(2):
        assert torch.allclose(torch.cat([output for (output,) in walk.outputs()]), expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 499, 500, 501, 2345])
def test_a_long_curve_is_thinned_and_keeps_its_ends_and_its_best(count):
    losses = [float((i * 7919) % 1000) for i in range(count)]
    rows = list(thinned(losses))
    assert len(rows) <= 501
    assert (rows[0][0], rows[-1][0]) == (0, count - 1)
    best = list(itertools.accumulate(losses, min))
    assert all((loss, so_far) == (losses[i], best[i]) for i, loss, so_far in rows)
