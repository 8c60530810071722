"""Objects on an image: average precision with annotations, and that of the integer model's boxes against the float model's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area, box_iou

from fewbit.core.task import Json, Outputs, OutputScore, Placement, Rating, Scored, Signature, Task
from fewbit.errors import BadModel
from fewbit.task import objects
from fewbit.task.closeness import SPREAD
from fewbit.task.decode import DECODERS, Decoder, Selected
from fewbit.task.distance import of_candidates, of_rows, passing
from fewbit.task.interval import bootstrap
from fewbit.task.objects import Objects
from fewbit.task.paint import boxed
from fewbit.task.precision import Matched, matched
from fewbit.task.selection import Found, select
from fewbit.task.telling import NOTHING, by_truth, no_better, silent
from fewbit.task.tensors import rate_by_numbers

SURE = 0.3  # score from which a box of the float model counts as an object, and from which boxes are drawn
SAME = 0.5  # IoU from which two boxes are of one object
ROUNDS = 300  # of the bootstrap
SLIGHT = 0.1  # Cohen's kappa of classes (1960) up to which they agree by chance
TURNS = 3  # how many times boxes are held against the objects of other images
DRAWN = 20  # boxes on a picture
NOWHERE = Placement((1.0, 1.0), (0.0, 0.0), (0, 0))


@dataclass(frozen=True)
class Detect(Task):
    """Boxes with classes and scores, as `decoder` makes them of the outputs; `kind` is its name."""

    kind: str
    decoder: Decoder | Selected
    names: tuple[str, ...] = ()
    name: ClassVar[str] = "detect"
    distance: ClassVar[str] = "KL divergence of scores and distance of corners"
    classes = None

    @property
    def spec(self) -> str:
        return f"{self.name}:{self.kind}"

    @staticmethod
    def of(model: Signature, variant: str) -> Detect:
        """By the name of a decoder. Raises BadModel where the outputs are not what it decodes, or no name is given."""
        if not variant:
            fitting = []
            for name, make in DECODERS.items():
                try:
                    make(model)
                    fitting.append(name)
                except BadModel:
                    pass
            said = f"these outputs could be {' or '.join(fitting)}" if fitting else f"there are {', '.join(DECODERS)}"
            raise BadModel(f"the way in which boxes are written has to be named, as in detect:yolox; {said}")
        return Detect(variant, DECODERS[variant](model), tuple(model.names))

    def divergence(self, exact: Outputs, outputs: Outputs) -> Tensor:
        """How far scores and boxes are from exact ones, candidate by candidate; of a model that selects by itself they are
        paired so that this is the least. The KL divergence of the scores, and the distance of the corners by the side of the
        box, counted by the exact score; both by the sum of exact scores. Finite: a box that is not a number has no score.
        """
        if isinstance(self.decoder, Selected):
            return of_rows(self.decoder.rows(exact), self.decoder.rows(passing(outputs)))
        return of_candidates(self.decoder.candidates(exact), self.decoder.candidates(passing(outputs)))

    def read(self, path: Path, images: Scored) -> list[Objects]:
        """Boxes from COCO's JSON, YOLO's text files, Pascal VOC's XML or parquet. Raises BadImages."""
        return objects.read(path, images, self.names, self.decoder.classes)

    def meter(self, truth: list[Objects] | None) -> Boxes:
        return Boxes(self, truth)

    def program(self) -> tuple[tuple[str, ...], dict[str, Json]]:
        """The pieces of its decoder; the outputs where that takes more than a few lines."""
        if not self.decoder.piece:
            return super().program()
        said = {"overlaps": self.decoder.overlaps, "alone": self.decoder.alone}
        return ("detect", self.decoder.piece), {**asdict(self.decoder), **said}  # type: ignore[arg-type]

    def drawn(self, picture: Image.Image, outputs: Outputs) -> Image.Image:
        """The boxes of which the model is sure, with class and score."""
        (found,) = select(self.decoder, outputs)
        sure = (found.scores >= SURE).nonzero().flatten()[:DRAWN]
        labels = found.labels[sure].tolist()
        texts = [f"{self.called(c)} {s:.2f}" for c, s in zip(labels, found.scores[sure].tolist(), strict=True)]
        return boxed(picture, found.boxes[sure].tolist(), texts, labels)


