"""Oracles: the exact sum, a scalar loop over NumPy's own int16, and the paper's table of products that fit."""

from __future__ import annotations

import numpy as np
import pytest
from bench.kernels.chains import chained, overflows
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fewbit.core.grid import Grid, safe_terms

INT7 = Grid(7, narrow=True)


def stepwise(products: np.ndarray, chain: int, *, saturate: bool) -> int:
    """One sum, product by product; the register is NumPy's int16, or clamped."""
    total = 0
    for start in range(0, len(products), chain):
        register = np.int16(0)
        for product in products[start : start + chain]:
            exact = int(register) + int(product)
            with np.errstate(over="ignore"):
                register = np.int16(max(-32768, min(32767, exact))) if saturate else register + np.int16(product)
        total += int(register)
    return total


@pytest.mark.parametrize(("a", "w", "fit"), [(8, 8, 2), (7, 7, 8), (7, 6, 16), (6, 6, 34)])
def test_the_papers_table_of_products_in_16_bits(a, w, fit):
    assert safe_terms(16, Grid(a, narrow=True), Grid(w, narrow=True)) == fit
    largest = (2 ** (a - 1) - 1) * (2 ** (w - 1) - 1)
    assert not overflows(np.full(fit, largest), chain=fit)
    assert overflows(np.full(fit + 1, largest), chain=fit + 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_eight_products_of_seven_bits_never_overflow_and_nine_do(sign):
    worst = np.full((3, 64), sign * 63 * 63)
    assert not overflows(worst, chain=8).any()
    assert overflows(worst, chain=9).all()
    assert (chained(worst, chain=8) == worst.sum(-1)).all()
    assert (chained(worst, chain=9) != worst.sum(-1)).all()


def test_the_lowest_code_of_seven_bits_costs_the_eighth_product():
    assert overflows(np.full(8, -64 * -64), chain=8)
    assert not overflows(np.full(7, -64 * -64), chain=7)
    assert safe_terms(16, Grid(7), Grid(7)) == 7
    assert chained(np.full(8, 4096)) == -32768
    assert chained(np.full(8, 4096), overflow="saturate") == 32767


def test_nine_products_of_six_by_seven_bits_fit():
    assert not overflows(np.full(9, 31 * 63), chain=9)


@given(st.data(), st.integers(0, 20), st.integers(1, 9))
def test_wrap_and_saturate_are_those_of_a_register(data, terms, chain):
    products = data.draw(arrays(np.int16, terms, elements=st.integers(-16384, 16384)))
    assert chained(products, chain, overflow="wrap") == stepwise(products, chain, saturate=False)
    assert chained(products, chain, overflow="saturate") == stepwise(products, chain, saturate=True)


@given(arrays(np.int16, (4, 8), elements=st.integers(-16384, 16384)))
def test_one_chain_differs_from_the_exact_sum_where_it_overflows(products):
    exact, left = products.sum(-1, dtype=np.int64), overflows(products)
    final = (exact < -32768) | (exact > 32767)
    assert ((chained(products) != exact) == final).all()  # what wraps on the way comes back
    assert (chained(products, overflow="saturate")[~left] == exact[~left]).all()
    assert left[final].all()


@given(arrays(np.int16, (4, 8), elements=st.integers(0, 16384)))
def test_what_saturation_takes_from_a_growing_sum_is_lost(products):
    exact, left = products.sum(-1, dtype=np.int64), overflows(products)
    assert ((chained(products, overflow="saturate") != exact) == left).all()


def test_an_overflow_on_the_way_is_seen_where_the_sum_comes_back():
    products = np.array([16384, 16384, -16384, -16384])
    assert overflows(products)
    assert chained(products) == 0
    assert chained(products, overflow="saturate") == -1
    assert not overflows(products, chain=1)


@given(arrays(np.int8, (2, 5, 24), elements=st.integers(INT7.low, INT7.high)))
def test_seven_bit_codes_are_summed_exactly(codes):
    products = codes[0].astype(np.int64) * codes[1]
    assert not overflows(products).any()
    assert (chained(products) == products.sum(-1)).all()
    assert (chained(products, overflow="saturate") == products.sum(-1)).all()
