"""The recipes of Liu et al. 2021 from choose to the runtime. Oracles: the float module, and the search's own objective."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from bench.ablations import ABLATIONS
from bench.module_search import ModuleSearch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from fewbit.capture.structure import modules
from fewbit.choose import Recipe, choose, parse_bits
from fewbit.choose.objectives import Pearson, RankingLoss, flipped
from fewbit.choose.output_search import OutputSearch
from fewbit.choose.ranges import Ranges
from fewbit.core.fx import constant
from fewbit.core.grid import fake, values
from fewbit.core.plan import Bias, SameAs
from fewbit.errors import BadFile, BadImages
from fewbit.execute.executor import Executor
from fewbit.execute.simulate import simulate
from fewbit.realize import load_plan, realize, save_plan
from fewbit.target import load_target
from fewbit.verify.compare import compare, kernels
from oracles.search import dense

LIU = [name for name in ABLATIONS if name.startswith("liu2021")]
QUICK = ("liu2021",)  # of every other the file is checked with the slow tests
BITS = parse_bits(4)
STRONG = OutputSearch(ranking=RankingLoss(), gamma=5.0)


@pytest.fixture(params=["conv_net", "vit"])
def net(request):
    return request.getfixturevalue(request.param)


def tensor_of(net, site: str) -> torch.Tensor:
    return constant(net.graph.module, next(n for n in net.graph.module.graph.nodes if n.name == net.graph.site(site).tensor))


def outputs(net, plan, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float and quantized outputs (images, tokens, c_out) of an op on the samples, biases of graph and plan included."""
    op, rows = net.graph.op(name), net.rows[name].rows
    read, weight = plan.choices[op.operands["input"]], plan.choices[op.operands["weight"]]
    w = values(weight.codes.to(torch.int32), weight.qparams, weight.grid).flatten(1)
    bias = tensor_of(net, op.operands["bias"]) if "bias" in op.operands else torch.zeros(len(w))
    new = plan.biases[name].values if name in plan.biases else bias
    exact = F.linear(rows, dense(tensor_of(net, op.operands["weight"]).flatten(1), rows.shape[-1]), bias)
    return exact, F.linear(fake(rows, read.qparams, read.grid), dense(w, rows.shape[-1]), new)


ELSEWHERE = ("ort-x86-avx2", "openvino-x86")


@pytest.mark.parametrize("recipe", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LIU])
def test_simulation_and_runtime_agree_in_codes_and_no_kernel_is_lost(net, ort_target, recipe, tmp_path):
    plan = net.plan(ort_target, recipe, bits=parse_bits(6))
    realize(net.graph, plan, tmp_path / "model.onnx", opset=load_target(ort_target).opset)
    checks = compare(net.graph, plan, tmp_path / "model.onnx", [net.images[:4]])
    assert checks.wrong == ()
    found = kernels(plan, tmp_path / "model.onnx")
    assert found["found"] == found["expected"]
    assert not checks.wrong_outputs


@pytest.mark.parametrize("target", ["ort-x86-vnni", *(pytest.param(name, marks=pytest.mark.slow) for name in ELSEWHERE)])
def test_outputs_of_single_ops_are_no_less_alike_than_with_the_whole_range(net, target):
    plans = [net.plan(target, recipe, bits=BITS) for recipe in ("minmax", "liu2021-similarity")]
    groups: dict[str, list[str]] = {}
    for name in net.rows:
        groups.setdefault(net.graph.op(name).operands["input"], []).append(name)
    gains = []
    for names in groups.values():
        scores = [0.0, 0.0]
        for name in names:
            for i, plan in enumerate(plans):
                exact, quantized = outputs(net, dataclasses.replace(plan, biases={}), name)
                bias = tensor_of(net, f"{name}:bias") if "bias" in net.graph.op(name).operands else 0
                scores[i] += Pearson()((exact - bias).flatten(1), (quantized - bias).flatten(1)[None]).item()
        gains.append(scores[1] - scores[0])
    assert min(gains) > -1e-4
    assert max(gains) > 1e-3


@pytest.mark.parametrize("target", ["ort-x86-vnni", pytest.param("openvino-x86", marks=pytest.mark.slow)])
def test_after_correction_channels_have_no_mean_error_on_the_samples(net, target):
    before, after = (net.plan(target, recipe, bits=BITS) for recipe in ("liu2021-similarity", "liu2021-bias"))
    for name in net.rows:
        op, errors = net.graph.op(name), []
        for plan in (before, after):
            exact, quantized = outputs(net, plan, name)
            errors.append((quantized - exact).mean((0, 1)).abs())
        step = after.choices[op.operands["input"]].qparams.scale * after.choices[op.operands["weight"]].qparams.scale
        integer = op.operands.get("output", "") in after.choices
        assert (errors[1] <= (0.5 * step if integer else 0) + 1e-5).all()
        assert errors[0].max() > 1e-3
        assert (after.biases[name].integer is not None) == (integer and target == "ort-x86-vnni")  # openvino's are real


