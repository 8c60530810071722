"""Mixed precision from units to files. Oracles: brute force over all configurations, torch's norms, simulate."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fewbit.capture.structure import modules
from fewbit.choose import Bits, Mixed, allocate, parse_bits
from fewbit.choose.frontier import frontier
from fewbit.choose.sensitivity import NuclearNorm, OutputKL
from fewbit.core.bits import read_bits
from fewbit.core.fx import between
from fewbit.errors import FewbitError
from fewbit.execute.executor import Executor
from fewbit.execute.simulate import simulate
from fewbit.execute.stream import Stream
from fewbit.realize import load_plan, realize, save_plan
from fewbit.recipes import RECIPES
from fewbit.request.recipe_options import check_bits
from fewbit.target import load_target
from fewbit.verify.compare import compare, kernels

VNNI = load_target("ort-x86-vnni")


@pytest.fixture(params=["conv_net", "vit"])
def net(request):
    return request.getfixturevalue(request.param)


CROSSED = (("conv_net", "liu2021"), ("vit", "mse"))
WIDE = "mixed:8.0:6,7,8,9,10"
MORE_WIDE = (("vit", "9"), ("conv_net", WIDE), *itertools.product(("conv_net", "vit"), ("10", "13")))


def everything(plan):
    """What a plan decides, without the records that choose adds."""
    choices = {name: (c.grid, c.qparams, c.codes if c.codes is None else c.codes.tolist()) for name, c in plan.choices.items()}
    return choices, {op: bias.values.tolist() for op, bias in plan.biases.items()}


# units --------------------------------------------------------------------------------------------------------------


def test_a_vit_has_an_attention_and_an_mlp_a_block_and_the_rest_alone(vit):
    found = [(u.name, u.kind, [op.removeprefix("blocks.0.") for op in u.ops]) for u in modules(vit.graph)]
    assert found == [
        ("patch", "op", ["patch"]),
        ("blocks.0.attention", "attention", ["qkv.1", "qkv.2", "qkv.3", "qk", "pv", "proj"]),
        ("blocks.0.mlp", "mlp", ["fc1", "fc2"]),
        ("head", "op", ["head"]),
    ]


def test_every_product_belongs_to_one_unit(net):
    found = [op for unit in modules(net.graph) for op in unit.ops]
    products = [op.name for op in net.graph.ops if "weight" in op.operands or op.kind == "matmul"]
    assert sorted(found) == sorted(products)


class Gated(nn.Module):
    """An MLP with a gate, a residual around it, and another behind the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.after, self.last = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2).reshape(-1, 24, 8)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.last(F.relu(self.after(self.norm(x)))).mean(1)


def test_layers_joined_by_activations_and_gates_are_one_mlp_and_a_norm_or_a_residual_ends_it(capture_net):
    found = [set(u.ops) for u in modules(capture_net(Gated()).graph)]
    assert found == [{"up", "gate", "down"}, {"after", "last"}]


# allocation ---------------------------------------------------------------------------------------------------------

OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 50, allow_nan=False)), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(OPTIONS)
def test_the_frontier_is_what_no_other_configuration_beats(options):
    sizes, losses = [[s for s, _ in unit] for unit in options], [[v for _, v in unit] for unit in options]
    found = frontier(sizes, losses)
    all_ = []
    for picks in itertools.product(*(range(len(u)) for u in options)):
        total = 0.0  # summed in the order of the units, as the table does
        for unit, k in enumerate(picks):
            total += losses[unit][k]
        all_.append((sum(sizes[unit][k] for unit, k in enumerate(picks)), total))
    best = {size: min(v for s, v in all_ if s <= size) for size in {s for s, _ in all_}}
    expected, last = [], math.inf
    for size in sorted(best):
        if best[size] < last:
            expected.append((size, best[size]))
            last = best[size]
    assert list(zip(found.sizes.tolist(), found.losses.tolist(), strict=True)) == expected
    for size, loss, picks in zip(found.sizes, found.losses, found.picks, strict=True):
        assert sum(sizes[u][k] for u, k in enumerate(picks)) == size
        assert sum(losses[u][k] for u, k in enumerate(picks)) == pytest.approx(loss)
    for budget in range(min(found.sizes), max(found.sizes) + 2):
        place = found.best(budget)
        assert found.losses[place] == min(v for s, v in all_ if s <= budget)


