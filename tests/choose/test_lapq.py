"""LAPQ from the line search to the file. Oracles: closed forms, brute force, scipy, torch's kl_div, simulate."""

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
from fewbit.choose import Bits, choose, lapq
from fewbit.choose.choose import choosing
from fewbit.choose.joint_search import Model
from fewbit.choose.loss import Measure, Walk
from fewbit.choose.powell import JointSearch, descend, parabola, parse_time, thinned
from fewbit.choose.ranges import MinMax, MseRange
from fewbit.core.grid import codes, of_bias, qparams_from_range
from fewbit.data.images import Preprocess
from fewbit.demo import model as demo
from fewbit.errors import BadImages, FewbitError
from fewbit.execute.overlay import Overlay
from fewbit.execute.samples import channel_samples
from fewbit.execute.simulate import simulate
from fewbit.files import Journal
from fewbit.pipeline import open_both, with_joint
from fewbit.realize import load_plan, realize, save_plan
from fewbit.recipes import RECIPES, Recipe
from fewbit.run import Request
from fewbit.target import load_target
from fewbit.target.allowed import allowed
from fewbit.verify.compare import compare

VNNI, AVX2 = load_target("ort-x86-vnni"), load_target("ort-x86-avx2")
QUICK = Recipe(MseRange(), MseRange(), joint=JointSearch(points=4, seconds=None, tolerance=0.05))
W4A4 = Bits(4, 4)


@pytest.fixture(params=["conv_net", "vit"])
def net(request):
    return request.getfixturevalue(request.param)


def searched(net, recipe=QUICK, target=VNNI, **options):
    return lapq(net.graph, net.stats, target, recipe, net.images.split(8), **{"bits": W4A4, **options})


def kl(net, plan, batch=16):
    """torch's own KL divergence of what a plan's simulation answers."""
    simulation = simulate(net.graph, plan)
    with torch.no_grad():
        answers = (torch.cat([m(x) for x in net.images.split(batch)]) for m in (net.graph.module, simulation))
        p, q = (y.double().log_softmax(1) for y in answers)
    return F.kl_div(q, p, log_target=True, reduction="batchmean").item()


def same(loss):
    """The order of float sums may differ, and a KL divergence is small."""
    return pytest.approx(loss, rel=1e-4, abs=1e-12)


def numbers(plan):
    """A plan without its records."""
    return {name: (c.grid, c.qparams, c.codes if c.codes is None else c.codes.tolist()) for name, c in plan.choices.items()}


# the search of numbers ----------------------------------------------------------------------------------------------


class Seen:
    """A function that keeps its points and values."""

    def __init__(self, function):
        self.function, self.points, self.values = function, [], []

    def __call__(self, x):
        self.points.append(np.array(x))
        self.values.append(self.function(x))
        return self.values[-1]

    @property
    def best(self):
        return self.points[int(np.argmin(self.values))]


@pytest.mark.parametrize("method", ["powell", "coordinate"])
def test_a_separable_quadratic_has_its_minimum_after_one_sweep(method):
    place = np.array([0.3, -0.7, 0.0, 1.1])
    f = Seen(lambda x: 2 + float((np.array([1, 5, 2, 0.1]) * (x - place) ** 2).sum()))
    JointSearch(method=method).search(f, 4)
    assert np.abs(f.best - place).max() < 0.01
    assert len(f.values) < 4 * 10


def test_what_moves_together_is_searched_first():
    f = Seen(lambda x: 1 + float(((x - np.array([0.5, 0.5, 0.5, -0.3])) ** 2).sum()))
    kinds = [np.array([1.0, 1, 1, 0]), np.array([0.0, 0, 0, 1])]
    JointSearch().search(f, 4, kinds)
    alone = next(i for i, x in enumerate(f.points) if len(set(x[:3])) > 1)
    assert alone < 20
    found = f.points[int(np.argmin(f.values[:alone]))]
    assert np.abs(found - [0.5, 0.5, 0.5, -0.3]).max() < 0.01
    still = Seen(lambda x: 1.0)
    JointSearch(sweeps=0).search(still, 4, kinds)
    assert len(still.values) == 1


def test_all_weights_and_all_activations_are_the_two_kinds(net):
    model = a_model(net)
    weights = [name.endswith("weight") for name in model.free]
    assert [[bool(v) for v in kind] for kind in model.kinds] == [weights, [not w for w in weights]]
    assert any(weights)
    assert not all(weights)