@dataclass
class Boxes:
    """The boxes of both models for each image, at most 100, in pixels of the input; the objects that there are."""

    task: Detect
    truth: list[Objects] | None
    before: list[Found] = field(default_factory=list)
    after: list[Found] = field(default_factory=list)

    def add(self, exact: Outputs, outputs: Outputs) -> Tensor:
        before, after = (select(self.task.decoder, one) for one in (exact, outputs))
        self.before += before
        self.after += after
        return torch.tensor([apart(x, y) for x, y in zip(before, after, strict=True)])

    def rating(self, outputs: Sequence[OutputScore]) -> Rating:
        """AP with annotations; always that of the integer model's boxes against the float model's of `SURE` and more, or where
        there are none a comparison of outputs. Raises BadImages where the float model finds the same boxes on every image.
        """
        if _all_same(self.before):
            raise silent("boxes")
        truth = self.truth
        if truth is None:
            return self._agreed(outputs)
        in_pictures = [
            [_in_picture(f, t.placement) for f, t in zip(found, truth, strict=True)] for found in (self.before, self.after)
        ]
        one, two = (matched(found, truth) for found in in_pictures)

        def change(drawn: Tensor) -> float:
            return two.ap(drawn.numpy()) - one.ap(drawn.numpy())

        guessed = self._guessed(in_pictures[0], truth, one.ap()) if one.ap() >= NOTHING else ""
        used = one.ap() >= NOTHING and not guessed
        agreed = self._agreed(outputs, judged=not used)
        interval = bootstrap(change, len(truth), rounds=ROUNDS if used else 0)
        return by_truth(agreed, "AP", one.ap(), two.ap(), interval, rows=_rows(self.task, one, two), guessed=guessed)

    def _guessed(self, found: Sequence[Found], truth: Sequence[Objects], ap: float) -> str:
        """In words that less than half of the boxes on objects have their class, hardly more than by chance, or that AP is not
        clearly higher than with the objects of other images; empty where neither is so.
        """
        same, count, chance = same_classes(found, truth)
        if chance < 1 and 2 * same < count and (same / count - chance) / (1 - chance) <= SLIGHT:
            return (
                f"AP of the float model is {ap:.2f} %, not clearly better than a guess: of {count} objects that it finds "
                f"{same} have their class, and {chance * count:.1f} would by chance"
            )
        others = [matched(found, [*truth[k:], *truth[:k]], ("all",)).ap() for k in range(1, min(len(truth), TURNS + 1))]
        return no_better("AP", ap, max(others, default=-math.inf), "the same boxes on the annotations of other images")

    def _agreed(self, outputs: Sequence[OutputScore], judged: bool = True) -> Rating:
        """Without annotations; of what is not judged the interval is not looked for, which takes long."""
        sure = [_as_objects(found) for found in self.before]
        measure = f"AP against the float model's boxes of score {SURE:g} and more"
        if not any(len(one.labels) for one in sure):
            why = f"The float model finds no object of score {SURE:g} or more on any scored image, so outputs are compared."
            return rate_by_numbers(outputs, why)
        against = matched(self.after, sure, ("all",))
        agreement = np.nan_to_num(against.ap())
        rows: list[Mapping[str, Json]] = [
            {"what": "AP50 against the float model's boxes", "agreement": against.ap(thresholds=slice(1))}
        ]
        rounds = ROUNDS if judged else 0
        interval = bootstrap(lambda drawn: against.ap(drawn.numpy()), against.images, rounds=rounds)
        return Rating("", measure, None, None, float(agreement), interval, rows=tuple(rows))


def _all_same(found: Sequence[Found]) -> bool:
    """Whether the same boxes, one or more, were found on each of two or more images."""
    first, *others = found
    return bool(len(first.labels) and others) and all(
        torch.equal(first.labels, one.labels)
        and torch.allclose(first.boxes, one.boxes, rtol=SPREAD)
        and torch.allclose(first.scores, one.scores, rtol=SPREAD)
        for one in others
    )


def _rows(task: Detect, one: Matched, two: Matched) -> list[Mapping[str, Json]]:
    """AP at an IoU of 0.5 and 0.75, by size and by class, of both models."""
    pairs = {
        "AP50": [m.ap(thresholds=slice(1)) for m in (one, two)],
        "AP75": [m.ap(thresholds=slice(5, 6)) for m in (one, two)],
        **{f"AP of {size} objects": [m.ap(size=size) for m in (one, two)] for size in ("small", "medium", "large")},
    }
    first, second = one.by_class(), two.by_class()
    pairs |= {f"AP of {task.called(label)}": [first[label], second[label]] for label in first}
    return [
        {"what": what, "float": before, "quantized": after} for what, (before, after) in pairs.items() if not np.isnan(before)
    ]


def _as_objects(found: Found) -> Objects:
    """The boxes of which a model is sure, as if they were the truth, in pixels of the input."""
    sure = found.scores >= SURE
    boxes = found.boxes[sure]
    return Objects(boxes, found.labels[sure], torch.zeros(int(sure.sum()), dtype=torch.int64), box_area(boxes), NOWHERE)


def _in_picture(found: Found, placement: Placement) -> Found:
    """Boxes in pixels of the picture."""
    shift = found.boxes.new_tensor([*placement.shift, *placement.shift])
    scale = found.boxes.new_tensor([*placement.scale, *placement.scale])
    return Found((found.boxes - shift) / scale, found.scores, found.labels)


def same_classes(found: Sequence[Found], truth: Sequence[Objects]) -> tuple[int, int, float]:
    """How many objects have the class of the surest box on them (IoU 0.5 and more), how many have a box, and the share that
    would have it by chance, if the same classes were dealt out anew: 1 where there is one class alone, or no box on an object.
    """
    pairs: list[tuple[int, int]] = []
    for boxes, there in zip(found, truth, strict=True):
        if len(boxes.labels) and len(there.labels):
            near = box_iou(there.boxes.double(), boxes.boxes.double()) >= SAME
            best = torch.where(near, boxes.scores.double(), -math.inf).argmax(1)
            on = near.any(1)
            pairs += zip(there.labels[on].tolist(), boxes.labels[best[on]].tolist(), strict=True)
    true, given = (Counter(pair[k] for pair in pairs) for k in range(2))
    chance = sum(true[label] * given[label] for label in true) / len(pairs) ** 2 if pairs else 1.0
    return sum(a == b for a, b in pairs), len(pairs), chance


def apart(x: Found, y: Found) -> float:
    """How far what two models found on an image is apart, 0 to 1: the share of sure boxes without one of the same class of the
    other model at the same place.
    """
    (a, la), (b, lb) = ((f.boxes[f.scores >= SURE], f.labels[f.scores >= SURE]) for f in (x, y))
    if not len(a) and not len(b):
        return 0.0
    overlap = box_iou(a, b) * (la[:, None] == lb) if len(a) and len(b) else torch.zeros(len(a), len(b))
    met = sum(int((overlap >= SAME).any(d).sum()) for d in (1, 0)) if overlap.numel() else 0
    return 1 - met / (len(a) + len(b))
