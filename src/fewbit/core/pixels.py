"""Input size, mean, std and crop of a model's images, from an option, a model's file or a record: checked in one place."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

from fewbit.errors import BadImages

Number = TypeVar("Number", int, float)
SIDES = (1, 8192)  # pixels
MEANS, STDS = (-10.0, 10.0), (0.0001, 10.0)  # in units of [0, 1], where black is 0 and white 1
CROPS = (0.1, 10.0)


def input_size(value: Any, name: str = "input_size") -> tuple[int, int, int]:
    """(3, height, width) as whole numbers; `name` is what the value is called where it was given. Raises BadImages."""
    sizes = _three(value, _whole)
    if sizes is None or sizes[0] != 3 or not all(SIDES[0] <= side <= SIDES[1] for side in sizes[1:]):
        allowed = f"3, height and width in whole pixels, {SIDES[0]} to {SIDES[1]}"
        raise BadImages(f"{name} {_shown(value)} is not allowed; it should be {allowed}, as in {name} 3,224,224.")
    return sizes


def means(value: Any, name: str = "mean") -> tuple[float, float, float]:
    """The mean of each channel. Raises BadImages."""
    return _channels(value, name, MEANS, "0.485,0.456,0.406")


def stds(value: Any, name: str = "std") -> tuple[float, float, float]:
    """The standard deviation of each channel. Raises BadImages."""
    return _channels(value, name, STDS, "0.229,0.224,0.225")


def crop_pct(value: Any, name: str = "crop_pct") -> float:
    """The share of the resized picture that the crop keeps. Raises BadImages."""
    try:
        share = math.nan if isinstance(value, str) else _real(value)
    except (TypeError, ValueError, OverflowError):
        share = math.nan
    if not CROPS[0] <= share <= CROPS[1]:
        allowed = f"a number from {CROPS[0]:g} to {CROPS[1]:g}; 1 is no crop"
        raise BadImages(f"{name} {_shown(value)} is not allowed; it should be {allowed}, as in {name} 0.9.")
    return share


def _channels(value: Any, name: str, limits: tuple[float, float], example: str) -> tuple[float, float, float]:
    numbers = _three(value, _real)
    if numbers is None or not all(limits[0] <= number <= limits[1] for number in numbers):
        allowed = f"three finite numbers from {limits[0]:g} to {limits[1]:g}, of pixels between 0 and 1"
        raise BadImages(f"{name} {_shown(value)} is not allowed; it should be {allowed}, as in {name} {example}.")
    return numbers


def _three(value: Any, kind: Callable[[Any], Number]) -> tuple[Number, Number, Number] | None:
    """The three numbers of a list, tuple or array, or of a text with commas; None for anything else."""
    parts = value.split(",") if isinstance(value, str) else value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(parts, list | tuple) or len(parts) != 3:
        return None
    try:
        return kind(parts[0]), kind(parts[1]), kind(parts[2])
    except (TypeError, ValueError, OverflowError):
        return None


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("no number")
    return int(value) if isinstance(value, str) else operator.index(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real | str):
        raise TypeError("no number")
    return float(value)


def _shown(value: Any) -> str:
    return value[:80] if isinstance(value, str) else repr(value)[:80]
