"""The objects on a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SURE, LEAST, OVERLAP, MOST, KEPT = 0.3, 0.01, 0.65, 1000, 100  # scores, IoU, boxes, as fewbit scored them


def objects(boxes: Floats, scores: Floats, task: Mapping[str, Any], placed: Any) -> dict[str, Any]:
    """Of candidates those of score `SURE` and more, the best first: corners (left, top, right, bottom) in the picture."""
    boxes, scores, labels = found(boxes, scores, task)
    (scale_x, shift_x), (scale_y, shift_y) = placed
    boxes = (boxes - (shift_x, shift_y) * 2) / ((scale_x, scale_y) * 2)
    names, sure = task["classes"] or (), scores >= SURE
    rows = zip(boxes[sure].round(2).tolist(), scores[sure].round(4).tolist(), labels[sure].tolist(), strict=True)
    return {"objects": [{"name": names[c] if c < len(names) else f"class {c}", "score": s, "box": box} for box, s, c in rows]}


def found(boxes: Floats, scores: Floats, task: Mapping[str, Any]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Of candidates (n, 4) and the scores of their classes (n, classes) what remains: boxes, scores and classes, best first."""
    if task["alone"]:
        scores = np.where(scores == scores.max(1, keepdims=True), scores, 0.0)
    scores = np.where(np.isfinite(boxes).all(axis=1, keepdims=True) & np.isfinite(scores), scores, 0.0)
    places, labels = np.nonzero(scores >= LEAST)
    values = scores[places, labels]
    order = np.argsort(-values, kind="stable")[: MOST if task["overlaps"] else KEPT]
    boxes, values, labels = boxes[places[order]], values[order], labels[order]
    if task["overlaps"]:
        kept: list[int] = []
        for i in range(len(boxes)):
            same = [k for k in kept if labels[k] == labels[i]]
            if not same or overlap(boxes[i], boxes[same]).max() <= OVERLAP:
                kept.append(i)
        boxes, values, labels = boxes[kept[:KEPT]], values[kept[:KEPT]], labels[kept[:KEPT]]
    return boxes, values, labels


def overlap(box: Floats, others: Floats) -> Floats:
    """The IoU of a box with each of others."""
    corners = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.clip(corners[1] - corners[0], 0, None).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1), (box[2:] - box[:2]).prod()
    return common / np.maximum(areas[0] + areas[1] - common, 1e-12)


def corners(boxes: Floats) -> Floats:
    """Centers and sides as corners."""
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
