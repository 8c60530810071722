"""Distillation. Oracles: autograd through `soft_fake`, the loss of the plan that comes out, an uninterrupted run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fewbit.choose import Bits, Recipe, choose
from fewbit.choose.distill import STATE, Course, Distill, Learned, LearnedPlan
from fewbit.choose.loss import ModelLoss
from fewbit.choose.ranges import MinMax, Ranges
from fewbit.core.grid import Grid
from fewbit.errors import BadImages
from fewbit.execute.executor import Executor
from fewbit.request import Request
from fewbit.target import load_target
from planning import context_for, numbers

VNNI = load_target("ort-x86-vnni")
START = Ranges(MinMax(), MinMax())
SHORT = Distill(steps=24, batch=8, checks=4, codes=2.0, scales=0.1, biases=0.2, area=(0.9, 1.0), seconds=None)


def distilled(net, folder=None, settings=SHORT, **options):
    images = net.images.split(8)
    context = context_for(
        net.graph, net.stats, VNNI, bits=Bits(3, 3), images=images[:-1], aside=images[-1:], folder=folder, **options
    )
    return context, choose(context, Recipe("", (START, settings)))


def same(a, b):
    """Whether two choices have the same scale and the same codes."""
    return a.qparams == b.qparams and (a.codes is None or torch.equal(a.codes, b.codes))


def test_the_gradients_of_a_learned_step_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    x, zero, grid = torch.randn(4, 50, generator=generator), 3, Grid(3, signed=False, symmetric=False)
    weight = torch.randn(4, 50, generator=generator)

    def written_out(x, log, zero, grid):
        at = x / log.exp()
        q = at + (at.round() - at).detach() + zero
        kept = (q >= grid.low) & (q <= grid.high)
        return (torch.where(kept, q, q.detach().clamp(grid.low, grid.high)) - zero) * log.exp()

    results = []
    for function in (Learned.apply, written_out):
        leaf, log = x.clone().requires_grad_(), torch.tensor(-0.7, requires_grad=True)
        y = function(leaf, log, torch.tensor(zero), grid)
        (y * weight).sum().backward()
        results.append((y.detach(), leaf.grad, log.grad))
    assert 0 < int((results[0][1] == 0).sum()) < 100  # some are clipped, most are not
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_plan_has_the_loss_that_is_said_and_a_smaller_one(conv_net):
    context, plan = distilled(conv_net)
    (log,) = plan.logs("distill")
    measure = ModelLoss.of(context.graph, context.aside)
    start = START(context.start(), context)
    assert measure(Executor.of(context.graph, start), context.aside) == pytest.approx(log.summary["before"])
    assert measure(Executor.of(context.graph, plan), context.aside) == pytest.approx(log.summary["after"], rel=1e-4)
    assert log.summary["kept"]
    assert log.summary["after"] < 0.9 * log.summary["before"]
    assert log.summary["after"] == min(log.summary["losses"])
    moved = [site for site, choice in plan.choices.items() if not same(choice, start.choices[site])]
    assert {context.graph.site(site).role for site in moved} >= {"weight", "input"}


def test_what_is_not_better_on_the_images_set_aside_is_not_taken(conv_net):
    context, plan = distilled(conv_net, settings=dataclasses.replace(SHORT, steps=4, checks=1, biases=1e4))
    (log,) = plan.logs("distill")
    start = START(context.start(), context)
    assert not log.summary["kept"]
    assert min(log.summary["losses"][1:]) > log.summary["before"]
    assert numbers(plan) == numbers(start)


def test_a_killed_run_goes_on_and_gives_the_same_plan(conv_net, tmp_path, monkeypatch):
    _, whole = distilled(conv_net)
    steps = 0

    def killed(course):
        nonlocal steps
        steps += 1
        if steps == 15:
            raise KeyboardInterrupt
        advance(course)

    advance = Course.advance
    monkeypatch.setattr(Course, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        distilled(conv_net, tmp_path)
    monkeypatch.setattr(Course, "advance", advance)
    assert (tmp_path / STATE).exists()
    _, resumed = distilled(conv_net, tmp_path)
    assert numbers(resumed) == numbers(whole)
    assert resumed.logs("distill")[0].summary == whole.logs("distill")[0].summary


def test_too_few_images_to_set_one_aside_are_refused(conv_net):
    context = context_for(conv_net.graph, conv_net.stats, VNNI, bits=Bits(4, 4), images=conv_net.images.split(8))
    with pytest.raises(BadImages, match="16 or more"):
        choose(context, Recipe("", (START, SHORT)))


def test_a_student_before_the_first_step_computes_what_the_plan_does(conv_net):
    context, _ = distilled(conv_net, settings=dataclasses.replace(SHORT, steps=1, checks=1))
    start = START(context.start(), context)
    student = LearnedPlan(start, context)
    images = conv_net.images[:4]
    expected = Executor.of(context.graph, start)(images)
    for outputs in (student(images), Executor.of(context.graph, student.quantized()[0])(images)):
        torch.testing.assert_close(outputs[0].detach(), expected[0], rtol=1e-4, atol=1e-4)


def test_a_weight_that_keeps_its_codes_is_a_fallback(conv_net):
    context = context_for(conv_net.graph, conv_net.stats, load_target("ort-x86-avx2"), images=conv_net.images.split(8))
    start, grids = START(context.start(), context), context.allowed.sites
    wide = {  # codes of 8 bits of which no two saturate a sum of 16
        site: dataclasses.replace(choice, grid=grids[site].grids[0], codes=torch.ones_like(choice.codes))
        for site, choice in start.choices.items()
        if choice.role == "weight"
    }
    start = dataclasses.replace(start, choices={**start.choices, **wide})
    student = LearnedPlan(start, context)
    for soft in student.codes.values():
        soft.parameter.data.fill_(soft.grid.high)
    plan, unchanged = student.quantized()
    saturate = set()
    for site, choice in wide.items():
        op = context.graph.op(context.graph.site(site).readers[0][0])
        sums = min(choice.codes[0].numel(), 2) * start.choices[op.operands["input"]].grid.high * choice.grid.high
        if grids[site].pair_bits is not None and sums > 2 ** (grids[site].pair_bits - 1) - 1:
            saturate.add(site)
    assert 0 < len(saturate) < len(wide)
    said = {f.site: (f.requested, f.actual, f.why) for f in plan.fallbacks if f.requested == "learned weights"}
    assert said == dict.fromkeys(saturate, ("learned weights", "those before", "learned codes can saturate 16 bits"))
    assert set(unchanged) == saturate == {site for site in wide if torch.equal(plan.choices[site].codes, wide[site].codes)}


def test_steps_and_time_are_those_that_are_asked_for():
    def asked(**options):
        return Request(model="demo", recipe="best", **options).method.passes[-1]

    assert asked() == Distill()
    assert asked(steps=600) == Distill(steps=600, seconds=None)
    assert asked(time="2min") == Distill(seconds=120)
    assert asked(steps=600, time="2min") == Distill(steps=600, seconds=120)