def test_powell_follows_a_narrow_valley_further_than_coordinates_do():
    def valley(x):
        return float((x[0] - x[1]) ** 2 + 0.02 * (x[0] + x[1] - 2) ** 2)

    ends = {}
    for method in ("powell", "coordinate"):
        f = Seen(valley)
        JointSearch(method=method, sweeps=4, tolerance=1e-4).search(f, 2)
        ends[method] = min(f.values)
    assert ends["powell"] < 1e-3 * ends["coordinate"]


@pytest.mark.parametrize("seed", range(5))
def test_a_line_search_on_steps_and_noise_is_never_worse_than_its_start_and_stays_inside(seed):
    noise = np.random.default_rng(seed).normal(size=400)
    f = Seen(lambda t: float(noise[int(50 * t) + 200]))
    t, found = descend(f, f(0.0), 0.1, 0.01, (-1.0, 0.5))
    assert found == min(f.values)
    assert found == f.function(t)
    assert all(-1 <= p <= 0.5 for p in f.points)


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_a_function_that_only_falls_ends_at_the_bound(slope):
    assert descend(lambda t: slope * t, 0.0, 0.1, 0.01, (-1.0, 0.75))[0] == (-1.0 if slope > 0 else 0.75)


def test_a_loss_that_is_infinite_on_one_side_is_searched_on_the_other():
    t, _ = descend(lambda t: math.inf if t > 0.02 else (t + 0.4) ** 2, 0.16, 0.1, 0.01, (-1.0, 1.0))
    assert abs(t + 0.4) < 0.01


def test_points_stay_within_the_factors():
    f = Seen(lambda x: float(x.sum() + x[0] * x[1]))
    JointSearch(smallest=0.5, largest=1.5, sweeps=3).search(f, 3)
    assert all(math.log(0.5) <= v <= math.log(1.5) for point in f.points for v in point)
    assert np.allclose(f.best[2], math.log(0.5))


@pytest.mark.parametrize("bad", [{"low": 0}, {"smallest": 1.5}, {"seconds": -1}, {"images": 0}, {"tolerance": 1}])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="allowed"):
        JointSearch(**bad)


# p ------------------------------------------------------------------------------------------------------------------


def test_the_vertex_of_a_parabola_is_its_closed_form():
    p = np.linspace(2, 4, 10)
    found = parabola(p, 3 * p**2 - 19 * p + 40)
    assert (found.a, found.b, found.c) == pytest.approx((3, -19, 40))
    assert found.vertex == pytest.approx(19 / 6)
    assert found.r2 == pytest.approx(1)


@pytest.mark.parametrize("losses", [lambda p: -((p - 3) ** 2), lambda p: (p - 5) ** 2, lambda p: (p - 1) ** 2])
def test_a_parabola_that_opens_down_or_has_its_vertex_outside_has_no_minimum(losses):
    p = np.linspace(2, 4, 10)
    assert parabola(p, losses(p)).vertex is None


def test_two_points_and_an_infinite_loss_have_no_parabola():
    assert parabola([2, 4], [1, 2]) is None
    assert parabola([2, 3, 4], [1, 2, math.inf]) is None


def test_norms_are_those_of_the_grid_and_the_first_few_span_it():
    found = JointSearch().norms
    assert sorted(found) == pytest.approx(np.linspace(2, 4, 10))
    assert found[:2] == [2, 4]
    assert 2.8 < found[2] < 3.2
    assert JointSearch(points=0).norms == []


@pytest.mark.parametrize("losses", [{2.0: 5, 4.0: 3, 3.0: 1}, {2.0: 1, 4.0: 9, 3.0: 5}, {2.0: 3, 4.0: 1, 3.0: 2}])
def test_the_search_starts_where_the_calibration_loss_is_smallest(conv_net, monkeypatch, losses):
    """Whatever each p costs, the vertex as well."""
    asked = []

    def value(self, key, compute):
        p = float(key.removeprefix("p = ")) if key.startswith("p = ") else None
        asked.append(p)
        return losses.get(p, 0.5) if p is not None else 7.0

    monkeypatch.setattr(Journal, "value", value)
    plan = searched(conv_net, dataclasses.replace(QUICK, joint=JointSearch(points=3, sweeps=0, seconds=None)))
    fit, record = parabola(list(losses), list(losses.values())), plan.extra["joint"]
    tried = losses if fit.vertex is None else losses | {fit.vertex: 0.5}
    assert record["p"] == min(tried, key=tried.get)
    assert [row["p"] for row in record["norms"]] == pytest.approx(sorted(tried))
    at_p = Recipe(MseRange(record["p"]), MseRange(record["p"]))
    assert numbers(plan) == numbers(choose(conv_net.graph, conv_net.stats, VNNI, at_p, bits=W4A4))


