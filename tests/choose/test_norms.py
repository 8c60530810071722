"""The norm of activations' ranges by the model's own loss. Oracle: the simulation with weights of 16 bits, torch's KL."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fewbit.choose import choose, parse_bits
from fewbit.choose.scales.ranges import MinMax, MseRange
from fewbit.recipes import RECIPES, Recipe
from fewbit.simulate import simulate
from fewbit.target import load_target

WIDE = load_target("ort-x86-wide")


@pytest.mark.parametrize("name", ["conv_net", "vit"])
def test_activations_have_the_norm_with_which_the_model_is_nearest(name, request):
    net = request.getfixturevalue(name)
    plan = net.plan("ort-x86-wide", "fast", bits=parse_bits("w4a5"))
    losses = {row["p"]: row["loss"] for row in plan.extra["norms"]}
    assert tuple(losses) == RECIPES["fast"].norms
    with torch.no_grad():
        exact = net.graph.module(net.images).log_softmax(1)
    for p, loss in losses.items():
        plain = Recipe(MseRange(p), MinMax(), free_softmax=True)
        alike = choose(net.graph, net.stats, WIDE, plain, bits=parse_bits("w16a5"), everything=True)
        with torch.no_grad():
            found = simulate(net.graph, alike)(net.images).log_softmax(1)
        kl = F.kl_div(found, exact, reduction="batchmean", log_target=True)
        assert loss == pytest.approx(float(kl), rel=0.12)  # a weight of 16 bits moves a code of 5 bits now and then
        ranges = {s: (c.affine.scale.item(), c.affine.zero.item()) for s, c in alike.choices.items() if c.codes is None}
        same = {s: (plan.choices[s].affine.scale.item(), plan.choices[s].affine.zero.item()) for s in ranges} == ranges
        assert same == (loss == min(losses.values()))


def test_norms_are_for_ranges_by_them():
    with pytest.raises(ValueError, match="norms are those of ranges by"):
        dataclasses.replace(RECIPES["minmax"], norms=(2.0, 3.0))
