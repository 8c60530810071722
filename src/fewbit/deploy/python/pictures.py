"""From a file to the input of the model."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewbit.data.prepare import prepared, whole

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ARRAYS = "give its pixels as a .npy file of uint8 or uint16, (height, width, channels)"


def opened(content: bytes, name: str, channels: int) -> NDArray[Any]:
    """The pixels (h, w, channels) of a picture or of a .npy file. Raises ValueError for those that the model cannot take."""
    if content.startswith(b"\x93NUMPY"):
        try:
            pixels = np.load(io.BytesIO(content))
        except Exception as error:  # a header that lies gives half a dozen kinds, MemoryError among them
            raise ValueError(f"{name} cannot be read as a .npy file: {error}; write it again with numpy.save.") from error
        if pixels.ndim == 3 and pixels.shape[0] == channels != pixels.shape[2]:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
            raise ValueError(f"{name} holds {pixels.dtype} {pixels.shape}; the model has {channels} channels: {ARRAYS}.")
        return np.ascontiguousarray(pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata and palettes: the pixels are right
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content))
            picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        why = re.sub(r"limit of \d+", f"limit of {Image.MAX_IMAGE_PIXELS}", str(error))  # an error names twice as many
        raise ValueError(f"{name} cannot be decoded as an image: {why} Give a smaller one.") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a broken file
        raise ValueError(f"{name} is none that Pillow reads: {error}".partition("<")[0].strip()) from error
    grey, tags = picture.mode.startswith("I;16"), getattr(picture, "tag_v2", {})
    deep = (content.startswith(b"\x89PNG") and content[24:25] == b"\x10") or max(tags.get(258, (1,))) > 8
    if channels not in MODES or picture.mode in ("I", "F") or (deep and not grey):
        raise ValueError(f"{name} has mode {picture.mode}, or more bits than Pillow keeps; {ARRAYS}.")
    if channels == 4 and not picture.has_transparency_data:
        raise ValueError(f"{name} has no alpha, and the model has 4 channels; {ARRAYS}.")
    if grey:
        return np.array(picture).astype(np.uint16)[..., None].repeat(channels, axis=2)
    converted = picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])
    return np.array(converted).reshape(picture.height, picture.width, channels)


def model_input(pixels: NDArray[Any], how: Mapping[str, Any]) -> NDArray[Any]:
    """What the file takes of one picture, without the batch: numbers (c, h, w), or pixels (h, w, c) where it normalizes."""
    x = prepared(pixels, how)
    if how["normalize"] == "inside":
        return np.ascontiguousarray(whole(x, how).astype(np.uint8).transpose(1, 2, 0))
    return x.astype(how["dtype"])
