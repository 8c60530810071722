"""A class for an image: top-1 accuracy, and the share of images that get the same class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.core.task import Json, Outputs, OutputScore, Rating, Signature, Task
from fewbit.errors import BadModel
from fewbit.task.interval import newcombe, wilson
from fewbit.task.tensors import rate_by_output


@dataclass(frozen=True)
class Classify(Task):
    """One of `classes` classes: output number `index` has a logit for each, (b, classes)."""

    index: int
    classes: int
    name: ClassVar[str] = "classify"
    distance: ClassVar[str] = "KL divergence, nats"

    @staticmethod
    def of(model: Signature, variant: str = "") -> Classify:
        """By the one list of real numbers among the outputs, of several the one named `logits`. Raises BadModel without it."""
        lists = [i for i, one in enumerate(model.outputs) if one.is_list]
        named = [i for i in lists if model.outputs[i].name == "logits"] or lists
        if len(named) != 1:
            raise BadModel("one list of logits (batch, classes) is needed")
        return Classify(named[0], model.outputs[named[0]].shape[0])

    @property
    def logits(self) -> int:
        return self.index

    def divergence(self, exact: Outputs, outputs: Outputs) -> Tensor:
        """KL divergence of the class probabilities from exact ones."""
        p, q = (y[self.index].flatten(1).double().log_softmax(1) for y in (exact, outputs))
        return (p.exp() * (p - q)).sum()

    def softened(self, outputs: Outputs, temperature: float) -> Outputs:
        return tuple(y / temperature if i == self.index else y for i, y in enumerate(outputs))

    def predict(self, outputs: Outputs) -> Tensor:
        """The class of each image; -1 where a logit is not a number."""
        y = outputs[self.index].flatten(1)
        return y.argmax(1).masked_fill(y.isnan().any(1), -1)

    def meter(self, truth: Tensor | None) -> Answers:
        return Answers(self, truth)

    def program(self) -> tuple[tuple[str, ...], dict[str, Json]]:
        return ("classify",), {"index": self.index}


@dataclass
class Answers:
    """The classes that both models gave, and the labels (n,) if there are some."""

    task: Classify
    labels: Tensor | None
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)

    def add(self, exact: Outputs, outputs: Outputs) -> None:
        self.before.append(self.task.predict(exact))
        self.after.append(self.task.predict(outputs))

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """Top-1 and agreement. Where they say nothing they are replaced: labels on which the float model does not beat
        chance by agreement, and agreement where the float model gives one class alone by correlation of the logits.
        """
        before, after, labels = torch.cat(self.before), torch.cat(self.after), self.labels
        count, whys = len(before), []
        right = 0 if labels is None else int((before == labels).sum())
        if labels is not None and right * self.task.classes <= count:
            whys.append(
                f"The float model is right for {right} of {count} labels, no better than guessing among {self.task.classes} "
                "classes, so accuracy is not used. If the labels are in another order, give it: --classes FILE."
            )
            labels = None
        if len(before.unique()) == 1:
            whys.append(
                f"The float model gives all {count} scored images the same class, so outputs are compared in place of classes."
            )
            rating = rate_by_output(outputs, self.task.index, " ".join(whys))
            return replace(rating, float_answers=before, answers=after)
        agree = int((before == after).sum())
        hits = None if labels is None else (before == labels, after == labels)
        top = (None, None) if hits is None else tuple(100 * int(h.sum()) / count for h in hits)
        return Rating(
            "top-1 accuracy",
            "agreement in class with the float model",
            top[0],
            top[1],
            100 * agree / count,
            newcombe(*hits) if hits is not None else wilson(agree, count),
            " ".join(whys),
            before,
            after,
        )
