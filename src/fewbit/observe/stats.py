"""Streaming statistics that merge exactly: `merge(a, b)` equals one pass over both.

The histogram's bin width is a power of two and its bins are aligned at zero, so two histograms have a common refinement
without interpolation: the finer one adds up neighbouring bins until the widths agree. Nothing is sampled, the order of the
batches does not matter, and memory does not grow with the number of images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.core.device import CPU, wide, widest

HALF = 4096  # bins on each side of zero: 16 for each code of an 8-bit grid on the full range of one sign


@dataclass(frozen=True)
class Histogram:
    """Counts of all elements of a tensor, its extremes and its moments.

    `counts` is float64 (2 * HALF,): bin i holds [ (i - HALF) w, (i + 1 - HALF) w ) with w = 2 ** exponent.
    `exponent` is None for an empty histogram and for a tensor of zeros (all in the bin of zero).
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(2 * HALF, dtype=torch.float64))
    exponent: int | None = None
    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    total: float = 0.0
    squares: float = 0.0

    @property
    def width(self) -> float:
        return 2.0 ** (self.exponent if self.exponent is not None else -100)

    @property
    def centers(self) -> Float[Tensor, "bins"]:
        """The middle of each bin, float64."""
        return (torch.arange(2 * HALF, dtype=torch.float64) - HALF + 0.5) * self.width

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> float:
        return max(self.squares / max(self.count, 1) - self.mean**2, 0.0)

    @staticmethod
    def of(x: Tensor) -> Histogram:
        """The histogram of one tensor of any shape; of one with NaN or infinities only the extremes (`observe` rejects it).

        It lies on the processor, wherever the tensor does.
        """
        x = x.detach().flatten()
        if not x.numel():
            return Histogram()
        low, high = (v.item() for v in torch.aminmax(x))
        largest = max(abs(low), abs(high))
        if not math.isfinite(low) or not math.isfinite(high):
            return Histogram(count=x.numel(), low=low, high=high)
        exponent = _exponent(largest) if largest > 0 else None
        counts = torch.zeros(2 * HALF, dtype=torch.float64)
        if exponent is None:
            counts[HALF] = x.numel()
        else:
            precise = x if -126 <= exponent <= 0 else wide(x)  # float32 could overflow or lose the sign of what is nearly 0
            bins = (precise * 2.0**-exponent).floor_().add_(HALF).clamp_(0, 2 * HALF - 1).to(torch.int32)
            counts = torch.bincount(bins, minlength=2 * HALF).to(CPU, torch.float64)
        sums = widest(x.device)
        total, squares = x.sum(dtype=sums).item(), torch.linalg.vector_norm(x, dtype=sums).item() ** 2
        return Histogram(counts, exponent, x.numel(), low, high, total, squares)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both tensors."""
        exponents = [h.exponent for h in (self, other) if h.exponent is not None]
        exponent = max(exponents) if exponents else None
        return Histogram(
            self._coarsened(exponent) + other._coarsened(exponent),
            exponent,
            self.count + other.count,
            min(self.low, other.low),
            max(self.high, other.high),
            self.total + other.total,
            self.squares + other.squares,
        )

    def _coarsened(self, exponent: int | None) -> Tensor:
        if exponent is None or self.exponent is None or exponent == self.exponent:
            return self.counts
        factor = 2 ** min(exponent - self.exponent, int(math.log2(HALF)))
        counts = torch.zeros_like(self.counts)
        half = HALF // factor
        counts[HALF - half : HALF + half] = self.counts.view(-1, factor).sum(1)
        return counts

    def quantile(self, share: float) -> float:
        """The value below which `share` (0 to 1) of the elements lie, to a bin's width; extremes are exact."""
        if share <= 0 or self.exponent is None:
            return self.low
        if share >= 1:
            return self.high
        below = torch.cumsum(self.counts, 0)
        i = int(torch.searchsorted(below, share * self.count))
        inside = (share * self.count - (below[i] - self.counts[i])) / self.counts[i].clamp_min(1)
        return float(min(max((i - HALF + inside.item()) * self.width, self.low), self.high))

    def to_json(self, bins: int = 128) -> dict[str, object]:
        """A coarse copy for drawing: edges (bins + 1) and counts (bins) over [low, high]."""
        first = max(math.floor(self.low / self.width) + HALF, 0)
        last = min(math.floor(self.high / self.width) + HALF + 1, 2 * HALF)
        stride = max(1, math.ceil((last - first) / bins))
        part = self.counts[first:last]
        padded = torch.nn.functional.pad(part, (0, -len(part) % stride)).view(-1, stride).sum(1)
        return {
            "edges": [(first - HALF + i * stride) * self.width for i in range(len(padded) + 1)],
            "counts": [int(c) for c in padded],
        }


def _exponent(largest: float) -> int:
    """The power of two of a bin so that `largest` falls inside HALF bins."""
    return math.frexp(largest)[1] - int(math.log2(HALF))  # largest < 2 ** frexp(largest)[1]


@dataclass(frozen=True)
class Stats:
    """A histogram per activation site, and the number of images behind them."""

    sites: Mapping[str, Histogram]
    images: int

    def merge(self, other: Stats) -> Stats:
        """Statistics of both sets of images."""
        names = {**self.sites, **other.sites}
        merged = {n: self.sites.get(n, Histogram()).merge(other.sites.get(n, Histogram())) for n in names}
        return Stats(merged, self.images + other.images)

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file: one float64 row per site, counts then the six scalars."""
        rows = {}
        for name, h in self.sites.items():
            exponent = math.nan if h.exponent is None else float(h.exponent)
            tail = torch.tensor([exponent, h.count, h.low, h.high, h.total, h.squares], dtype=torch.float64)
            rows[name] = torch.cat([h.counts, tail])
        return {**rows, "images": torch.tensor(self.images)}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Stats:
        """The inverse of `tensors`."""
        sites = {}
        for name, row in tensors.items():
            if name == "images":
                continue
            exponent, count, low, high, total, squares = row[2 * HALF :].tolist()
            power = None if math.isnan(exponent) else int(exponent)
            sites[name] = Histogram(row[: 2 * HALF], power, int(count), low, high, total, squares)
        return Stats(sites, int(tensors["images"]))
