"""Oracles: the worked example of Newcombe's paper, scipy's bootstrap, and coverage of a known difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chi2_contingency
from scipy.stats import bootstrap as scipys

from fewbit.task.interval import bootstrap, newcombe, of_mean


def pairs(both: int, lost: int, won: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right before and after, for so many images of each kind."""
    before = [True] * (both + lost) + [False] * (won + neither)
    after = [True] * both + [False] * lost + [True] * won + [False] * neither
    return torch.tensor(before), torch.tensor(after)


@pytest.mark.parametrize(
    ("table", "expected"),
    [  # Newcombe 1998, Statistics in Medicine 17, 2635, table III, method 10: intervals of (e + f - e - g) / n
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((53, 1, 0, 0), (-0.0497, 0.0977)),
    ],
)
def test_the_interval_of_a_difference_is_newcombes_of_his_examples(table, expected):
    both, first, second, neither = table
    low, high = newcombe(*pairs(both, second, first, neither))  # the paper subtracts the second from the first
    assert (low / 100, high / 100) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("table", [(20, 5, 4, 30), (10, 6, 5, 5), (7, 5, 5, 4), (5, 9, 8, 4), (60, 2, 30, 40)])
def test_the_interval_is_that_of_method_10_with_scipys_shares_and_yates_correlation(table):
    """Newcombe's correlation is the root of chi squared over n: with Yates' correction where it is positive, else without."""
    both, lost, won, neither = table
    n, excess = sum(table), both * neither - lost * won
    squares = [[both, lost], [won, neither]]
    correlation = np.sign(excess) * np.sqrt(chi2_contingency(squares, correction=excess > 0).statistic / n)
    shares = [(both + k) / n for k in (won, lost)]
    ends = [binomtest(both + k, n).proportion_ci(method="wilson") for k in (won, lost)]
    below = [shares[0] - ends[0].low, ends[1].high - shares[1]]
    above = [ends[0].high - shares[0], shares[1] - ends[1].low]
    down, up = (np.sqrt(a * a - 2 * correlation * a * b + b * b) for a, b in (below, above))
    apart = shares[0] - shares[1]
    assert newcombe(*pairs(*table)) == pytest.approx((100 * (apart - down), 100 * (apart + up)), abs=1e-9)


def test_no_change_on_a_few_images_is_no_proof_of_none():
    low, high = newcombe(*pairs(30, 0, 0, 10))
    assert low < -1 < 1 < high


def test_a_known_difference_lies_inside_95_times_in_100():
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        draw = torch.rand(200, generator=generator)
        before, after = draw < 0.7, (draw < 0.62) | (draw > 0.97)  # 70 % and 65 %
        low, high = newcombe(before, after)
        held += low <= -5 <= high
    assert 365 <= held <= 397  # 380 are expected, and their standard deviation is 4.4


def test_the_bootstrap_is_scipys():
    values = torch.randn(80, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    expected = scipys((values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0))
    low, high = of_mean(values)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.02)


def test_the_bootstrap_draws_as_many_images_as_there_are_and_the_same_again():
    seen = []
    first = bootstrap(lambda drawn: float(seen.append(drawn) or drawn[0]), 12, rounds=50)
    assert all(int(drawn.sum()) == 12 for drawn in seen)
    assert first == bootstrap(lambda drawn: float(drawn[0]), 12, rounds=50)
