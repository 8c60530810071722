"""Integer Winograd F(2x2, 3x3): 16 products in place of 36 for four outputs and one input channel, and the same integers.

Wu et al. 2020 (EasyQuant, 2006.16669) name integer Winograd; the tile and the matrices are those of the engine that its
authors released, with 2G in place of G so that weights stay integers, which makes each result four times too large:

    V = B^T d B            d: 4x4 codes of the input
    U = (2G) g (2G)^T      g: 3x3 codes of the weight, once for all images
    M = sum over input channels of U * V, element by element
    Y = (A^T M A) / 4      exact: A^T M A is four times the convolution, whatever the codes

What holds them. Each element of V is a sum of four codes with signs, each of U one of at most nine:

| codes | V | U | one product | 4Y for c input channels |
|---|---|---|---|---|
| ±63 | 4 · 63 = 252 | 9 · 63 = 567 | 142,884 | 36 · 63² · c |
| int8 | 4 · 128 = 512 | 9 · 128 = 1,152 | 589,824 | 36 · 128² · c |

So V and U need 16 bits (9 bits and more: not 8), a product needs 32, and no chain of products fits in 16. Sums in between may
wrap around in 32 bits; only 4Y has to fit, since everything behind the products is addition: 36 · 128² · c < 2^31 up to
c = 3,640, and `pack` refuses more.
"""

from __future__ import annotations

import numpy as np
from bench.kernels.direct import CHAIN, add_products, fill, images_last
from numba import njit
from numpy.typing import NDArray

BT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]])
G2 = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])
AT = np.array([[1, 1, 1, 0], [0, 1, -1, 1]])

CHANNELS = (2**31 - 1) // (36 * 128**2)  # input channels up to which four times any sum fits in 32 bits
TILES = 64  # tiles that are transformed and multiplied together, about


def pack(weight: NDArray[np.int8]) -> NDArray[np.int16]:
    """U of weights (c_out, c_in, 3, 3): (4, 4, c_in filled up to eights, c_out). Raises ValueError for too many channels."""
    if weight.shape[1] > CHANNELS:
        raise ValueError(f"{weight.shape[1]} input channels: four times a sum may leave 32 bits, {CHANNELS} are the most")
    u = np.einsum("ik,ockl,jl->ijco", G2, weight.astype(np.int64), G2)
    return fill(u.astype(np.int16))


def winograd(x: NDArray[np.int8], packed: NDArray[np.int16], padding: int = 1) -> NDArray[np.int32]:
    """Convolution of images (b, c_in, h, w) with packed weights: (b, c_out, h', w'), a view of NHWC; equal to `direct`."""
    return images_last(_winograd, x, packed, padding)


@njit
def _winograd(image, packed, padding):  # type: ignore[no-untyped-def]
    channels, c_out = packed.shape[2:]
    height, width = image.shape[1] + 2 * padding - 2, image.shape[2] + 2 * padding - 2
    down, across = (height + 1) // 2, (width + 1) // 2
    read = _even_and_odd(image, channels, padding, down + 1, across + 1)
    out = np.empty((2 * down, 2 * across, c_out), np.int32)
    rows = min(down, max(1, TILES // across))
    v = np.empty((4, 4, rows * across, channels), np.int16)
    m = np.empty((4, 4, rows * across, c_out), np.int32)
    v_rows, m_rows = v.reshape(4, 4, rows, across * channels), m.reshape(4, 4, rows, across * c_out)
    for top in range(0, down, rows):
        some = min(rows, down - top)
        for r in range(some):
            _transform_input(v_rows[:, :, r], read[2 * (top + r) : 2 * (top + r) + 4], channels)
        m[:] = 0
        for i in range(4):
            for j in range(4):
                for c in range(0, channels, CHAIN):
                    tiles = v[i, j, : some * across, c : c + CHAIN]
                    add_products(m[i, j, : some * across], tiles, packed[i, j, c : c + CHAIN])
        for r in range(some):
            _transform_output(out[2 * (top + r) : 2 * (top + r) + 2], m_rows[:, :, r])
    return out[:height, :width]


@njit
def _even_and_odd(image, channels, top, down, across):  # type: ignore[no-untyped-def]
    """(c, h, w) int8 as (2 down, 2, across * channels) int16: rows of even columns, then of odd ones, channels last.

    `top` zeros stand above and to the left, and zeros for what is missing.
    """
    out = np.zeros((2 * down, 2, across * channels), np.int16)
    for c in range(image.shape[0]):
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                at = x + top
                out[y + top, at % 2, at // 2 * channels + c] = image[c, y, x]
    return out


@njit
def _transform_input(v, read, channels):  # type: ignore[no-untyped-def]
    """v (4, 4, tiles * c) = B^T d B for a row of tiles; read (4, 2, (tiles + 1) * c) has its even and odd columns.

    Elements 0 to 3 of a tile's row are the even and the odd column at its place, then those one place on.
    """
    even, odd = np.empty(read.shape[2], np.int16), np.empty(read.shape[2], np.int16)  # a row of B^T d
    last = len(even) - channels
    for i in range(4):
        first, second, sign = (0, 2, -1) if i == 0 else (1, 2, 1) if i == 1 else (2, 1, -1) if i == 2 else (3, 1, -1)
        _add(even, read[first, 0], read[second, 0], np.int16(sign))
        _add(odd, read[first, 1], read[second, 1], np.int16(sign))
        _add(v[i, 0], even[:last], even[channels:], np.int16(-1))
        _add(v[i, 1], odd[:last], even[channels:], np.int16(1))
        _add(v[i, 2], even[channels:], odd[:last], np.int16(-1))
        _add(v[i, 3], odd[channels:], odd[:last], np.int16(-1))


@njit
def _add(out, a, b, sign):  # type: ignore[no-untyped-def]
    for k in range(len(out)):
        out[k] = np.int16(a[k] + np.int16(sign * b[k]))


@njit
def _transform_output(out, m):  # type: ignore[no-untyped-def]
    """out (2, 2 tiles, c_out) = (A^T M A) / 4 for a row of tiles; m (4, 4, tiles * c_out)."""
    channels = out.shape[2]
    rows = np.empty((4, m.shape[2]), np.int32)  # a row of A^T M
    for i in range(2):
        sign = np.int32(1 - 2 * i)
        for j in range(4):
            _add_three(rows[j], m[i, j], m[i + 1, j], m[i + 2, j], sign)
        for t in range(out.shape[1] // 2):
            some = slice(t * channels, (t + 1) * channels)
            _quarter(out[i, 2 * t], out[i, 2 * t + 1], rows[0, some], rows[1, some], rows[2, some], rows[3, some])


@njit
def _add_three(out, a, b, c, sign):  # type: ignore[no-untyped-def]
    """out = a + sign b + c, in 32 bits that wrap around."""
    for k in range(len(out)):
        out[k] = np.int32(np.int32(a[k] + np.int32(sign * b[k])) + c[k])


@njit
def _quarter(left, right, a, b, c, d):  # type: ignore[no-untyped-def]
    """left = (a + b + c) / 4 and right = (b - c + d) / 4, the sums in 32 bits that wrap around."""
    for k in range(len(left)):
        left[k] = np.int32(np.int32(a[k] + b[k]) + c[k]) >> 2
        right[k] = np.int32(np.int32(b[k] - c[k]) + d[k]) >> 2
