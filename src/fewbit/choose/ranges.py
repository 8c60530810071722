"""Tensor scope: the range of one tensor from its own values. Weights and activations look the same to these methods.

A tensor is `Samples`: rows of values with counts. A weight is one row per channel, every count 1; an activation is one row,
the bins of its histogram. So each rule is written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fewbit.core.grid import Grid, QParams, qparams_from_range
from fewbit.observe.stats import Histogram


@dataclass(frozen=True)
class Samples:
    """Values (rows, n), how often each was seen (n,) or (rows, n), and the exact extremes (rows,)."""

    values: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of_histogram(h: Histogram) -> Samples:
        """One row: the centers of the bins that hold anything."""
        seen = h.counts.nonzero().flatten()
        centers = h.centers[seen].clamp(h.low, h.high).float()
        return Samples(centers[None], (h.counts[seen] / h.count).float(), torch.tensor([h.low]), torch.tensor([h.high]))

    @staticmethod
    def of_weight(w: Float[Tensor, "channels ..."], grid: Grid) -> Samples:
        """One row per channel for a per-channel grid, one per block where it has blocks, else one row."""
        rows = (
            w.unflatten(1, (-1, grid.group_size)).flatten(0, 1)
            if grid.group_size
            else w.flatten(1)
            if grid.axis is not None
            else w.reshape(1, -1)
        )
        return Samples(rows, torch.ones(rows.shape[1]), rows.amin(1), rows.amax(1))

    @staticmethod
    def of_channels(values: Float[Tensor, "channels n"], low: Tensor, high: Tensor) -> Samples:
        """One row per channel of an activation: sampled values, and the extremes of all that was seen."""
        return Samples(values, torch.ones(values.shape[1]), low, high)

    def rows(self, index: Tensor) -> Samples:
        """Some of the rows."""
        counts = self.counts if self.counts.ndim == 1 else self.counts[index]
        return Samples(self.values[index], counts, self.low[index], self.high[index])


@runtime_checkable
class RangeMethod(Protocol):
    """From the samples of a tensor to a step and zero point per row: float32 and int32 of shape (rows,)."""

    def __call__(self, samples: Samples, grid: Grid) -> QParams: ...


def ranged(method: RangeMethod, samples: Samples, grid: Grid) -> QParams:
    """The step and zero point of each row; rows of a grid with channel widths are taken together by their width.

    A row of 0 bits has code 0 alone, which is 0.
    """
    if not grid.widths:
        return method(samples, grid)
    scale, zero = torch.ones(len(samples.low)), torch.zeros(len(samples.low), dtype=torch.int32)
    widths = torch.tensor(grid.widths)
    for bits in sorted({b for b in grid.widths if b}):
        rows = (widths == bits).nonzero().flatten()
        found = method(samples.rows(rows), replace(grid, bits=bits, widths=()))
        scale[rows], zero[rows] = found.scale, found.zero
    return QParams(scale, zero)


@dataclass(frozen=True)
class MinMax:
    """The whole range that was seen (Jacob et al. 2018)."""

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        return qparams_from_range(samples.low, samples.high, grid)


@dataclass(frozen=True)
class Percentile:
    """The range that holds `share` of the values, the same share cut off at both ends (Li et al. 2019, FQ-ViT's baseline)."""

    share: float = 0.9999

    def __post_init__(self) -> None:
        if not 0.5 < self.share <= 1:
            raise ValueError(f"share is the part of values kept, above 0.5 and at most 1, not {self.share}")

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        values, order = samples.values.sort(dim=1)
        counts = samples.counts.expand_as(samples.values).gather(1, order).double().cumsum(1)
        total = counts[:, -1:]
        cut = (1 - self.share) / 2
        first = torch.searchsorted(counts, total * cut).clamp(max=values.shape[1] - 1)
        last = torch.searchsorted(counts, total * (1 - cut)).clamp(max=values.shape[1] - 1)
        low = values.gather(1, first).squeeze(1) if self.share < 1 else samples.low
        high = values.gather(1, last).squeeze(1) if self.share < 1 else samples.high
        return qparams_from_range(low, high, grid)


@dataclass(frozen=True)
class MseRange:
    """The range with the smallest mean |x - fake(x)|^p (p = 2: mean squared error; LAPQ's layer-wise start for other p).

    Candidates shrink the seen range: both ends on their own for an asymmetric grid. A coarse grid of `steps` shares in
    [smallest, 1], then a fine one of as many between the neighbours of the best.
    """

    p: float = 2.0
    steps: int = 16
    smallest: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.smallest < 1 or self.p <= 0:
            raise ValueError(f"steps >= 2, 0 < smallest < 1 and p > 0 are allowed, not {self}")

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        found = [self._rows(part, grid) for part in _chunks(_near_one(samples))]
        low, high = (torch.cat(shares) for shares in zip(*found, strict=True))
        return qparams_from_range(samples.low * low, samples.high * high, grid)

    def _rows(self, samples: Samples, grid: Grid) -> tuple[Tensor, Tensor]:
        """The shares of the lowest and the highest value of each row."""
        best_low = best_high = torch.ones(len(samples.low))
        reach = 1 - self.smallest
        for offsets in (
            torch.linspace(-reach, 0, self.steps),
            torch.linspace(-1, 1, 2 * self.steps - 1) * reach / (self.steps - 1),
        ):
            if grid.symmetric:
                pairs = torch.stack([offsets, offsets], 1)
            elif bool((samples.low < 0).any()):
                pairs = torch.cartesian_prod(offsets, offsets)
            else:
                pairs = torch.stack([torch.zeros_like(offsets), offsets], 1)
            low = (best_low + pairs[:, :1]).clamp(self.smallest, 1)  # (candidates, rows)
            high = (best_high + pairs[:, 1:]).clamp(self.smallest, 1)
            error = torch.cat([self._error(samples, lo, hi, grid) for lo, hi in _together(low, high)])
            best = error.argmin(0)
            best_low, best_high = (share.gather(0, best[None]).squeeze(0) for share in (low, high))
        return best_low, best_high

    def _error(self, samples: Samples, low_share: Tensor, high_share: Tensor, grid: Grid) -> Float[Tensor, "candidates rows"]:
        """The error of each row for shares of its range (candidates, rows)."""
        qparams = qparams_from_range(samples.low * low_share, samples.high * high_share, grid)
        scale, zero = qparams.scale[..., None], qparams.zero[..., None]
        error = samples.values / scale
        error = error.round_().add_(zero).clamp_(grid.low, grid.high).sub_(zero).mul_(scale).sub_(samples.values)
        error = error.square_() if self.p == 2 else error.abs_().pow_(self.p)
        return error.mul_(samples.counts).sum(-1)


@dataclass(frozen=True)
class EntropyRange:
    """The threshold whose quantized histogram has the smallest KL divergence from the histogram (Migacz 2017, TensorRT).

    The histogram of |x| (without its first bin, where the zeros behind a ReLU are) has `bins` bins up to the largest. For
    each threshold T, a number of bins, P is what is below T with all that is above it in the last bin, and Q the same bins
    without that, averaged in as many groups as the grid has codes for them, over the bins that hold anything. The range is
    [-T, T], never wider than what was seen. EasyQuant starts from it (Wu et al. 2020; their tool has 2,001 bins, 128 groups).
    """

    bins: int = 2048

    def __call__(self, samples: Samples, grid: Grid) -> QParams:
        reach = torch.maximum(-samples.low, samples.high).double()
        counts = samples.counts.expand_as(samples.values)
        rows = zip(samples.values.double(), counts.double(), reach, samples.low, strict=True)
        found = torch.tensor([self._share(*row, grid) for row in rows], dtype=torch.float64)
        bound = (found * reach).float()
        return qparams_from_range(torch.maximum(samples.low, -bound), torch.minimum(samples.high, bound), grid)

    def _share(self, values: Tensor, counts: Tensor, reach: Tensor, low: Tensor, grid: Grid) -> float:
        """The threshold of one row as a share of its largest magnitude."""
        groups = 2**grid.bits if low >= 0 and not (grid.signed or grid.symmetric) else 2 ** (grid.bits - 1)
        if reach <= 0 or groups >= self.bins:
            return 1.0
        places = (values.abs() / reach * self.bins).long().clamp_max(self.bins - 1)
        histogram = torch.zeros(self.bins, dtype=torch.float64).scatter_add_(0, places, counts).numpy()
        histogram[0] = 0.0
        divergences = [entropy_lost(histogram, kept, groups) for kept in range(groups, self.bins + 1)]
        return (groups + int(np.argmin(divergences))) / self.bins


def entropy_lost(histogram: NDArray[np.float64], kept: int, groups: int) -> float:
    """KL divergence in nats of the first `kept` bins quantized to `groups` groups from the histogram clipped to them."""
    inside = histogram[:kept]
    p = inside.copy()
    p[-1] += histogram[kept:].sum()
    starts = np.arange(groups) * kept // groups
    filled = inside > 0
    sums, members = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.float64), starts)
    means = np.divide(sums, members, out=np.zeros_like(sums), where=members > 0)
    q = np.repeat(means, np.diff(np.append(starts, kept))) * filled
    if not q.sum():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    seen = p > 0
    if (q[seen] == 0).any():  # the bin of the threshold holds nothing but what was cut off
        return math.inf
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())


