"""Reconstruction. Oracles: all 2^n roundings, autograd's numeric gradients, the float graph, the start itself, onnxruntime."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from fewbit.capture.residual import blocks
from fewbit.choose import Bits, Recipe
from fewbit.choose.headroom import overflowing, pairs_are_safe, weight_of
from fewbit.choose.learn import Learner
from fewbit.choose.ranges import MseRange, Ranges
from fewbit.choose.reconstruct import Reconstruct, _Walk
from fewbit.choose.soft_codes import GAMMA, ZETA, h, h_inverse, open_codes, rounding_loss, soft_fake
from fewbit.core.grid import Grid, QParams, codes, fake, qparams_from_range
from fewbit.errors import BadImages
from fewbit.files import Journal
from fewbit.observe import observe
from fewbit.realize import load_plan, realize, save_plan
from fewbit.recipes import RECIPES
from fewbit.request import Request
from fewbit.target import load_target
from fewbit.target.allowed import allowed
from fewbit.verify.compare import compare
from planning import context_for, numbers, plan_for

VNNI = load_target("ort-x86-vnni")
W4A4 = Bits(4, 4)
START = Ranges(MseRange(), MseRange())
SHORT = Reconstruct(
    iterations=30, batch=8, lr=0.05, drop=0.5, learn_scales=True, learn_biases=True, scale_lr=3e-3, rounding="straight"
)


@pytest.fixture(params=["conv_net", pytest.param("vit", marks=pytest.mark.slow)])
def net(request):
    return request.getfixturevalue(request.param)


def learnt(net, settings=SHORT, target=VNNI, **options):
    options = {"bits": W4A4, "images": net.images.split(8), **options}
    return plan_for(net.graph, net.stats, target, Recipe("", (START, settings)), **options)


def started(net):
    return plan_for(net.graph, net.stats, VNNI, Recipe("", (START,)), bits=W4A4)


def learned_blocks(plan):
    """What came of each block."""
    (log,) = plan.logs("reconstruct")
    return log.rows


def walk_of(graph, stats, settings, images, start=START, **options):
    context = context_for(graph, stats, VNNI, **options)
    return _Walk(start(context.start(), context), context, settings, list(images))


# soft codes ---------------------------------------------------------------------------------------------------------


def test_the_gradients_of_the_sigmoid_and_of_the_pull_are_the_numeric_ones():
    v = torch.linspace(-2, 2, 9, dtype=torch.float64).add(0.03).requires_grad_()
    assert torch.autograd.gradcheck(h, v)
    assert torch.autograd.gradcheck(lambda x: rounding_loss(h(x), 3.0), v)
    assert float(h(torch.tensor(0.0))) == pytest.approx((ZETA + GAMMA) / 2)


def test_h_and_its_inverse_and_where_nothing_pulls():
    share = torch.linspace(0, 0.999, 50)
    torch.testing.assert_close(h(h_inverse(share)), share, atol=1e-6, rtol=0)
    assert float(rounding_loss(torch.tensor([0.0, 1.0, 1.0]), 2.0)) == 0
    assert float(rounding_loss(torch.tensor([0.5, 0.25]), 2.0)) == 1.75


def test_beta_falls_behind_the_warm_up():
    settings = Reconstruct()
    assert settings.beta(0.19) is None
    assert [settings.beta(p) for p in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])


@pytest.mark.parametrize("rounding", ["sigmoid", "straight"])
@pytest.mark.parametrize("moved", [0, 1])
def test_without_a_step_the_codes_are_those_of_the_start(rounding, moved):
    grid, w = Grid(4, narrow=True, axis=0), torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    qparams = qparams_from_range(w.amin(1) * 0.8, w.amax(1) * 0.8, grid)  # some are clipped
    start = codes(w, qparams, grid)
    start = (start + moved * torch.randint(-1, 2, w.shape, generator=torch.Generator().manual_seed(2))).clamp(
        grid.low, grid.high
    )
    soft = open_codes(rounding, w, start.int(), qparams, grid)
    assert torch.equal(soft.codes(), start.int())
    if rounding == "sigmoid" and not moved:  # the weight itself, where it is not clipped
        inside = (w / qparams.scale[:, None]).abs() < grid.high
        near = (soft.real() - w).abs() <= 2e-3 * qparams.scale[:, None]
        assert near[inside].all()


def test_a_soft_activation_is_the_hard_one_with_the_gradient_of_lsq():
    grid = Grid(3, signed=False, symmetric=False)
    qparams = QParams(torch.tensor(0.5), torch.tensor(2, dtype=torch.int32))
    x = torch.tensor([-3.0, -0.6, 0.2, 1.3, 9.0], requires_grad=True)
    step = qparams.scale.clone().requires_grad_()
    y = soft_fake(x, step, qparams.zero, grid)
    torch.testing.assert_close(y.detach(), fake(x.detach(), qparams, grid))
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    inside = [round(v / 0.5) - v / 0.5 for v in (-0.6, 0.2, 1.3)]  # Esser et al. 2020, equation 3
    assert float(step.grad) == pytest.approx(-2 + sum(inside) + 5, abs=1e-5)


# a unit -------------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Two outputs of three numbers of an image."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        return self.layer(x.mean((2, 3)))


@pytest.mark.parametrize("seed", [0, 1])  # a relaxation need not find it always: for seeds 2 to 4 it does not
def test_a_small_layer_gets_the_best_of_all_roundings(capture_net, seed):
    torch.manual_seed(seed)
    net = capture_net(Tiny())
    x = (torch.randn(128, 3) @ (torch.randn(3, 3) + 1))[:, :, None, None].expand(-1, -1, 8, 8).contiguous()  # correlated
    settings = Reconstruct(iterations=400, batch=64, lr=0.02, rounding_weight=0.3, scope="op")
    walk = walk_of(net.graph, observe(net.graph, x.split(64)), settings, x.split(64), Ranges(), bits=Bits(3, 8))
    lesson, chosen = walk.lesson(walk.blocks[0]), walk.builder.choices
    learner = Learner(walk.builder, settings, lesson, walk.quantized.overlay)
    assert learner.learn(walk.fit, None, lambda: 0.0, torch.Generator().manual_seed(0)) == 400
    (name,) = (site.name for site in net.graph.sites if site.role == "weight")
    choice, read = chosen[name], chosen[net.graph.ops[0].operands["input"]]
    seen = fake(x.mean((2, 3)), read.qparams, read.grid)[walk.fit]
    w, scale = weight_of(net.graph, net.graph.site(name)), choice.qparams.scale
    found = learner.codes()[name].float()
    for row in range(2):
        below = (w[row] / scale[row]).floor()

        def error(q, row=row):
            return float((seen @ (q * scale[row]) - lesson.output.rows(walk.fit)[:, row]).square().mean())

        tried = [
            (below + torch.tensor(up)).clamp(choice.grid.low, choice.grid.high)
            for up in itertools.product((0.0, 1.0), repeat=3)
        ]
        assert error(found[row]) == pytest.approx(min(map(error, tried)), rel=1e-3)


def test_with_drop_1_a_unit_reads_floats_and_with_0_the_quantized_model(net):
    for drop in (0.0, 1.0):
        settings = dataclasses.replace(SHORT, drop=drop)
        walk = walk_of(net.graph, net.stats, settings, net.images.split(8), bits=W4A4, everything=True)
        for part in walk.blocks:
            lesson = walk.lesson(part)
            learner = Learner(walk.builder, settings, lesson, walk.quantized.overlay)
            rows = torch.arange(8)
            given = {node: count * 8 for node, count in lesson.counts.items()}
            y = learner._output(rows).detach()
            if drop:
                plain = type(walk.exact.overlay)(net.graph, walk.builder.allowed.integer_ops)
                weights = {net.graph.op(op).operands["weight"] for op in part.ops}
                for choice in walk.builder.choices.values():
                    if choice.site in weights:
                        plain.set(choice)
                exact = plain.value(part.nodes, {**given, **{n: x.rows(rows) for n, x in lesson.exact.items()}})
                assert float((y - exact).square().mean()) < 1e-4 * float(exact.var())  # biases that are integers are rounded
            else:
                hard = walk.quantized.overlay.value(part.nodes, {**given, **{n: x.rows(rows) for n, x in lesson.read.items()}})
                close = torch.isclose(y, hard, atol=1e-4, rtol=1e-4).float().mean()  # a tie may fall to either side
                assert close > 0.97


def test_the_units_of_a_transformer_and_of_a_residual_network(vit, conv_net, mixed_net):
    integer = allowed(vit.graph, VNNI).integer_ops
    found = blocks(vit.graph, integer, "block")
    assert [op for part in found for op in part.ops] == [
        op.name for op in vit.graph.ops if op.name in integer and "weight" in op.operands
    ]
    both = [part for part in found if len(part.ops) > 1]
    assert both
    assert all("add" in part.output.name and len(part.reads) == 1 for part in both)
    for other, inside in ((conv_net, {"a", "b"}), (mixed_net, None)):
        other_blocks = blocks(other.graph, allowed(other.graph, VNNI).integer_ops, "block")
        joined = [set(part.ops) for part in other_blocks if len(part.ops) > 1]
        assert joined == [inside] if inside else len(joined) == 1
        alone = blocks(other.graph, allowed(other.graph, VNNI).integer_ops, "op")
        assert all(len(part.ops) == 1 for part in alone)


# the walk -----------------------------------------------------------------------------------------------------------


def test_no_unit_is_worse_than_its_start_and_one_is_better(net):
    plan = learnt(net, dataclasses.replace(SHORT, drop=0.0))
    rows = learned_blocks(plan)
    assert all(row["after"] <= row["before"] for row in rows)
    assert any(row["after"] < 0.99 * row["before"] for row in rows)
    assert plan.logs("reconstruct")[0].summary["held"] == 4


def test_what_makes_a_unit_worse_is_not_kept(net):
    plan = learnt(net, dataclasses.replace(SHORT, lr=50.0, scale_lr=3.0, bias_lr=50.0, iterations=2))
    assert not any(row["kept"] for row in learned_blocks(plan))
    assert numbers(plan) == numbers(started(net))


@pytest.mark.parametrize(
    "settings", [SHORT, Reconstruct(iterations=5, batch=4, scope="op"), Reconstruct(iterations=5, batch=4, fisher=True)]
)
def test_the_same_seed_gives_the_same_plan(vit, settings):
    one, two, other = (learnt(vit, settings, seed=seed) for seed in (1, 1, 2))
    assert numbers(one) == numbers(two)
    assert one.log == two.log
    if settings is SHORT:
        assert one.log != other.log


class Clock:
    """Each step of learning takes a second."""

    def __init__(self, monkeypatch):
        self.now, output = 0.0, Learner._output

        def slow(learner, rows):
            self.now += 1
            return output(learner, rows)

        monkeypatch.setattr(Learner, "_output", slow)

    def __call__(self):
        return self.now


def test_the_time_is_shared_in_proportion_and_not_exceeded(vit, monkeypatch):
    clock = Clock(monkeypatch)
    plan = learnt(vit, dataclasses.replace(SHORT, iterations=10_000, seconds=60.0), journal=Journal(None, clock))
    rows = learned_blocks(plan)
    assert clock.now <= 60 + len(rows)  # a step that has begun is ended
    macs = {part.name: part.macs for part in blocks(vit.graph, plan.integer_ops, "block")}
    for row in rows:
        assert row["iterations"] == pytest.approx(60 * macs[row["block"]] / sum(macs.values()), abs=2)


def test_codes_may_stay(vit):
    plan, before = learnt(vit, dataclasses.replace(SHORT, learn_codes=False)), started(vit)
    kept = [row for row in learned_blocks(plan) if row["kept"]]
    assert kept
    for name, choice in plan.choices.items():
        assert choice.role != "weight" or torch.equal(choice.codes, before.choices[name].codes)
    assert any(c.qparams != before.choices[n].qparams for n, c in plan.choices.items() if c.role != "weight")


def test_without_time_nothing_is_learnt(net):
    plan = learnt(net, dataclasses.replace(SHORT, seconds=0.0))
    assert all(row["iterations"] == 0 for row in learned_blocks(plan))
    assert numbers(plan) == numbers(started(net))


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_at_its_unit_and_ends_at_the_same_plan(vit, monkeypatch, tmp_path):
    settings = dataclasses.replace(SHORT, iterations=10_000, seconds=60.0)
    clock = Clock(monkeypatch)
    whole = learnt(vit, settings, journal=Journal(tmp_path / "whole", clock), folder=tmp_path / "all")

    def stop(unit):
        if len(list((tmp_path / "some").glob("*"))) == 2:
            raise KilledError

    clock.now = 0.0
    with pytest.raises(KilledError):
        learnt(vit, settings, journal=Journal(tmp_path / "part", clock), folder=tmp_path / "some", progress=stop)
    clock.now, asked = 1000.0, []
    learn = _Walk.learn
    monkeypatch.setattr(_Walk, "learn", lambda walk, i, *rest: asked.append(i) or learn(walk, i, *rest))
    again = learnt(vit, settings, journal=Journal(tmp_path / "part", clock), folder=tmp_path / "some")
    assert asked == list(range(2, len(learned_blocks(whole))))
    assert again.log == whole.log
    assert whole.biases
    assert numbers(again) == numbers(whole)


@pytest.mark.parametrize(("target", "bits"), [("arm-int7", 7), ("ort-x86-avx2", 8)])
def test_integers_stay_safe_in_narrow_accumulators(vit, target, bits):
    net, spec = vit, load_target(target)
    plan = learnt(net, dataclasses.replace(SHORT, lr=0.03), target=spec, bits=Bits(bits, bits))
    assert any(row["kept"] for row in learned_blocks(plan))
    answer = allowed(net.graph, spec, weight_bits=8, activation_bits=8)
    assert not overflowing(net.graph, plan, answer)
    for op in net.graph.ops:
        if op.name in plan.integer_ops and "weight" in op.operands:
            weight, slot = plan.choices[op.operands["weight"]], answer.sites[op.operands["weight"]]
            assert int(weight.codes.int().abs().max()) <= weight.grid.largest
            if slot.pair_bits is not None and weight.grid != slot.grids[-1]:
                assert pairs_are_safe(weight.codes, plan.choices[op.operands["input"]].grid, slot.pair_bits)


def test_a_weight_whose_new_codes_are_not_safe_keeps_the_old_which_is_a_fallback(vit, monkeypatch, tmp_path):
    monkeypatch.setattr(_Walk, "_is_safe", lambda walk, choice: "learned for its float output" not in choice.method)
    plan = learnt(vit, journal=Journal(tmp_path / "journal"), folder=tmp_path / "blocks")
    before = started(vit)
    kept = [op for row in learned_blocks(plan) if row["kept"] for op in row["ops"]]
    said = [(f.site, f.actual) for f in plan.fallbacks if f.requested == "learned weights"]
    assert sorted(said) == sorted((vit.graph.op(op).operands["weight"], "those before") for op in kept)
    assert len(kept) > 0
    again = learnt(vit, journal=Journal(tmp_path / "journal"), folder=tmp_path / "blocks")
    assert again.fallbacks == plan.fallbacks
    assert numbers(again) == numbers(plan)
    for name, choice in plan.choices.items():
        if choice.role == "weight":
            assert torch.equal(choice.codes, before.choices[name].codes)


def test_the_simulation_is_the_file_in_codes(net, ort_target, tmp_path):
    target = load_target(ort_target)
    plan = learnt(net, target=target, everything=True)
    save_plan(net.graph, plan, tmp_path)
    assert numbers(load_plan(net.graph, tmp_path)) == numbers(plan)
    realize(net.graph, plan, tmp_path / "model.onnx", **target.file_format)
    assert not compare(net.graph, plan, tmp_path / "model.onnx", net.images.split(4)).wrong


def test_too_few_images_are_refused_before_any_work_and_none_as_well(vit):
    done = []
    with pytest.raises(BadImages, match="give 4 calibration images or more"):
        learnt(vit, images=[vit.images[:3]], progress=done.append)
    assert not done
    with pytest.raises(BadImages, match="needs calibration images"):
        learnt(vit, images=())


def test_time_is_for_reconstruction_too():
    *_, learning = Request(model="demo", recipe="best", time="2min").method.passes
    assert learning == dataclasses.replace(RECIPES["best"].passes[-1], seconds=120)
