"""Checks of the calibration images by their statistics: are there enough, and are they like the training data?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fewbit.core.device import CPU, on
from fewbit.core.graph import Json
from fewbit.core.inputs import Batch, count, images_of
from fewbit.data.synthesize.teacher import Moments, Teacher
from fewbit.observe.stats import Stats

EPS = 1e-5  # added to batch-norm variances
TAIL = 0.001
FLAT = 0.02  # in standard deviations of the training images; an image that varies less counts as one colour


@dataclass(frozen=True)
class Inspection:
    """Statistics of the calibration images under the float model.

    `shift` is the distance of batch-norm input means from the running means, in running standard deviations (root mean square
    over channels, median over layers); `spread` is the mean absolute difference of log variances (median over layers). Both are
    None without batch norm. `classes` is the effective number of predicted classes: e to the entropy of the prediction shares,
    1 if all are the same; None for a model that is not a classifier. `duplicate_share` is the share of images that show one
    colour or repeat another.
    """

    images: int
    shift: float | None
    spread: float | None
    classes: float | None
    duplicate_share: float


def inspect_images(teacher: Teacher, batches: Iterable[Batch]) -> Inspection:
    """Run the float model on batches of normalized images."""
    total, answers = 0, []
    sums: list[tuple[Tensor, Tensor]] = []
    digests, duplicates = set[bytes](), 0
    with torch.no_grad():
        for batch in batches:
            response, n = on(teacher(batch, attention_too=False), CPU), count(batch)
            for image in images_of(batch):
                digest = hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
                duplicates += digest in digests or float(image.flatten(1).std(1).max()) < FLAT
                digests.add(digest)
            if teacher.classes is not None:
                answers.append(response.logits.argmax(1))
            pairs = zip(response.moments.means, response.moments.variances, strict=True)
            parts = [(n * mean.double(), n * (variance + mean.square()).double()) for mean, variance in pairs]
            sums = parts if not sums else [(a + c, b + d) for (a, b), (c, d) in zip(sums, parts, strict=True)]
            total += n
    means = tuple(summed / total for summed, _ in sums)
    moments = Moments(means, tuple(squares / total - m.square() for (_, squares), m in zip(sums, means, strict=True)))
    shift, spread = _distances(moments, on(teacher.running, CPU)) if len(moments) else (None, None)
    classes = None
    if answers:
        shares = torch.bincount(torch.cat(answers)).double() / total
        classes = math.exp(float(torch.special.entr(shares).sum()))
    return Inspection(total, shift, spread, classes, duplicates / total)


def _distances(moments: Moments, running: Moments) -> tuple[float, float]:
    shifts, spreads = [], []
    pairs = zip(moments.means, moments.variances, running.means, running.variances, strict=True)
    for mean, variance, running_mean, running_variance in pairs:
        shifts.append(float(((mean - running_mean).square() / (running_variance + EPS)).mean().sqrt()))
        spreads.append(float(((variance.clamp_min(0) + EPS) / (running_variance + EPS)).log().abs().mean()))
    return median(shifts), median(spreads)


def range_change(first: Stats, second: Stats) -> float:
    """How much the ranges of two halves of the images differ: the larger change of the two range ends (quantiles `TAIL` and
    1 - `TAIL`) as a share of the combined range, median over sites.
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
class CalibrationLimits:
    """Limits above which the calibration statistics cause a warning.

    They lie between the values for 64 images of the demo models' own data and those for noise, one colour or two images
    (docs/methods.md has the numbers).
    """

    range_change: float = 0.06
    shift: float = 0.3
    spread: float = 0.55
    classes: float = 1.5
    counted: int = 8
    duplicate_share: float = 0.1

    def __call__(self, stats: Inspection, change: float | None) -> dict[str, Json]:
        """The numbers and, in `warnings`, a sentence for each limit that is passed; `change` is None for a single image."""
        warnings = []
        if change is None:
            warnings.append("There is one calibration image, so nothing says whether its ranges hold for others.")
        elif change > self.range_change:
            warnings.append(
                f"Too few calibration images: the ranges of two halves of the {stats.images} differ by {100 * change:.0f} % "
                f"(median over sites; up to {100 * self.range_change:.0f} % is steady). Give more."
            )
        if stats.shift is not None and stats.spread is not None and (stats.shift > self.shift or stats.spread > self.spread):
            warnings.append(
                "The calibration images are unlike what the model was trained on: what its batch norms read is "
                f"{stats.shift:.2f} standard deviations off (up to {self.shift:g} is usual) and its variances differ by a "
                f"factor of {math.exp(stats.spread):.2f} (up to {math.exp(self.spread):.2f}). Are --mean, --std and the images "
                "right? (Synthetic ones come closer with more --steps.)"
            )
        if stats.classes is not None and stats.images >= self.counted and stats.classes < self.classes:
            warnings.append(
                f"The float model gives nearly all of the {stats.images} calibration images the same answer. "
                "Give images of other kinds, too."
            )
        if stats.duplicate_share > self.duplicate_share:
            warnings.append(
                f"{100 * stats.duplicate_share:.0f} % of the {stats.images} calibration images show one colour "
                "or repeat another, so they say nothing. Give others."
            )
        return {
            "images": stats.images,
            "range_change": change,
            "shift": stats.shift,
            "spread": stats.spread,
            "classes": stats.classes,
            "duplicate_share": stats.duplicate_share,
            "warnings": warnings,
        }
