"""What a task answers for, and which one a model has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fewbit.core.values import Output
from fewbit.task.closeness import OutputScore

Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Rating:
    """How good the integer model is, in percent: with labels by `measure` of both models, always by agreement of the two.

    `agreement_measure` says in what they agree. `interval` (95 %) is that of `score`, or of the agreement where there are
    no labels. `why` says why another measure than the task's first was taken, if one was. `float_answers` and `answers` are
    the predictions for each image, int64 (images,), of a task that has such.
    """

    measure: str
    agreement_measure: str
    float_score: float | None
    score: float | None
    agreement: float
    interval: tuple[float, float]
    why: str = ""
    float_answers: Tensor | None = None
    answers: Tensor | None = None


class Task(Protocol):
    """What a model's outputs mean. `exact` and `outputs` are the float and the integer model's, batches (b, ...) each."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> int | None:
        """How many classes a label may name; None for a task without labels."""

    def divergence(self, exact: Outputs, outputs: Outputs) -> float:
        """How far the outputs are from exact ones, 0 or more, summed over the images of a batch: the loss of a whole model."""

    def predict(self, outputs: Outputs) -> Tensor | None:
        """The prediction for each image (b,), int64; None for a task that has none."""

    def rate(
        self, before: Tensor | None, after: Tensor | None, labels: Tensor | None, outputs: Sequence[OutputScore]
    ) -> Rating:
        """The rating from the predictions of both models for all images (n,), and from every output's closeness."""


def recognise(outputs: Sequence[Output]) -> Task:
    """The task of a model with these outputs: a class where one output, alone or named `logits`, is a list of real numbers."""
    from fewbit.task.classify import Classify
    from fewbit.task.tensors import Tensors

    for i, output in enumerate(outputs):
        is_list = output.is_real and len(output.shape) == 1 and output.shape[0] >= 2
        if is_list and (output.name == "logits" or len(outputs) == 1):
            return Classify(i, output.shape[0])
    return Tensors(tuple(output.is_real for output in outputs))
