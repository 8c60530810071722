"""From the pixels of a picture to the input of a model, in NumPy and Pillow alone.

fewbit prepares its images with this file, and `predict.py` of a run has a copy of it: a program sees the pixels that were
scored. `how` are the fields of a Preprocess, as run.json and `preprocess.json` have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

How = Mapping[str, Any]
Floats = NDArray[np.float32]
LONGEST = 16  # times as long as the frame: what of a picture a centre crop is taken from
CUBIC = -0.75  # the constant of bicubic interpolation, as torch has it
LUMINANCE = (19595, 38470, 7471)  # of red, green and blue, in units of 2^-16, as Pillow has them


def prepared(pixels: NDArray[Any], how: How) -> Floats:
    """The normalized input (channels, height, width) for pixels (h, w, channels), uint8 or uint16."""
    pixels = middle(pixels, how) if how["resize"] == "center" else pixels
    size = resized(pixels.shape[0], pixels.shape[1], how)
    x = centred(_smooth(pixels, size, how) if how["antialias"] else _sharp(_unit(pixels), size, how["interpolation"]), how)
    x = _normal(np.ascontiguousarray(x[::-1]) if flips(how) else x, how)
    if how.get("whole") or how.get("normalize") == "inside":
        return _normal(whole(x, how) / np.float32(255), how)
    return x


def in_bands(values: NDArray[Any], channels: int) -> NDArray[Any] | None:
    """Grey, grey with alpha, RGB or RGBA (h, w, bands) in as many bands as there are channels; None where they do not fit."""
    bands = values.shape[2]
    if bands == channels:
        return values
    if channels == 3 and bands <= 2:
        return values[..., :1].repeat(3, axis=2)
    if (bands, channels) in ((4, 3), (2, 1)):
        return values[..., :channels]
    if channels == 1 and bands in (3, 4):
        light = values[..., :3].astype(np.uint64) @ np.array(LUMINANCE, np.uint64)
        return ((light + 0x8000) >> 16).astype(values.dtype)[..., None]
    return values[..., [0, 0, 0, 1]] if (bands, channels) == (2, 4) else None


def whole(x: Floats, how: How) -> Floats:
    """The whole numbers from 0 to 255 that normalized pixels stand for."""
    return np.rint(255 * (x * _column(how["std"]) + _column(how["mean"]))).clip(0, 255)


def flips(how: How) -> bool:
    """Whether blue comes first."""
    return str(how.get("channel_order")).lower() == "bgr"


def middle(pixels: NDArray[Any], how: How) -> NDArray[Any]:
    """A picture far longer than the frame without the ends that a centre crop never shows, which bounds the memory."""
    (_, h, w), (high, wide) = how["size"], pixels.shape[:2]
    cut_w = max(0, wide - math.ceil(LONGEST * high * w / h)) // 2
    cut_h = max(0, high - math.ceil(LONGEST * wide * h / w)) // 2
    return pixels[cut_h : high - cut_h, cut_w : wide - cut_w]


def resized(high: int, wide: int, how: How) -> tuple[int, int]:
    """(height, width) in pixels after the resize; timm rounds differently for square frames and for others."""
    to_h, to_w = (max(1, math.floor(side / how["crop_pct"])) for side in how["size"][1:])
    if how["resize"] == "squash":
        return to_h, to_w
    if how["resize"] == "center" and to_h == to_w:
        return (to_h, int(to_h * wide / high)) if high <= wide else (int(to_w * high / wide), to_w)
    ratios = high / to_h, wide / to_w
    if how["resize"] == "corner":  # as YOLOX has it
        return max(1, int(high / max(ratios) + 1e-6)), max(1, int(wide / max(ratios) + 1e-6))
    ratio = min(ratios) if how["resize"] == "center" else max(ratios)
    return max(1, round(high / ratio)), max(1, round(wide / ratio))


def centred(x: Floats, how: How) -> Floats:
    """The middle of a resized picture (c, h, w), bordered where it is smaller than the input: mean colour for "border", `fill`
    for a letterbox, else black, as in timm.
    """
    (h, w), (high, wide) = how["size"][1:], x.shape[1:]
    frame = np.empty((len(x), max(h, high), max(w, wide)), np.float32)
    fill = around(how)
    frame[:] = _column(fill[::-1] if flips(how) else fill)
    (top, first_row), (left, first_column) = corner(high, h, how), corner(wide, w, how)
    frame[:, top : top + high, left : left + wide] = x
    return frame[:, first_row : first_row + h, first_column : first_column + w]


def around(how: How) -> list[float]:
    """What is around a picture that is smaller than the input, 0 to 1 for each channel of the model."""
    if how["resize"] == "border":
        return [round(255 * m) / 255 for m in how["mean"]]
    return [(how.get("fill") or 0.0) / 255] * int(how["size"][0])


def corner(length: int, side: int, how: How) -> tuple[int, int]:
    """Along one side: where a picture of a length begins in a frame that holds it and the input, and where the input does."""
    whole = max(length, side)
    return (0, 0) if how["resize"] == "corner" else ((whole - length) // 2, round((whole - side) / 2))


def placed(high: int, wide: int, how: How) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where a picture comes to lie in the input: scale and shift of its columns, and of its rows."""
    pixels = np.empty((high, wide, 0), np.uint8)
    kept = (middle(pixels, how) if how["resize"] == "center" else pixels).shape[:2]
    found = []
    for side, length, cut, to in zip(how["size"][1:], (high, wide), kept, resized(kept[0], kept[1], how), strict=True):
        start, begin = corner(to, side, how)
        found.append((to / cut, start - begin - (length - cut) // 2 * to / cut))
    return found[1], found[0]


def _smooth(pixels: NDArray[Any], size: tuple[int, int], how: How) -> Floats:
    """Pixels (h, w, c) as float32 (c, high, wide) from 0 to 1, resized by Pillow; 16 bits as floats."""
    shape, kind = (size[1], size[0]), Image.Resampling[how["interpolation"].upper()]
    bands = np.moveaxis(pixels, 2, 0)
    if pixels.dtype == np.uint8:
        return _unit(np.stack([np.array(Image.fromarray(band).resize(shape, kind)) for band in bands], axis=2))
    deep = [np.array(Image.fromarray(band.astype(np.float32)).resize(shape, kind)) for band in bands]
    return (np.stack(deep) / np.float32(np.iinfo(pixels.dtype).max)).clip(0, 1)


def _unit(pixels: NDArray[Any]) -> Floats:
    """Pixels (h, w, c) as float32 (c, h, w), 0 for black and 1 for white."""
    planes = np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1))
    return planes / np.float32(np.iinfo(pixels.dtype).max)