def test_a_budget_below_the_smallest_configuration_is_refused():
    with pytest.raises(FewbitError, match="the smallest configuration takes 7"):
        frontier([[3, 4], [4, 9]], [[1.0, 0.5], [1.0, 0.1]]).best(6)


# overlay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["mse", "liu2021-bias"])
def test_an_overlay_of_a_whole_plan_is_the_simulation(net, recipe):
    plan = net.plan("ort-x86-vnni", recipe, bits=parse_bits(5))
    source = next(n for n in net.graph.module.graph.nodes if n.op == "placeholder")
    last = next(n for n in net.graph.module.graph.nodes if n.op == "output").all_input_nodes[0]
    with torch.no_grad():
        expected = simulate(net.graph, plan)(net.images)
        env = {source: net.images}
        Executor.of(net.graph, plan).run(net.graph.module.graph.nodes, env)
    assert torch.allclose(env[last], expected, atol=1e-6)
    stream = Stream(Executor.of(net.graph, plan), net.images.split(4))
    assert torch.allclose(torch.cat(list(stream.at(last))), expected, atol=1e-5)


def test_a_stream_gives_every_node_its_value_and_keeps_what_is_wanted_later(vit):
    nodes = [n for n in vit.graph.module.graph.nodes if n.op == "call_function"]
    env = {next(n for n in vit.graph.module.graph.nodes if n.op == "placeholder"): vit.images}
    with torch.no_grad():
        Executor(vit.graph, ()).run(vit.graph.module.graph.nodes, env)
    wanted = [nodes[-1], nodes[3], nodes[3], nodes[10]]
    stream = Stream(Executor(vit.graph, ()), [vit.images], wanted)
    for node in wanted:
        value = stream.at(node)[0]
        assert torch.equal(value, env[node]) if isinstance(value, torch.Tensor) else value == env[node]


def test_a_stream_drops_what_nobody_reads_later_even_if_it_was_asked_for(vit):
    order = list(vit.graph.module.graph.nodes)
    stream = Stream(Executor(vit.graph, ()), [vit.images])
    for node in order:
        if node.op == "call_function":
            stream.at(node)
            later = order[order.index(node) + 1 :]
            needed = {read for n in later for read in n.all_input_nodes}
            assert set(stream._values) <= needed, node


def test_between_runs_nothing_that_does_not_lead_to_the_output(vit):
    graph = vit.graph
    nodes = {n.name: n for n in graph.module.graph.nodes}
    qk = nodes[graph.op("blocks.0.qk").node]
    inner, reads = between([qk], [nodes[graph.op(f"blocks.0.qkv.{i}").node] for i in (1, 2, 3)])
    assert nodes[graph.op("blocks.0.qkv.3").node] not in inner
    assert inner[-1] is qk
    assert all(r not in inner for r in reads)


# sensitivity --------------------------------------------------------------------------------------------------------


def test_omega_of_attention_is_the_nuclear_norm_times_the_squared_error_of_the_scaled_logits(vit):
    plans = {4: vit.plan("ort-x86-vnni", "minmax", bits=Bits(4, 4))}
    unit = next(u for u in modules(vit.graph) if u.kind == "attention")
    (found,) = NuclearNorm()(vit.graph, [unit], plans, [vit.images[:4]])
    block = vit.module.blocks[0]
    with torch.no_grad():
        x = block.norm1(vit.module.patch(vit.images[:4]).flatten(2).transpose(1, 2))

        def logits(read, w, b):
            q, k = (F.linear(read, w[i], b[i]).view(4, 16, 2, 8).transpose(1, 2) for i in (0, 1))
            return q, k

        w, b = block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)
        q, k = logits(x, w, b)
        exact = q @ k.transpose(-2, -1) / 8**0.5
        nuclear = torch.linalg.matrix_norm(exact, "nuc").mean()
    assert found.nuclear == pytest.approx(nuclear.item(), rel=1e-4)
    env = {next(n for n in vit.graph.module.graph.nodes if n.op == "placeholder"): vit.images[:4]}
    with torch.no_grad():
        Executor.of(vit.graph, plans[4], [o for o in unit.ops if "qkv" in o or "qk" in o]).run(
            vit.graph.module.graph.nodes, env
        )
        node = next(n for n in vit.graph.module.graph.nodes if n.name == vit.graph.op("blocks.0.qk").node)
        error = (env[node] - exact).square().sum((-2, -1)).mean()
    assert found.losses[4] == pytest.approx((nuclear * error).item(), rel=1e-3)