# the loss -----------------------------------------------------------------------------------------------------------


def a_model(net, target=VNNI, bits=W4A4, batches=None, recipe=QUICK):
    batches = batches or net.images.split(4)
    work = choosing(net.graph, net.stats, target, recipe, bits=bits)
    return Model(work, Measure.of(net.graph, batches), batches, "moved")


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
        assert loss == same(kl(net, model.plan(x), 4))
    assert len(places) > 3  # it did start in the middle


def test_the_same_points_in_another_order_have_the_same_losses(net):
    model, other = a_model(net), a_model(net)
    found = list(points(model, 8))
    assert [model(x) for x in found] == [other(x) for x in reversed(found)][::-1]


def test_a_line_search_runs_only_what_is_behind_its_step(vit, monkeypatch):
    model = a_model(vit)
    ran = []
    run = Overlay.run
    monkeypatch.setattr(Overlay, "run", lambda self, nodes, env: (ran.append(1), run(self, nodes, env))[1])
    last = np.zeros(len(model.free))
    counts = []
    for step in (0.1, 0.2, 0.3):
        last[-1] = step  # the weight of the head
        ran.clear()
        model(last.copy())
        counts.append(len(ran))
    assert counts[2] < 0.1 * counts[0]


def test_what_is_held_stays_under_its_limit(vit, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fewbit.choose.loss"), "KEPT_BYTES", 20_000)
    model = a_model(vit)
    for x in points(model, 8):
        assert model(x) == same(kl(vit, model.plan(x), 4))
        held = [v for env in model.walk._envs for node, v in env.items() if node.op != "placeholder"]
        assert sum(4 * v.numel() for v in held if isinstance(v, torch.Tensor)) <= 20_000


def test_with_labels_the_loss_is_cross_entropy(conv_net):
    labels = torch.randint(4, (16,), generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(QUICK, joint=JointSearch(points=2, sweeps=0, loss="labels", seconds=None))
    plan = searched(conv_net, recipe, labels=labels)
    with torch.no_grad():
        expected = F.cross_entropy(simulate(conv_net.graph, plan)(conv_net.images), labels).item()
    assert plan.extra["joint"]["best"] == pytest.approx(expected, rel=1e-5)
    assert "labels" in plan.extra["joint"]["loss"]
    with pytest.raises(BadImages, match="needs calibration images with labels"):
        searched(conv_net, recipe)


def test_an_answer_that_is_no_number_is_infinitely_bad(conv_net):
    measure = Measure.of(conv_net.graph, conv_net.images.split(16))
    assert measure.total([torch.full((16, 4), math.nan)]) == math.inf


# the plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [W4A4, Bits(8, 8), Bits(3, 5)], ids=str)
def test_the_plan_has_the_smallest_loss_that_was_seen_and_none_is_above_its_start(net, bits):
    plan = searched(net, bits=bits)
    record = plan.extra["joint"]
    losses = [loss for _, loss, _ in record["curve"] if loss is not None]
    assert record["best"] == min(losses) <= record["start"] == losses[0]
    assert record["start"] <= min(row["loss"] for row in record["norms"])
    assert kl(net, plan) == same(record["best"])
    assert bits == Bits(8, 8) or record["best"] < record["start"]


@pytest.mark.parametrize("target", [VNNI, AVX2, load_target("openvino-x86")], ids=lambda t: t.name)
def test_codes_are_the_weights_rounded_at_the_new_steps_and_biases_follow(net, target):
    model = a_model(net, target)
    x = next(point for point in points(model, 50) if np.isfinite(model(point)))
    plan, start = model.plan(x), model.plan(0 * x)
    moved = {c.role for c in plan.choices.values() if c.qparams != start.choices[c.site].qparams}
    assert {"weight", "input"} <= moved
    for op in (net.graph.op(name) for name in plan.integer_ops):
        if "weight" not in op.operands:
            continue
        weight, read = plan.choices[op.operands["weight"]], plan.choices[op.operands["input"]]
        w = tensor_of(net.graph, net.graph.site(weight.site))
        assert torch.equal(weight.codes.int(), codes(w, weight.qparams, weight.grid))
        if op.operands.get("bias") in plan.choices:
            bias = plan.choices[op.operands["bias"]]
            b = tensor_of(net.graph, net.graph.site(bias.site))
            assert bias.qparams == of_bias(read.qparams, weight.qparams, len(b))
            assert torch.equal(bias.codes.int(), codes(b, bias.qparams, bias.grid))
    for choice in plan.choices.values():
        if choice.why.startswith("elements of "):
            assert choice.qparams == plan.choices[choice.why.removeprefix("elements of ")].qparams


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
    followers = [name for names in model._followers.values() for name in names]
    assert followers
    assert not set(followers) & set(model.free)
    for x in points(model, 8):
        assert model(x) == same(kl(pooled, model.plan(x), 4))
        for name in followers:
            owner = model.work.choices[model.work.choices[name].why.removeprefix("elements of ")]
            assert model.work.choices[name].qparams == owner.qparams


class Wide:
    """Twice the range: codes so small that any two products are safe."""

    def __call__(self, samples, grid):
        return qparams_from_range(2 * samples.low, 2 * samples.high, grid)


def test_codes_that_are_not_safe_are_infinitely_bad_and_leave_the_model_as_it_was(vit):
    model = a_model(vit, target=AVX2, bits=Bits(8, 8), recipe=Recipe(MinMax(), Wide()))
    x = np.zeros(len(model.free))
    before = model(x), numbers(model.plan(x))
    role = {i: model.work.choices[name].role for i, name in enumerate(model.free)}
    for i in range(len(x)):
        point = np.full(len(x), 0.01)
        point[i] = math.log(0.25)
        assert (model(point) == math.inf) == (role[i] == "weight"), model.free[i]
    assert (model(x), numbers(model.plan(x))) == before


@pytest.mark.parametrize("name", ["conv_net", "vit"])
def test_the_runtime_has_the_codes_of_the_plan(request, name, tmp_path, ort_target):
    net = request.getfixturevalue(name)
    target = load_target(ort_target)
    plan = searched(net, target=target)
    save_plan(net.graph, plan, tmp_path)
    again = load_plan(net.graph, tmp_path)
    assert numbers(again) == numbers(plan)
    assert again.extra["joint"] == plan.extra["joint"]
    realize(net.graph, plan, tmp_path / "model.onnx", opset=target.opset)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    checks = compare(net.graph, plan, tmp_path / "model.onnx", net.images.split(4))
    assert not checks.wrong


def test_steps_of_channels_share_a_factor(conv_net):
    target = load_target("ort-x86-channel")
    channels = channel_samples(conv_net.graph, conv_net.images.split(8), allowed(conv_net.graph, target).channel_axes)
    found = {}
    for name, joint in (("start", dataclasses.replace(QUICK.joint, points=0, sweeps=0)), ("end", QUICK.joint)):
        recipe = dataclasses.replace(QUICK, joint=dataclasses.replace(joint, points=0))
        found[name] = searched(conv_net, recipe, target=target, channels=channels)
    assert found["end"].extra["joint"]["best"] < found["start"].extra["joint"]["best"]
    for site, choice in found["end"].choices.items():
        ratio = choice.qparams.scale / found["start"].choices[site].qparams.scale
        assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4)
    assert any(c.qparams.scale.ndim and c.role != "weight" for c in found["end"].choices.values())


def test_a_start_without_norms_is_the_recipes_own(conv_net):
    recipe = Recipe(MinMax(), MinMax(), joint=JointSearch(points=0, sweeps=0, seconds=None))
    plan = searched(conv_net, recipe)
    assert numbers(plan) == numbers(choose(conv_net.graph, conv_net.stats, VNNI, Recipe(), bits=W4A4))
    assert plan.extra["joint"]["norms"] == []
    assert plan.extra["joint"]["p"] is None


# time and resuming --------------------------------------------------------------------------------------------------


def test_the_same_request_gives_the_same_plan(conv_net):
    one, two = searched(conv_net), searched(conv_net)
    assert numbers(one) == numbers(two)
    assert one.extra == two.extra


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 2, 6, 30])
def test_a_killed_search_goes_on_and_computes_nothing_twice(conv_net, tmp_path, monkeypatch, after):
    whole = searched(conv_net, journal=Journal(tmp_path / "whole"))
    count = len((tmp_path / "whole").read_text().splitlines())
    computed, total = [], Measure.total

    def counted(self, outputs):
        if len(computed) == after and not resumed:
            raise Killed
        computed.append(1)
        return total(self, outputs)

    monkeypatch.setattr(Measure, "total", counted)
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
    assert again.extra == whole.extra
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
        self.now, total = 0.0, Measure.total

        def slow(measure, outputs):
            self.now += 1
            return total(measure, outputs)

        monkeypatch.setattr(Measure, "total", slow)

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("seconds", "norms", "evaluations"), [(0, 1, 1), (3, 2, 1), (20, 5, 15)])
def test_the_search_ends_when_its_time_is_up(vit, monkeypatch, seconds, norms, evaluations):
    recipe = dataclasses.replace(QUICK, joint=dataclasses.replace(QUICK.joint, points=4, seconds=seconds))
    plan = searched(vit, recipe, journal=Journal(clock=Clock(monkeypatch)))
    record = plan.extra["joint"]
    assert record["out_of_time"]
    assert (len(record["norms"]) in (norms, norms - 1), abs(record["evaluations"] - evaluations) <= 1) == (True, True)
    assert record["norms"][0]["p"] == 2
    assert kl(vit, plan) == same(record["best"])


