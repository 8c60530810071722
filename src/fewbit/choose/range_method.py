"""What a range method is: from the values of one tensor to its scale and zero point. Weights and activations look the same.

A tensor is `Samples`: rows of values with counts. A weight is one row per channel, every count 1; an activation is one row,
the bins of its histogram. So each rule is written once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.core.device import wide
from fewbit.core.grid import Grid, QParams
from fewbit.observe.stats import Histogram

LOSSLESS = 200.0  # dB of values that their codes hold exactly


@dataclass(frozen=True)
class Samples:
    """Values (rows, n), how often each occurs (n,) or (rows, n), and the exact extremes (rows,)."""

    values: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of_histogram(h: Histogram) -> Samples:
        """One row: the centers of the bins that hold anything."""
        filled = h.counts.nonzero().flatten()
        centers = h.centers[filled].clamp(h.low, h.high).float()
        return Samples(centers[None], (h.counts[filled] / h.count).float(), torch.tensor([h.low]), torch.tensor([h.high]))

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
        return Samples(rows, torch.ones(rows.shape[1], device=w.device), rows.amin(1), rows.amax(1))

    @staticmethod
    def of_channels(values: Float[Tensor, "channels n"], low: Tensor, high: Tensor) -> Samples:
        """One row per channel of an activation: sampled values, and the extremes of all values."""
        return Samples(values, torch.ones(values.shape[1], device=values.device), low, high)

    def rows(self, index: Tensor) -> Samples:
        """Some of the rows."""
        counts = self.counts if self.counts.ndim == 1 else self.counts[index]
        return Samples(self.values[index], counts, self.low[index], self.high[index])


@runtime_checkable
class RangeMethod(Protocol):
    """From the samples of a tensor to a scale and zero point per row: float32 and int32 of shape (rows,)."""

    def __call__(self, samples: Samples, grid: Grid) -> QParams: ...


def ranged(method: RangeMethod, samples: Samples, grid: Grid) -> QParams:
    """The scale and zero point of each row; rows of a grid with channel widths are grouped by width.

    A row of 0 bits has code 0 alone, which is 0.
    """
    if not grid.widths:
        return method(samples, grid)
    device, count = samples.low.device, len(samples.low)
    scale, zero = torch.ones(count, device=device), torch.zeros(count, dtype=torch.int32, device=device)
    widths = torch.tensor(grid.widths, device=device)
    for bits in sorted({b for b in grid.widths if b}):
        rows = (widths == bits).nonzero().flatten()
        qparams = method(samples.rows(rows), replace(grid, bits=bits, widths=()))
        scale[rows], zero[rows] = qparams.scale, qparams.zero
    return QParams(scale, zero)


def fidelity(samples: Samples, qparams: QParams, grid: Grid) -> tuple[float | None, float]:
    """Signal to quantization noise in dB over all rows, and the share of values outside of the range (0 to 1).

    Of values that are all 0 there is no ratio: None. Where nothing is lost it is infinite, and given as `LOSSLESS`.
    """
    scale, zero = qparams.scale.reshape(-1, 1), qparams.zero.reshape(-1, 1)
    code = torch.round(samples.values / scale) + zero
    low, high = (end.reshape(-1, 1) for end in grid.ends(scale.device))
    noise = ((code.clamp(low, high) - zero) * scale - samples.values).square() * samples.counts
    power = wide(samples.values.square() * samples.counts).sum().item()
    outside = wide(((code < low) | (code > high)) * samples.counts).sum().item()
    total = wide(samples.counts.expand_as(samples.values)).sum().item()
    error = wide(noise).sum().item()
    if not power > 0 or math.isnan(error):
        return None, outside / total
    return (10 * math.log10(power / error) if error > 0 else LOSSLESS), outside / total
