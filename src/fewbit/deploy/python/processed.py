"""From the pixels of a picture to the input of a model whose own image processor, of transformers, makes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewbit.data.prepare import _column, _normal, middle, whole

How = Mapping[str, Any]


def prepared(pixels: NDArray[Any], how: How) -> NDArray[np.float32]:
    """The normalized input (channels, height, width) for pixels (h, w, channels)."""
    if json.loads(how["processor"]).get("do_center_crop"):
        pixels = middle(pixels, how)
    x = _made(pixels, how)
    return _normal(whole(x, how) / np.float32(255), how) if how["normalize"] == "inside" else x


def _made(pixels: NDArray[Any], how: How) -> NDArray[np.float32]:
    import transformers

    fields = json.loads(how["processor"])
    processor = getattr(transformers, fields["image_processor_type"]).from_dict(fields)
    few = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    few = few if few.dtype == np.uint8 else (few / 257).round().astype(np.uint8)
    values = processor(images=Image.fromarray(few), return_tensors="pt")["pixel_values"]
    return np.asarray(values[0].float().numpy(), np.float32)


def placed(high: int, wide: int, how: How) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where a picture comes to lie in the input: by what becomes of red that rises to the right, and green downwards."""
    columns, rows = ((np.arange(n) + 0.5) / n * 255 for n in (wide, high))
    slopes = np.stack(np.broadcast_arrays(columns[None, :], rows[:, None], np.zeros((1, 1))), -1).round().astype(np.uint8)
    x = _made(slopes, how)
    x = 255 * (x * _column(how["std"]) + _column(how["mean"]))
    x = x[::-1] if json.loads(how["processor"]).get("do_flip_channel_order") else x
    found = []
    for line, n in ((np.median(x[0], 0), wide), (np.median(x[1], 1), high)):
        inside = np.flatnonzero((line > 2) & (line < 253))
        slope, start = np.polyfit(line[inside].astype(np.float64) / 255 * n, inside + 0.5, 1)
        found.append((float(slope), float(start)))
    return found[0], found[1]