@pytest.mark.parametrize("most", [1, 12])
def test_a_search_ends_after_so_many_evaluations_wherever_a_longer_one_was_then(vit, most):
    recipe = dataclasses.replace(QUICK, joint=dataclasses.replace(QUICK.joint, points=0, evaluations=40))
    longer = searched(vit, recipe).extra["joint"]
    recipe = dataclasses.replace(recipe, joint=dataclasses.replace(recipe.joint, evaluations=most))
    plan = searched(vit, recipe)
    record = plan.extra["joint"]
    assert (record["evaluations"], record["out_of_time"]) == (most, False)
    assert record["curve"] == longer["curve"][:most]
    assert kl(vit, plan) == same(record["best"])


def test_a_search_that_was_killed_has_the_time_that_was_left(vit, monkeypatch, tmp_path):
    recipe = dataclasses.replace(QUICK, joint=dataclasses.replace(QUICK.joint, seconds=20))
    whole = searched(vit, recipe, journal=Journal(tmp_path / "whole", Clock(monkeypatch)))
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "part").write_bytes(b"".join(lines[:9]))
    again = searched(vit, recipe, journal=Journal(tmp_path / "part", Clock(monkeypatch)))
    assert again.extra == whole.extra
    assert numbers(again) == numbers(whole)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10min", 600), ("1h", 3600), ("1.5 h", 5400), ("0s", 0)])
