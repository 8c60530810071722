"""Minima of a function of many numbers without its gradient, and of one number; a parabola through measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Point = NDArray[np.float64]
Loss = Callable[[Point], float]
GOLDEN = (3 - math.sqrt(5)) / 2


@dataclass(frozen=True)
class Powell:
    """Powell's method (1964) from 0 on, for numbers in [low, high] each.

    A line search starts with `step` and ends at `tolerance`. `sweeps` are outer iterations; `coordinate` leaves out the
    extrapolation behind each and moves one number at a time only.
    """

    low: float
    high: float
    step: float
    tolerance: float
    sweeps: int = 1
    method: Literal["powell", "coordinate"] = "powell"

    def __call__(self, loss: Loss, count: int, together: Sequence[Point] = ()) -> None:
        """Evaluate `loss` from 0 on, for `count` numbers; the caller stores the results.

        `together` are directions that are searched once before the first sweep: a short search gets more from them.
        """
        x = np.zeros(count)
        low, high = np.full(count, self.low), np.full(count, self.high)
        best = loss(x)
        for direction in together if self.sweeps else ():
            x, best = self._line(loss, x, best, direction, low, high)
        directions = list(np.eye(count))
        for _ in range(self.sweeps):
            start, before = x, best
            gains = []
            for direction in directions:
                x, value = self._line(loss, x, best, direction, low, high)
                gains.append(best - value)
                best = value
            if max(gains, default=0) <= 0:
                break
            if self.method == "powell":
                along, steepest = x - start, int(np.argmax(gains))
                beyond = loss(np.clip(x + along, low, high))
                # Powell 1964: replace the direction of the largest gain where its share of the descent is not all of it
                bend = 2 * (before - 2 * best + beyond) * (before - best - gains[steepest]) ** 2
                if beyond < before and bend < gains[steepest] * (before - beyond) ** 2:
                    x, best = self._line(loss, x, best, along, low, high)
                    directions[steepest : steepest + 1] = []
                    directions.append(along)

    def _line(self, loss: Loss, x: Point, best: float, direction: Point, low: Point, high: Point) -> tuple[Point, float]:
        """The best point on the line through x, never worse than x, and its loss."""
        longest = float(np.abs(direction).max())
        if longest == 0:
            return x, best
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.where(direction == 0, np.inf, np.maximum((low - x) / direction, (high - x) / direction))
            starts = np.where(direction == 0, -np.inf, np.minimum((low - x) / direction, (high - x) / direction))
        bounds = min(float(starts.max()), 0.0), max(float(ends.min()), 0.0)
        # rounding may leave the bounds by the last bit
        t, value = descend(
            lambda t: loss(np.clip(x + t * direction, low, high)), best, self.step / longest, self.tolerance / longest, bounds
        )
        return (x, best) if t == 0 else (np.clip(x + t * direction, low, high), value)


def descend(
    loss: Callable[[float], float], best: float, step: float, tolerance: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """A minimum of a function of one number near 0, where it is `best`, within bounds; never worse than 0.

    Downhill in growing steps until it rises, then parabolas through the three points around the lowest (golden sections
    where they lead nowhere) until the next one would be nearer than `tolerance`.
    """
    cache = {0.0: best}

    def at(t: float) -> float:
        if t not in cache:
            cache[t] = loss(t)
        return cache[t]

    def clipped(t: float) -> float:
        return min(max(t, bounds[0]), bounds[1])

    a, b, c = clipped(-step), 0.0, clipped(step)
    if at(c) < best:
        while at(c) < at(b) and c < bounds[1]:
            a, b, c = b, c, clipped(c + 2 * (c - b))
        if at(c) < at(b):  # at the bound, or between
            a, b = b, c - GOLDEN * (c - b)
            if at(c) <= at(b):
                return c, at(c)
    elif at(a) < best:
        while at(a) < at(b) and a > bounds[0]:
            a, b, c = clipped(a - 2 * (b - a)), a, b
        if at(a) < at(b):
            b, c = a + GOLDEN * (b - a), b
            if at(a) <= at(b):
                return a, at(a)
    while c - a > 2 * tolerance:
        t = _between(a, b, c, at(a), at(b), at(c), tolerance)
        if t is None:
            break
        if at(t) < at(b):
            a, b, c = (b, t, c) if t > b else (a, t, b)
        elif t > b:
            c = t
        else:
            a = t
    return b, at(b)


def _between(a: float, b: float, c: float, fa: float, fb: float, fc: float, tolerance: float) -> float | None:
    """Where to look next with the lowest of three points in the middle; None where nothing is left to gain."""
    curvature = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    if math.isfinite(curvature) and curvature != 0:
        t = b - ((b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)) / (2 * curvature)
        if a < t < c:
            return None if abs(t - b) < tolerance else t
    far = c if c - b > b - a else a
    return b + GOLDEN * (far - b) if abs(far - b) > tolerance else None


@dataclass(frozen=True)
class Parabola:
    """a·p² + b·p + c through losses over p; `vertex` is its minimum, None where it has none between the first and last p."""

    a: float
    b: float
    c: float
    r2: float
    vertex: float | None


def parabola(p: Sequence[float], losses: Sequence[float]) -> Parabola | None:
    """The least-squares parabola; None for fewer than 3 points or a loss that is not a number."""
    if len(set(p)) < 3 or not np.isfinite(losses).all():
        return None
    middle = float(np.mean(p))
    x, y = np.asarray(p) - middle, np.asarray(losses)
    a, b, c = (float(v) for v in np.polyfit(x, y, 2))
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(((np.polyval([a, b, c], x) - y) ** 2).sum()) / spread if spread > 0 else 1.0
    vertex = middle - b / (2 * a) if a > 0 else None
    if vertex is not None and not min(p) <= vertex <= max(p):
        vertex = None
    return Parabola(a, b - 2 * a * middle, c - b * middle + a * middle**2, r2, vertex)
