"""The search of numbers, without a model. Oracles: closed forms, brute force over what was evaluated."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fewbit.choose.powell import Powell, descend, parabola

SEARCH = Powell(-math.log(4), math.log(4), step=0.1, tolerance=0.01)


class Seen:
    """A function that keeps its points and values."""

    def __init__(self, function):
        self.function, self.points, self.values = function, [], []

    def __call__(self, x):
        self.points.append(np.array(x))
        self.values.append(self.function(x))
        return self.values[-1]

    @property
    def best(self):
        return self.points[int(np.argmin(self.values))]


@pytest.mark.parametrize("method", ["powell", "coordinate"])
def test_a_separable_quadratic_has_its_minimum_after_one_sweep(method):
    place = np.array([0.3, -0.7, 0.0, 1.1])
    f = Seen(lambda x: 2 + float((np.array([1, 5, 2, 0.1]) * (x - place) ** 2).sum()))
    replace(SEARCH, method=method)(f, 4)
    assert np.abs(f.best - place).max() < 0.01
    assert len(f.values) < 4 * 10


def test_what_moves_together_is_searched_first():
    f = Seen(lambda x: 1 + float(((x - np.array([0.5, 0.5, 0.5, -0.3])) ** 2).sum()))
    kinds = [np.array([1.0, 1, 1, 0]), np.array([0.0, 0, 0, 1])]
    SEARCH(f, 4, kinds)
    alone = next(i for i, x in enumerate(f.points) if len(set(x[:3])) > 1)
    assert alone < 20
    found = f.points[int(np.argmin(f.values[:alone]))]
    assert np.abs(found - [0.5, 0.5, 0.5, -0.3]).max() < 0.01
    still = Seen(lambda x: 1.0)
    replace(SEARCH, sweeps=0)(still, 4, kinds)
    assert len(still.values) == 1


def test_powell_follows_a_narrow_valley_further_than_coordinates_do():
    def valley(x):
        return float((x[0] - x[1]) ** 2 + 0.02 * (x[0] + x[1] - 2) ** 2)

    ends = {}
    for method in ("powell", "coordinate"):
        f = Seen(valley)
        replace(SEARCH, method=method, sweeps=4, tolerance=1e-4)(f, 2)
        ends[method] = min(f.values)
    assert ends["powell"] < 1e-3 * ends["coordinate"]


def test_points_stay_within_the_bounds():
    low, high = math.log(0.5), math.log(1.5)
    f = Seen(lambda x: float(x.sum() + x[0] * x[1]))
    replace(SEARCH, low=low, high=high, sweeps=3)(f, 3)
    assert all(low <= v <= high for point in f.points for v in point)
    assert np.allclose(f.best[2], low)


@pytest.mark.parametrize("seed", range(5))
def test_a_line_search_on_steps_and_noise_is_never_worse_than_its_start_and_stays_inside(seed):
    noise = np.random.default_rng(seed).normal(size=400)
    f = Seen(lambda t: float(noise[int(50 * t) + 200]))
    t, found = descend(f, f(0.0), 0.1, 0.01, (-1.0, 0.5))
    assert found == min(f.values)
    assert found == f.function(t)
    assert all(-1 <= p <= 0.5 for p in f.points)


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_a_function_that_only_falls_ends_at_the_bound(slope):
    assert descend(lambda t: slope * t, 0.0, 0.1, 0.01, (-1.0, 0.75))[0] == (-1.0 if slope > 0 else 0.75)


def test_a_loss_that_is_infinite_on_one_side_is_searched_on_the_other():
    t, _ = descend(lambda t: math.inf if t > 0.02 else (t + 0.4) ** 2, 0.16, 0.1, 0.01, (-1.0, 1.0))
    assert abs(t + 0.4) < 0.01


def test_the_vertex_of_a_parabola_is_its_closed_form():
    p = np.linspace(2, 4, 10)
    found = parabola(p, 3 * p**2 - 19 * p + 40)
    assert (found.a, found.b, found.c) == pytest.approx((3, -19, 40))
    assert found.vertex == pytest.approx(19 / 6)
    assert found.r2 == pytest.approx(1)


@pytest.mark.parametrize("losses", [lambda p: -((p - 3) ** 2), lambda p: (p - 5) ** 2, lambda p: (p - 1) ** 2])
def test_a_parabola_that_opens_down_or_has_its_vertex_outside_has_no_minimum(losses):
    p = np.linspace(2, 4, 10)
    assert parabola(p, losses(p)).vertex is None


def test_two_points_and_an_infinite_loss_have_no_parabola():
    assert parabola([2, 4], [1, 2]) is None
    assert parabola([2, 3, 4], [1, 2, math.inf]) is None
