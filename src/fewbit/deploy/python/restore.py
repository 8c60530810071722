"""A picture for a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def answer(outputs: Sequence[NDArray[Any]], task: Mapping[str, Any], placed: Any) -> dict[str, Any]:
    """The picture that comes out, of 8 bits."""
    y = outputs[task["index"]][0].astype(np.float32)
    y = y[None] if y.ndim == 2 else y
    return {"map": np.rint(255 * y.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0).squeeze()}
