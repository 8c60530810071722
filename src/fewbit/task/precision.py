"""Average precision of boxes as COCO has it: pycocotools matches, precision is summed here, with weights of images."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision.ops import box_convert

from fewbit.task.objects import Objects
from fewbit.task.selection import KEPT, Found

Array = NDArray[Any]
SIZES = ("all", "small", "medium", "large")  # areas up to 32 x 32, up to 96 x 96, above, in pixels
POINTS = np.linspace(0.0, 1.0, 101)  # recalls at which precision is read
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # IoU


@dataclass(frozen=True)
class Matches:
    """The boxes of a class, best first, over all images: the image of each (n,), whether it is right, and whether it counts, at
    each IoU (10, n); and how many objects each image has.
    """

    image: Array
    right: Array
    counts: Array
    objects: Array

    def precision(self, drawn: Array) -> Array:
        """The average precision at each IoU (10,), each image counted as often as it was `drawn`; NaN without objects."""
        total = float(self.objects @ drawn)
        if not total:
            return np.full(len(THRESHOLDS), np.nan)
        often = drawn[self.image]
        true = np.cumsum((self.right & self.counts) * often, 1)
        false = np.cumsum((~self.right & self.counts) * often, 1)
        recall, precision = true / total, true / (true + false + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        found = np.zeros((len(THRESHOLDS), len(POINTS)))
        for row, (reached, values) in enumerate(zip(recall, precision, strict=True)):
            places = np.searchsorted(reached, POINTS, side="left")
            there = places < len(values)
            found[row, there] = values[places[there]]
        return found.mean(1)


@dataclass(frozen=True)
class Matched:
    """All matches of a model, by the name of a size and by class."""

    by_size: dict[str, dict[int, Matches]]
    images: int

    def ap(self, drawn: Array | None = None, size: str = "all", thresholds: slice = slice(None)) -> float:
        """The mean over classes with objects and over IoU thresholds, in percent; NaN where there is no object."""
        each = self.by_class(drawn, size, thresholds)
        return float(np.mean(list(each.values()))) if each else float("nan")

    def by_class(self, drawn: Array | None = None, size: str = "all", thresholds: slice = slice(None)) -> dict[int, float]:
        """The average precision of each class with objects, in percent."""
        drawn = np.ones(self.images) if drawn is None else drawn
        values = {label: 100 * matches.precision(drawn)[thresholds].mean() for label, matches in self.by_size[size].items()}
        return {label: float(value) for label, value in values.items() if not np.isnan(value)}


def matched(found: Sequence[Found], truth: Sequence[Objects], sizes: Sequence[str] = SIZES) -> Matched:
    """Match what was found on each image, in pixels of the picture, with its objects, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({int(label) for one in truth for label in one.labels})
    with contextlib.redirect_stdout(io.StringIO()):
        given = COCO()
        given.dataset = {
            "info": {}, "images": [{"id": i} for i in range(len(truth))], "categories": [{"id": label} for label in labels],
            "annotations": _annotations(truth),
        }  # fmt: skip
        given.createIndex()
        boxes = _detections(found)
        result = given.loadRes(boxes) if len(boxes) else COCO()
        evaluation = COCOeval(given, result, "bbox")
        evaluation.params.imgIds, evaluation.params.catIds = list(range(len(truth))), labels
        evaluation.params.areaRng = [evaluation.params.areaRng[SIZES.index(name)] for name in sizes]
        evaluation.params.areaRngLbl = list(sizes)
        evaluation.params.maxDets = [KEPT]
        if len(boxes):
            evaluation.evaluate()
    count = len(truth)
    by_size: dict[str, dict[int, Matches]] = {name: {} for name in sizes}
    for k, label in enumerate(labels):
        for a, name in enumerate(sizes):
            start = (k * len(sizes) + a) * count
            cells = evaluation.evalImgs[start : start + count] if len(boxes) else [None] * count
            objects = np.array([int((one.labels == label).sum()) for one in truth]) if not len(boxes) else None
            by_size[name][label] = _matches(cells, objects)
    return Matched(by_size, count)


def _matches(cells: Sequence[Any], objects: Array | None) -> Matches:
    """What pycocotools says of each image, as one list, best first; `objects` where nothing at all was found."""
    there = [(i, cell) for i, cell in enumerate(cells) if cell is not None]
    if objects is None:
        objects = np.zeros(len(cells))
        for i, cell in there:
            objects[i] = np.count_nonzero(np.asarray(cell["gtIgnore"]) == 0)
    scores = np.concatenate([cell["dtScores"][:KEPT] for _, cell in there] or [np.zeros(0)])
    image = np.concatenate([np.full(len(cell["dtScores"][:KEPT]), i) for i, cell in there] or [np.zeros(0)]).astype(int)
    empty = [np.zeros((len(THRESHOLDS), 0))]
    right = np.concatenate([cell["dtMatches"][:, :KEPT] for _, cell in there] or empty, 1) != 0
    ignored = np.concatenate([cell["dtIgnore"][:, :KEPT] for _, cell in there] or empty, 1) != 0
    order = np.argsort(-scores, kind="mergesort")
    return Matches(image[order], right[:, order], ~ignored[:, order], objects)


def _annotations(truth: Sequence[Objects]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, one in enumerate(truth):
        boxes = box_convert(one.boxes, "xyxy", "xywh").tolist()
        for box, label, crowd, area in zip(boxes, *(t.tolist() for t in (one.labels, one.crowd, one.areas)), strict=True):
            rows.append({"id": len(rows) + 1, "image_id": i, "category_id": label, "bbox": box, "iscrowd": crowd, "area": area})
    return rows


def _detections(found: Sequence[Found]) -> Array:
    """(n, 7): image, x, y, width, height, score, class."""
    rows = [
        np.column_stack([np.full(len(one.scores), i), box_convert(one.boxes, "xyxy", "xywh"), one.scores, one.labels])
        for i, one in enumerate(found)
    ]
    return np.concatenate(rows) if rows else np.zeros((0, 7))
