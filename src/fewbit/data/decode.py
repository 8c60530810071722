"""From an encoded image to pixels of as many bands as the model takes channels, as timm converts a picture to RGB.

Grey is repeated, alpha is dropped, CMYK is converted; EXIF orientation is NOT applied, which is timm's behaviour too. For a
model of one channel a colour becomes its luminance, for one of four a picture needs alpha.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from fewbit.data.bands import Array, beyond_pillow, channels_last, deep_png, fitted, is_tiff, of_picture, read_png, read_tiff
from fewbit.errors import BadImages, FewbitError

KNOWN = {
    ".avif": "AVIF", ".bmp": "BMP", ".gif": "GIF", ".heic": "HEIF", ".heif": "HEIF", ".jfif": "JPEG", ".jp2": "JPEG2000",
    ".jpeg": "JPEG", ".jpg": "JPEG", ".pgm": "PPM", ".png": "PNG", ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF",
    ".webp": "WEBP",
}  # fmt: skip
CODECS = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "PNG": "zlib", "WEBP": "webp"}  # what Pillow was built with
NUMPY = b"\x93NUMPY"  # how a .npy file begins
LARGEST = 1e6  # of a normalized pixel; more overflows in the model

# An encoded file, encoded bytes, pixels (uint8 or uint16, h w c) or a normalized input (float32, c h w).
Item = Path | bytes | Array | None


def is_input(item: Item) -> bool:
    """Whether an item is a normalized input of the model rather than a picture."""
    return isinstance(item, np.ndarray) and item.dtype.kind == "f"


@cache
def formats() -> dict[str, str]:
    """Suffix to format of the pictures that this installation of Pillow reads."""
    Image.init()
    there = {kind for kind in set(KNOWN.values()) & set(Image.OPEN) if kind not in CODECS or features.check(CODECS[kind])}
    return {suffix: kind for suffix, kind in KNOWN.items() if kind in there}


def decode(item: Item, name: str, channels: int) -> Array:
    """The pixels (h, w, channels), uint8 or uint16, of the first picture. Raises BadImages with the name."""
    if isinstance(item, np.ndarray):
        return item
    try:
        if item is None:
            raise ValueError("its bytes are missing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata and palettes: the pixels are right
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decoded(item, channels)
    except UnidentifiedImageError as error:
        if (isinstance(item, Path) and not item.stat().st_size) or item == b"":
            raise BadImages(f"{name} cannot be decoded as an image: it is empty, of 0 bytes.") from error
        there = ", ".join(dict.fromkeys(formats().values()))
        raise BadImages(f"{name} cannot be decoded as an image: this installation reads {there}.") from error
    except BadImages as error:
        raise BadImages(f"{name}: {error}.") from error
    except (MemoryError, FewbitError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        why = re.sub(r"limit of \d+", f"limit of {Image.MAX_IMAGE_PIXELS}", str(error))  # an error names twice as many
        raise BadImages(f"{name} cannot be decoded as an image: {why.rstrip('. ')}.") from error
    except FileNotFoundError as error:
        gone = f"{error.filename or name} is not there (any more)"
        raise BadImages(f"{name} cannot be decoded as an image: {gone}; give files that are there.") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a broken file
        raise BadImages(f"{name} cannot be decoded as an image: {str(error).rstrip('. ')}.") from error


def _decoded(item: Path | bytes, channels: int) -> Array:
    """The pixels, by Pillow where it keeps all that the model takes."""
    with item.open("rb") if isinstance(item, Path) else io.BytesIO(item) as file:
        head = file.read(25)
    if head.startswith(NUMPY) and isinstance(item, Path):
        return channels_last(np.load(item, mmap_mode="r", allow_pickle=False), channels)  # mapped: its header may lie
    try:
        with Image.open(item if isinstance(item, Path) else io.BytesIO(item), formats=tuple(formats().values())) as picture:
            if not min(picture.size):
                raise ValueError("it has no pixels")
            if deep_png(head):
                return fitted(read_png(item.read_bytes() if isinstance(item, Path) else item), channels)
            if picture.format != "TIFF" or not beyond_pillow(picture, channels):
                picture.load()
                return of_picture(picture, channels)
    except UnidentifiedImageError:
        if not is_tiff(head):
            raise
    return read_tiff(item, channels)


def encoded(item: Path | bytes | None, name: str) -> bytes:
    try:
        return item.read_bytes() if isinstance(item, Path) else item or b""
    except OSError as error:
        raise BadImages(f"{name} cannot be read: {error}.") from error


def checked(item: Item, name: str, channels: int) -> bytes:
    """A hash of an image's pixels, equal where pixels are, whatever file they are in. Raises BadImages for an image that does
    not decode, and for floats that are no normalized pixels.
    """
    if isinstance(item, np.ndarray) and is_input(item):
        if not np.isfinite(item).all():
            raise BadImages(f"{name} has {np.sum(~np.isfinite(item))} NaN or infinite values; all must be finite.")
        if (largest := float(np.abs(item).max())) > LARGEST:
            raise BadImages(f"{name} has values up to {largest:.3g}; normalized pixels are at most {LARGEST:.0e}.")
        shape, content = item.shape, item.tobytes()
    else:
        pixels = decode(item, name, channels)
        shape, content = (pixels.shape[1], pixels.shape[0]), pixels.tobytes()
    return hashlib.blake2b(content, digest_size=16, salt=str(shape).encode()[:16]).digest()
