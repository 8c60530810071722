"""Oracles: the target's own table, brute force over pairs, float64 for biases, the tensor itself for weights."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from bench.ablations import ABLATIONS
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fewbit.choose import Bits, Recipe, choose, parse_bits
from fewbit.choose.distill import Distill
from fewbit.choose.finetune import Finetune
from fewbit.choose.headroom import pairs_are_safe
from fewbit.choose.joint_search import JointSearch
from fewbit.choose.reconstruct import Reconstruct
from fewbit.core.fx import constant
from fewbit.core.grid import Grid
from fewbit.core.plan import Fixed, Own, SameAs
from fewbit.errors import BadValues, FewbitError, UnknownName
from fewbit.realize import realize
from fewbit.recipes import MSE, RECIPES
from fewbit.target import Target, load_target
from planning import plan_for

TARGETS = ["ort-x86-vnni", "ort-x86-avx2", "openvino-x86"]
INTEGER_OUTPUT = {"ort-x86-vnni", "ort-x86-avx2"}


def tensor_of(net, site: str) -> torch.Tensor:
    node = next(n for n in net.graph.module.graph.nodes if n.name == net.graph.site(site).tensor)
    return constant(net.graph.module, node)


@pytest.fixture(params=["conv_net", "vit"])
def net(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_chooses_for_each_site_that_an_integer_op_reads_and_for_no_other(net, target, everything):
    plan = net.plan(target, everything=everything)
    rules = load_target(target)
    expected, biases = set(), []
    for name in plan.integer_ops:
        op = net.graph.op(name)
        read = set(op.operands) & set(rules.rule(op.kind).operands)
        expected |= {op.operands[operand] for operand in read - {"bias"}}
        biases += [name] if "bias" in read else []
    assert set(plan.choices) == expected
    assert list(plan.biases) == biases
    assert all(bias.integer is not None for bias in plan.biases.values())
    order = [site.name for site in net.graph.sites]
    assert list(plan.choices) == sorted(plan.choices, key=order.index)


@pytest.mark.parametrize("target", TARGETS)
def test_every_op_is_in_integers_or_refused_or_joins_what_is_float(net, target):
    plan = net.plan(target)
    refused = {fallback.site for fallback in plan.fallbacks if fallback.actual == "float"}
    for op in net.graph.ops:
        assert (op.name in plan.integer_ops) + (op.name in refused) + (op.macs == 0 and op.name not in plan.integer_ops) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_conv_net_runs_in_integers_from_end_to_end_where_convolutions_have_integer_results(conv_net, target):
    joins = {"add", "avgpool"} if target in INTEGER_OUTPUT else set()
    assert set(conv_net.plan(target).integer_ops) == {"stem", "depth", "a", "b", "head"} | joins


LINEARS = ("patch", *(f"blocks.0.qkv.{part}" for part in (1, 2, 3)), "blocks.0.proj", "blocks.0.fc1", "blocks.0.fc2", "head")


@pytest.mark.parametrize("target", TARGETS)
def test_a_transformer_runs_in_integers_from_end_to_end(vit, target):
    assert set(vit.plan(target, everything=True).integer_ops) == {*LINEARS, "blocks.0.qk", "blocks.0.pv"}


@pytest.mark.parametrize("target", TARGETS)
def test_onnxruntime_keeps_attention_in_float_and_writes_it_as_one_kernel(vit, target, tmp_path):
    fused = load_target(target).fuse
    plan = vit.plan(target, everything=False)
    assert (set(plan.integer_ops) == set(LINEARS)) == ("multi_head_attention" in fused)
    realize(vit.graph, plan, tmp_path / "model.onnx", **load_target(target).file_format)
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "model.onnx")).graph.node]
    assert kinds.count("MultiHeadAttention") + kinds.count("QAttention") == ("multi_head_attention" in fused)


def slow_attention(name: str) -> Target:
    """A target that says that it multiplies two activations faster in float."""
    target = load_target(name)
    rules = (rule.model_copy(update={"runs": "float", "why": "slow"}) if rule.kind == "matmul" else rule for rule in target.op)
    return target.model_copy(update={"op": tuple(rules)})


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_target_runs_faster_in_float_is_refused_with_its_share_and_taken_on_request(vit, name):
    def plan(**options):
        return plan_for(vit.graph, vit.stats, slow_attention(name), RECIPES["minmax"], **options)

    assert plan().integer_ops == LINEARS
    shares = {r.site: r.macs_share for r in plan().fallbacks if r.actual == "float"}
    macs = 3 * 4 * 16 * 16 + 16 * 16 * (48 + 16 + 32 + 32) + 16 * 4 + 2 * (16 * 16 * 16)
    assert shares == {name: pytest.approx(16 * 16 * 16 / macs) for name in ("blocks.0.qk", "blocks.0.pv")}
    assert {r.why for r in plan().fallbacks} >= {"slow"}
    assert {"blocks.0.qk", "blocks.0.pv"} <= set(plan(everything=True).integer_ops)


@pytest.mark.parametrize("target", TARGETS)
def test_softmax_is_pinned_at_one_in_256(vit, target):
    plan = vit.plan(target, "mse")
    assert {"blocks.0.qk", "blocks.0.pv"} <= set(plan.integer_ops)
    probs = plan.choices["blocks.0.pv:probs"]
    assert (probs.qparams.scale.item(), probs.qparams.zero.item(), probs.source) == (1 / 256, 0, Fixed())
    assert (probs.grid.low, probs.grid.high) == (0, 255)


def test_softmax_of_fewer_bits_keeps_its_range(vit):
    probs = vit.plan("ort-x86-vnni", everything=True, bits=Bits(6, 6)).choices["blocks.0.pv:probs"]
    assert (probs.qparams.scale.item(), probs.grid.high) == (1 / 64, 63)


SLOW = JointSearch | Reconstruct | Finetune | Distill


PLAIN = [name for name, recipe in ABLATIONS.items() if not isinstance(recipe.passes[-1], SLOW)]


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=[pytest.mark.slow] * (name not in RECIPES)) for name in PLAIN])
def test_openvino_has_no_zero_point_on_either_side_of_a_product_of_activations(vit, recipe):
    plan = vit.plan("openvino-x86", recipe, everything=True)
    for operand in ("qk:query", "qk:key", "pv:probs", "pv:value"):
        assert plan.choices[f"blocks.0.{operand}"].qparams.zero == 0


class SelfProduct(nn.Module):
    """One tensor that a linear reads with a zero point and a product of activations must read without."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = x.flatten(2)[..., :8].relu()
        return self.outer(F.scaled_dot_product_attention(self.inner(x), x, x)).mean(1)


