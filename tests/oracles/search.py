"""Slow twin of fewbit.choose.output_search: the whole table of candidates, one product at a time, in float64."""

from __future__ import annotations

import numpy as np


def fake(x: np.ndarray, low: np.ndarray, high: np.ndarray, codes: tuple[int, int], symmetric: bool) -> np.ndarray:
    """Round to the codes that cover [low, high]: numpy, float32 steps, per row where low has rows."""
    first, last = codes
    if symmetric:
        scale = np.float32(np.maximum(-low, high) / last)
        zero = np.zeros_like(scale)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = np.float32((high - low) / (last - first))
        zero = np.round(first - low / scale)
    scale, zero = (np.asarray(v).reshape(-1, *[1] * (x.ndim - 1)) if np.ndim(v) else v for v in (scale, zero))
    return (np.clip(np.rint(x / scale) + zero, first, last) - zero) * np.float64(scale)


def coordinate_ascent(
    x: np.ndarray, w: np.ndarray, x_codes: tuple[int, int], w_codes: tuple[int, int], factors: np.ndarray
) -> tuple[float, float, float]:
    """The factors of weight and input and the objective that the alternation over the whole table of both ends in.

    The last factor is the start, 1. x (images, tokens, c_in) asymmetric and per tensor, w
    (c_out, c_in) symmetric and per channel.
    """
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    every = factors
    lows, highs = w.min(1), w.max(1)
    table = np.empty((len(every), len(every)))
    weights = [fake(w, lows * f, highs * f, w_codes, True) for f in every]
    inputs = [fake(x, x.min() * f, x.max() * f, x_codes, False) for f in every]
    for i, wq in enumerate(weights):
        for j, xq in enumerate(inputs):
            out = xq @ wq.T
            table[i, j] = np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(exact, out, strict=True)])
    i = j = len(every) - 1
    while True:
        before = i, j
        if table[:, j].max() > table[i, j] + 1e-6:
            i = nearest_to_1(table[:, j], every)
        if table[i].max() > table[i, j] + 1e-6:
            j = nearest_to_1(table[i], every)
        if (i, j) == before:
            return float(every[i]), float(every[j]), float(table[i, j])


def nearest_to_1(scores: np.ndarray, factors: np.ndarray) -> int:
    """Of the best scores, to 1e-6, the one whose factor is nearest to 1."""
    best = [k for k in range(len(scores)) if scores[k] >= scores.max() - 1e-6]
    return min(best, key=lambda k: abs(factors[k] - np.float32(1)))


def dense(w, width: int):
    """A grouped weight (c_out, m) written out over all `width` entries of a row, 0 where another group reads (torch)."""
    out = w.new_zeros(len(w), width)
    groups, m = width // w.shape[1], w.shape[1]
    for c in range(len(w)):
        first = c // (len(w) // groups) * m
        out[c, first : first + m] = w[c]
    return out
