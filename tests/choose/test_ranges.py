"""Oracles: closed forms, numpy.quantile, and a dense grid of ranges with the error computed in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.choose.range_method import fidelity
from fewbit.choose.ranges import MinMax, MseRange, Percentile, Samples
from fewbit.core.grid import Grid, QParams, fake
from fewbit.observe import Histogram

U8, S8 = Grid(8, signed=False, symmetric=False), Grid(8, narrow=True)
U4, S4 = Grid(4, signed=False, symmetric=False), Grid(4, narrow=True)


def draw(kind: str, n: int = 2000, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    x = {"gauss": generator.normal(0.3, 1.0, n), "laplace": generator.laplace(0.0, 1.0, n)}[kind.split()[0]]
    return torch.from_numpy(x).float().relu() if kind.endswith("relu") else torch.from_numpy(x).float()


def row(x: torch.Tensor) -> Samples:
    return Samples.of_weight(x, Grid(8))


def error(x: torch.Tensor, a: QParams, grid: Grid, p: float = 2) -> float:
    return float((fake(x, QParams(a.scale.reshape(()), a.zero.reshape(())), grid) - x).double().abs().pow(p).mean())


def brute_force(x: torch.Tensor, grid: Grid, p: float = 2, steps: int = 91) -> float:
    """The smallest mean |x - fake(x)|^p over shares of the range in [0.1, 1] at both ends, in float64 numpy."""
    wide, best = x.double().numpy(), np.inf
    bottom, top = min(wide.min(), 0), max(wide.max(), 0)
    shares = np.linspace(0.1, 1, steps)
    for share in shares:
        if grid.symmetric:
            candidates = [(share * max(-bottom, top) / grid.high, 0.0)]
        else:
            low = share * bottom
            steps_of = [(other * top - low) / (grid.high - grid.low) for other in shares]
            candidates = [(s, np.rint(grid.low - low / s)) for s in steps_of]
        for s, zero in candidates:
            found = (np.clip(np.rint(wide / s) + zero, grid.low, grid.high) - zero) * s
            best = min(best, (np.abs(wide - found) ** p).mean())
    return best


@pytest.mark.parametrize(("grid", "scale", "zero"), [(U8, 6 / 255, 85), (S8, 4 / 127, 0), (U4, 6 / 15, 5), (S4, 4 / 7, 0)])
def test_minmax_is_the_closed_form(grid, scale, zero):
    a = MinMax()(row(torch.tensor([-2.0, 1.0, 4.0])), grid)
    assert a.scale.tolist() == [pytest.approx(scale)]
    assert a.zero.tolist() == [zero]


def test_minmax_of_a_histogram_is_that_of_the_tensor():
    x = draw("gauss")
    assert MinMax()(Samples.of_histogram(Histogram.of(x)), U8) == MinMax()(row(x), U8)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "laplace relu"])
@pytest.mark.parametrize("share", [0.9, 0.99, 0.999])
def test_percentile_cuts_where_numpy_says(kind, share):
    x = draw(kind, 4001)
    low, high = np.quantile(x.numpy(), [(1 - share) / 2, (1 + share) / 2], method="inverted_cdf")
    a = Percentile(share)(row(x), U8)
    assert a.scale.item() == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-6)
    h = Histogram.of(x)  # two bins wide: either end is found to a bin
    assert abs(Percentile(share)(Samples.of_histogram(h), U8).scale.item() - a.scale.item()) <= 2 * h.width / 255


def test_percentile_of_everything_is_minmax():
    x = draw("laplace")
    assert Percentile(1.0)(row(x), U8) == MinMax()(row(x), U8)


@pytest.mark.parametrize("share", [0.5, 1.1])
def test_a_share_that_keeps_no_range_is_refused(share):
    with pytest.raises(ValueError, match=r"above 0\.5"):
        Percentile(share)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "gauss relu", "laplace relu"])
@pytest.mark.parametrize("grid", [U4, S4, S8], ids=str)
def test_mse_finds_the_error_of_a_dense_grid_of_ranges(kind, grid):
    x = draw(kind, 500)
    assert error(x, MseRange()(row(x), grid), grid) <= 1.02 * brute_force(x, grid)


@pytest.mark.parametrize("p", [1.0, 3.0, 4.0])
def test_other_powers_find_the_error_of_a_dense_grid_of_ranges(p):
    x = draw("laplace")
    assert error(x, MseRange(p=p)(row(x), S4), S4, p) <= 1.02 * brute_force(x, S4, p)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "laplace relu"])
def test_mse_of_a_histogram_is_nearly_that_of_the_tensor(kind):
    x = draw(kind, 20000)
    found = MseRange()(Samples.of_histogram(Histogram.of(x)), U8)
    assert error(x, found, U8) <= 1.02 * error(x, MseRange()(row(x), U8), U8)


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12),
    st.builds(Grid, bits=st.integers(2, 8), signed=st.booleans(), narrow=st.booleans(), symmetric=st.booleans()),
)
def test_mse_is_never_worse_than_minmax(values, grid):
    x = torch.tensor(values)
    assert error(x, MseRange()(row(x), grid), grid) <= error(x, MinMax()(row(x), grid), grid) * (1 + 1e-5)


def test_a_large_power_approaches_minmax_and_a_small_one_cuts_more():
    x = draw("laplace")
    whole = MinMax()(row(x), S4).scale.item()
    shares = [MseRange(p=p)(row(x), S4).scale.item() / whole for p in (1.0, 2.0, 4.0, 12.0)]
    assert shares == sorted(shares)
    # one step is 2/15 of the range: the largest error is least where clipping costs as much as rounding
    assert shares[-1] > 1 - 1 / 7 > shares[0]


@pytest.mark.parametrize("p", [2.0, 4.0])
@pytest.mark.parametrize("power", [-40, 30])
def test_the_unit_of_the_values_does_not_matter(p, power):
    x = draw("laplace")
    here, there = (MseRange(p=p)(row(x * 2.0**k), S4) for k in (0, power))
    assert there.scale.item() == here.scale.item() * 2.0**power


@pytest.mark.parametrize("method", [MinMax(), Percentile(0.9), MseRange(), MseRange(p=4.0)], ids=repr)
@pytest.mark.parametrize("grid", [Grid(4, narrow=True, axis=0), Grid(8, symmetric=False, axis=0)], ids=str)
def test_each_channel_is_what_it_is_alone(method, grid):
    w = torch.stack([draw("gauss"), draw("laplace") * 5, draw("laplace relu"), -draw("laplace relu"), torch.zeros(2000)])
    together = method(Samples.of_weight(w, grid), grid)
    for i in range(len(w)):
        alone = method(Samples.of_weight(w[i : i + 1], grid), grid)
        assert (together.scale[i], together.zero[i]) == (alone.scale[0], alone.zero[0])


def test_rows_that_fill_more_than_one_piece_of_the_cache_are_all_there(monkeypatch):
    w = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, axis=0)
    whole = MseRange()(Samples.of_weight(w, grid), grid)
    monkeypatch.setattr("fewbit.choose.ranges.CACHE", 600)
    assert MseRange()(Samples.of_weight(w, grid), grid) == whole


def test_weights_have_a_row_per_channel_or_one_for_all():
    w = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    rows, one = Samples.of_weight(w, Grid(8, axis=0)), Samples.of_weight(w, Grid(8))
    np.testing.assert_array_equal(rows.high.numpy(), w.numpy().reshape(3, -1).max(1))
    assert (one.low.item(), one.high.item()) == (w.min().item(), w.max().item())
    assert rows.values.shape == (3, 8)


def test_a_tensor_of_one_sign_has_half_the_step_on_an_asymmetric_grid():
    x = draw("laplace relu")
    symmetric = MinMax()(row(x), Grid(8, narrow=True)).scale
    asymmetric = MinMax()(row(x), Grid(8, symmetric=False)).scale
    assert (symmetric / asymmetric).item() == pytest.approx(255 / 127, rel=1e-6)


@pytest.mark.parametrize("method", [MinMax(), Percentile(), MseRange()], ids=repr)
@pytest.mark.parametrize("value", [0.0, 2.0, -3.0])
def test_a_constant_is_kept_exactly_enough(method, value):
    x = torch.full((10,), value)
    for samples in (row(x), Samples.of_histogram(Histogram.of(x))):
        a = method(samples, U8)
        assert error(x, a, U8) <= (1e-6 * value) ** 2


@pytest.mark.parametrize("settings", [{"steps": 1}, {"smallest": 0.0}, {"smallest": 1.0}, {"p": 0.0}])
def test_settings_without_a_meaning_are_refused(settings):
    with pytest.raises(ValueError, match="allowed"):
        MseRange(**settings)


def test_the_ratio_of_signal_to_noise_is_the_closed_form_and_of_zeros_there_is_none():
    """Oracle: 1.25 on steps of 1 is 1, so 20 log10(1.25 / 0.25) dB; 9 is clipped to 3 on a grid of 3 bits."""
    grid, unit = Grid(3), QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    assert fidelity(row(torch.tensor([1.25])), unit, grid) == pytest.approx((20 * np.log10(5), 0))
    assert fidelity(row(torch.tensor([9.0, 1.0])), unit, grid) == pytest.approx((10 * np.log10(82 / 36), 0.5))
    assert fidelity(row(torch.tensor([2.0, -1.0])), unit, grid) == (200, 0)  # infinite
    assert fidelity(row(torch.zeros(4)), unit, grid) == (None, 0)