CACHE = 1 << 17  # elements worked on at a time: half a megabyte stays in a core's cache


def _near_one(samples: Samples) -> Samples:
    """Each row times a power of two, so that its errors have a p-th power in float32."""
    exponent = torch.frexp(torch.maximum(-samples.low, samples.high)).exponent
    unit = torch.ldexp(torch.ones_like(samples.low), -exponent.clamp_min(-120))
    return Samples(samples.values * unit[:, None], samples.counts, samples.low * unit, samples.high * unit)


def _chunks(samples: Samples) -> Iterator[Samples]:
    """The rows in pieces that fit the cache."""
    step = max(1, CACHE // samples.values.shape[1])
    for i in range(0, len(samples.low), step):
        counts = samples.counts if samples.counts.ndim == 1 else samples.counts[i : i + step]
        yield Samples(samples.values[i : i + step], counts, samples.low[i : i + step], samples.high[i : i + step])


def _together(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Candidates (candidates, rows) in pieces: many at once for one row, one by one for many."""
    step = max(1, 16 // low.shape[1])
    return zip(low.split(step), high.split(step), strict=True)


def fidelity(samples: Samples, qparams: QParams, grid: Grid) -> tuple[float, float]:
    """Signal to quantization noise in dB over all rows, and the share of values outside of the range (0 to 1)."""
    scale, zero = qparams.scale.reshape(-1, 1), qparams.zero.reshape(-1, 1)
    code = torch.round(samples.values / scale) + zero
    low, high = (end.reshape(-1, 1) for end in grid.ends())
    noise = ((code.clamp(low, high) - zero) * scale - samples.values).square() * samples.counts
    power = (samples.values.square() * samples.counts).double().sum().item()
    outside = (((code < low) | (code > high)) * samples.counts).double().sum().item()
    total = (samples.counts.expand_as(samples.values)).double().sum().item()
    error = noise.double().sum().item()
    return (10 * math.log10(power / error) if error > 0 and power > 0 else 200.0), outside / total