@pytest.mark.slow
def test_queries_and_keys_keep_more_of_the_order_with_ranking(vit):
    pairs = torch.triu_indices(16, 16, 1)
    shares = []
    context = vit.context("ort-x86-vnni", bits=parse_bits(3), everything=False)
    for search in (OutputSearch(), STRONG):
        plan = choose(context, Recipe("", (Ranges(), search)))
        share = 0.0
        for name in ("blocks.0.qkv.1", "blocks.0.qkv.2"):
            attention, op = vit.samples[name].attention, vit.graph.op(name)
            read, weight = plan.choices[op.operands["input"]], plan.choices[op.operands["weight"]]
            bias, w = tensor_of(vit, op.operands["bias"]), tensor_of(vit, op.operands["weight"])
            exact = attention.scores(F.linear(attention.x, w, bias)[None])[0]
            q = values(weight.codes.to(torch.int32), weight.qparams, weight.grid)
            found = attention.scores(F.linear(fake(attention.x, read.qparams, read.grid), q, bias)[None])[0]
            a, b = ((m[:, pairs[0]] - m[:, pairs[1]]).sign() for m in (exact, found))
            share += (a != b).float().mean().item()
        shares.append(share)
    assert shares[1] < shares[0]


def test_an_op_without_a_bias_gets_one(conv_net):
    assert "bias" not in conv_net.graph.op("b").operands
    assert conv_net.plan("openvino-x86", "liu2021-bias").biases["b"].values.shape == (8,)


def test_corrected_biases_come_back_from_the_files_and_the_old_ones_are_not_there(net, tmp_path):
    plan = net.plan("openvino-x86", "liu2021", bits=BITS)
    save_plan(net.graph, plan, tmp_path)
    back = load_plan(net.graph, tmp_path)
    assert list(back.biases) == list(plan.biases) == list(net.rows)
    with torch.no_grad():
        assert torch.equal(*(simulate(net.graph, p)(net.images) for p in (plan, back)))
    stored = load_file(tmp_path / "plan.safetensors")
    replaced = [net.graph.op(name).operands["bias"] for name in plan.biases if "bias" in net.graph.op(name).operands]
    nodes = {n.name: n.target for n in net.graph.module.graph.nodes}
    assert not {f"float.{nodes[net.graph.site(site).tensor]}" for site in replaced} & set(stored)


def test_a_bias_of_another_width_is_a_bad_file(vit, tmp_path):
    plan = vit.plan("openvino-x86", "liu2021-bias")
    save_plan(vit.graph, dataclasses.replace(plan, biases={**plan.biases, "head": Bias(torch.zeros(5))}), tmp_path)
    with pytest.raises(BadFile, match="a bias of shape"):
        load_plan(vit.graph, tmp_path)


def test_without_samples_and_images_the_recipe_says_what_it_needs(vit):
    with pytest.raises(BadImages, match="recipe liu2021 needs calibration images"):
        vit.plan("ort-x86-vnni", "liu2021", sampled=None, images=())


def values_of(executor: Executor, images, names) -> dict[str, torch.Tensor]:
    """What nodes give, before anything is quantized."""
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        executor(images, {name: partial(found.__setitem__, name) for name in names})
    return found


@pytest.mark.slow
def test_sequential_correction_takes_out_the_mean_error_of_the_whole_model_so_far(vit):
    worst = {}
    for recipe in ("liu2021", "liu2021-sequential"):
        plan = vit.plan("ort-x86-vnni", recipe, bits=BITS)
        nodes = {vit.graph.op(name).node for name in vit.rows}
        before, after = (
            values_of(executor, vit.images, nodes) for executor in (Executor(vit.graph), Executor.of(vit.graph, plan))
        )
        errors = [(after[n] - before[n]).flatten(0, -2).mean(0).abs().max().item() for n in nodes]
        worst[recipe] = max(errors)
    assert worst["liu2021-sequential"] < 1e-4
    assert worst["liu2021"] > 1e-3


