"""From an encoded image, or pixels, to a picture in RGB, as timm converts it.

Grey is repeated, alpha is dropped, CMYK is converted; EXIF orientation is NOT applied, which is timm's behaviour too.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewbit.errors import BadImages

Array = np.ndarray[Any, Any]
Item = Path | bytes | Array | None  # an encoded file, encoded bytes, pixels (uint8 h w 3) or a normalized input (3 h w)


def rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB. Raises BadImages for more than 8 bits per channel, which Pillow would saturate."""
    if image.mode.startswith(("I", "F")):
        raise BadImages(f"mode {image.mode} has more than 8 bits per channel; allowed is 8, save it with 8 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def unit(picture: Image.Image) -> Tensor:
    """RGB pixels as float32 (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)


def decode(item: Item, name: str, *, small: bool = False) -> Image.Image:
    """The picture in RGB; `small` lets JPEG come out at an eighth of its size. Raises BadImages with the name."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        if item is None:
            raise ValueError("its bytes are missing")
        with Image.open(item if isinstance(item, Path) else io.BytesIO(item)) as picture:
            if small:
                picture.draft("RGB", (1, 1))
            picture.load()
            return rgb(picture)
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a broken file
        raise BadImages(f"{name} cannot be decoded as an image: {error}.") from error


def encoded(item: Path | bytes | None, name: str) -> bytes:
    try:
        return item.read_bytes() if isinstance(item, Path) else item or b""
    except OSError as error:
        raise BadImages(f"{name} cannot be read: {error}.") from error


def check(item: Item, name: str) -> None:
    """Raises BadImages for an image that does not decode, or floats with NaN or infinity."""
    if not isinstance(item, np.ndarray):
        decode(item, name, small=True)
    elif item.dtype != np.uint8 and not np.isfinite(item).all():
        raise BadImages(f"{name} has {np.sum(~np.isfinite(item))} NaN or infinite values; all must be finite.")
