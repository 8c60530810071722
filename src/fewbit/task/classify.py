"""A class for an image: top-1 accuracy, and the share of images that get the same class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import cast

from torch import Tensor

from fewbit.task.closeness import OutputScore
from fewbit.task.task import Outputs, Rating
from fewbit.task.tensors import rate_by_numbers


@dataclass(frozen=True)
class Classify:
    """One of `classes` classes: output number `index` has a logit for each, (b, classes)."""

    index: int
    classes: int
    name = "classify"

    def divergence(self, exact: Outputs, outputs: Outputs) -> float:
        """KL divergence of the class probabilities from exact ones."""
        p, q = (y[self.index].flatten(1).double().log_softmax(1) for y in (exact, outputs))
        return cast(float, (p.exp() * (p - q)).sum().item())

    def cross_entropy(self, outputs: Outputs, labels: Tensor) -> float:
        """That of the labels (b,), summed over the images of a batch."""
        q = outputs[self.index].flatten(1).double().log_softmax(1)
        return -cast(float, q.gather(1, labels[:, None]).sum().item())

    def predict(self, outputs: Outputs) -> Tensor:
        """The class of each image; -1 where a logit is no number."""
        y = outputs[self.index].flatten(1)
        return y.argmax(1).masked_fill(y.isnan().any(1), -1)

    def rate(
        self, before: Tensor | None, after: Tensor | None, labels: Tensor | None, outputs: Sequence[OutputScore]
    ) -> Rating:
        """Top-1 and agreement. Where they say nothing they are replaced: labels on which the float model does not beat
        chance by agreement, and agreement where the float model gives one class alone by correlation of the logits.
        """
        assert before is not None
        assert after is not None
        count, whys = len(before), []
        right = 0 if labels is None else int((before == labels).sum())
        if labels is not None and right * self.classes <= count:
            whys.append(
                f"The float model is right for {right} of {count} labels, no more than guessing among {self.classes} classes "
                "would be, so accuracy says nothing. If the labels are in another order, give it: --classes FILE."
            )
            labels = None
        if len(before.unique()) == 1:
            whys.append(f"The float model has one class for all of the {count} scored images, so the class says nothing.")
            rating = rate_by_numbers([outputs[self.index]], " ".join(whys))
            return replace(rating, float_answers=before, answers=after)
        agree = int((before == after).sum())
        hits_before, hits = (None if labels is None else int((answers == labels).sum()) for answers in (before, after))
        return Rating(
            "top-1 accuracy",
            "agreement in class with the float model",
            None if hits_before is None else 100 * hits_before / count,
            None if hits is None else 100 * hits / count,
            100 * agree / count,
            wilson(agree if hits is None else hits, count),
            " ".join(whys),
            before,
            after,
        )


def wilson(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share, in percent (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return 100 * max(center - half, 0.0), 100 * min(center + half, 1.0)