def test_sequential_convolutions_read_what_the_quantized_model_gives_them(conv_net):
    plan = conv_net.plan("openvino-x86", "liu2021-sequential", bits=BITS)
    op = conv_net.graph.op("a")
    before, after = (
        values_of(m, conv_net.images, {op.node}) for m in (Executor(conv_net.graph), Executor.of(conv_net.graph, plan))
    )
    step = plan.choices[op.operands["input"]].qparams.scale * plan.choices[op.operands["weight"]].qparams.scale
    error = (after[op.node] - before[op.node]).mean((0, 2, 3)).abs()
    assert (error <= step / 2 + 1e-4).all()


def test_without_images_a_sequential_recipe_says_what_it_needs(vit):
    with pytest.raises(BadImages, match="recipe liu2021-sequential needs calibration images"):
        vit.plan("ort-x86-vnni", "liu2021-sequential", images=())


@pytest.mark.parametrize("target", ["ort-x86-vnni", "ort-x86-avx2"])
def test_outputs_of_modules_are_more_alike_after_a_search_of_modules(net, target):
    plain = net.plan(target, "minmax", bits=BITS)
    recipe = Recipe("", (Ranges(), ModuleSearch(candidates=10)))
    searched = choose(net.context(target, bits=BITS, everything=False), recipe)
    source = next(n for n in net.graph.module.graph.nodes if n.op == "placeholder")
    gains = []
    for unit in modules(net.graph):
        node, scores = next(n for n in net.graph.module.graph.nodes if n.name == unit.output), []
        for ops, plan in (((), plain), (unit.ops, plain), (unit.ops, searched)):
            env = {source: net.images[:8]}
            with torch.no_grad():
                Executor.of(net.graph, dataclasses.replace(plan, biases={}), ops).run(net.graph.module.graph.nodes, env)
            scores.append(env[node].flatten(1))
        before, after = (Pearson()(scores[0], s[None]).item() for s in scores[1:])
        gains.append(after - before)
    assert min(gains) > -1e-3
    assert max(gains) > 1e-3


def test_the_flips_of_each_head_are_counted_with_ranking_and_without(vit):
    context = vit.context("ort-x86-vnni", bits=parse_bits(3))
    plan, plain = (choose(context, Recipe("", (Ranges(), search))) for search in (STRONG, OutputSearch(gamma=5.0)))
    (log,) = plan.logs("ranking")
    rows = log.rows
    assert [(row["op"], row["head"]) for row in rows] == [("blocks.0.qk", 0), ("blocks.0.qk", 1)]
    assert plain.logs("ranking") == ()
    for name, one in (("with", plan), ("without", plain)):
        x = vit.samples["blocks.0.qkv.1"].attention.x
        operands, exact = [], []
        for i, side in ((1, "query"), (2, "key")):
            op = vit.graph.op(f"blocks.0.qkv.{i}")
            read, weight, out = (one.choices[s] for s in (op.operands["input"], op.operands["weight"], f"blocks.0.qk:{side}"))
            bias, w = tensor_of(vit, op.operands["bias"]), tensor_of(vit, op.operands["weight"])
            scale = 8**-0.5 if side == "query" else 1

            def heads(y, scale=scale):
                return (y * scale).view(4, 16, 2, 8).transpose(1, 2)

            exact.append(heads(F.linear(x, w, bias)))
            q = values(weight.codes.to(torch.int32), weight.qparams, weight.grid)
            y = heads(F.linear(fake(x, read.qparams, read.grid), q, bias))
            operands.append(fake(y, out.qparams, out.grid))
        found = flipped(exact[0] @ exact[1].transpose(-2, -1), operands[0] @ operands[1].transpose(-2, -1))
        assert [row[name] for row in rows] == pytest.approx(found.tolist(), abs=0.002)
    assert any(row["with"] != row["without"] for row in rows)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        y, z = self.b(x), self.c(x.transpose(2, 3))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1) + F.adaptive_avg_pool2d(z, 1).flatten(1))


def test_a_site_with_the_elements_of_another_follows_it_when_modules_are_searched(capture_net, ort_target, tmp_path):
    torch.manual_seed(0)
    net = capture_net(Pooled())
    recipe, target = Recipe("", (Ranges(), ModuleSearch(low=0.3, candidates=20))), load_target(ort_target)
    plan = choose(net.context(ort_target, bits=parse_bits(3), everything=False), recipe)
    plain = net.plan(ort_target, "minmax", bits=parse_bits(3))
    owner = plan.choices["a:output"].qparams
    assert owner != plain.choices["a:output"].qparams
    assert plan.choices["c:input"].source == SameAs("a:output")
    assert plan.choices["c:input"].qparams == owner
    realize(net.graph, plan, tmp_path / "model.onnx", opset=target.opset)
    assert compare(net.graph, plan, tmp_path / "model.onnx", [net.images[:4]]).wrong == ()