def test_time_is_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["10", "ten minutes", "-5s", "10m", "1h30min", ""])
def test_time_that_is_not_understood_says_what_is_allowed(text):
    with pytest.raises(FewbitError, match="allowed are seconds, minutes and hours: 90s, 10min, 1h"):
        parse_time(text)


def test_time_and_loss_are_for_recipes_that_search_and_a_loss_is_one_of_two():
    assert with_joint(RECIPES["lapq"], "lapq", "2min", "labels").joint == JointSearch(seconds=120, loss="labels")
    assert with_joint(RECIPES["mse"], "mse", None, None) is RECIPES["mse"]
    with pytest.raises(FewbitError, match="recipe mse has none, these have: lapq"):
        with_joint(RECIPES["mse"], "mse", "2min", None)
    with pytest.raises(FewbitError, match=r"allowed are kl .* and labels"):
        with_joint(RECIPES["lapq"], "lapq", None, "accuracy")


@pytest.mark.parametrize(("loss", "labels", "kept"), [("labels", True, True), ("kl", True, False), ("labels", False, False)])
def test_calibration_images_keep_their_labels_where_the_loss_asks_for_them(loss, labels, kept):
    request = Request("demo", "ort-x86-vnni", "lapq", calibration=4, scored=4, labels=labels, loss=loss)
    preprocess = Preprocess.from_timm({"input_size": (3, 32, 32)})
    chosen, _ = open_both(demo.CALIBRATION, demo.TEST, preprocess, 10, request)
    assert (chosen.labels is not None) == kept


@pytest.mark.parametrize("count", [1, 499, 500, 501, 2345])
def test_a_long_curve_is_thinned_and_keeps_its_ends_and_its_best(count):
    losses = [float((i * 7919) % 1000) for i in range(count)]
    rows = list(thinned(losses))
    assert len(rows) <= 501
    assert (rows[0][0], rows[-1][0]) == (0, count - 1)
    best = list(itertools.accumulate(losses, min))
    assert all((loss, so_far) == (losses[i], best[i]) for i, loss, so_far in rows)


def test_a_walk_gives_what_the_graph_gives(net):
    walk = Walk(Overlay(net.graph, ()), net.images.split(4))
    walk.to(len(walk.order) // 2)
    with torch.no_grad():
        expected = net.graph.module(net.images)
    for _ in range(2):
        assert torch.allclose(torch.cat(list(walk.answers())), expected, atol=1e-6)
