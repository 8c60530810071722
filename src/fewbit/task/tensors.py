"""Outputs whose meaning is not known, compared as numbers: correlation and relative error, output by output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.core.task import Outputs, OutputScore, Rating, Signature, Task
from fewbit.errors import BadImages
from fewbit.task.telling import silent


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
    """The rating by the output that has become worst, of those that the files give. Raises BadImages where no output varies
    or there are too few numbers, so that nothing can be said.
    """
    rated = [output for output in outputs if output.agreement is not None and not output.inside]
    if not rated and any(output.few for output in outputs):
        raise BadImages(
            "the scored images give one or two numbers, which correlate whatever they are, so nothing can be compared; "
            "score at least three images: --score DIR."
        )
    if not rated:
        raise silent("numbers")
    return _rated(min(rated, key=lambda output: output.agreement or 0.0), why)


def rate_by_output(outputs: Sequence[OutputScore], index: int, why: str) -> Rating:
    """The rating by the numbers of output `index`, also where a tail reads it and the files do not give it; where that one is
    the same for every image, by what the tail makes of it. Raises BadImages where that says nothing either.
    """
    read = outputs[index]
    if read.agreement is not None:
        return _rated(read, why)
    return rate_by_numbers(outputs if read.inside else [read], why)


def _rated(one: OutputScore, why: str) -> Rating:
    return Rating("", one.measure, None, None, one.agreement or 0.0, one.interval or (0.0, 0.0), why)
