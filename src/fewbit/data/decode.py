"""From an encoded image, or pixels, to a picture in RGB, as timm converts it.

Grey is repeated, alpha is dropped, CMYK is converted; EXIF orientation is NOT applied, which is timm's behaviour too.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from fewbit.errors import BadImages

KNOWN = {
    ".avif": "AVIF", ".bmp": "BMP", ".gif": "GIF", ".heic": "HEIF", ".heif": "HEIF", ".jfif": "JPEG", ".jp2": "JPEG2000",
    ".jpeg": "JPEG", ".jpg": "JPEG", ".pgm": "PPM", ".png": "PNG", ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF",
    ".webp": "WEBP",
}  # fmt: skip
CODECS = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "PNG": "zlib", "WEBP": "webp"}  # what Pillow was built with
LARGEST = 1e6  # of a normalized pixel; more overflows in the model

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


@cache
def formats() -> dict[str, str]:
    """Suffix to format of the pictures that this installation of Pillow reads."""
    Image.init()
    there = {kind for kind in set(KNOWN.values()) & set(Image.OPEN) if kind not in CODECS or features.check(CODECS[kind])}
    return {suffix: kind for suffix, kind in KNOWN.items() if kind in there}


def decode(item: Item, name: str) -> Image.Image:
    """The picture in RGB, the first where there are several. Raises BadImages with the name."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        if item is None:
            raise ValueError("its bytes are missing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata and palettes: the pixels are right
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(item if isinstance(item, Path) else io.BytesIO(item), formats=tuple(formats().values())) as picture:
                if not min(picture.size):
                    raise ValueError("it has no pixels")
                picture.load()
                return rgb(picture)
    except UnidentifiedImageError as error:
        there = ", ".join(dict.fromkeys(formats().values()))
        raise BadImages(f"{name} cannot be decoded as an image: this installation reads {there}.") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a broken file
        raise BadImages(f"{name} cannot be decoded as an image: {error}.") from error


def encoded(item: Path | bytes | None, name: str) -> bytes:
    try:
        return item.read_bytes() if isinstance(item, Path) else item or b""
    except OSError as error:
        raise BadImages(f"{name} cannot be read: {error}.") from error


def checked(item: Item, name: str) -> bytes:
    """A hash of an image's pixels, equal where pixels are, whatever file they are in. Raises BadImages for an image that does
    not decode, and for floats that are no normalized pixels.
    """
    if isinstance(item, np.ndarray) and item.dtype != np.uint8:
        if not np.isfinite(item).all():
            raise BadImages(f"{name} has {np.sum(~np.isfinite(item))} NaN or infinite values; all must be finite.")
        if (largest := float(np.abs(item).max())) > LARGEST:
            raise BadImages(f"{name} has values up to {largest:.3g}; normalized pixels are at most {LARGEST:.0e}.")
        shape, content = item.shape, item.tobytes()
    else:
        picture = decode(item, name)
        shape, content = picture.size, picture.tobytes()
    return hashlib.blake2b(content, digest_size=16, salt=str(shape).encode()[:16]).digest()
