"""The numbers that come out, as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

SHOWN = 100


def answer(outputs: Sequence[NDArray[Any]], task: Mapping[str, Any], placed: Any) -> dict[str, Any]:
    """The outputs of one picture by name; of large ones the shape and where the numbers lie. `Model.run` gives all."""
    named = zip(task["outputs"], outputs, strict=True)
    return {"outputs": {name: y.tolist() if y.size <= SHOWN else _described(y) for name, y in named}}


def _described(y: NDArray[Any]) -> dict[str, Any]:
    return {"shape": list(y.shape), "smallest": float(y.min()), "largest": float(y.max()), "mean": float(y.mean())}
