"""Sums of products in short accumulators: so many are added in 16 bits, then the chain is added to 32 bits.

The reason for 7 bits in EasyQuant, and the rule behind `accumulator.chain` of a target (docs/targets.md).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]
Overflow = Literal["wrap", "saturate"]


def chained(products: Integers, chain: int = 8, bits: int = 16, overflow: Overflow = "wrap") -> NDArray[np.int64]:
    """The sum over the last axis of products (..., terms) as a processor with chains gives it.

    Every `chain` products are added one by one in `bits`, which wrap around or saturate at each step; chains are added
    exactly (in 32 bits a layer would need 500,000 products of 7 by 7 bits to leave them).
    """
    runs = _runs(products, chain)
    low, high = limits(bits)
    if overflow == "saturate":
        total = np.zeros(runs.shape[:-1], np.int64)
        for i in range(chain):
            total = np.clip(total + np.clip(runs[..., i], low, high), low, high)
    else:
        total = (runs.sum(-1) - low) % 2**bits + low
    return total.sum(-1)


def overflows(products: Integers, chain: int = 8, bits: int = 16) -> NDArray[np.bool_]:
    """For each sum over the last axis of products (..., terms): whether any of its chains leaves `bits` on the way."""
    low, high = limits(bits)
    running = _runs(products, chain).cumsum(-1)
    return np.any((running < low) | (running > high), axis=(-1, -2))


def limits(bits: int) -> tuple[int, int]:
    """The smallest and the largest signed integer of a width."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _runs(products: Integers, chain: int) -> NDArray[np.int64]:
    """(..., terms) as (..., chains, chain), the last chain filled with zeros."""
    missing = -products.shape[-1] % chain
    filled = np.pad(products.astype(np.int64), [(0, 0)] * (products.ndim - 1) + [(0, missing)])
    return filled.reshape(*products.shape[:-1], -1, chain)
