"""The likeliest classes of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BEST = 5


def answer(outputs: Sequence[NDArray[Any]], task: Mapping[str, Any], placed: Any) -> dict[str, Any]:
    """The best classes with their names and probabilities, the best first; `outputs` are those of one picture."""
    scores = outputs[task["index"]].reshape(-1).astype(np.float64)
    if scores.min() < 0 or abs(scores.sum() - 1) > 1e-3:  # logits
        shares = np.exp(scores - scores.max())
        scores = shares / shares.sum()
    order = np.argsort(-scores, kind="stable")[:BEST]
    names = task["classes"] or [f"class {i}" for i in range(len(scores))]
    return {"classes": [{"name": names[i], "index": int(i), "probability": round(float(scores[i]), 4)} for i in order]}
