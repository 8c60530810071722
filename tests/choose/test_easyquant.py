"""EasyQuant: entropy ranges and the cosine search. Oracles: a histogram walked in loops, a dense weight, the search itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from bench.ablations import ABLATIONS

from fewbit.choose import Recipe, choose, parse_bits
from fewbit.choose.entropy_range import EntropyRange
from fewbit.choose.objectives import Cosine
from fewbit.choose.output_scores import Product, Range
from fewbit.choose.output_search import OutputSearch
from fewbit.choose.range_method import Samples
from fewbit.choose.ranges import MinMax
from fewbit.core.grid import Grid, QParams, codes, fake
from fewbit.realize import realize
from fewbit.recipes import IN_TURN
from fewbit.target import load_target
from fewbit.verify.compare import compare
from oracles.search import dense

X, W = Grid(4, signed=False, symmetric=False), Grid(4, narrow=True, axis=0)
EASY = IN_TURN


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_values(x: torch.Tensor) -> Samples:
    return Samples(x[None], torch.ones(len(x)), x.min()[None], x.max()[None])


def walked_threshold(x: np.ndarray, bins: int, groups: int) -> float:
    """Migacz 2017, slide 39, in plain loops: the share of the largest magnitude with the smallest divergence."""
    histogram = [0.0] * bins
    for v in np.abs(x) / np.abs(x).max() * bins:
        histogram[min(int(v), bins - 1)] += 1
    histogram[0] = 0
    best, best_kept = math.inf, bins
    for kept in range(groups, bins + 1):
        p = histogram[:kept]
        p[-1] += sum(histogram[kept:])
        q = [0.0] * kept
        for g in range(groups):
            members = range(g * kept // groups, (g + 1) * kept // groups)
            filled = [i for i in members if histogram[i] > 0]
            for i in filled:
                q[i] = sum(histogram[j] for j in members) / len(filled)
        total_p, total_q, divergence = sum(p), sum(q), 0.0
        for a, b in zip(p, q, strict=True):
            if a > 0:
                divergence += math.inf if b == 0 else a / total_p * math.log(a / total_p / (b / total_q))
        if divergence < best:
            best, best_kept = divergence, kept
    return best_kept / bins


@pytest.mark.parametrize(
    ("sign", "grid", "groups"), [(0, X, 16), (1, Grid(5), 16), (1, Grid(5, signed=False, symmetric=False), 16)]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_that_of_the_histogram_walked_bin_by_bin(sign, grid, groups, seed):
    x = drawn(4000, seed=seed) ** 3
    x = x if sign else x.abs()
    found = EntropyRange(bins=96)(of_values(x), grid)
    share = walked_threshold(x.numpy(), 96, groups)
    assert 0.1 < share < 1
    bound = share * x.abs().max()
    expected = MinMax()(
        Samples(x[None], torch.ones(1), torch.maximum(x.min(), -bound)[None], torch.minimum(x.max(), bound)[None]), grid
    )
    assert torch.allclose(found.scale, expected.scale, rtol=1e-5)


def test_a_tensor_of_zeros_and_one_with_fewer_bins_than_codes_keep_the_whole_range():
    zeros = EntropyRange()(of_values(torch.zeros(10)), X)
    assert zeros == MinMax()(of_values(torch.zeros(10)), X)
    x = drawn(100)
    assert EntropyRange(bins=8)(of_values(x), X) == MinMax()(of_values(x), X)


def product(w: torch.Tensor, x: torch.Tensor) -> Product:
    return Product(x, w, Range(w.amin(1), w.amax(1), W))


@pytest.mark.slow
def test_a_grouped_weight_is_searched_as_the_dense_one_is():
    x = drawn(3, 40, 12) ** 3
    for m in (1, 2, 3, 6):  # 12, 6, 4 and 2 groups of 2 channels each
        w = drawn(24 // m, m, seed=m)
        low, high = w.amin(1), w.amax(1)
        for search in (EASY, OutputSearch(), OutputSearch(per_channel=True, finalists=3)):
            seen = Range(x.min(), x.max(), X)
            grouped = search.search([Product(x, w, Range(low, high, W))], seen, X)
            full = search.search([Product(x, dense(w, 12), Range(low, high, W))], seen, X)
            assert grouped.input == full.input
            if search.per_channel:  # a channel's correlation has no scale: steps with the same codes are as good as each other
                assert torch.equal(codes(w, grouped.weights[0], W), codes(w, full.weights[0], W))
                assert grouped.after == pytest.approx(full.after, abs=1e-3)  # of all channels, which such steps weigh otherwise
            else:
                assert torch.equal(grouped.weights[0].scale, full.weights[0].scale)
                assert grouped.after == pytest.approx(full.after, abs=1e-5)


def test_candidates_are_linear_in_the_inverse_of_the_step():
    inverse = 1 / EASY.factors
    assert inverse.min() == 0.5
    assert inverse.max() == 2
    assert torch.allclose(inverse[:-1].diff(), torch.tensor(1.5 / 99), rtol=1e-4)


@pytest.mark.parametrize("grid", [X, Grid(7, narrow=True), Grid(8)])
def test_the_range_of_a_step_has_that_step(grid):
    qparams = QParams(torch.tensor(0.037), torch.tensor(5 if not grid.symmetric else 0, dtype=torch.int32))
    assert Range.of(qparams, grid).qparams(torch.tensor(1.0)) == qparams


@pytest.mark.parametrize("seed", range(4))
def test_both_sides_in_turn_are_no_worse_than_one_alone(seed):
    x, w = drawn(4, 30, 16, seed=seed) ** 3, drawn(8, 16, seed=seed + 9) ** 3
    found = {
        side: dataclasses.replace(EASY, sides=side).search([product(w, x)], Range(x.min(), x.max(), X), X)
        for side in ("both", "weights", "inputs")
    }
    assert found["weights"].input == Range(x.min(), x.max(), X).qparams(torch.tensor(1.0))
    assert found["inputs"].weights[0] == product(w, x).first
    assert found["both"].after >= found["weights"].after > found["weights"].before
    assert found["inputs"].after > found["inputs"].before
    out = fake(x, found["both"].input, X) @ fake(w, found["both"].weights[0], W).t()
    assert Cosine()((x @ w.t()).flatten(1), out.flatten(1)[None]).item() == pytest.approx(found["both"].after, abs=1e-5)


def test_a_search_of_inputs_begins_at_the_weights_that_are_given():
    x, w = drawn(4, 30, 16) ** 3, drawn(8, 16, seed=9) ** 3
    start = product(w, x).range.qparams(torch.full((8,), 0.6))
    given = dataclasses.replace(product(w, x), start=start)
    found = dataclasses.replace(EASY, sides="inputs").search([given], Range(x.min(), x.max(), X), X)
    assert found.weights[0] == start


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["easyquant", "easyquant-onepass"])
@pytest.mark.parametrize("name", ["conv_net", "vit"])
def test_the_recipe_runs_end_to_end_and_gains_on_its_start(request, name, recipe, tmp_path):
    net = request.getfixturevalue(name)
    bits, target = parse_bits(6), load_target("ort-x86-vnni")
    plan = net.plan("ort-x86-vnni", recipe, bits=bits, everything=False)
    rows = [row for log in plan.logs("output search") for row in log.rows]
    assert {op for row in rows for op in row["ops"]} == {op.name for op in net.graph.ops if "weight" in op.operands}
    assert all(row["after"] >= row["before"] - 1e-6 for row in rows)
    assert sum(row["after"] - row["before"] for row in rows) > 1e-4
    realize(net.graph, plan, tmp_path / "model.onnx", opset=target.opset)
    assert compare(net.graph, plan, tmp_path / "model.onnx", [net.images[:4]]).wrong == ()


@pytest.mark.slow
def test_the_second_pass_keeps_the_weights_of_the_first_and_widens_inputs_only(conv_net):
    context, passes = (
        conv_net.context("openvino-x86", bits=parse_bits(4), everything=False),
        ABLATIONS["easyquant-onepass"].passes,
    )
    plans = [choose(context, Recipe("", passes[:count])) for count in (1, 2, 3)]
    start, first, second = ({name: c.qparams.scale for name, c in p.choices.items()} for p in plans)
    weights = [name for name in start if name.endswith("weight")]
    inputs = [name for name in start if not name.endswith("weight")]
    assert all(torch.equal(first[w], second[w]) and bool((first[w] >= start[w] * (1 - 1e-6)).all()) for w in weights)
    assert any(not torch.equal(first[w], start[w]) for w in weights)
    assert all(torch.equal(start[x], first[x]) and start[x] * (1 - 1e-6) <= second[x] <= start[x] * 1.2501 for x in inputs)
    assert any(second[x] > start[x] * 1.001 for x in inputs)