def _sharp(x: Floats, size: tuple[int, int], kind: str) -> Floats:
    """Floats (c, h, w) interpolated between the nearest pixels, as torch does without antialias; bicubic may leave [0, 1]."""
    if x.shape[1:] == size:
        return x
    (rows, across), (columns, along) = (_taps(n, to, kind) for n, to in zip(x.shape[1:], size, strict=True))
    total = np.zeros((len(x), *size), np.float32)
    for row, a in zip(rows, across, strict=True):
        lines = x[:, row]
        line = np.zeros_like(total)
        for column, b in zip(columns, along, strict=True):
            line += lines[:, :, column] * b
        total += line * a[:, None]
    return total


def _taps(n: int, to: int, kind: str) -> tuple[NDArray[np.int64], Floats]:
    """Along one side: which of n pixels each of `to` new ones reads (taps, to), and how much of each."""
    middles = (np.arange(to) + 0.5) * float(np.float32(n) / np.float32(to))
    if kind == "nearest":
        return np.minimum(np.floor(middles.astype(np.float32)), n - 1).astype(np.int64)[None], np.ones((1, to), np.float32)
    places = (middles - 0.5).astype(np.float32)
    places = np.maximum(places, 0) if kind == "bilinear" else places
    first = np.floor(places)
    t, one = places - first, np.float32(1)
    if kind == "bilinear":
        steps, weights = (0, 1), (one - t, t)
    else:
        steps, weights = (-1, 0, 1, 2), (_outer(t + one), _inner(t), _inner(one - t), _outer(one - t + one))  # type: ignore[assignment]
    return np.stack([first + step for step in steps]).clip(0, n - 1).astype(np.int64), np.stack(weights)


def _inner(t: Floats) -> Floats:
    """The weight of bicubic interpolation at a distance of 0 to 1."""
    a = np.float32(CUBIC)
    return ((a + 2) * t - (a + 3)) * t * t + 1


def _outer(t: Floats) -> Floats:
    """The weight at a distance of 1 to 2."""
    a = np.float32(CUBIC)
    return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a


def _normal(unit: Floats, how: How) -> Floats:
    return (unit - _column(how["mean"])) / _column(how["std"])


def _column(values: Any) -> Floats:
    return np.array(values, np.float32).reshape(-1, 1, 1)
