"""Are the calibration images enough, and are they what the model knows? Answered by statistics, never by their count."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fewbit.core.values import Json
from fewbit.data.synthesize.teacher import Moments, Teacher
from fewbit.observe.stats import Stats

EPS = 1e-5  # of batch norm
TAIL = 0.001
FLAT = 0.02  # of a standard deviation of the training images: pixels that differ by less show nothing


@dataclass(frozen=True)
class Look:
    """What the float model says of the images.

    `shift` is how far the mean of what a batch norm reads is from its running mean, in running standard deviations (root mean
    square over channels, median over layers), `spread` the mean distance of the logarithms of the two variances, the same
    way; None without batch norm. `classes` is how many classes its answers are spread over: e to the entropy of the answers'
    shares, 1 where all are the same; None for a model with one output. `idle` is the share of images that show one colour or
    repeat another.
    """

    images: int
    shift: float | None
    spread: float | None
    classes: float | None
    idle: float


def look(teacher: Teacher, batches: Iterable[Tensor]) -> Look:
    """Run the float model on batches of normalized images (b, c, h, w)."""
    count, answers = 0, []
    sums: list[tuple[Tensor, Tensor]] = []
    outputs, known, idle = 0, set[bytes](), 0
    with torch.no_grad():
        for batch in batches:
            seen, n = teacher(batch), len(batch)
            for image in batch:
                mark = hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
                idle += mark in known or float(image.flatten(1).std(1).max()) < FLAT
                known.add(mark)
            outputs = seen.logits.shape[1]
            answers.append(seen.logits.argmax(1))
            pairs = zip(seen.moments.means, seen.moments.variances, strict=True)
            parts = [(n * mean.double(), n * (variance + mean.square()).double()) for mean, variance in pairs]
            sums = parts if not sums else [(a + c, b + d) for (a, b), (c, d) in zip(sums, parts, strict=True)]
            count += n
    means = tuple(total / count for total, _ in sums)
    found = Moments(means, tuple(squares / count - m.square() for (_, squares), m in zip(sums, means, strict=True)))
    shift, spread = _distances(found, teacher.running) if len(found) else (None, None)
    shares = torch.bincount(torch.cat(answers)).double() / count
    classes = math.exp(float(torch.special.entr(shares).sum())) if outputs > 1 else None
    return Look(count, shift, spread, classes, idle / count)


def _distances(found: Moments, running: Moments) -> tuple[float, float]:
    shifts, spreads = [], []
    for mean, variance, there, wide in zip(found.means, found.variances, running.means, running.variances, strict=True):
        shifts.append(float(((mean - there).square() / (wide + EPS)).mean().sqrt()))
        spreads.append(float(((variance.clamp_min(0) + EPS) / (wide + EPS)).log().abs().mean()))
    return median(shifts), median(spreads)


def range_change(first: Stats, second: Stats) -> float:
    """How differently two halves of the images fill the sites: the median over sites of the larger difference of the two ends
    (quantiles `TAIL` and 1 - `TAIL`), as a share of the range of both.
    """
    changes = []
    for name in first.sites.keys() & second.sites.keys():
        a, b = first.sites[name], second.sites[name]
        ends = [(h.quantile(TAIL), h.quantile(1 - TAIL)) for h in (a, b)]
        whole = max(high for _, high in ends) - min(low for low, _ in ends)
        difference = max(abs(ends[0][0] - ends[1][0]), abs(ends[0][1] - ends[1][1]))
        changes.append(difference / whole if whole > 0 else 0.0)
    return median(changes) if changes else 0.0


@dataclass(frozen=True)
class Enough:
    """Where the statistics of calibration images begin to be a warning.

    The limits are between what 64 images of the demo models' own kind give and what noise, one colour or two images give
    (docs/methods.md has the numbers).
    """

    range_change: float = 0.06
    shift: float = 0.3
    spread: float = 0.55
    classes: float = 1.5
    counted: int = 8
    idle: float = 0.1

    def __call__(self, found: Look, change: float | None) -> dict[str, Json]:
        """The numbers and, in `warnings`, a sentence for each that is too large; `change` is None for a single image."""
        warnings = []
        if change is None:
            warnings.append("There is one calibration image, so nothing says whether its ranges hold for others.")
        elif change > self.range_change:
            warnings.append(
                f"Too few calibration images: the ranges of two halves of the {found.images} differ by {100 * change:.0f} % "
                f"(median over sites; up to {100 * self.range_change:.0f} % is steady). Give more."
            )
        if found.shift is not None and found.spread is not None and (found.shift > self.shift or found.spread > self.spread):
            warnings.append(
                "The calibration images are unlike what the model was trained on: what its batch norms read is "
                f"{found.shift:.2f} standard deviations off (up to {self.shift:g} is usual) and its variances differ by a "
                f"factor of {math.exp(found.spread):.2f} (up to {math.exp(self.spread):.2f}). Are --mean, --std and the images "
                "right? (Synthetic ones come closer with more --steps.)"
            )
        if found.classes is not None and found.images >= self.counted and found.classes < self.classes:
            warnings.append(
                f"The float model gives nearly all of the {found.images} calibration images the same answer. "
                "Give images of other kinds, too."
            )
        if found.idle > self.idle:
            warnings.append(
                f"{100 * found.idle:.0f} % of the {found.images} calibration images show one colour or repeat another, "
                "so they say nothing. Give others."
            )
        return {
            "images": found.images,
            "range_change": change,
            "shift": found.shift,
            "spread": found.spread,
            "classes": found.classes,
            "idle": found.idle,
            "warnings": warnings,
        }
