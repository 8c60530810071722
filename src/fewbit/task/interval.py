"""95 % intervals: of a share, of the difference of two shares, and of any measure by bootstrap over images."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

ROUNDS = 1000  # of the bootstrap

Interval = tuple[float, float]


def wilson(hits: int, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share, in percent (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return 100 * max(center - half, 0.0), 100 * min(center + half, 1.0)


def newcombe(before: Tensor, after: Tensor) -> Interval:
    """Interval of the difference `after` minus `before` of two shares, bool (n,) each, of the same images, in percent points.

    Method 10 of Newcombe (1998, Statistics in Medicine 17, 2635): Wilson's intervals of both shares, joined with their
    correlation. Unlike a bootstrap it has a width where no image changed, which so few images do not prove.
    """
    n = len(before)
    both, lost = int((before & after).sum()), int((before & ~after).sum())
    won = int((~before & after).sum())
    neither = n - both - lost - won
    p, q = (both + won) / n, (both + lost) / n  # shares after and before
    (low_p, high_p), (low_q, high_q) = ([end / 100 for end in wilson(hits, n)] for hits in (both + won, both + lost))
    correlation = _phi(both, won, lost, neither, n)
    down = (p - low_p) ** 2 - 2 * correlation * (p - low_p) * (high_q - q) + (high_q - q) ** 2
    up = (high_p - p) ** 2 - 2 * correlation * (high_p - p) * (q - low_q) + (q - low_q) ** 2
    return 100 * (p - q - math.sqrt(max(down, 0))), 100 * (p - q + math.sqrt(max(up, 0)))


def _phi(both: int, won: int, lost: int, neither: int, n: int) -> float:
    """The correlation of the two, corrected for continuity where it is positive, as Newcombe's method 10 has it."""
    product = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    if not product:
        return 0.0
    excess = both * neither - won * lost
    return (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(product)


def bootstrap(measure: Callable[[Tensor], float], count: int, seed: int = 0, rounds: int = ROUNDS) -> Interval:
    """Percentile interval of a measure over images (Efron 1979); `measure` gets how often each of `count` images was drawn.

    A measure of the difference of two models makes it a paired bootstrap: both are looked at on the same images.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(rounds):
        drawn = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
        if math.isfinite(value := measure(drawn.double())):
            values.append(value)
    low, high = np.percentile(values or [math.nan], (2.5, 97.5))
    return float(low), float(high)


def of_mean(values: Tensor) -> Interval:
    """The bootstrap interval of the mean of values (n,), one for each image."""
    return bootstrap(lambda drawn: float(drawn @ values / drawn.sum()), len(values))
