"""Candidates of DETR and its kin: logits and boxes as shares of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.deploy.python.detect import corners, objects


def answer(outputs: Sequence[NDArray[Any]], task: Mapping[str, Any], placed: Any) -> dict[str, Any]:
    """The objects on a picture."""
    logits, boxes = (outputs[task[name]][0].astype(np.float64) for name in ("logits", "boxes"))
    if task["independent"]:
        scores = 1 / (1 + np.exp(-logits))
    else:
        shares = np.exp(logits - logits.max(1, keepdims=True))
        scores = (shares / shares.sum(1, keepdims=True))[:, :-1]
    h, w = task["size"]
    return objects(corners(boxes) * (w, h, w, h), scores, task, placed)
