"""Candidates of YOLOX: offsets and log sizes on grids of 8, 16 and 32 pixels, then scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.deploy.python.detect import corners, objects


def answer(outputs: Sequence[NDArray[Any]], task: Mapping[str, Any], placed: Any) -> dict[str, Any]:
    """The objects on a picture."""
    y = outputs[task["index"]][0].astype(np.float64)
    cells, strides = [], []
    for stride in (8, 16, 32):
        rows, columns = np.mgrid[: task["size"][0] // stride, : task["size"][1] // stride]
        cells.append(np.stack([columns, rows], -1).reshape(-1, 2))
        strides.append(np.full((len(cells[-1]), 1), stride))
    side = np.concatenate(strides)
    boxes = np.concatenate([(y[:, :2] + np.concatenate(cells)) * side, np.exp(y[:, 2:4]) * side], 1)
    return objects(corners(boxes), y[:, 4:5] * y[:, 5:], task, placed)
