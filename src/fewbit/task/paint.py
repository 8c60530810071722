"""Predictions on pictures: boxes with names, classes of pixels as colours, numbers as colours."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fewbit.core.colours import dark_to_bright

STRENGTH = 0.55  # of the colours of classes over a picture


def colour(index: int) -> tuple[int, int, int]:
    """A colour for a class; neighbours differ (steps of the golden ratio around the circle of hues)."""
    r, g, b = colorsys.hsv_to_rgb(0.61803398875 * index % 1, 0.75, 0.95)
    return round(255 * r), round(255 * g), round(255 * b)


def overlaid(picture: Image.Image, classes: NDArray[np.int64], clear: int | None = None) -> Image.Image:
    """The classes (h, w) of the pixels as colours over a picture of that size; a background stays `clear`."""
    palette = np.array([colour(i) for i in range(int(classes.max()) + 1)], np.float64)
    base = np.asarray(picture.convert("RGB"), np.float64)
    mixed = (1 - STRENGTH) * base + STRENGTH * palette[classes]
    return Image.fromarray(np.where((classes == clear)[:, :, None], base, mixed).round().astype(np.uint8))


def side(values: NDArray[np.float64], size: tuple[int, int]) -> Image.Image:
    """Numbers (h, w) from dark blue (small) to yellow, as a picture of a size (width, height)."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    levels = np.nan_to_num((values - low) / (high - low or 1.0) * 255).round().astype(np.uint8)
    palette = np.array(dark_to_bright(), np.uint8)
    return Image.fromarray(palette[levels]).resize(size, Image.Resampling.BILINEAR)


def boxed(picture: Image.Image, boxes: Any, labels: Sequence[str], colours: Sequence[int]) -> Image.Image:
    """Boxes (n, 4), corners in pixels, with their labels, on a picture."""
    drawn = picture.convert("RGB")
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(max(9, drawn.height // 32))
    for (x0, y0, x1, y1), label, index in zip(boxes, labels, colours, strict=True):
        paint, width = colour(index), max(1, drawn.height // 160)
        pen.rectangle((x0, y0, max(x1, x0), max(y1, y0)), outline=paint, width=width)
        left, top, right, bottom = pen.textbbox((x0, y0), label, font=font)
        top = max(0, y0 - (bottom - top) - 2)
        pen.rectangle((x0, top, x0 + right - left + 2, top + bottom - y0 + 1), fill=paint)
        pen.text((x0 + 1, top), label, fill="black", font=font)
    return drawn
