"""Entries of a kind, sizes, shared steps and sums. Oracles: sizes and magnitudes counted by hand, the worst input there is."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bench.integer_arithmetic import weighted_codes
from torch import nn

from fewbit.choose import Bits
from fewbit.core.grid import Grid
from fewbit.core.plan import SharedWith
from fewbit.recipes import RECIPES
from fewbit.target import load_target, rule_of
from fewbit.target.allowed import allowed
from fewbit.target.shapes import sizes
from fewbit.target.spec import Target
from fewbit.target.sums import narrowed_pair
from planning import plan_for

CONVS = ("stem", "side", "widen", "narrow")


def edited(name: str, **changes: object) -> Target:
    """A shipped target with fields of its `conv` entry changed; `first` is an entry in front of all, `types` more types."""
    data = json.loads(load_target(name).model_dump_json(by_alias=True))
    data["types"] |= changes.pop("types", {})
    first = changes.pop("first", None)
    for rule in data["op"]:
        if rule["kind"] == "conv":
            rule |= changes
    data["op"] = ([first] if first else []) + data["op"]
    return Target.model_validate(data)


def test_sizes_are_those_of_the_layers(mixed_net, wide_vit):
    of = {op.name: sizes(mixed_net.graph, op) for op in mixed_net.graph.ops}
    assert of["stem"] == {"inputs": 3, "outputs": 16, "rows": 64}
    assert of["depth"] == {"inputs": 48, "outputs": 48, "rows": 64, "grouped": 1}
    assert of["head"] == {"inputs": 32, "outputs": 4, "rows": 1}
    assert of["concat"] == {"inputs": 16, "outputs": 32, "rows": 64}
    vit = {op.name: sizes(wide_vit.graph, op) for op in wide_vit.graph.ops}
    assert vit["blocks.0.qk"] == {"inputs": 16, "outputs": 16, "rows": 16}
    assert vit["blocks.0.fc1"] == {"inputs": 32, "outputs": 64, "rows": 16}


@pytest.mark.parametrize(
    ("shape", "lost"),
    [
        ({"inputs": {"multiple": 16}}, {"stem": "inputs is 3, the kernel needs a multiple of 16"}),
        ({"outputs": {"most": 32}}, {"widen": "outputs is 48, the kernel needs at most 32"}),
        (
            {"rows": {"least": 65}},
            dict.fromkeys(("stem", "side", "widen", "narrow"), "rows is 64, the kernel needs at least 65"),
        ),
        ({}, {}),
    ],
)
def test_an_op_of_another_size_stays_float_and_says_so(mixed_net, shape, lost):
    answer = allowed(mixed_net.graph, edited("ort-x86-vnni", shape=shape))
    refused = {r.site: r.why for r in answer.fallbacks}
    assert refused == {name: f"conv on ort-x86-vnni: {why}" for name, why in lost.items()}
    assert not set(lost) & set(answer.integer_ops)


FIRST = {
    "kind": "conv",
    "operands": {"input": ["x6"], "weight": ["w8"], "bias": ["b32"], "output": ["x6"]},
    "output": "integer",
    "readers": "all",
    "shape": {"outputs": {"multiple": 48}},
}
X6 = {"x6": {"bits": 6, "signed": False, "symmetric": False}}


def test_of_several_entries_the_first_that_fits_is_taken(conv_net, mixed_net):
    target = edited("ort-x86-vnni", first=FIRST, types=X6)
    graph = mixed_net.graph
    plan = plan_for(graph, mixed_net.stats, target, RECIPES["minmax"], bits=Bits(6, 6))
    grids = {name: choice.grid for name, choice in plan.choices.items()}
    rule = rule_of(graph, target, graph.op("stem"), grids)
    assert rule is not None
    assert rule.operands["input"] == ("a8",)  # 16 outputs: the second entry
    alone = edited("ort-x86-vnni", first={**FIRST, "shape": {}}, types=X6)
    six = allowed(conv_net.graph, alone, weight_bits=6, activation_bits=6)
    assert {six.sites[op.operands["input"]].grids[0].bits for op in conv_net.graph.ops if op.kind == "conv"} == {6}
    eight = allowed(conv_net.graph, alone)  # an entry that does not hold eight bits comes after one that does
    assert {eight.sites[op.operands["input"]].grids[0].bits for op in conv_net.graph.ops if op.kind == "conv"} == {8}


def test_a_group_has_the_step_of_all_that_was_seen_of_it(mixed_net):
    plan = mixed_net.plan("npu-int16")
    answer = allowed(mixed_net.graph, load_target("npu-int16"))
    joined = next(group for group in answer.shared if "concat:output" in group)
    assert {"stem:output", "maxpool:output", "side:output", "concat:output"} <= set(joined)
    largest = max(max(-mixed_net.stats.sites[n].low, mixed_net.stats.sites[n].high) for n in joined)
    for name in joined:
        assert plan.choices[name].source == SharedWith(tuple(other for other in joined if other != name))
    grid = plan.choices["concat:output"].grid
    assert float(plan.choices["concat:output"].qparams.scale) == pytest.approx(largest / grid.high, rel=1e-6)


@pytest.mark.parametrize("recipe", ["minmax", "mse", "easyquant", "liu2021"])
@pytest.mark.parametrize("net", ["mixed_net", "wide_vit"])
def test_no_input_overflows_the_accumulator_of_a_plan(net, recipe, request):
    net = request.getfixturevalue(net)
    plan, target = net.plan("npu-int16", recipe), load_target("npu-int16")
    weighted = [net.graph.op(name) for name in plan.integer_ops if "weight" in net.graph.op(name).operands]
    assert len(weighted) > 4
    warned = {r.site for r in plan.fallbacks if r.actual == "sums that may leave them"}
    for op in weighted:
        weight, read = plan.choices[op.operands["weight"]], plan.choices[op.operands["input"]].grid
        bias = plan.biases[op.name].integer if op.name in plan.biases else None
        start = torch.zeros(len(weight.codes)) if bias is None else bias.codes.double()
        rule = rule_of(net.graph, target, op, {name: c.grid for name, c in plan.choices.items()})
        rows = weight.codes.flatten(1).int()
        for sign in (1, -1):  # the worst input of each channel, on its diagonal
            _, lost = weighted_codes(sign * read.high * rows.sign(), rows, torch.zeros(len(rows)), 0, rule.accumulator)
            assert lost == 0
        worst = rows.abs().sum(1) * read.largest + start.abs()
        assert bool((worst <= 32767).all()) or op.name in warned


def test_the_widest_pair_is_found_and_a_narrower_one_where_weights_are_heavy(conv_net):
    op = conv_net.graph.op("b")  # 72 terms
    rule = load_target("npu-int16").rules("conv")[0]
    grids = [Grid(bits, narrow=True, axis=None) for bits in range(8, 2, -1)]
    weights = [dataclasses.replace(g, axis=0) for g in grids]
    found = narrowed_pair(conv_net.graph, op, rule.accumulator, grids, weights)
    assert found is not None
    w = conv_net.module.b.weight.detach().flatten(1).double()

    def fits(a: Grid, b: Grid) -> bool:
        codes = (w / (w.abs().amax(1, keepdim=True) / b.high)).round()
        return bool((codes.abs().sum(1) * a.largest <= 32767).all())

    assert fits(*found)
    better = [(a, b) for a in grids for b in weights if min(a.bits, b.bits) > min(found[0].bits, found[1].bits)]
    assert better
    assert not any(fits(a, b) for a, b in better)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        nn.init.constant_(self.conv.weight, 0.5)
        nn.init.constant_(self.conv.bias, 20.0)

    def forward(self, x):
        return self.conv(x)


def test_a_channel_that_would_overflow_has_a_larger_step(capture_net):
    net = capture_net(Wide())
    plan = net.plan("npu-int16")
    weight, bias = plan.choices["conv:weight"], plan.biases["conv"].integer
    sums = weight.codes.int().flatten(1).abs().sum(1) * plan.choices["conv:input"].grid.largest + bias.codes.abs()
    assert bool((sums <= 32767).all())
    assert float(sums.max()) > 0.8 * 32767  # and no larger than it has to be
    real = bias.codes * bias.qparams.scale
    torch.testing.assert_close(real, torch.full((4,), 20.0), rtol=1e-3, atol=0)
