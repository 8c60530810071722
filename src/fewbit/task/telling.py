"""What says something: a measure that could not have become worse is not used; another one is, and the report says why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.core.task import Json, Rating
from fewbit.errors import BadImages
from fewbit.task.closeness import SPREAD
from fewbit.task.interval import Interval

NOTHING = 0.05  # percent or dB below which a measure is shown as 0.0
CLEAR = 1.05  # how many times as high as a guess's a measure has to be,
MISSED = 0.5  # or, of percents, what share of the guess's distance to 100 its own has to be below


def by_truth(
    agreed: Rating,
    measure: str,
    before: float,
    after: float,
    interval: Interval,
    *,
    unit: str = "%",
    rows: Sequence[Mapping[str, Json]] = (),
    guessed: str = "",
) -> Rating:
    """The rating by what is known of the images: `measure` of the float model and of the integer one, and the `interval` (95 %)
    of its change; `rows` come behind those of `agreed`, the rating without it.

    Where the float model's measure is 0, which cannot fall, or no number because nothing was to be found, or where `guessed`
    says that a guess is as good, it is `agreed`, and says why.
    """
    if before >= NOTHING and not guessed:  # not so for NaN
        rows = (*agreed.rows, *rows)
        return replace(agreed, measure=measure, float_score=before, score=after, interval=interval, unit=unit, rows=tuple(rows))
    found = (
        f"The annotations have nothing of which {measure} could be taken"
        if math.isnan(before)
        else f"{measure} of the float model is {max(before, 0):.2f}, which cannot fall"
        if before < NOTHING
        else guessed
    )
    return replace(
        agreed,
        why=f"{found}, so it is not used. Look whether --annotations are those of these images, and in the model's classes and "
        f"units. {agreed.why}".strip(),
    )


def no_better(measure: str, before: float, guess: float, what: str, unit: str = "%") -> str:
    """In words that `measure` of the float model is not `CLEAR` times that of a `guess`, an answer that does not look at the
    image, nor, in percent, less than `MISSED` of its distance from 100; empty where it is, or is not a number. `what` is the
    guess.
    """
    if not before <= CLEAR * guess or (unit == "%" and 100 - before < MISSED * (100 - guess)):
        return ""
    return (
        f"{measure} of the float model is {before:.2f} {unit}, not clearly better than a guess: {what} has {guess:.2f} {unit}"
    )


@dataclass
class Range:
    """The smallest and the largest of all numbers so far."""

    low: float = math.inf
    high: float = -math.inf

    def add(self, values: Tensor) -> None:
        """More numbers, of any shape; those that are not finite are left out."""
        if len(seen := values[values.isfinite()]):
            self.low, self.high = min(self.low, float(seen.min())), max(self.high, float(seen.max()))

    @property
    def is_one(self) -> bool:
        """Whether all were the same number, up to rounding."""
        return not self.high - self.low > SPREAD * max(abs(self.low), abs(self.high))


def silent(what: str) -> BadImages:
    """What is raised where the float model gives the same `what` for every image, so that no measure says anything."""
    return BadImages(
        f"the float model gives the same {what} for every scored image, so nothing can be compared; "
        "give other images: --score DIR (and look whether the model and --mean, --std are right)."
    )


def same_rows(rows: Tensor, apart: float) -> bool:
    """Whether all rows (n, width) are the same: none is further than `apart` from the first."""
    return not bool(torch.linalg.vector_norm(rows - rows[:1], dim=1).max() > apart)