def test_more_bits_lose_less_and_a_float_unit_nothing(net):
    plans = {b: net.plan("ort-x86-vnni", "mse", bits=Bits(b, b)) for b in (3, 5, 8)}
    for measure in (NuclearNorm(), OutputKL()):
        for row in measure(net.graph, modules(net.graph), plans, [net.images[:4]]):
            assert row.losses[3] > row.losses[5] > row.losses[8] >= 0
    nothing = {8: dataclasses.replace(plans[8], integer_ops=(), choices={})}
    for measure in (NuclearNorm(), OutputKL()):
        assert all(row.losses[8] < 1e-6 for row in measure(net.graph, modules(net.graph), nothing, [net.images[:4]]))


def test_the_loss_of_a_unit_is_that_of_the_model_with_only_that_unit_quantized(net):
    plan = net.plan("ort-x86-vnni", "mse", bits=Bits(3, 3))
    looked = 0
    with torch.no_grad():
        exact = net.graph.module(net.images[:4]).log_softmax(1)
        for row in OutputKL()(net.graph, modules(net.graph), {3: plan}, [net.images[:4]]):
            others = [op.name for op in net.graph.ops if op.name not in row.module.ops]
            alone = net.plan("ort-x86-vnni", "mse", bits=Bits(3, 3), keep_float=others)
            if any(net.graph.site(s).readers[0][0] not in row.module.ops for s in alone.choices):
                continue
            quantized = simulate(net.graph, alone)(net.images[:4]).log_softmax(1)
            expected = F.kl_div(quantized, exact, log_target=True, reduction="batchmean").item()
            assert row.losses[3] == pytest.approx(expected, rel=1e-3, abs=1e-6)
            looked += 1
    assert looked


# the whole ----------------------------------------------------------------------------------------------------------


def mixed_plan(net, target, text="mixed:5:3,4,5,6,7,8", recipe="mse"):
    mixed = parse_bits(text)
    assert isinstance(mixed, Mixed)
    found = allocate(net.context(target, images=[net.images[:8]]), mixed, RECIPES[recipe])
    return found, net.plan(target, recipe, bits=found.bits)


@pytest.mark.parametrize(
    ("net", "recipe"),
    [("conv_net", "mse"), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("vit", "liu2021"), *CROSSED))],
    indirect=["net"],
)
def test_a_mixed_model_has_the_bytes_that_its_widths_say_and_gives_the_same_codes(net, ort_target, recipe, tmp_path):
    found, plan = mixed_plan(net, ort_target, recipe=recipe)
    widths = {row["module"]: row["bits"] for row in found.log.rows}
    assert len(set(widths.values())) > 1
    assert sum(row["weights"] * row["bits"] for row in found.log.rows) <= 5 * sum(row["weights"] for row in found.log.rows)
    for unit in modules(net.graph):
        for op in unit.ops:
            for operand, site in net.graph.op(op).operands.items():
                if operand in ("weight", "query", "key", "value", "probs"):
                    choice = plan.choices[site]
                    saturates = "can saturate" in choice.why  # without VNNI 8-bit weights become 7-bit ones where they must
                    assert choice.grid.bits == (min(7, widths[unit.name]) if saturates else widths[unit.name])
    realize(net.graph, plan, tmp_path / "model.onnx", opset=load_target(ort_target).opset)
    save_plan(net.graph, plan, tmp_path)
    assert everything(load_plan(net.graph, tmp_path)) == everything(plan)
    assert compare(net.graph, plan, tmp_path / "model.onnx", [net.images[:4]]).wrong == ()
    counted = kernels(plan, tmp_path / "model.onnx")
    assert counted["found"] == counted["expected"]


