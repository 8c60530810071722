"""Oracles: torch's convolution in float64 (exact below 2^53), scipy's in int64, and every tile of extreme codes."""

from __future__ import annotations

import importlib
import sys
from itertools import product

import numpy as np
import pytest
import torch
from bench.kernels import direct, winograd
from bench.kernels.chains import chained, overflows
from bench.kernels.winograd import AT, BT, CHANNELS, G2
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d

CODES = {"int7": (-63, 63), "int8": (-128, 127)}


def exact(x, w, padding):
    return torch.conv2d(torch.from_numpy(x).double(), torch.from_numpy(w).double(), padding=padding).numpy()


def drawn(seed, low, high, c_in, c_out, height, width, *, ends=False):
    """Images (2, c_in, height, width) and weights; `ends`: only the two extreme codes."""
    rng = np.random.default_rng(seed)
    shapes = (2, c_in, height, width), (c_out, c_in, 3, 3)
    if ends:
        return [rng.choice(np.array([low, high], np.int8), shape) for shape in shapes]
    return [rng.integers(low, high + 1, shape).astype(np.int8) for shape in shapes]


@settings(max_examples=40)
@given(
    codes=st.sampled_from(list(CODES.values())),
    c_in=st.integers(1, 5),
    c_out=st.integers(1, 5),
    height=st.integers(3, 12),
    width=st.integers(3, 12),
    padding=st.integers(0, 1),
    ends=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_winograd_and_direct_are_the_convolution(codes, c_in, c_out, height, width, padding, ends, seed):
    x, w = drawn(seed, *codes, c_in, c_out, height, width, ends=ends)
    expected = exact(x, w, padding)
    assert np.array_equal(winograd.winograd(x, winograd.pack(w), padding), expected)
    assert np.array_equal(direct.direct(x, direct.pack(w), padding), expected)
    if codes == CODES["int7"]:
        assert np.array_equal(direct.chained(x, direct.pack(w), padding), expected)


@pytest.mark.parametrize(("c_in", "size"), [pytest.param(16, (33, 9), marks=pytest.mark.slow), (24, (5, 70)), (9, (1, 1))])
def test_layers_of_several_blocks_are_the_convolution(c_in, size):
    x, w = drawn(3, -128, 127, c_in, 20, *size)
    expected = exact(x, w, 1)
    assert np.array_equal(winograd.winograd(x, winograd.pack(w)), expected)
    assert np.array_equal(direct.direct(x, direct.pack(w)), expected)


def test_one_channel_is_scipys_correlation():
    x, w = drawn(5, -128, 127, 1, 1, 9, 7)
    expected = correlate2d(x[0, 0].astype(np.int64), w[0, 0].astype(np.int64), "same")
    assert np.array_equal(winograd.winograd(x, winograd.pack(w))[0, 0], expected)


def test_the_worst_codes_of_many_channels_fit_in_32_bits():
    x, w = np.full((1, 512, 4, 4), -128, np.int8), np.full((2, 512, 3, 3), -128, np.int8)
    assert (winograd.winograd(x, winograd.pack(w), 0) == 9 * 512 * 128**2).all()


def test_the_most_channels_give_the_largest_sum_and_one_more_is_refused():
    x, w = np.full((1, CHANNELS, 4, 4), -128, np.int8), np.full((1, CHANNELS, 3, 3), -128, np.int8)
    assert (winograd.winograd(x, winograd.pack(w), 0) == 9 * CHANNELS * 128**2).all()
    assert 36 * 128**2 * CHANNELS < 2**31 <= 36 * 128**2 * (CHANNELS + 1)
    with pytest.raises(ValueError, match="3641 input channels: four times a sum may leave 32 bits, 3640 are the most"):
        winograd.pack(np.zeros((1, CHANNELS + 1, 3, 3), np.int8))


@pytest.mark.parametrize(("low", "high", "v", "u"), [(-63, 63, 252, 567), (-128, 127, 512, 1152)])
def test_the_bounds_of_the_transforms_are_those_of_all_tiles_of_extreme_codes(low, high, v, u):
    ends = np.array([low, high])
    inputs = np.array(list(product(ends, repeat=16))).reshape(-1, 4, 4)  # linear: extremes are at extreme codes
    weights = np.array(list(product(ends, repeat=9))).reshape(-1, 3, 3)
    assert np.abs(BT @ inputs @ BT.T).max() == v
    assert np.abs(G2 @ weights @ G2.T).max() == u
    assert max(v, u) < 2**15
    packed = winograd.pack(weights[:, None].astype(np.int8))
    assert np.abs(packed.astype(int)).max() == u


def test_the_result_before_the_division_is_a_multiple_of_four():
    rng = np.random.default_rng(0)
    d, g = rng.integers(-128, 128, (2000, 4, 4)), rng.integers(-128, 128, (2000, 3, 3))
    four = AT @ ((G2 @ g @ G2.T) * (BT @ d @ BT.T)) @ AT.T
    sums = np.lib.stride_tricks.sliding_window_view(d, (3, 3), axis=(1, 2)) * g[:, None, None]
    assert (four % 4 == 0).all()
    assert np.array_equal(four // 4, sums.sum((-1, -2)))


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_chains_of_the_kernel_wrap_as_the_emulation_says(codes):
    x, w = drawn(7, *codes, 8, 4, 6, 5, ends=True)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64), (3, 3), axis=(2, 3))  # b c y x ky kx
    products = np.einsum("bcyxij,ocij->boyxijc", windows, w.astype(np.int64))
    terms = products.reshape(*products.shape[:4], -1)  # eight channels of one element of the kernel are a chain
    found = direct.chained(x, direct.pack(w), 0)
    assert np.array_equal(found, chained(terms))
    assert overflows(terms).any() == (codes == CODES["int8"])
    assert np.array_equal(found, terms.sum(-1)) == (codes == CODES["int7"])


def test_images_that_are_too_small_are_refused():
    x, w = drawn(0, -63, 63, 1, 1, 2, 5)
    for convolve, pack in ((direct.direct, direct.pack), (winograd.winograd, winograd.pack)):
        with pytest.raises(ValueError, match="images of 2 x 5 with a padding of 0 are smaller than 3 x 3"):
            convolve(x, pack(w), 0)


def test_without_numba_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "bench.kernels")
    with pytest.raises(ImportError, match=r"bench\.kernels .* numba, which is not installed: pip install 'numba>=0\.61'"):
        importlib.import_module("bench.kernels")
