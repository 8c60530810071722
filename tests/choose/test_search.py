"""Oracle: coordinate ascent over the whole table of steps (tests/oracles/search.py)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fewbit.choose.correct import OutputBias
from fewbit.choose.objectives import Pearson, RankingLoss
from fewbit.choose.output_scores import Pair, Product, Range
from fewbit.choose.output_search import OutputSearch
from fewbit.core.grid import Grid, fake
from fewbit.execute.samples import Attention, PairSample
from oracles.search import coordinate_ascent

X, W = Grid(4, signed=False, symmetric=False), Grid(4, narrow=True, axis=0)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(w: torch.Tensor, x: torch.Tensor, grid: Grid = W, attention: Attention | None = None) -> Product:
    rows = w if grid.axis is not None else w.reshape(1, -1)
    low, high = rows.amin(1), rows.amax(1)
    return Product(x, w, Range(low, high, grid) if grid.axis is not None else Range(low[0], high[0], grid), attention)


def seen(x: torch.Tensor, grid: Grid = X) -> Range:
    return Range(x.min(), x.max(), grid)


@pytest.mark.parametrize("seed", range(3))
def test_the_steps_are_those_of_a_loop_over_the_whole_table(seed):
    x, w = drawn(3, 5, 6, seed=seed).exp() - 0.5, drawn(4, 6, seed=seed + 10)
    search = OutputSearch(candidates=100)
    found = search.search([product(w, x)], seen(x), X)
    weight, read, score = coordinate_ascent(x.numpy(), w.numpy(), (0, 15), (-7, 7), search.factors.numpy())
    assert found.after == pytest.approx(score, abs=2e-6)
    assert found.input == seen(x).qparams(torch.tensor(read))
    assert torch.equal(found.weights[0].scale, product(w, x).range.qparams(torch.full((4,), weight)).scale)


@pytest.mark.parametrize("grid", [W, Grid(3, narrow=True)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_search_is_never_worse_than_its_start_and_says_so_itself(grid, per_channel):
    x, w = drawn(2, 9, 8) ** 3, drawn(5, 8, seed=1) ** 3
    found = OutputSearch(per_channel=per_channel).search([product(w, x, grid)], seen(x), X)
    assert found.after >= found.before
    out = F.linear(fake(x, found.input, X), fake(w, found.weights[0], grid))
    assert Pearson()(F.linear(x, w).flatten(1), out.flatten(1)[None]).item() == pytest.approx(found.after, abs=1e-5)


def test_a_start_that_is_the_best_of_all_stays():
    x, w = torch.randint(0, 16, (2, 9, 8)).float(), torch.randint(-7, 8, (5, 8)).float()
    x[0, 0, 0], w[:, 0] = 15, 7
    x[0, 0, 1] = 0
    found = OutputSearch().search([product(w, x)], seen(x), X)
    assert found.before == found.after == pytest.approx(1, abs=1e-5)
    assert found.input.scale == 1


def test_each_channel_can_have_a_factor_of_its_own():
    x, w = drawn(4, 30, 16), drawn(6, 16, seed=1) ** 3
    one, each = (OutputSearch(per_channel=p).search([product(w, x)], seen(x), X) for p in (False, True))
    shares = each.weights[0].scale / product(w, x).range.qparams(torch.ones(6)).scale
    assert len(shares.unique()) > 1
    assert each.after >= one.before


def test_ops_that_read_one_tensor_get_one_input_step_and_weights_of_their_own():
    x = drawn(2, 9, 8) ** 3
    products = [product(drawn(5, 8, seed=s) ** 3, x) for s in (1, 2)]
    found = OutputSearch().search(products, seen(x), X)
    assert len(found.weights) == 2
    assert found.after > found.before
    outs = [F.linear(fake(x, found.input, X), fake(p.weight, w, W)) for p, w in zip(products, found.weights, strict=True)]
    scores = [Pearson()(F.linear(x, p.weight).flatten(1), o.flatten(1)[None]) for p, o in zip(products, outs, strict=True)]
    assert sum(scores).item() / 2 == pytest.approx(found.after, abs=1e-5)


def test_an_input_step_that_is_given_stays():
    x, w = drawn(2, 9, 8), drawn(5, 8, seed=1)
    given = seen(x).qparams(torch.tensor(0.7))
    assert OutputSearch().search([product(w, x)], given, X).input == given


def projection(seed: int) -> tuple[torch.Tensor, torch.Tensor, Attention]:
    """A projection to queries whose order of keys hangs on small entries, and the float keys (images, heads, d, keys)."""
    x, w = drawn(4, 12, 8, seed=seed), drawn(8, 8, seed=seed + 1)
    w[0] *= 20  # decides the correlation, and meets keys of nearly 0
    keys = drawn(4, 8, 12, seed=seed + 2)
    keys[:, 0] *= 0.01
    return x, w, Attention("query", x, "qk", keys, (), 0.35, torch.arange(12))


def flips(w: torch.Tensor, attention: Attention, found, grid: Grid) -> float:
    exact, quantized = (
        attention.scores(out[None])[0]
        for out in (
            F.linear(attention.x, w),
            F.linear(fake(attention.x, found.input, X), fake(w, found.weights[0], grid)),
        )
    )
    i, j = torch.triu_indices(exact.shape[1], exact.shape[1], 1)
    before, after = ((m[:, i] - m[:, j]).sign() for m in (exact, quantized))
    return (before != after).float().mean().item()


def test_ranking_keeps_more_pairs_of_keys_in_order_where_similarity_looks_elsewhere():
    grid = Grid(5, narrow=True)
    without, ranked = 0.0, 0.0
    for seed in range(0, 30, 3):
        x, w, attention = projection(seed)
        p = product(w, x, grid, attention)
        a = OutputSearch().search([p], seen(x), X)
        b = OutputSearch(ranking=RankingLoss(pairs=100), gamma=1.0).search([p], seen(x), X)
        without, ranked = without + flips(w, attention, a, grid), ranked + flips(w, attention, b, grid)
    assert ranked < without - 0.02


def test_ranking_of_an_op_without_scores_is_similarity():
    x, w = drawn(2, 9, 8), drawn(5, 8, seed=1)
    a, b = (OutputSearch(ranking=r).search([product(w, x)], seen(x), X) for r in (None, RankingLoss()))
    assert dataclasses.astuple(a)[2:] == dataclasses.astuple(b)[2:]
    assert a.input == b.input


def test_after_correction_the_mean_error_of_each_channel_is_0():
    exact, quantized = drawn(500, 6), drawn(500, 6) * 0.9 + drawn(6, seed=1)
    bias = drawn(6, seed=2)
    corrected = OutputBias().corrected(exact, quantized, bias)
    assert ((quantized + corrected) - (exact + bias)).mean(0).abs().max() < 1e-6
    assert (quantized - exact).mean(0).abs().max() > 0.1


def test_an_operand_of_a_product_has_the_step_that_no_other_candidate_beats():
    left, right = drawn(3, 2, 5, 8).abs() ** 2, drawn(3, 2, 8, 6, seed=1) ** 3
    sample = PairSample(left, right, 0.4, torch.arange(5))
    search, pair = OutputSearch(candidates=40), Pair(sample, X, Grid(4), False)
    found = search.pair(pair, seen(left), seen(right, pair.right))
    exact = left @ right

    def score(a, b) -> float:
        out = fake(left, a, X) @ fake(right, b, pair.right)
        return np.mean([np.corrcoef(e.ravel(), o.ravel())[0, 1] for e, o in zip(exact.numpy(), out.numpy(), strict=True)])

    best = score(*found)
    for f in search.factors:
        assert score(seen(left).qparams(f), found[1]) <= best + 2e-6
        assert score(found[0], seen(right, pair.right).qparams(f)) <= best + 2e-6
    start = [r.qparams(torch.tensor(1.0)) for r in (seen(left), seen(right, pair.right))]
    assert best > score(*start) + 1e-4
    assert search.pair(pair, start[0], seen(right, pair.right))[0] == start[0]


def test_the_scores_of_a_pair_are_ranked_where_ranking_is_asked_for():
    left, right = drawn(2, 2, 9, 8) ** 3, drawn(2, 2, 8, 12, seed=50) ** 3
    pair = Pair(PairSample(left, right, 0.35, torch.arange(9)), Grid(3), Grid(3), True)
    hinge, exact = RankingLoss(pairs=100), (left @ right * 0.35).flatten(0, -2)
    found = []
    for ranking in (None, hinge):
        a, b = OutputSearch(ranking=ranking, gamma=3.0).pair(pair, seen(left, Grid(3)), seen(right, Grid(3)))
        out = fake(left, a, Grid(3)) @ fake(right, b, Grid(3)) * 0.35
        found.append(hinge(exact, out.flatten(0, -2)[None]).item())
    assert found[1] < found[0] - 0.01
    unranked = dataclasses.replace(pair, ranked=False)
    a, b = (OutputSearch(ranking=r, gamma=3.0).pair(unranked, seen(left, Grid(3)), seen(right, Grid(3))) for r in (None, hinge))
    assert a == b


def test_rows_are_thinned_evenly_and_one_row_an_image_stays():
    p = product(drawn(4, 6), drawn(5, 12, 6))
    assert torch.equal(p.thinned(20).rows, p.rows[:, ::3])
    assert torch.equal(p.thinned(1).rows, p.rows[:, :1])
    assert torch.equal(p.thinned(1000).rows, p.rows)
    x, w = drawn(2, 12, 6), drawn(5, 6, seed=1)
    few = OutputSearch(rows=8).search([product(w, x)], seen(x), X)
    same = OutputSearch().search([product(w, x[:, ::3])], seen(x), X)
    assert (few.input, few.after) == (same.input, same.after)


def test_outputs_are_scored_without_the_error_that_each_round_takes_out():
    x, w = drawn(3, 40, 8).abs(), drawn(5, 8, seed=1) + 1
    found = OutputSearch(correction=OutputBias()).search([product(w, x)], seen(x), X)
    exact, out = F.linear(x, w), F.linear(fake(x, found.input, X), fake(w, found.weights[0], W))
    corrected = out - (out - exact).mean((0, 1))
    assert found.after == pytest.approx(Pearson()(exact.flatten(1), corrected.flatten(1)[None]).item(), abs=1e-5)
    once = OutputSearch(correction=OutputBias(each_round=False)).search([product(w, x)], seen(x), X)
    assert dataclasses.astuple(once)[2:] == dataclasses.astuple(OutputSearch().search([product(w, x)], seen(x), X))[2:]
    assert found.after > once.after


def test_an_op_that_reads_something_else_is_held_to_its_float_output():
    x, w = drawn(3, 20, 8), drawn(5, 8, seed=1)
    read = x + 0.3 * drawn(3, 20, 8, seed=2)
    p = dataclasses.replace(product(w, x), read=read)
    found = OutputSearch().search([p], seen(x), X)
    out = F.linear(fake(read, found.input, X), fake(w, found.weights[0], W))
    assert found.after == pytest.approx(Pearson()(F.linear(x, w).flatten(1), out.flatten(1)[None]).item(), abs=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_finalists_find_the_steps_that_all_candidates_find(per_channel):
    x, grid = drawn(4, 64, 32).exp(), Grid(5, narrow=True, axis=0)
    products = [product(drawn(128, 32, seed=s) ** 3, x, grid) for s in (1, 2)]
    few, all_ = (
        OutputSearch(finalists=n, per_channel=per_channel, candidates=60).search(products, seen(x), X) for n in (16, 0)
    )
    assert few.input == all_.input
    assert all(a == b for a, b in zip(few.weights, all_.weights, strict=True))
    assert few.after == pytest.approx(all_.after, abs=1e-6)


def test_a_glimpse_has_half_of_the_rows_and_a_quarter_of_the_channels():
    p = dataclasses.replace(product(drawn(8, 6), drawn(5, 12, 6)), shift=drawn(8))
    g = p.glimpse()
    assert torch.equal(g.rows, p.rows[:, ::2])
    assert torch.equal(g.weight, p.weight[::4])
    assert torch.equal(g.range.low, p.range.low[::4])
    assert torch.equal(g.shift, p.shift[::4])
    assert g.attention is None
