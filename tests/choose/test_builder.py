"""What a plan is while a pass changes it. Oracles: float64 for integer biases, the target's own table, the value itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewbit.capture.sites import tensor_of
from fewbit.choose.builder import PlanBuilder
from fewbit.core.grid import Grid, QParams
from fewbit.core.plan import Bias, Own, PassLog, SameAs
from fewbit.execute.executor import Executor

VNNI = "ort-x86-vnni"  # convolutions store integer biases and have integer results; those of linear layers are float


def builder_of(net, target: str = VNNI) -> PlanBuilder:
    return PlanBuilder(net.plan(target), net.context(target))


def own_bias(net, op: str) -> torch.Tensor:
    return tensor_of(net.graph, net.graph.site(f"{op}:bias"))


def scaled(choice, factor: float, method: str = "moved"):
    return replace(choice, qparams=QParams(choice.qparams.scale * factor, choice.qparams.zero), method=method)


def assert_codes(bias: Bias, builder: PlanBuilder, op: str, real: torch.Tensor) -> None:
    """The codes are the nearest multiples of input scale times weight scale, and what is added is these multiples."""
    operands = builder.graph.op(op).operands
    scales = [builder.choices[operands[side]].qparams.scale.double() for side in ("input", "weight")]
    expected = real.double() / (scales[0] * scales[1])
    # the product of the two scales is rounded to float32
    assert bool(((bias.integer.codes - expected).abs() <= 0.5 + expected.abs() * 2.0**-23).all())
    torch.testing.assert_close(bias.values.double(), bias.integer.codes * scales[0] * scales[1], rtol=1e-6, atol=0)
    assert bias.integer.codes.dtype == torch.int32
    assert torch.equal(bias.real, real)


def test_a_bias_is_an_integer_where_the_target_stores_it_so(conv_net):
    builder = builder_of(conv_net)
    assert "stem:bias" in builder.allowed.sites
    bias = builder.decide_bias(conv_net.graph.op("stem"))
    assert bias.integer.grid == builder.allowed.sites["stem:bias"].grids[0]
    assert_codes(bias, builder, "stem", own_bias(conv_net, "stem"))
    moved = own_bias(conv_net, "stem") + 0.01
    builder.correct("stem", moved)
    assert_codes(builder.biases["stem"], builder, "stem", moved)


def test_a_correction_is_an_integer_where_the_kernel_quantizes_its_result(conv_net):
    name, builder = "b", builder_of(conv_net, VNNI)  # without a bias
    op = conv_net.graph.op(name)
    assert op.operands.get("bias") not in builder.allowed.sites
    assert op.operands["output"] in builder.choices
    assert builder.decide_bias(op) is None  # without a correction the graph's own stays, or there is nothing to add
    real = torch.linspace(-0.3, 0.3, 8)
    builder.correct(name, real)
    assert builder.biases[name].integer.grid == Grid(32, axis=0)
    assert_codes(builder.biases[name], builder, name, real)


@pytest.mark.parametrize(
    ("name", "op", "target"),  # a reader alone quantizes what the stem gives
    [("vit", "blocks.0.fc1", VNNI), ("conv_net", "head", "openvino-x86"), ("conv_net", "stem", "openvino-x86")],
)
def test_a_bias_is_float_everywhere_else(request, name, op, target):
    net = request.getfixturevalue(name)
    builder = builder_of(net, target)
    node = net.graph.op(op)
    assert f"{op}:bias" not in builder.allowed.sites
    assert (node.operands.get("output", "") in builder.allowed.sites) == (op == "stem")
    assert builder.decide_bias(node) is None  # the graph's own float bias stays
    assert torch.equal(builder.real_bias(node), own_bias(net, op))
    real = own_bias(net, op) + 0.1234
    builder.correct(op, real)
    assert builder.biases[op].integer is None
    assert torch.equal(builder.biases[op].values, real)


def test_where_a_sum_has_many_scales_no_bias_is_an_integer(wide_vit):
    builder = builder_of(wide_vit, "ort-x86-w4")
    assert builder.choices["blocks.0.fc1:weight"].qparams.scale.ndim == 2
    real = torch.ones(64)
    builder.correct("blocks.0.fc1", real)
    assert builder.biases["blocks.0.fc1"].integer is None
    assert torch.equal(builder.biases["blocks.0.fc1"].values, real)


@pytest.mark.parametrize("side", ["input", "weight"])
def test_integer_biases_follow_the_scales_and_keep_what_was_wanted(conv_net, side):
    builder = builder_of(conv_net)
    before, real = builder.biases["stem"], own_bias(conv_net, "stem")
    builder.set(scaled(builder.choices[f"stem:{side}"], 0.25))
    plan = builder.plan()
    assert_codes(plan.biases["stem"], builder, "stem", real)
    assert (plan.biases["stem"].integer.codes - 4 * before.integer.codes).abs().max() <= 2  # of the half that was lost
    back = PlanBuilder(plan, conv_net.context(VNNI))
    back.set(scaled(back.choices[f"stem:{side}"], 4.0))
    assert torch.equal(back.plan().biases["stem"].integer.codes, before.integer.codes)  # nothing was rounded twice


def test_what_an_op_adds_is_in_the_executor_as_soon_as_it_is_decided(conv_net):
    plan = conv_net.plan(VNNI)
    executor = Executor(conv_net.graph, plan.integer_ops)
    builder = PlanBuilder(plan, conv_net.context(VNNI), executor)
    builder.correct("b", torch.linspace(-0.3, 0.3, 8))
    assert torch.equal(executor.bias("b"), builder.biases["b"].values)
    builder.restore({}, {"b": None})
    assert "b" not in builder.biases
    assert executor.bias("b") is None


def test_biases_of_a_plan_are_in_graph_order_and_no_choices(conv_net):
    builder = builder_of(conv_net)
    builder.correct("head", torch.ones(4))
    builder.correct("b", torch.ones(8))
    plan = builder.plan()
    assert list(plan.biases) == ["stem", "depth", "a", "b", "head"]
    assert {choice.role for choice in plan.choices.values()} == {"input", "weight", "output"}


def test_sites_that_hold_the_codes_of_another_follow_it(conv_net):
    builder = builder_of(conv_net)
    followers = {name: c.source.site for name, c in builder.choices.items() if isinstance(c.source, SameAs)}
    assert followers["head:input"] == "avgpool:output"
    owner = scaled(builder.choices["avgpool:output"], 1.5)
    builder.set(owner)
    follower = builder.choices["head:input"]
    assert follower.qparams == owner.qparams
    assert follower.method == "moved"
    assert (follower.site, follower.role, follower.source) == ("head:input", "input", SameAs("avgpool:output"))
    others = {name: c for name, c in builder.choices.items() if name not in ("avgpool:output", "head:input")}
    assert all(choice.method != "moved" for choice in others.values())


def test_a_follower_of_a_follower_follows_too_and_an_executor_reads_it(conv_net):
    plan = conv_net.plan(VNNI)
    executor = Executor(conv_net.graph, plan.integer_ops, plan.choices)
    builder = PlanBuilder(plan, conv_net.context(VNNI), executor)
    builder.choices["avgpool:output"] = replace(builder.choices["avgpool:output"], source=SameAs("stem:input"))
    moved = scaled(builder.choices["stem:input"], 3.0)
    assert moved.source == Own()
    builder.set(moved)
    for name in ("avgpool:output", "head:input"):
        assert builder.choices[name].qparams == moved.qparams
    head, pooled = (executor.nodes[name] for name in (conv_net.graph.op("head").node, conv_net.graph.site("head:input").tensor))
    assert executor.instead[head][pooled].qparams == moved.qparams


def test_only_a_scale_of_its_own_is_free(vit, conv_net, mixed_net):
    plans = [vit.plan(VNNI), conv_net.plan(VNNI), mixed_net.plan("npu-int16")]
    kinds = {type(c.source).__name__: c.is_free for plan in plans for c in plan.choices.values()}
    assert kinds == {"Own": True, "Fixed": False, "SameAs": False, "SharedWith": False}


def test_a_fallback_of_a_narrower_weight_is_replaced_by_the_next(conv_net):
    builder = builder_of(conv_net)
    weight = builder.choices["a:weight"]
    for bits in (7, 6):
        builder.set_weight(replace(weight, grid=replace(weight.grid, bits=bits)), weight.grid, "too heavy")
    mine = [f for f in builder.plan().fallbacks if f.site == "a:weight"]
    assert [(f.requested, f.actual, f.why, f.kind) for f in mine] == [("8 bits", "6 bits", "too heavy", "accumulator")]
    builder.set_weight(weight, weight.grid, "")
    assert not [f for f in builder.plan().fallbacks if f.site == "a:weight"]


def test_the_log_of_a_pass_comes_behind_those_before(conv_net):
    first = builder_of(conv_net).plan(PassLog("one", "1"))
    second = PlanBuilder(first, conv_net.context(VNNI)).plan(PassLog("two", "2", ({"a": 1},), {"b": 2}))
    assert [log.name for log in second.log] == ["one", "two"]
    assert second.logs("two") == (PassLog("two", "2", ({"a": 1},), {"b": 2}),)
    assert second.logs("three") == ()
