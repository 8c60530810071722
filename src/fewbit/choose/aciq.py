"""Tensor scope: clipping from a distribution in closed form (Banner et al. 2019, ACIQ)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from fewbit.choose.range_method import Samples
from fewbit.core.device import wide
from fewbit.core.grid import Grid, QParams, qparams_from_range

Prior = Literal["laplace", "gauss"]


@lru_cache
def clipping_factor(prior: Prior, bits: int, one_sided: bool = False) -> float:
    """α* / b for Laplace(0, b), α* / σ for Gauss(0, σ): the clip with the smallest mean squared error on 2^bits bins.

    Laplace: (α/b) e^(α/b) = 3 · 4^bits, that is α/b + ln(α/b) = ln(3 · 4^bits). Gauss: the root of
    α (1 - erf(α / √2σ)) - √(2/π) σ e^(-α²/2σ²) + α / (3 · 4^bits) (Banner et al. 2019, equations 6 to 9). With `one_sided`
    only positive values count and [0, α] has all of the bins: one bit more than the symmetric case.
    """
    if bits < 1:
        raise ValueError(f"1 bit at least, not {bits}")
    bins = 4.0 ** (bits + one_sided)
    if prior == "laplace":
        return _root(lambda a: a + math.log(a / (3 * bins)))
    return _root(
        lambda a: a * math.erfc(a / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-a * a / 2) + a / (3 * bins),
    )


def _root(f: Callable[[float], float], low: float = 1e-3, high: float = 50.0) -> float:
    """Where a function that begins below 0 and ends above crosses it, to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return high


@dataclass(frozen=True)
class AnalyticClip:
    """[μ - α*, μ + α*] where α* is the best clip for a Laplace or Gauss distribution of the tensor's own spread.

    b is the mean of |x - μ|, σ the standard deviation. A tensor without values below 0 is treated as the ReLU of a symmetric
    one around 0: its spread is that of the positive values, its range [0, α*]. Never wider than the observed range.
    (The paper centres on the statistics before the ReLU; a site is the tensor behind it, where these are the same up to μ.)
    """

    prior: Prior = "laplace"

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return f"the best range for a {self.prior.capitalize()} distribution"

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        counts = wide(samples.counts.expand_as(samples.values))
        x, one_sided = wide(samples.values), bool((samples.low >= 0).all())
        if one_sided:
            counts = counts * (x > 0)
        total = counts.sum(1, keepdim=True).clamp_min(1e-30)
        mean = torch.zeros_like(total) if one_sided else (x * counts).sum(1, keepdim=True) / total
        away = (x - mean).abs()
        spread = (away * counts).sum(1) / total[:, 0]
        if self.prior == "gauss":
            spread = ((away.square() * counts).sum(1) / total[:, 0]).sqrt()
        reach = clipping_factor(self.prior, grid.bits, one_sided) * spread
        low = samples.low if one_sided else torch.maximum(wide(samples.low), mean[:, 0] - reach)
        high = torch.minimum(wide(samples.high), mean[:, 0] + reach)
        return qparams_from_range(low.float(), high.float(), grid)
