"""How near an output of the integer model is to that of the float model, summed up batch by batch.

An output of real numbers is looked at channel by channel, because one with large numbers (boxes in pixels) would hide
what becomes of one with small numbers (scores): the correlation and the relative error are means over channels. What does
not vary from image to image or from place to place counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from fewbit.core.task import OutputScore
from fewbit.errors import BadValues

GROUPS = 32  # of images, for the interval
FEW = 2  # numbers, whose correlation is 1 or -1 whatever they are
SPREAD = 1e-6  # standard deviation of a channel, as a share of its largest number, up to which it counts as constant


class Closeness:
    """Sums over images of one output; memory does not grow with their number.

    Images are dealt into groups; the interval comes from leaving out one group at a time (the delete-a-group jackknife,
    Kott 2001).
    """

    def __init__(self, name: str, is_real: bool) -> None:
        self.name, self.is_real = name, is_real
        self.images, self.broken = 0, False
        self.sums: Tensor | None = None  # (groups, channels, 6): 1, x, y, xx, yy, xy around `middle`; of integers 1, equal
        self.middle = torch.zeros(1)
        self.extremes = math.inf, -math.inf

    def add(self, exact: Tensor, actual: Tensor) -> Tensor:
        """One more batch (b, ...) of both; returns an error of each image (b,), 0 or more, to find the worst ones.

        Raises BadValues where the float model's output is NaN.
        """
        b, x = len(exact), exact.double()
        if bool(x.isnan().any()):
            raise BadValues(
                f"the float model gives NaN for output {self.name} on a scored image, so nothing can be compared; "
                "fix the model, or take that image out of --score."
            )
        finite = x.isfinite()
        self.broken |= bool((actual.double().isnan() | (finite & ~actual.isfinite())).any())
        seen = x[finite]
        if seen.numel():
            self.extremes = min(self.extremes[0], float(seen.min())), max(self.extremes[1], float(seen.max()))
        rows, errors = self._real(x, actual.double()) if self.is_real else _integers(exact, actual)
        self.sums = rows.new_zeros(GROUPS, *rows.shape[1:]) if self.sums is None else self.sums
        self.sums.index_add_(0, (torch.arange(b) + self.images) % GROUPS, rows)
        self.images += b
        return errors

    def _real(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of each image (b, channels, 6), and its error by the spread within the batch; infinities are left out."""
        x, y = _by_channel(x), _by_channel(y)
        counted = x.isfinite() & y.isfinite()
        x, y = (torch.where(counted, t, torch.zeros_like(t)) for t in (x, y))
        if self.sums is None:
            self.middle = (x.sum((0, 2)) / counted.sum((0, 2)).clamp_min(1))[:, None]
        x, y = ((t - self.middle) * counted for t in (x, y))
        spread = x.square().mean((0, 2)).sqrt().clamp_min(1e-30)
        rows = torch.stack([counted.double(), x, y, x * x, y * y, x * y], -1).sum(2)
        return rows, ((y - x).square().mean(2).sqrt() / spread).mean(1)

    def score(self) -> OutputScore:
        """Of all images so far."""
        low, high = self.extremes
        if self.broken:
            return OutputScore(self.name, self.is_real, 0.0, (0.0, 0.0))
        if self.sums is None or not low < high:
            return OutputScore(self.name, self.is_real, None)
        if not self.is_real:
            return OutputScore(
                self.name, False, *self._with_interval(self.sums, lambda s: float(s[:, 1].sum() / s[:, 0].sum()))
            )
        few, sums = float(self.sums[..., 0].sum(0).max()) <= FEW, self.sums
        if self.images > 1 and not bool(self._variance(sums)[1].any()):
            return OutputScore(self.name, True, None)
        sums = self._all_alike() if self.images == 1 or few else sums
        n, _, _, xx, yy, xy = sums.sum(0).unbind(-1)
        if float(n.max()) <= FEW:
            return OutputScore(self.name, True, None, few=True)
        variance, varies = self._variance(sums)
        if not bool(varies.any()):
            return OutputScore(self.name, True, None)
        error = float(((xx + yy - 2 * xy) / variance)[varies].clamp_min(0).sqrt().mean())
        return OutputScore(self.name, True, *self._with_interval(sums[:, varies], _correlation), error)

    def _variance(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """That of each channel of the float model's numbers, times their count, and whether it is more than rounding."""
        low, high = self.extremes
        n, x, _, xx, _, _ = sums.sum(0).unbind(-1)
        variance = (xx - x * x / n).clamp_min(0)
        return variance, variance > n * (SPREAD * max(-low, high)) ** 2

    def _all_alike(self) -> Tensor:
        """The sums with all channels as one, which is all that a single image has to say, or two of one place."""
        assert self.sums is not None
        middle = self.middle[:, 0] - self.middle.mean()
        n, x, y, xx, yy, xy = self.sums.unbind(-1)
        moved = torch.stack(
            [n, x + n * middle, y + n * middle, xx + 2 * middle * x + n * middle**2, yy + 2 * middle * y + n * middle**2,
             xy + middle * (x + y) + n * middle**2], -1,
        )  # fmt: skip
        return moved.sum(1, keepdim=True)

    def _with_interval(self, sums: Tensor, statistic: Callable[[Tensor], float]) -> tuple[float, tuple[float, float]]:
        """A statistic of sums over groups (channels, k), in percent and not below 0, and its interval."""
        total, groups = sums.sum(0), min(self.images, GROUPS)
        value = statistic(total)
        without = [statistic(total - sums[g]) for g in range(groups)] if groups > 1 else []
        half = NormalDist().inv_cdf(0.975) * math.sqrt((groups - 1) / groups * sum((v - value) ** 2 for v in without))
        return 100 * max(value, 0.0), (100 * max(value - half, 0.0), 100 * max(min(value + half, 1.0), 0.0))


def _integers(exact: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of each image (b, 1, 2), elements and equal ones, and the share of its elements that differ."""
    same = (exact == actual).reshape(len(exact), -1).double()
    return torch.stack([torch.ones_like(same), same], -1).sum(1, keepdim=True), 1 - same.mean(1)


def _by_channel(t: Tensor) -> Tensor:
    """(b, channels, places): channels are second in a map and in a list of values, else the shorter of the outer axes."""
    if t.ndim < 3:
        return t.reshape(len(t), -1, 1)
    if t.ndim == 3 and t.shape[2] < t.shape[1]:
        t = t.transpose(1, 2)
    return t.reshape(len(t), t.shape[1], -1)


def _correlation(sums: Tensor) -> float:
    """Mean over channels of Pearson's correlation, from their sums (channels, 6); 0 where the second does not vary."""
    n, x, y, xx, yy, xy = sums.unbind(-1)
    both = ((xx - x * x / n).clamp_min(0) * (yy - y * y / n).clamp_min(0)).sqrt()
    return float(torch.where(both > 0, (xy - x * y / n) / both.clamp_min(1e-300), torch.zeros_like(both)).clamp(-1, 1).mean())
