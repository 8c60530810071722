"""The fields that say how a model's images are prepared, wherever they were said: names, limits and checks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

from fewbit.errors import BadImages, UnknownName

Number = TypeVar("Number", int, float)
CHANNELS = (1, 1024)
SIDES = (1, 8192)  # pixels
MEANS, STDS = (-10.0, 10.0), (0.0001, 10.0)  # in units of [0, 1], where black is 0 and white 1
CROPS = (0.1, 10.0)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
RESIZES = ("squash", "center", "border", "letterbox", "corner")
ORDERS = ("rgb", "bgr")
FILL = (0.0, 255.0)
CLIPS = (
    "Images have (channels, height, width). Of clips fold the time into the channels: images (channels * time, height, width), "
    "and a module around the model whose forward calls self.net(x.unflatten(1, (channels, time)))."
)


def input_size(value: Any, name: str = "input_size") -> tuple[int, int, int]:
    """(channels, height, width) as whole numbers; `name` is what the value is called where it was given. Raises BadImages."""
    sizes = _numbers(value, _whole)
    limits = (CHANNELS, SIDES, SIDES)
    if len(sizes) == 3 and all(low <= n <= high for n, (low, high) in zip(sizes, limits, strict=True)):
        return sizes[0], sizes[1], sizes[2]
    allowed = f"channels ({CHANNELS[0]} to {CHANNELS[1]}), height and width in whole pixels, {SIDES[0]} to {SIDES[1]}"
    clips = f" {CLIPS}" if len(sizes) == 4 else ""
    raise BadImages(f"{name} {_shown(value)} is not allowed; it should be {allowed}, as in {name} 3,224,224.{clips}")


def interpolation(value: Any, name: str = "interpolation") -> str:
    """How the resized picture is interpolated. Raises UnknownName."""
    return _word(value, name, INTERPOLATIONS)


def resize(value: Any, name: str = "resize") -> str:
    """How a picture is brought to the input's size. Raises UnknownName."""
    return _word(value, name, RESIZES)


def channel_order(value: Any, name: str = "channel_order") -> str:
    """The order of the colours in the model's input. Raises UnknownName."""
    return _word(value, name, ORDERS)


def fill(value: Any, name: str = "fill") -> float:
    """The grey of the borders of a letterbox. Raises BadImages."""
    return _within(value, name, FILL, "a number from 0 (black) to 255", "114")


def means(value: Any, name: str = "mean") -> tuple[float, ...]:
    """The mean of each channel, or one of all. Raises BadImages."""
    return _of_channels(value, name, MEANS, "0.485,0.456,0.406")


def stds(value: Any, name: str = "std") -> tuple[float, ...]:
    """The standard deviation of each channel, or one of all. Raises BadImages."""
    return _of_channels(value, name, STDS, "0.229,0.224,0.225")


def usual(name: str, channels: int) -> tuple[float, ...]:
    """The mean or std where nobody says one: ImageNet's of three channels, a half of any other number."""
    colours = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return colours[name] if channels == 3 else (0.5,) * channels


def for_channels(values: tuple[float, ...], channels: int, name: str) -> tuple[float, ...]:
    """One number for each channel; a single one is that of all. Raises BadImages for any other count."""
    if len(values) not in (1, channels):
        raise BadImages(
            f"{name} has {len(values)} numbers and the model {channels} channel{'s' * (channels > 1)}; "
            f"give {channels} or one for all, as in --{name.lower()} 0.5."
        )
    return values if len(values) == channels else values * channels


def order_for_channels(order: str, channels: int, name: str = "channel_order") -> None:
    """Raise BadImages where an order is not for so many channels."""
    if order == "bgr" and channels != 3:
        raise BadImages(f"{name} bgr needs 3 channels, and the input has {channels}; leave it out.")


def crop_pct(value: Any, name: str = "crop_pct") -> float:
    """The share of the resized picture that the crop keeps. Raises BadImages."""
    return _within(value, name, CROPS, f"a number from {CROPS[0]:g} to {CROPS[1]:g}; 1 is no crop", "0.9")


def _within(value: Any, name: str, limits: tuple[float, float], allowed: str, example: str) -> float:
    """A number in its limits. Raises BadImages for another one, or for none."""
    try:
        found = math.nan if isinstance(value, str) else _real(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not limits[0] <= found <= limits[1]:
        raise BadImages(f"{name} {_shown(value)} is not allowed; it should be {allowed}, as in {name} {example}.")
    return found


def _of_channels(value: Any, name: str, limits: tuple[float, float], example: str) -> tuple[float, ...]:
    numbers = _numbers(value, _real)
    if not 1 <= len(numbers) <= CHANNELS[1] or not all(limits[0] <= number <= limits[1] for number in numbers):
        allowed = (
            f"a finite number for each channel, or one for all, from {limits[0]:g} to {limits[1]:g}, of pixels between 0 and 1"
        )
        raise BadImages(f"{name} {_shown(value)} is not allowed; it should be {allowed}, as in {name} {example}.")
    return numbers


def _numbers(value: Any, kind: Callable[[Any], Number]) -> tuple[Number, ...]:
    """The numbers of a list, tuple or array, or of a text with commas, or a single one; none for anything else."""
    parts = value.split(",") if isinstance(value, str) else value.tolist() if hasattr(value, "tolist") else value
    try:
        return tuple(kind(part) for part in (parts if isinstance(parts, list | tuple) else (parts,)))
    except (TypeError, ValueError, OverflowError):
        return ()


def _word(value: Any, name: str, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise UnknownName(name, str(value), allowed, f"Allowed are {', '.join(allowed)}.")
    return value


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


@dataclass(frozen=True)
class Field:
    """What a field has to be: `check` takes a value and what it is called, `json` is its type in a file. One that is `assumed`
    has a default where nobody says it.
    """

    check: Callable[[Any, str], Any]
    json: type | tuple[type, ...]
    assumed: bool = False


FIELDS: Mapping[str, Field] = {
    "input_size": Field(input_size, list),
    "mean": Field(means, list, assumed=True),
    "std": Field(stds, list, assumed=True),
    "interpolation": Field(interpolation, str, assumed=True),
    "resize": Field(resize, str, assumed=True),
    "crop_pct": Field(crop_pct, (int, float), assumed=True),
    "channel_order": Field(channel_order, str),
    "fill": Field(fill, (int, float)),
}
ASSUMED = tuple(name for name, field in FIELDS.items() if field.assumed)
