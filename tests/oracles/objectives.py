"""Slow twins of fewbit.choose.objectives."""

from __future__ import annotations

from torch import Tensor


def hinge_of_all_pairs(exact: Tensor, quantized: Tensor, theta: float) -> float:
    """The mean hinge over every pair of keys of every row (rows, keys), one pair after the other."""
    total, count = 0.0, 0
    for before, after in zip(exact.tolist(), quantized.tolist(), strict=True):
        for i in range(len(before)):
            for j in range(i + 1, len(before)):
                if before[i] == before[j]:
                    continue
                sign = 1.0 if before[i] > before[j] else -1.0
                total += max(0.0, theta - (after[i] - after[j]) * sign)
                count += 1
    return total / count