def test_a_product_is_refused_where_its_operand_has_a_grid_that_it_cannot_read(capture_net):
    torch.manual_seed(0)
    net = capture_net(SelfProduct())
    plan = net.plan("openvino-x86", everything=True)
    (product,) = (op for op in map(net.graph.op, plan.integer_ops) if op.kind == "matmul")
    assert product.name == "qk"
    assert all(plan.choices[site].qparams.zero == 0 for site in product.operands.values())
    refused = {r.site: r.why for r in plan.fallbacks}
    first = net.graph.op("pv").operands["value"]
    assert refused == {"pv": f"openvino-x86 has no grid for {first} that all of its readers take"}


@pytest.mark.parametrize("pattern", ["blocks.0.fc1", "blocks.0.fc1:input", "blocks.?.fc1*"])
def test_keep_float_leaves_the_op_float_and_says_so(vit, pattern):
    plan = vit.plan("ort-x86-vnni", keep_float=[pattern])
    assert "blocks.0.fc1" not in plan.integer_ops
    assert "blocks.0.fc2" in plan.integer_ops
    assert not {"blocks.0.fc1:input", "blocks.0.fc1:weight"} & set(plan.choices)
    why = {r.site: r.why for r in plan.fallbacks}
    assert "on request" in why["blocks.0.fc1"]
    assert plan.exemptions == (pattern,)


def test_an_op_in_float_has_the_reason_of_the_option_that_left_it_there(vit):
    limit, given = ("blocks.0.fc1",), Bits(8, 8, floats=("head",))
    plan = vit.plan("ort-x86-vnni", keep_float=["*.fc2", *limit], float_by_limit=limit, bits=given)
    assert {r.site: r.why for r in plan.fallbacks if r.site in ("blocks.0.fc1", "blocks.0.fc2", "head")} == {
        "blocks.0.fc1": "in float by --max-drop",
        "blocks.0.fc2": "kept float on request (--keep-float)",
        "head": "kept float on request (--bits)",
    }


def test_what_joins_a_convolution_kept_float_stays_float(conv_net):
    plan = conv_net.plan("ort-x86-vnni", keep_float=["b"])
    assert plan.integer_ops == ("stem", "depth", "a", "head")


