"""What a runtime decides of numbers one by one, which may differ where they stand on a threshold: what is true of them (less
than, at least and their like), and the whole number that they are rounded to (floor, casts and their like).

A mask of attention is made of scores below a threshold, and a score that stands on it is masked or not by how a float sum was
rounded. So the truth is the runtime's, as places are (selections.py), and it is judged by the simulation's own numbers: where
both differ, both sides of the comparison are no further from each other than rounding moves them. That is measured: by how far
they move in disturbed runs, and by a few units of their own last digits. Sides that are equal in every run, as zeros behind a
rectifier are to a threshold of 0, are moved by nothing: there both give the same. Whole numbers are one step apart, and the
number that was rounded stands between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.selections import COMPARISONS
from fewbit.core.checks import SelectionCheck
from fewbit.core.fx import aten
from fewbit.verify.outputs import MARGIN, STEP

OWN = 4 * STEP  # the share of its size by which a number moves where a few ops in a row round it


BOUNDARIES: Mapping[Any, Callable[[Tensor, Tensor], Tensor]] = {  # of the numbers that give one or the other whole number
    aten.floor.default: torch.maximum,
    aten.ceil.default: torch.minimum,
    aten.round.default: lambda a, b: (a + b) / 2,
    aten.trunc.default: lambda a, b: torch.where(a.abs() > b.abs(), a, b),
    aten.to.dtype: lambda a, b: torch.where(a.abs() > b.abs(), a, b),
}


class Sides:
    """On which sides of thresholds a runtime found the numbers of a node that compares or rounds them.

    Kept are what the simulation and the runtime give (None where that is of another size), the numbers and their thresholds in
    the first run, how far each of both moves in the other runs, and where both are equal in all of them.
    """

    def __init__(self, node: Node, given: Tensor) -> None:
        self._node, self._given = node, given
        self._own, self._theirs = given, cast("Tensor | None", None)
        self._first: tuple[Tensor, Tensor] | None = None
        self._moved = [0.0, 0.0]
        self._equal = given

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the node gives where it decides as the runtime does."""
        own = cast(Tensor, cast(Any, self._node.target)(x, *args, **kwargs))
        usable = self._given.numel() == own.numel()
        theirs = self._given.reshape(own.shape).to(own) if usable else own
        if self._first is None:
            self._own, self._theirs = own, theirs if usable else None
        numbers = x, self._threshold(x, args)
        equal = numbers[0] == numbers[1]
        if self._first is None:
            self._first, self._equal = numbers, equal
        else:
            moves = (moved_by_sums(first.double(), other) for first, other in zip(self._first, numbers, strict=True))
            self._moved = [max(pair) for pair in zip(self._moved, moves, strict=True)]
            self._equal = self._equal & equal
        return theirs

    def _threshold(self, x: Tensor, args: Sequence[Any]) -> Tensor:
        """What numbers are compared with: the other side of a comparison; of a step the number between what simulation and
        runtime gave in the first run.
        """
        if self._compares:
            return args[0] if isinstance(args[0], Tensor) else torch.as_tensor(args[0], dtype=x.dtype)
        if self._of_zero or self._theirs is None:
            return torch.zeros_like(x)
        return BOUNDARIES[self._node.target](self._own.double(), self._theirs.double())

    @property
    def _compares(self) -> bool:
        return self._node.target in COMPARISONS

    @property
    def _of_zero(self) -> bool:
        """Whether a step tells what is zero, or the sign, and nothing else."""
        return self._node.target == aten.sign.default or self._own.dtype == torch.bool

    def check(self, name: str) -> SelectionCheck:
        """The check of the node, after two runs or more."""
        own, theirs, does = self._own, self._theirs, cast("Any", "compares" if self._compares else "rounds")
        if theirs is None:
            return SelectionCheck(name, own.numel(), 0, own.numel(), float("inf"), 0.0, does)
        assert self._first is not None
        x, threshold = (numbers.double() for numbers in self._first)
        apart = (x - threshold).abs()
        if not self._compares:
            steps = theirs if self._of_zero else theirs.double() - own.double()
            apart = torch.where(steps.double().abs() > 1, float("inf"), apart)
        limit = MARGIN * sum(self._moved) + OWN * (finite(x.abs()) + finite(threshold.abs()))
        limit = torch.where(self._equal, 0.0, limit)
        differ = (own != theirs) & ~(own.isnan() & theirs.isnan())
        worse = differ & (~(apart <= limit) | self._equal)  # a NaN is, too
        near, wrong = int((differ & ~worse).sum()), int(worse.sum())
        return SelectionCheck(name, own.numel(), near, wrong, *furthest(apart, limit, worse), does)


def moved_by_sums(first: Tensor, other: Tensor) -> float:
    """The furthest that a number has moved beyond a few units of its own last digit; `first` in double precision."""
    moved = finite((other.double() - first).abs()) - OWN * finite(first.abs())
    return max(float(moved.max()), 0.0) if moved.numel() else 0.0


def furthest(apart: Tensor, limit: Tensor, worse: Tensor) -> tuple[float, float]:
    """How far numbers are apart, and how far they may be, where that is exceeded most among those that are `worse`; (0, 0)
    where none is.
    """
    if not bool(worse.any()):
        return 0.0, 0.0
    over = (apart - limit)[worse].nan_to_num(float("inf")).argmax()
    return float(apart[worse][over].nan_to_num(float("inf"))), float(limit[worse][over])


def finite(x: Tensor) -> Tensor:
    """Zero instead of what is not a finite number: the infinities of a mask are exact."""
    return x.nan_to_num(0.0, 0.0, 0.0)
