"""Which of a detector's candidates are what it found: those of a score that counts, one box for each object, the best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from fewbit.core.task import Outputs
from fewbit.task.decode import Decoder, Selected

LEAST = 0.01  # score of a box that counts
OVERLAP = 0.65  # IoU from which the weaker of two boxes of a class is dropped
MOST = 1000  # candidates before that
KEPT = 100  # boxes of an image, as COCO counts them


@dataclass(frozen=True)
class Found:
    """The boxes of an image, the best first: corners (n, 4) in pixels of the model's input, scores (n,), classes (n,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def select(decoder: Decoder | Selected, outputs: Outputs) -> list[Found]:
    """What a detector found on each image: boxes of at least `LEAST`, one for each object, the best `KEPT`."""
    if isinstance(decoder, Selected):
        rows = decoder.rows(outputs)
        some = zip(rows.boxes, counted(rows.boxes, rows.scores[..., None])[..., 0], rows.labels, strict=True)
        return [_best(boxes, scores, labels, KEPT) for boxes, scores, labels in some]
    boxes, scores = decoder.candidates(outputs)
    if decoder.alone:
        scores = torch.where(scores == scores.amax(2, keepdim=True), scores, 0.0)
    return [_selected(*one, decoder.overlaps) for one in zip(boxes, counted(boxes, scores), strict=True)]


def counted(boxes: Tensor, scores: Tensor) -> Tensor:
    """Scores (..., n, classes) of boxes (..., n, 4), 0 where the box or the score is not a finite number."""
    return torch.where(boxes.isfinite().all(-1, keepdim=True) & scores.isfinite(), scores, 0.0)


def _selected(boxes: Tensor, scores: Tensor, overlaps: bool) -> Found:
    """Of one image: boxes (n, 4) and scores (n, classes)."""
    places, labels = (scores >= LEAST).nonzero(as_tuple=True)
    found = _best(boxes[places], scores[places, labels], labels, MOST if overlaps else KEPT)
    if not overlaps:
        return found
    kept = batched_nms(found.boxes, found.scores, found.labels, OVERLAP)[:KEPT]
    return Found(found.boxes[kept], found.scores[kept], found.labels[kept])


def _best(boxes: Tensor, scores: Tensor, labels: Tensor, most: int) -> Found:
    """Of rows (n, ...) those of at least `LEAST`, the best first."""
    order = scores.argsort(descending=True, stable=True)[:most]
    order = order[scores[order] >= LEAST]
    return Found(boxes[order], scores[order], labels[order])
