"""The range by the entropy of a tensor's histogram (Migacz 2017, TensorRT)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbit.choose.range_method import Samples
from fewbit.core.device import CPU, on
from fewbit.core.grid import Grid, QParams, qparams_from_range


@dataclass(frozen=True)
class EntropyRange:
    """The threshold whose quantized histogram has the smallest KL divergence from the histogram (Migacz 2017, TensorRT).

    The histogram of |x| (without its first bin, where the zeros behind a ReLU are) has `bins` bins up to the largest. For
    each threshold T, a number of bins, P is the bins below T with all counts above T added to the last one, and Q the same bins
    without these, averaged in as many groups as the grid has codes for them, over nonempty bins. The range is [-T, T], never
    wider than the observed range. EasyQuant starts from it (Wu et al. 2020; their tool has 2,001 bins, 128 groups).
    """

    bins: int = 2048

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "the range whose quantized histogram is nearest to the histogram"

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        device, samples = samples.values.device, on(samples, CPU)
        reach = torch.maximum(-samples.low, samples.high).double()
        counts = samples.counts.expand_as(samples.values)
        rows = zip(samples.values.double(), counts.double(), reach, samples.low, strict=True)
        shares = torch.tensor([self._share(*row, grid) for row in rows], dtype=torch.float64)
        bound = (shares * reach).float()
        return on(qparams_from_range(torch.maximum(samples.low, -bound), torch.minimum(samples.high, bound), grid), device)

    def _share(self, values: Tensor, counts: Tensor, reach: Tensor, low: Tensor, grid: Grid) -> float:
        """The threshold of one row as a share of its largest magnitude."""
        groups = 2**grid.bits if low >= 0 and not (grid.signed or grid.symmetric) else 2 ** (grid.bits - 1)
        if reach <= 0 or groups >= self.bins:
            return 1.0
        places = (values.abs() / reach * self.bins).long().clamp_max(self.bins - 1)
        histogram = torch.zeros(self.bins, dtype=torch.float64).scatter_add_(0, places, counts).numpy()
        histogram[0] = 0.0
        divergences = [entropy_lost(histogram, count, groups) for count in range(groups, self.bins + 1)]
        return (groups + int(np.argmin(divergences))) / self.bins


def entropy_lost(histogram: NDArray[np.float64], count: int, groups: int) -> float:
    """KL divergence in nats of the first `count` bins quantized to `groups` groups from the histogram clipped to them."""
    inside = histogram[:count]
    p = inside.copy()
    p[-1] += histogram[count:].sum()
    starts = np.arange(groups) * count // groups
    filled = inside > 0
    sums, members = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.float64), starts)
    means = np.divide(sums, members, out=np.zeros_like(sums), where=members > 0)
    q = np.repeat(means, np.diff(np.append(starts, count))) * filled
    if not q.sum():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    nonzero = p > 0
    if (q[nonzero] == 0).any():  # the last bin holds only the clipped counts
        return math.inf
    return float((p[nonzero] * np.log(p[nonzero] / q[nonzero])).sum())
