"""What is true of numbers in a runtime (less than, at least and their like), which may differ where they stand on a threshold.

A mask of attention is made of scores below a threshold, and a score that stands on it is masked or not by how a float sum was
rounded. So the truth is the runtime's, as places are (selections.py), and it is judged by the simulation's own numbers: where
both differ, both sides of the comparison are no further from each other than rounding moves them. That is measured: by how far
they move in disturbed runs, and by a few units of their own last digits. Sides that are equal in every run, as zeros behind a
rectifier are to a threshold of 0, are moved by nothing: there both give the same.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.core.checks import SelectionCheck
from fewbit.verify.outputs import MARGIN, STEP

OWN = 4 * STEP  # the share of its size by which a number moves where a few ops in a row round it


class Truths:
    """What a runtime found true at a node that compares, and the sides that the simulation compares.

    Kept are the sides of the first run, what is true of them in the simulation and in the runtime (None where that is of
    another size), how far each side moves in the other runs, and where both are equal in all of them.
    """

    def __init__(self, node: Node, truths: Tensor) -> None:
        self._node, self._truths = node, truths
        self._sides: tuple[Tensor, Tensor] | None = None
        self._moved = [0.0, 0.0]
        self._own, self._theirs = truths, cast("Tensor | None", None)
        self._equal = truths

    def call(self, left: Tensor, right: Tensor | float) -> Tensor:
        """What the node gives: the runtime's truths."""
        own = cast(Tensor, cast(Any, self._node.target)(left, right))
        usable = self._truths.numel() == own.numel()
        theirs = self._truths.reshape(own.shape).to(own) if usable else own
        sides = left, right if isinstance(right, Tensor) else torch.as_tensor(right, dtype=left.dtype)
        if self._sides is None:
            self._sides, self._own, self._theirs = sides, own, theirs if usable else None
            self._equal = sides[0] == sides[1]
        else:
            moves = (moved_by_sums(first.double(), other) for first, other in zip(self._sides, sides, strict=True))
            self._moved = [max(pair) for pair in zip(self._moved, moves, strict=True)]
            self._equal = self._equal & (sides[0] == sides[1])
        return theirs

    def check(self, name: str) -> SelectionCheck:
        """The check of the node, after two runs or more."""
        own, theirs = self._own, self._theirs
        if theirs is None:
            return SelectionCheck(name, own.numel(), 0, own.numel(), float("inf"), 0.0, places=False)
        assert self._sides is not None
        left, right = (side.double() for side in self._sides)
        apart = (left - right).abs()
        limit = MARGIN * sum(self._moved) + OWN * (finite(left.abs()) + finite(right.abs()))
        limit = torch.where(self._equal, 0.0, limit)
        differ = own != theirs
        worse = differ & (~(apart <= limit) | self._equal)  # a NaN is, too
        near, wrong = int((differ & ~worse).sum()), int(worse.sum())
        return SelectionCheck(name, own.numel(), near, wrong, *furthest(apart, limit, worse), places=False)


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
