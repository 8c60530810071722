"""Oracles: products counted by hand, NumPy's int16 on the worst codes, and onnxruntime's integers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fewbit.choose import Bits
from fewbit.errors import FewbitError
from fewbit.request.recipe_options import check_bits, default_bits
from fewbit.target import load_target
from fewbit.target.allowed import allowed
from fewbit.target.spec import Target
from fewbit.verify.compare import compare

A8 = {"bits": 8, "signed": True, "narrow": True}
W8 = A8 | {"granularity": "channel"}
TOO_MANY = "8 products of 8 by 8 bits do not fit in 16 bits: 2 do"


def variant(activations: list[str], weights: list[str], chain: int = 8) -> Target:
    """arm-int7 with types of 8 bits as well, and these lists for what activations and weights may be."""
    data = json.loads(load_target("arm-int7").model_dump_json(by_alias=True))
    data["types"] |= {"a8": A8, "w8": W8, "p8": A8 | {"fixed_scale": 1 / 127}}
    for rule in data["op"]:
        for operand, names in rule["operands"].items():
            if names == ["a7"]:
                rule["operands"][operand] = activations
            if names == ["p7"]:
                rule["operands"][operand] = [name.replace("a", "p") for name in activations]
            if names == ["w7"]:
                rule["operands"][operand] = weights
        if rule["accumulator"]["chain"]:
            rule["accumulator"]["chain"] = chain
    return Target.model_validate(data)


def products(graph):
    return [op for op in graph.ops if op.reduction_size is not None]


def worst_chain(graph, answer, op) -> int:
    """The largest sum of eight products that the first grids of an op allow."""
    names = [name for operand, name in op.operands.items() if operand not in ("bias", "output")]
    g, h = (answer.sites[name].grids[0] for name in (names[0], names[-1]))
    return min(8, op.reduction_size) * max(abs(a * b) for a in (g.low, g.high) for b in (h.low, h.high))


@pytest.mark.parametrize("net", ["conv_net", "vit"])
def test_every_layer_is_legal_in_seven_bits(net, request):
    graph = request.getfixturevalue(net).graph
    answer = allowed(graph, load_target("arm-int7"))
    assert not answer.fallbacks
    assert {op.name for op in products(graph)} <= set(answer.integer_ops)
    for op in products(graph):
        assert worst_chain(graph, answer, op) <= 32767


@pytest.mark.parametrize("net", ["conv_net", "vit"])
def test_eight_bits_alone_are_refused_with_the_number_that_fits(net, request):
    graph = request.getfixturevalue(net).graph
    answer = allowed(graph, variant(["a8"], ["w8"]))
    assert [r.why for r in answer.fallbacks] == [TOO_MANY] * len(products(graph))
    assert {r.site for r in answer.fallbacks} == {op.name for op in products(graph)}
    assert not answer.integer_ops


@pytest.mark.parametrize("net", ["conv_net", "vit"])
def test_the_next_types_of_the_lists_are_taken_and_reported(net, request):
    graph = request.getfixturevalue(net).graph
    answer = allowed(graph, variant(["a8", "a7"], ["w8", "w7"]))
    assert {op.name for op in products(graph)} <= set(answer.integer_ops)
    for op in products(graph):
        assert worst_chain(graph, answer, op) <= 32767
        assert {answer.sites[op.operands[o]].grids[0].bits for o in op.operands if o not in ("bias", "output")} == {7}
    assert {(r.requested, r.actual) for r in answer.fallbacks} == {("8 bits", "7 bits")}
    narrowed = {op.operands[o] for op in products(graph) for o in op.operands if o not in ("bias", "output")}
    assert {r.site for r in answer.fallbacks} == narrowed


def test_one_operand_is_narrowed_where_that_is_enough(conv_net):
    answer = allowed(conv_net.graph, variant(["a8"], ["w8", "w7"], chain=4))  # 4 * 127 * 63 = 32,004
    assert {answer.sites[op.operands["weight"]].grids[0].bits for op in products(conv_net.graph)} == {7}
    assert {answer.sites[op.operands["input"]].grids[0].bits for op in products(conv_net.graph)} == {8}
    assert {r.why for r in answer.fallbacks} == {"4 products of 8 by 8 bits do not fit in 16 bits: 2 do"}


def test_a_width_that_is_asked_for_counts_and_not_that_of_the_type(conv_net):
    assert not allowed(conv_net.graph, variant(["a8"], ["w8"]), weight_bits=7, activation_bits=7).fallbacks
    mixed = allowed(conv_net.graph, variant(["a8"], ["w8"]), weight_bits=6, activation_bits=8)  # 8 * 127 * 31 = 31,496
    assert not mixed.fallbacks


def test_a_code_more_costs_the_eighth_product(conv_net):
    data = json.loads(load_target("arm-int7").model_dump_json(by_alias=True))
    for name in ("a7", "w7"):
        data["types"][name]["narrow"] = False
    answer = allowed(conv_net.graph, Target.model_validate(data))
    assert {r.why for r in answer.fallbacks} == {"8 products of 7 by 7 bits do not fit in 16 bits: 7 do"}


def test_an_op_that_sums_fewer_products_than_a_chain_needs_no_more(conv_net):
    answer = allowed(conv_net.graph, variant(["a7"], ["w7"], chain=9))  # 9 * 63 * 63 = 35,721
    a_pointwise = conv_net.graph.op("a")  # 1 x 1 with 8 input channels
    assert a_pointwise.reduction_size == 8
    assert "a" in answer.integer_ops
    assert {r.why for r in answer.fallbacks} == {"9 products of 7 by 7 bits do not fit in 16 bits: 8 do"}


def test_a_softmax_that_is_narrowed_has_the_step_of_its_type(vit):
    answer = allowed(vit.graph, variant(["a8", "a7"], ["w8", "w7"]))
    probs = next(site.name for site in vit.graph.sites if site.role == "probs")
    assert answer.sites[probs].fixed_scale == pytest.approx(1 / 63)
    plan = vit.plan("arm-int7")
    assert plan.choices[probs].qparams.scale.item() == np.float32(1 / 63)


def test_without_a_width_a_target_has_the_widest_up_to_eight():
    assert [default_bits(load_target(name)) for name in ("arm-int7", "ort-x86-vnni", "ort-x86-wide")] == [7, 8, 8]
    check_bits(load_target("arm-int7"), Bits(7, 7))
    with pytest.raises(FewbitError, match=r"arm-int7 has no integers wider than 7 bits; allowed are 2 to 7"):
        check_bits(load_target("arm-int7"), Bits(8, 8))


@pytest.mark.parametrize("net", ["conv_net", pytest.param("vit", marks=pytest.mark.slow)])
def test_onnxruntime_gives_the_integers_of_the_plan(net, realized, request):
    run = realized(request.getfixturevalue(net), "arm-int7", bits=Bits(7, 7))
    checks = compare(run.net.graph, run.plan, run.path, run.net.images.split(8))
    assert checks.off
    assert not checks.wrong
    codes = [c.codes for c in run.plan.choices.values() if c.role == "weight"]
    assert max(int(q.abs().max()) for q in codes) == 63


def test_on_request_are_those_ops_alone_that_are_in_integers_without_it(vit):
    target = load_target("ort-x86-vnni")
    before, after = allowed(vit.graph, target), allowed(vit.graph, target, keep_float=("blocks.0.*",))
    asked = {r.site for r in after.fallbacks if "on request" in r.why}
    assert asked == {name for name in before.integer_ops if name.startswith("blocks.0.")}
    assert len(asked) == 6  # attention's products are float anyway, and so are both additions
    assert {r for r in after.fallbacks if r.site not in asked} == set(before.fallbacks)


def test_a_pattern_of_ops_does_not_mean_those_that_read_their_results(conv_net):
    assert conv_net.graph.op("depth").operands["input"] == "stem:output"
    for pattern, kept in (("stem*", {"stem"}), ("stem:out*", {"stem", "depth"})):
        answer = allowed(conv_net.graph, load_target("ort-x86-vnni"), keep_float=(pattern,))
        assert {r.site for r in answer.fallbacks} == kept
        assert not kept & set(answer.integer_ops)


def test_what_stays_float_on_purpose_is_told_from_what_could_not_be_had(vit):
    target, attention = load_target("ort-x86-vnni"), [op.name for op in vit.graph.ops if op.kind == "matmul"]
    answer = allowed(vit.graph, target, keep_float=("head",))
    assert {r.site for r in answer.fallbacks if r.kind == "chosen"} == {"head", *attention}
    tried = allowed(vit.graph, target, everything=True)
    assert not [r for r in tried.fallbacks if r.kind == "chosen"]
    assert not [r for r in allowed(vit.graph, load_target("npu-int16")).fallbacks if r.kind == "chosen"]
