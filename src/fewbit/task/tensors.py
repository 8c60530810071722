"""Outputs whose meaning is not known, compared as numbers: correlation and relative error, output by output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.core.task import Outputs, OutputScore, Rating, Signature, Task
from fewbit.errors import BadImages


@dataclass(frozen=True)
class Tensors(Task):
    """Any outputs; `is_real` says for each whether it holds real numbers or integers."""

    is_real: tuple[bool, ...]
    name: ClassVar[str] = "tensors"
    distance: ClassVar[str] = "squared error by variance"
    classes = None

    @staticmethod
    def of(model: Signature, variant: str = "") -> Tensors:
        return Tensors(tuple(output.is_real for output in model.outputs))

    def divergence(self, exact: Outputs, outputs: Outputs) -> Tensor:
        """Mean over outputs of the squared error by the variance of the exact output; for integers the share that differs."""
        total = torch.zeros((), dtype=torch.float64)
        for x, y, is_real in zip(exact, outputs, self.is_real, strict=True):
            x, y = x.double(), y.double()
            variance = (x - x.mean()).square().mean().clamp_min(1e-30) if is_real else 1.0
            total = total + ((x - y).square().mean() if is_real else (x != y).double().mean()) / variance
        return len(exact[0]) * total / len(self.is_real)

    def meter(self, truth: None) -> Numbers:
        return Numbers()


class Numbers:
    """Nothing beside the closeness of the outputs."""

    def add(self, exact: Outputs, outputs: Outputs) -> None:
        pass

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        return rate_by_numbers(outputs)


def rate_by_numbers(outputs: Sequence[OutputScore], why: str = "") -> Rating:
    """The rating by the output that has become worst. Raises BadImages where no output varies, so that nothing can be said."""
    rated = [output for output in outputs if output.agreement is not None]
    if not rated:
        raise BadImages(
            "the float model gives the same numbers for every scored image, so nothing can be compared; "
            "give other images: --score DIR (and look whether the model and --mean, --std are right)."
        )
    worst = min(rated, key=lambda output: output.agreement or 0.0)
    return Rating("", worst.measure, None, None, worst.agreement or 0.0, worst.interval or (0.0, 0.0), why)
