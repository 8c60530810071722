"""What the outputs of some files of the zoo mean: tasks of one's own, as `--task bench/answers.py:STRINGS` takes them.

Each measures agreement with the float file: TEXT and FOREGROUND of pixels above a threshold, FACES of boxes, STRINGS of what is
read in a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fewbit import Rating, Task
from fewbit.core.task import Outputs, OutputScore
from fewbit.task.detect import Detect
from fewbit.task.interval import of_mean, wilson
from fewbit.task.segment import Segment

STRIDE = 4  # of CenterFace's maps
BLANK = 0  # the class that separates characters


@dataclass(frozen=True)
class CenterFace:
    """CenterFace (Xu et al. 2019): maps of scores (b, 1, h, w), log sizes and offsets (b, 2, h, w), rows before columns."""

    classes: int = 1
    overlaps: bool = True
    alone: bool = False

    def candidates(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        scores, sizes, offsets = (y.double() for y in outputs[:3])
        h, w = scores.shape[2:]
        cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        middles, halves = STRIDE * (cells + offsets + 0.5), STRIDE * sizes.exp() / 2
        corners = torch.cat([middles - halves, middles + halves], 1)[:, [1, 0, 3, 2]]
        return corners.flatten(2).transpose(1, 2), scores.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Strings(Task):
    """Lines of text: probabilities of classes (b, steps, classes); what is read is the likeliest class of each step, without
    repetitions and blanks.
    """

    name: ClassVar[str] = "strings"
    classes = None

    def divergence(self, exact: Outputs, outputs: Outputs) -> float:
        """KL divergence of the classes, mean over steps."""
        p, q = (y[0].double().clamp_min(1e-9) for y in (exact, outputs))
        return float((p * (p / q).log()).sum(2).mean(1).sum())

    def meter(self, truth: None) -> Read:
        return Read()


@dataclass
class Read:
    """Of each line the share of its characters that are read otherwise, and whether it is the same."""

    errors: list[float] = field(default_factory=list)

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor:
        pairs = zip(*(map(decoded, y[0].argmax(2).tolist()) for y in (exact, outputs)), strict=True)
        errors = [distance(a, b) / max(len(a), 1) for a, b in pairs]
        self.errors += errors
        return torch.tensor(errors)

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        same, count = sum(error == 0 for error in self.errors), len(self.errors)
        right = 1 - torch.tensor(self.errors, dtype=torch.float64)
        rows = ({"what": "characters", "agreement": 100 * float(right.mean()), "interval": of_mean(right)},)
        return Rating("", "lines read as by the float model", None, None, 100 * same / count, wilson(same, count), rows=rows)


def decoded(steps: Sequence[int]) -> list[int]:
    """Classes of steps as characters."""
    return [c for c, before in zip(steps, [BLANK, *steps], strict=False) if c not in (BLANK, before)]


def distance(a: Sequence[int], b: Sequence[int]) -> int:
    """How many characters have to be changed, added or removed (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(last[j + 1] + 1, row[j] + 1, last[j] + (x != y)))
    return row[-1]


TEXT = Segment(index=0, many=2, threshold=0.3, probability=True)  # as the detector of PP-OCR is used
FOREGROUND = Segment(index=0, many=2, threshold=0.5, probability=True)
FACES = Detect("centerface", CenterFace())
STRINGS = Strings()
