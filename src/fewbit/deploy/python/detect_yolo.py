"""Candidates of YOLOv5 and v7 (with an objectness) and of YOLOv8, v9 and 11: centers and sides in pixels, then scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.deploy.python.detect import corners, objects


def answer(outputs: Sequence[NDArray[Any]], task: Mapping[str, Any], placed: Any) -> dict[str, Any]:
    """The objects on a picture."""
    y = outputs[task["index"]][0].astype(np.float64)
    y = y if task["objectness"] else y.T
    return objects(corners(y[:, :4]), y[:, 4:5] * y[:, 5:] if task["objectness"] else y[:, 4:], task, placed)
