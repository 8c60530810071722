"""A class for each pixel: mean IoU with masks, the share of pixels of the same class without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewbit.core.task import Json, Outputs, OutputScore, Rating, Scored, Signature, Task
from fewbit.errors import BadImages
from fewbit.task.folder import read_array
from fewbit.task.interval import bootstrap, of_mean
from fewbit.task.maps import Map, maps, one_map
from fewbit.task.paint import overlaid
from fewbit.task.telling import Range, by_truth, no_better
from fewbit.task.tensors import rate_by_output

IGNORED = 255  # the class of pixels that do not count
BACKGROUNDS = ("background", "__background__", "unlabeled", "void", "n/a")


@dataclass(frozen=True)
class Segment(Task):
    """A class for each pixel: output number `index` has logits (b, classes, h, w), of one channel a foreground that begins at
    `threshold`, or the class itself, an integer (b, h, w) or (b, 1, h, w).
    """

    index: int
    many: int
    threshold: float | None = None
    probability: bool = False
    names: tuple[str, ...] = ()
    name: ClassVar[str] = "segment"
    distance: ClassVar[str] = "KL divergence by pixel, nats"
    classes = None

    @property
    def spec(self) -> str:
        return f"{self.name}:probability" if self.probability else self.name

    @staticmethod
    def of(model: Signature, variant: str = "") -> Segment:
        what = (
            "a map of real numbers (batch, classes, height, width), or of one number or integer for each pixel, (batch, 1, "
            "height, width) or (batch, height, width),"
        )
        index, shape = one_map(model.outputs, None, what)
        channels = (shape[0] if len(shape) == 3 else 1) if model.outputs[index].is_real else None
        given = variant == "probability"
        threshold = (0.5 if given else 0.0) if channels == 1 else None
        return Segment(index, 2 if channels == 1 else channels or IGNORED, threshold, given, tuple(model.names))

    def _logits(self, outputs: Outputs, size: tuple[int, int] | None) -> Tensor:
        """The output as (b, channels, h, w), enlarged to a size."""
        y = outputs[self.index]
        y = y[:, None] if y.ndim == 3 else y
        if size is None or tuple(y.shape[2:]) == size:
            return y
        if not y.is_floating_point():
            return F.interpolate(y.float(), size, mode="nearest-exact").to(y.dtype)
        return F.interpolate(y.float(), size, mode="bilinear", align_corners=False)

    def predict(self, outputs: Outputs, size: tuple[int, int] | None = None) -> Tensor:
        """The class of each pixel, int64 (b, h, w)."""
        y = self._logits(outputs, size)
        if self.threshold is not None:
            return (y[:, 0] > self.threshold).long()
        return y.argmax(1) if y.shape[1] > 1 else y[:, 0].long()

    def divergence(self, exact: Outputs, outputs: Outputs) -> Tensor:
        """KL divergence of the class probabilities, mean over pixels; of classes alone the share of pixels that differ."""
        x, y = (self._logits(one, None) for one in (exact, outputs))
        if not x.is_floating_point():
            return (x != y).double().mean((1, 2, 3)).sum()
        x, y = x.double(), y.double()
        if self.probability:
            x, y = (t.clamp(1e-6, 1 - 1e-6).logit() for t in (x, y))
        if self.threshold is not None:
            x, y = (torch.cat([torch.zeros_like(t), t], 1) for t in (x, y))
        p, q = x.log_softmax(1), y.log_softmax(1)
        return (p.exp() * (p - q)).sum(1).mean((1, 2)).sum()

    def read(self, path: Path, images: Scored) -> list[Map]:
        """Masks: PNG of class numbers, 255 where a pixel does not count; of a model of two classes 0 and 255 alone are 0 and 1.
        Raises BadImages for other numbers or sizes, and where no pixel counts.
        """
        found, seen = maps(path, images, (".png",), "masks"), set[int]()
        for one in found:
            values = np.unique(read_array(one.path))
            seen |= {int(v) for v in values}
            if wrong := [int(v) for v in values if v != IGNORED and not 0 <= v < self.many]:
                known = "the model has classes" if self.many != IGNORED else "of a model that gives classes these may be"
                raise BadImages(
                    f"{one.path} has class {wrong[0]}; {known} 0 to {self.many - 1}, and {IGNORED} is not a class. Write the "
                    "masks in the model's classes."
                )
        if seen == {IGNORED}:
            raise BadImages(
                f"--annotations {path}: every pixel of the masks of all {len(found)} scored images is {IGNORED}, which is not "
                "a class. Write the masks in the model's classes, or leave --annotations out."
            )
        if seen == {0, IGNORED} and self.many != 2:
            classes = "" if self.many == IGNORED else f" of the {self.many} of the model"  # nobody knows how many there are
            raise BadImages(
                f"--annotations {path}: the masks of all {len(found)} scored images have 0 and {IGNORED} alone, and {IGNORED} "
                f"is not a class, so one class{classes} would be compared. Write the class's number where {IGNORED} is the "
                "foreground, score images with more classes, or leave --annotations out."
            )
        return [replace(one, one=IGNORED) for one in found] if seen == {0, IGNORED} and self.many == 2 else found

    def meter(self, truth: list[Map] | None) -> Pixels:
        return Pixels(self, truth)

    def program(self) -> tuple[tuple[str, ...], dict[str, Json]]:
        return ("segment",), {"index": self.index, "threshold": self.threshold}

    def drawn(self, picture: Image.Image, outputs: Outputs) -> Image.Image:
        """The classes as colours over the picture; class 0 stays clear where it is, or may be, the background."""
        is_class = self.threshold is None and bool(self.names) and self.names[0].lower() not in BACKGROUNDS
        classes = self.predict(outputs, (picture.height, picture.width))[0].numpy()
        return overlaid(picture, classes, None if is_class else 0)


@dataclass
class Pixels:
    """For each image and class: pixels that are right, that are given, and that are so in truth, of both models."""

    task: Segment
    truth: list[Map] | None
    same: list[float] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)  # (2 models, 3, classes)
    given: Range = field(default_factory=Range)  # of the float model's classes

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor:
        start = len(self.same)
        before, after = (self.task.predict(one) for one in (exact, outputs))
        same = (before == after).double().mean((1, 2))
        self.same += same.tolist()
        self.given.add(before)
        if self.truth is not None:
            size = self.truth[start].placement.size
            both = [self.task.predict(one, size) for one in (exact, outputs)]
            for k in range(len(same)):
                mask = self.truth[start + k].placed(size, IGNORED).long()
                self.counts.append(torch.stack([_counts(y[k], mask, self.task.many) for y in both]))
        return 1 - same

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """Mean IoU over the classes that occur, of all images together; without masks the share of pixels of the same class.
        Where the float model gives one class alone, outputs are compared.
        """
        if self.given.is_one:
            every = f"The float model gives every pixel of all {len(self.same)} scored images the same class"
            return rate_by_output(outputs, self.task.index, f"{every}, so outputs are compared.")
        same = torch.tensor(self.same, dtype=torch.float64)
        agreement, measure = 100 * float(same.mean()), "pixels in the class of the float model"
        low, high = of_mean(same)
        agreed = Rating("", measure, None, None, agreement, (100 * low, 100 * high), self._said())
        if not self.counts:
            return agreed
        counts = torch.stack(self.counts).double()  # (n, 2, 3, classes)
        flat = counts.flatten(1)

        def change(drawn: Tensor) -> float:
            before, after = mean_iou((drawn @ flat).view(counts.shape[1:]))
            return 100 * float(after - before)

        total = counts.sum(0)
        before, after = (100 * float(x) for x in mean_iou(total))
        each = 100 * total[:, 0] / (total[:, 1] + total[:, 2] - total[:, 0])
        seen = total[0, 2].nonzero().flatten().tolist()
        rows = tuple(
            {"what": f"IoU of {self.task.called(c)}", "float": float(each[0, c]), "quantized": float(each[1, c])} for c in seen
        )
        guessed = no_better("mIoU", before, *guess_of_classes(total[0]))
        return by_truth(agreed, "mIoU", before, after, bootstrap(change, len(flat)), rows=rows, guessed=guessed)

    def _said(self) -> str:
        if not self.truth or self.truth[0].one is None:
            return ""
        called = self.task.called(1)
        return (
            f"The masks have 0 and {IGNORED} alone, and the model two classes, so {IGNORED} is taken for {called}. Where it "
            "means that a pixel does not count, leave --annotations out: there is no pixel of that class."
        )


def _counts(given: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(3, classes): pixels of a class in both, in `given`, in `truth`; pixels without a class do not count."""
    counted = truth != IGNORED
    g, t = given[counted], truth[counted]
    return torch.stack([torch.bincount(x, minlength=classes)[:classes] for x in (g[g == t], g, t)])


def mean_iou(counts: Tensor) -> Tensor:
    """The mean IoU of each model from its counts (models, 3, classes), over classes that occur in truth."""
    right, given, true = counts.unbind(1)
    occurs = true > 0
    iou = right / (given + true - right).clamp_min(1e-30)
    return (iou * occurs).sum(1) / occurs.sum(1).clamp_min(1)


def guess_of_classes(counts: Tensor) -> tuple[float, str]:
    """The mIoU in percent of the better of two guesses, and which: the most frequent class for every pixel, and the model's
    classes of pixels that were shuffled; from the model's counts (3, classes).
    """
    _, given, true = counts / counts[2].sum().clamp_min(1)
    shuffled = mean_iou(torch.stack([given * true, given, true])[None])
    occurs = int((true > 0).sum())
    one = float(true.max()) / max(occurs, 1)
    guesses = {"one class for every pixel": 100 * one, "the same classes on shuffled pixels": 100 * float(shuffled)}
    what = max(guesses, key=lambda name: guesses[name])
    return guesses[what], what