def test_a_pattern_that_matches_nothing_offers_near_names(vit):
    with pytest.raises(UnknownName, match=r"'blocks\.0\.fc3'\. Did you mean .*blocks\.0\.fc"):
        vit.plan("ort-x86-vnni", keep_float=["blocks.0.fc3"])


def extremes(grid: Grid) -> list[int]:
    return [grid.low, 0, grid.high]


@given(
    st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[st.integers(-127, 127)] * n), min_size=1, max_size=3)),
    st.sampled_from([Grid(8, signed=False), Grid(8), Grid(8, narrow=True), Grid(6, signed=False)]),
    st.sampled_from([14, 15, 16]),
)
def test_pairs_are_safe_says_what_all_pairs_with_extreme_activations_say(rows, activation, bits):
    sums = [
        w[0] * a + (w[1] * b if len(w) > 1 else 0)
        for row in rows
        for w in (list(itertools.combinations(row, 2)) or [row])
        for a in extremes(activation)
        for b in extremes(activation)
    ]
    safe = -(2 ** (bits - 1)) <= min(sums) and max(sums) < 2 ** (bits - 1)
    assert pairs_are_safe(torch.tensor(rows, dtype=torch.int8), activation, bits) == safe


@pytest.mark.parametrize(("row", "safe"), [([127, 1], True), ([127, 2], False), ([-127, -1], True), ([-64, -65], False)])
def test_two_bytes_times_255_saturate_sixteen_bits_where_arithmetic_says(row, safe):
    assert (255 * sum(row) <= 32767 and 255 * sum(row) >= -32768) == safe
    assert pairs_are_safe(torch.tensor([row]), Grid(8, signed=False), 16) == safe


