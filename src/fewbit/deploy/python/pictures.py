"""From a file to the input of the model."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fewbit.data.prepare import in_bands, prepared, whole

KINDS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # that fewbit reads
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BYTES = {"LA;16B": ("RGBA",), "RGB;16B": ("RGB;16B", "RGB;16L"), "RGBA;16B": ("RGBA;16B", "RGBA;16L")}  # Pillow keeps 8 bits
ARRAYS = "give its pixels as a .npy file of uint8 or uint16, (height, width, channels)"


def opened(content: bytes, name: str, channels: int) -> NDArray[Any]:
    """The pixels (h, w, channels) of a picture or of a .npy file. Raises ValueError for those that the model cannot take."""
    if not content:
        raise ValueError(f"{name} is empty, of 0 bytes; give a picture.")
    if content.startswith(b"\x93NUMPY"):
        try:
            pixels = np.load(io.BytesIO(content))
        except Exception as error:  # a header that lies gives half a dozen kinds, MemoryError among them
            raise ValueError(f"{name} cannot be read as a .npy file: {error}; write it again with numpy.save.") from error
        if pixels.ndim == 3 and pixels.shape[0] == channels != pixels.shape[2]:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
            raise ValueError(f"{name} holds {pixels.dtype} {pixels.shape}; the model has {counted(channels)}: {ARRAYS}.")
        return np.ascontiguousarray(pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata and palettes: the pixels are right
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = decoded(content)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        why = re.sub(r"limit of \d+", f"limit of {Image.MAX_IMAGE_PIXELS}", str(error))  # an error names twice as many
        raise ValueError(f"{name} cannot be decoded as an image: {why} Give a smaller one.") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is broken, or of none of the kinds {', '.join(read())}, .npy; give it as PNG.") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a broken file
        cut = "truncated" in str(error).lower()
        how = "is damaged" if cut else "is damaged, or of a kind that Pillow does not read"
        why = str(error).partition("<")[0].strip(" .:")
        again = "get the whole file again" if cut else "get it again, or give it as PNG"
        raise ValueError(f"{name} {how} ({why}); {again}.") from error
    is_deep = content.startswith(b"\x89PNG") and content[24:25] == b"\x10"
    if why := unread(picture, channels, is_deep=is_deep):
        raise ValueError(f"{name} {why}; {ARRAYS}.")
    if is_deep or picture.mode.startswith("I;16"):
        values = in_bands(deep(content) if is_deep else np.array(picture).astype(np.uint16)[..., None], channels)
        assert values is not None  # what does not fit has been told
        return values
    try:
        converted = picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])
    except ValueError as error:
        raise ValueError(f"{name} has mode {picture.mode}: {error}; {ARRAYS}.") from error
    return np.array(converted).reshape(picture.height, picture.width, channels)


def counted(channels: int) -> str:
    return f"{channels} channel{'s' * (channels != 1)}"


def read() -> list[str]:
    """The kinds of picture that are read here."""
    Image.init()
    return [kind for kind in KINDS if kind in Image.OPEN]


def decoded(content: bytes, raw: str = "") -> Image.Image:
    """A picture; `raw` is what Pillow is told of how its bytes lie, where that is not what the file says."""
    picture = Image.open(io.BytesIO(content), formats=read())
    if raw:
        picture.tile = [tile._replace(args=raw) for tile in picture.tile]  # type: ignore[attr-defined]
    picture.load()
    return picture


def unread(picture: Image.Image, channels: int, *, is_deep: bool) -> str:
    """Why a picture is not read for a model, in words; empty where it is. Deep is a PNG of 16 bits."""
    grey, tags = picture.mode.startswith("I;16"), getattr(picture, "tag_v2", {})
    bits, samples, white = max(tags.get(258, (1,))), tags.get(277, 1), tags.get(262)
    if not min(picture.size):
        return "has no pixels"
    if channels not in MODES:
        return f"has mode {picture.mode}, and the model has {counted(channels)}"
    if picture.mode in ("I", "F"):
        return f"has mode {picture.mode}, whose black and white nobody knows"
    if grey and tags and (bits != 16 or white != 1):
        return f"is a TIFF of {bits} bits whose white is {0 if white == 0 else 2**bits - 1}"
    if bits > 8 and not grey and samples > 1:
        return f"is a TIFF of {bits} bits in colour, of which Pillow keeps 8"
    if channels == 4 and not (picture.mode in ("LA", "RGBA") if is_deep else picture.has_transparency_data):
        return "has no alpha, and the model has 4 channels"
    return ""


def deep(content: bytes) -> NDArray[np.uint16]:
    """The bands (h, w, n) of a PNG of 16 bits, of whose colours Pillow gives the upper or the lower bytes."""
    picture = Image.open(io.BytesIO(content), formats=("PNG",))
    raw = str(picture.tile[0].args)  # type: ignore[attr-defined]
    if raw not in BYTES:
        return np.array(picture).astype(np.uint16)[..., None]
    parts = [np.array(decoded(content, one)).astype(np.uint16) for one in BYTES[raw]]
    high, low = parts if len(parts) == 2 else (parts[0][..., ::2], parts[0][..., 1::2])
    return np.asarray(high << 8 | low, np.uint16)


def model_input(pixels: NDArray[Any], how: Mapping[str, Any]) -> NDArray[Any]:
    """What the file takes of one picture, without the batch: numbers (c, h, w), or pixels (h, w, c) where it normalizes."""
    x = prepared(pixels, how)
    if how["normalize"] == "inside":
        return np.ascontiguousarray(whole(x, how).astype(np.uint8).transpose(1, 2, 0))
    return x.astype(how["dtype"])