def test_the_record_has_the_frontier_with_the_point_that_was_taken(vit):
    found, _ = mixed_plan(vit, "ort-x86-vnni")
    points, rows = found.log.summary["frontier"], found.log.rows
    (taken,) = [p for p in points if p["taken"]]
    assert taken["bits"] == [row["bits"] for row in rows]
    assert taken["bytes"] <= found.log.summary["budget_bytes"]
    assert np.all(np.diff([p["bytes"] for p in points]) > 0)
    assert np.all(np.diff([p["loss"] for p in points]) < 0)
    for point in points:
        assert point["loss"] == pytest.approx(sum(r["losses"][str(b)] for r, b in zip(rows, point["bits"], strict=True)))


def test_widths_that_the_target_has_no_integers_for_are_refused_in_words(vit):
    found, _ = mixed_plan(vit, "ort-x86-vnni", "mixed:8.0")
    assert {row["bits"] for row in found.log.rows} <= {6, 7, 8}
    assert {r.site for r in found.fallbacks} == {u.name for u in modules(vit.graph)}
    assert all("no integers wider than 8 bits" in r.why and r.requested.startswith("9, 10") for r in found.fallbacks)
    with pytest.raises(FewbitError, match="no integers wider than 8 bits for patch"):
        mixed_plan(vit, "ort-x86-vnni", "mixed:10:9,10")


@pytest.mark.parametrize(
    ("net", "bits"),
    [("conv_net", "9"), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("vit", WIDE), *MORE_WIDE))],
    indirect=["net"],
)
def test_widths_above_8_have_16_bit_containers_on_disk_their_true_size_and_the_same_codes(net, ort_target, tmp_path, bits):
    target = load_target("ort-x86-wide")
    if ort_target != "ort-x86-vnni" and bits.startswith("mixed"):
        bits = "mixed:8.0:6,7,9,10"  # sums of 8-bit weights saturate here
    parsed = parse_bits(bits)
    context = net.context(target.name, images=[net.images[:8]], everything=False)
    found = parsed if isinstance(parsed, Bits) else allocate(context, parsed, RECIPES["mse"]).bits
    plan = net.plan(target.name, "mse", bits=found)
    realize(net.graph, plan, tmp_path / "model.onnx", opset=target.opset)
    save_plan(net.graph, plan, tmp_path)
    assert everything(load_plan(net.graph, tmp_path)) == everything(plan)
    checks = compare(net.graph, plan, tmp_path / "model.onnx", [net.images[:4]])
    assert checks.wrong == ()
    assert max(choice.grid.bits for choice in plan.choices.values()) > 8
    packed = {i.name: i for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for choice in plan.choices.values():
        name = choice.site.replace(".", "_").replace(":", "__")
        if choice.role == "weight" and choice.grid.bits > 8:
            stored = sum(math.prod(t.dims) for n, t in packed.items() if n.startswith(f"{name}.bits"))
            assert stored * 8 == -(-choice.codes.numel() // 8) * 8 * choice.grid.bits


def test_a_uniform_width_that_no_target_type_holds_is_refused_before_anything_is_read():
    with pytest.raises(FewbitError, match=r"--bits w10a10: ort-x86-vnni has no integers wider than 8 bits"):
        check_bits(VNNI, parse_bits(10))
    check_bits(load_target("ort-x86-wide"), parse_bits(10))


@pytest.mark.parametrize(
    "given", [Bits(8, 8, {"a:weight": 10}), Bits(8, 8, {"a": (8, 10)}), Bits(8, 8, exceptions=(("*", 10),))]
)
def test_the_widest_of_all_widths_is_checked_whatever_way_it_was_given(given):
    with pytest.raises(FewbitError, match="no integers wider than 8 bits"):
        check_bits(VNNI, given)


def test_widths_come_back_from_a_file(tmp_path):
    bits = Bits(8, 7, {"a:weight": 10}, floats=("b",))
    (tmp_path / "p.json").write_text(json.dumps(bits.to_json()))
    assert dataclasses.replace(read_bits(tmp_path / "p.json"), asked="") == bits
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "p.json").read_bytes())  # as some editors save it
    assert dataclasses.replace(read_bits(tmp_path / "p.json"), asked="") == bits
