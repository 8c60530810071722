"""Boxes that the model has selected: corners, scores and classes, in one output (n, 6) or in three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.deploy.python.detect import objects


def answer(outputs: Sequence[NDArray[Any]], task: Mapping[str, Any], placed: Any) -> dict[str, Any]:
    """The objects on a picture."""
    if len(task["places"]) == 1:
        y = outputs[task["places"][0]][0].astype(np.float64)
        boxes, scores, labels = y[:, :4], y[:, 4], np.rint(y[:, 5]).astype(np.int64)
    else:
        boxes, scores, labels = (outputs[i][0] for i in task["places"])
    labels = np.maximum(labels.astype(np.int64), 0)
    each = np.eye(int(labels.max(initial=0)) + 1)[labels] * scores.astype(np.float64)[:, None]
    return objects(boxes.astype(np.float64), each, task, placed)
