"""3x3 convolutions of integers with stride 1, as they are written down: nine products for each output and input channel.

The innermost loop runs over output channels, which lie side by side, and takes eight input channels at a time; Winograd's
products (winograd.py) go through the same loop. With 7-bit codes the eight products fit in 16 bits (EasyQuant's chains), and
twice as many of them fit in a vector register.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

CHAIN = 8  # input channels in one pass of the innermost loop
PIXELS = 64  # outputs that go through it while eight rows of weights stay in the cache, about


def pack(weight: NDArray[np.int8]) -> NDArray[np.int16]:
    """Weights (c_out, c_in, 3, 3) in the order of the loops: (3, 3, c_in filled up to eights, c_out), 16 bits."""
    return fill(weight.astype(np.int16).transpose(2, 3, 1, 0))


def fill(w: NDArray[np.int16]) -> NDArray[np.int16]:
    """(a, b, c_in, c_out) with zeros for the input channels that are missing to a multiple of eight."""
    return np.ascontiguousarray(np.pad(w, ((0, 0), (0, 0), (0, -w.shape[2] % CHAIN), (0, 0))))


def direct(x: NDArray[np.int8], packed: NDArray[np.int16], padding: int = 1) -> NDArray[np.int32]:
    """Convolution of images (b, c_in, h, w) with packed weights, sums in 32 bits: (b, c_out, h', w'), a view of NHWC."""
    return images_last(_direct, x, packed, padding)


def chained(x: NDArray[np.int8], packed: NDArray[np.int16], padding: int = 1) -> NDArray[np.int32]:
    """The same with chains of eight products in 16 bits, which wrap around: exact where no code is beyond ±63."""
    return images_last(_chained, x, packed, padding)


def images_last(one: Any, x: NDArray[np.int8], packed: NDArray[np.int16], padding: int) -> NDArray[np.int32]:
    """`one` on each image; it gives (h', w', c_out)."""
    if x.shape[2] + 2 * padding < 3 or x.shape[3] + 2 * padding < 3:
        raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} with a padding of {padding} are smaller than 3 x 3")
    return np.stack([one(image, packed, padding) for image in x]).transpose(0, 3, 1, 2)


@njit
def padded(image, channels, top, height, width):  # type: ignore[no-untyped-def]
    """(c, h, w) int8 as (height, width, channels) int16, `top` zeros above and to the left, zeros for what is missing."""
    out = np.zeros((height, width, channels), np.int16)
    for c in range(image.shape[0]):
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                out[y + top, x + top, c] = image[c, y, x]
    return out


@njit
def add_products(sums, a, w):  # type: ignore[no-untyped-def]
    """sums (n, c_out) int32 += a (n, 8) times w (8, c_out), both int16: products and sums in 32 bits."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for i in range(len(sums)):
        row = sums[i]
        a0, a1, a2, a3 = np.int32(a[i, 0]), np.int32(a[i, 1]), np.int32(a[i, 2]), np.int32(a[i, 3])
        a4, a5, a6, a7 = np.int32(a[i, 4]), np.int32(a[i, 5]), np.int32(a[i, 6]), np.int32(a[i, 7])
        for j in range(len(row)):  # each product is cut to 32 bits at once, or the compiler multiplies in 64
            row[j] += (
                np.int32(a0 * w0[j])
                + np.int32(a1 * w1[j])
                + np.int32(a2 * w2[j])
                + np.int32(a3 * w3[j])
                + np.int32(a4 * w4[j])
                + np.int32(a5 * w5[j])
                + np.int32(a6 * w6[j])
                + np.int32(a7 * w7[j])
            )


@njit
def add_chains(sums, a, w):  # type: ignore[no-untyped-def]
    """The same with the eight products and their sum in 16 bits, which wrap around; then it is widened."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for i in range(len(sums)):
        row = sums[i]
        a0, a1, a2, a3, a4, a5, a6, a7 = a[i, 0], a[i, 1], a[i, 2], a[i, 3], a[i, 4], a[i, 5], a[i, 6], a[i, 7]
        for j in range(len(row)):
            row[j] += np.int16(
                np.int16(a0 * w0[j])
                + np.int16(a1 * w1[j])
                + np.int16(a2 * w2[j])
                + np.int16(a3 * w3[j])
                + np.int16(a4 * w4[j])
                + np.int16(a5 * w5[j])
                + np.int16(a6 * w6[j])
                + np.int16(a7 * w7[j])
            )


@njit
def _convolve(image, packed, padding, add):  # type: ignore[no-untyped-def]
    channels, c_out = packed.shape[2:]
    height, width = image.shape[1] + 2 * padding - 2, image.shape[2] + 2 * padding - 2
    read = padded(image, channels, padding, height + 2, width + 2)
    out = np.zeros((height, width, c_out), np.int32)
    rows = max(1, PIXELS // width)
    for top in range(0, height, rows):
        for dy in range(3):
            for dx in range(3):
                for c in range(0, channels, CHAIN):
                    w = packed[dy, dx, c : c + CHAIN]
                    for y in range(top, min(top + rows, height)):
                        add(out[y], read[y + dy, dx : dx + width, c : c + CHAIN], w)
    return out


@njit
def _direct(image, packed, padding):  # type: ignore[no-untyped-def]
    return _convolve(image, packed, padding, add_products)


@njit
def _chained(image, packed, padding):  # type: ignore[no-untyped-def]
    return _convolve(image, packed, padding, add_chains)