class Narrow(nn.Module):
    """Two linears: one whose channels have a single weight each, and one with normal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.full = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.alone.weight.copy_(torch.eye(8) + 1e-3)

    def forward(self, x):
        return self.full(self.alone(x))


def test_without_vnni_weights_keep_8_bits_only_where_no_two_products_saturate(capture_net):
    torch.manual_seed(0)
    net = capture_net(Narrow())
    plan = net.plan("ort-x86-avx2")
    bits = {name: plan.choices[f"{name}:weight"].grid.bits for name in ("alone", "full")}
    assert bits == {"alone": 8, "full": 7}
    assert plan.choices["full:weight"].codes.abs().max() == 63
    (fallback,) = plan.fallbacks
    assert (fallback.site, fallback.requested, fallback.actual) == ("full:weight", "8 bits", "7 bits")
    assert fallback.macs_share == 0.5
    assert {c.grid.bits for c in net.plan("ort-x86-vnni").choices.values() if c.role == "weight"} == {8}


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_four_bits_are_within_seven_and_activations_keep_eight(net, target):
    plan = net.plan(target, bits=parse_bits("w4a8"))
    for choice in plan.choices.values():
        if choice.role == "weight":
            assert choice.codes.abs().amax(tuple(range(1, choice.codes.ndim))).tolist() == [7] * len(choice.codes)
        else:
            assert choice.grid.bits == 8


def test_weight_codes_are_the_nearest_multiples_of_the_channels_step(net):
    plan = net.plan("ort-x86-vnni")
    weights = [c for c in plan.choices.values() if c.role == "weight"]
    assert len(weights) == sum(op.kind in ("linear", "conv", "depthwise") for op in net.graph.ops)
    for choice in weights:
        w = tensor_of(net, choice.site).double().numpy()
        w = w.reshape(len(w), -1)
        step = np.abs(w).max(1, keepdims=True) / 127
        # the step is float32: the code of a weight right between two codes may be either
        assert np.abs(choice.codes.numpy().reshape(w.shape) - w / step).max() <= 0.5 + 1e-4


def test_biases_are_counted_in_steps_of_input_times_weight(conv_net):
    plan = conv_net.plan("ort-x86-vnni", "mse")
    assert set(plan.biases) == {"stem", "depth", "a"}
    for choice in (bias.integer for bias in plan.biases.values()):
        op = conv_net.graph.op(choice.site.split(":")[0])
        steps = [plan.choices[op.operands[operand]].qparams.scale.double() for operand in ("input", "weight")]
        expected = (tensor_of(conv_net, choice.site).double() / (steps[0] * steps[1])).numpy()
        # the product of the two steps is rounded to float32
        assert np.abs(choice.codes.numpy() - expected).max() <= 0.5 + np.abs(expected).max() * 2.0**-23
        assert choice.codes.dtype == torch.int32
        assert not choice.qparams.zero.any()


def test_a_tensor_that_only_moves_codes_takes_the_step_of_their_owner(conv_net):
    plan = conv_net.plan("ort-x86-vnni", "mse")
    pooled, read = plan.choices["avgpool:output"], plan.choices["head:input"]
    assert read.qparams == pooled.qparams
    assert read.source == SameAs("avgpool:output")
    assert read.why == "elements of avgpool:output"


def test_a_weight_that_is_not_finite_names_its_site(conv_net):
    net = copy.deepcopy(conv_net)
    tensor_of(net, "a:weight")[3, 2] = float("nan")
    with pytest.raises(BadValues, match=r"^a:weight holds NaN or infinite values"):
        net.plan("ort-x86-vnni")


def test_the_same_choice_twice_is_the_same_plan(net):
    a, b = (net.plan("ort-x86-avx2", "mse") for _ in range(2))
    assert list(a.choices) == list(b.choices)
    for name, choice in a.choices.items():
        assert choice.qparams == b.choices[name].qparams
        assert choice.codes is None or torch.equal(choice.codes, b.choices[name].codes)
    assert a.fallbacks == b.fallbacks


@pytest.mark.parametrize(("text", "bits"), [("8", Bits(8, 8)), (6, Bits(6, 6)), (" W4A8 ", Bits(4, 8)), ("w2a3", Bits(2, 3))])
def test_bits_are_read_as_one_width_or_as_two(text, bits):
    assert parse_bits(text) == bits


@pytest.mark.parametrize(
    "text",
    [
        "4,stem",
        "4,stem=",
        "4,=8",
        "4,stem=1",
        "4,a=8,b=x",
        "mixed:6.0,first=8",
        "first=8",
        "",
        "1",
        "17",
        "w4",
        "a8",
        "w4a17",
        "4.5",
        "w8a8x",
        "mixed",
        "mixed:",
        "mixed:3:4,5",
        "mixed:6:4,20",
        "mixed:6.0:",
    ],
)
def test_other_bits_are_refused_with_what_is_allowed(text):
    with pytest.raises(FewbitError, match="write mixed:4.5" if text == "4.5" else "allowed are 2 to 16"):
        parse_bits(text)


def test_ops_with_another_width_are_named_by_pattern_or_by_their_place(conv_net):
    assert parse_bits("w4a6,first=8,head=7") == Bits(4, 6, exceptions=(("first", 8), ("head", 7)))
    assert parse_bits("4,*.fc2=w4a8") == Bits(4, 4, exceptions=(("*.fc2", (4, 8)),))
    plan = conv_net.plan("openvino-x86", bits=parse_bits("4,*=5,first=8,last=6,?=3"))
    widths = {name.removesuffix(":weight"): c.grid.bits for name, c in plan.choices.items() if c.role == "weight"}
    assert widths == {"stem": 8, "depth": 5, "a": 3, "b": 3, "head": 6}
    assert plan.choices["stem:input"].grid.bits == 8
    assert plan.bits == "w4a4,*=5,first=8,last=6,?=3"
    with pytest.raises(UnknownName, match=r"op in --bits 'heat'.*head"):
        conv_net.plan("openvino-x86", bits=parse_bits("4,heat=8"))


def test_an_exception_may_have_one_width_for_weights_and_one_for_activations(vit):
    plan = vit.plan("ort-x86-vnni", bits=parse_bits("4,*.fc2=w4a8,*.qk=w4a6"))
    bits = {name: choice.grid.bits for name, choice in plan.choices.items()}
    assert bits["blocks.0.fc2:weight"] == 4
    assert bits["blocks.0.fc2:input"] == 8
    assert [bits[f"blocks.0.qk:{side}"] for side in ("query", "key")] == [6, 6]
    assert bits["blocks.0.fc1:input"] == 4
    assert plan.bits == "w4a4,*.fc2=w4a8,*.qk=w4a6"
    assert parse_bits("4,*.fc2=w4a8").most == 8


def test_the_step_of_a_softmax_is_searched_where_the_recipe_asks_and_the_target_does_not_need_its_own(vit):
    for target, free in (("ort-x86-vnni", True), ("arm-int7", False)):
        recipe = Recipe("", (replace(MSE, free_softmax=True),))
        plan = choose(vit.context(target, bits=parse_bits(4)), recipe)
        probs = next(c for c in plan.choices.values() if c.role == "probs")
        assert (probs.method != "fixed") == free
        assert isinstance(probs.source, Own if free else Fixed)
        if free:
            assert float(probs.qparams.scale) * 15 <= vit.stats.sites[probs.site].high * 1.001
