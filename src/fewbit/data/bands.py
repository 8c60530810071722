"""The bands of a picture as an array (h, w, channels), uint8 or uint16, with as many of them as the model takes channels.

Pictures in grey, RGB or either with alpha become grey, RGB or RGBA. Any other number of channels needs as many bands.
"""

from __future__ import annotations

import io
import logging
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewbit.data.prepare import in_bands
from fewbit.errors import BadImages, FewbitError

Array = np.ndarray[Any, Any]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BITS, SAMPLES, COLOURS = 258, 277, 262  # tags of a TIFF
PLAIN = (1, 2)  # of COLOURS: grey with 0 for black, RGB
for library in ("PIL", "tifffile"):  # what they say of files stands in the errors, or a file is right
    logging.getLogger(library).addHandler(logging.NullHandler())


def is_pixels(values: Array) -> bool:
    """Whether an array is of the types that pixels have, by which it is no normalized input."""
    return values.dtype.kind == "u" and values.dtype.itemsize <= 2


def channels_behind(shape: tuple[int, ...], size: tuple[int, int, int]) -> str:
    """How inputs of the model that have their channels last, images (h, w, c) or arrays (n, h, w, c), become those of `size`
    (c, h, w), in a sentence; empty where they are of another shape.
    """
    if shape[-3:] != (*size[1:], size[0]) or shape[-3:] == size or len(shape) > 4:
        return ""
    order = "2, 0, 1" if len(shape) == 3 else "0, 3, 1, 2"
    return f"The channels are last; put them first: x.transpose({order}) in NumPy, x.permute({order}) in torch."


def channels_last(values: Array, channels: int) -> Array:
    """Pixels (h, w, channels) of an array with the channels last or first, of one channel also (h, w). Raises BadImages."""
    placed = values[..., None] if channels == 1 and values.ndim == 2 else values
    first, last = placed.shape[:1] == (channels,), placed.shape[-1:] == (channels,)
    if not is_pixels(values) or placed.ndim != 3 or 0 in placed.shape or first == last:
        raise BadImages(f"it has type {values.dtype} and shape {values.shape}; {_allowed(channels)}")
    native = placed.astype(placed.dtype.newbyteorder("="))
    return np.ascontiguousarray(native.transpose(1, 2, 0) if first else native)


def of_picture(picture: Image.Image, channels: int) -> Array:
    """The pixels of a picture in Pillow, 8 bits or 16. Raises BadImages for other types and for bands that do not fit."""
    if picture.mode.startswith("I;16"):
        return fitted(np.array(picture).astype(np.uint16)[..., None], channels)
    if picture.mode in ("I", "F"):
        raise BadImages(f"it has mode {picture.mode}, whose black and white nobody knows; {_allowed(channels)}")
    if channels not in MODES or (channels == 4 and not picture.has_transparency_data):
        raise _misfit(len(picture.getbands()), f" ({picture.mode})", channels)
    converted = picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])
    return np.array(converted).reshape(picture.height, picture.width, channels)


def fitted(values: Array, channels: int) -> Array:
    """Grey, grey with alpha, RGB or RGBA (h, w, bands) in as many bands as there are channels. Raises BadImages."""
    found = in_bands(values, channels)
    if found is None:
        raise _misfit(values.shape[2], "", channels)
    return found


def _misfit(bands: int, kind: str, channels: int) -> BadImages:
    wanted = f"{channels} channel{'s' * (channels > 1)}"
    return BadImages(f"it has {bands} band{'s' * (bands > 1)}{kind} and the model {wanted}; {_allowed(channels)}")


def _allowed(channels: int) -> str:
    pictures = {1: "grey or colour pictures", 3: "pictures", 4: "RGBA pictures"}.get(channels)
    many = f"{'or ' if pictures else ''}TIFF files and arrays of {channels} band{'s' * (channels > 1)}"
    return f"allowed are {pictures + ', ' if pictures else ''}{many}, of 8 or 16 bits without sign"


def deep_png(head: bytes) -> bool:
    """Whether a file of these first bytes is a PNG of 16 bits."""
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:25] == b"\x10"


def read_png(data: bytes) -> Array:
    """The bands (h, w, n) of a PNG of 16 bits, of which Pillow keeps 8 where they are coloured."""
    from torchvision.io import ImageReadMode, decode_image

    values = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return np.ascontiguousarray(values.numpy().transpose(1, 2, 0))


def is_tiff(head: bytes) -> bool:
    """Whether a file of these first bytes is a TIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def beyond_pillow(picture: Image.Image, channels: int) -> bool:
    """Whether Pillow keeps less of an open TIFF than it holds: 8 of 16 bits, or fewer bands than the model takes."""
    tags = picture.tag_v2  # type: ignore[attr-defined]
    bits, samples, colours = max(tags.get(BITS, (1,))), tags.get(SAMPLES, 1), tags.get(COLOURS)
    grey = picture.mode.startswith("I;16")
    if grey and (bits != 16 or colours != 1):
        raise BadImages(f"it has {bits} bits, and white is {2**bits - 1 if colours else 0}; {_allowed(channels)}")
    if bits > 8 and not grey:
        return bool(samples > 1)
    if channels in (1, 3) or (channels == 4 and picture.has_transparency_data):
        return False
    return colours in PLAIN and channels in (samples, getattr(picture, "n_frames", 1))


def read_tiff(source: Path | bytes, channels: int) -> Array:
    """The bands (h, w, channels) of a TIFF, which are samples of a pixel or grey pictures one after the other.

    Raises BadImages, and FewbitError where tifffile is not installed.
    """
    with _tifffile().TiffFile(source if isinstance(source, Path) else io.BytesIO(source)) as file:
        page = file.pages.first
        if not page.imagewidth * page.imagelength:
            raise BadImages("it has no pixels")
        part = page if page.samplesperpixel > 1 else file.series[0]
        axes = "".join(axis for axis, n in zip(part.axes, part.shape, strict=True) if n > 1 or axis in "YX")
        bands = math.prod(part.shape) // (page.imagewidth * page.imagelength)
        if (
            part.dtype not in (np.uint8, np.uint16)
            or page.bitspersample != 8 * part.dtype.itemsize
            or page.photometric not in PLAIN
        ):
            kind = f"{part.dtype}, {page.bitspersample} bits, {page.photometric.name}"
            raise BadImages(f"it has samples of type {kind}; {_allowed(channels)}")
        if page.imagewidth * page.imagelength > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise BadImages(f"it has {page.imagewidth * page.imagelength} pixels, which is more than Pillow allows")
        if len(axes) > 3 or (bands != channels and bands > 4):
            raise _misfit(bands, f" ({part.axes} {part.shape})", channels)
        values = part.asarray().reshape([n for axis, n in zip(part.axes, part.shape, strict=True) if n > 1 or axis in "YX"])
    values = np.moveaxis(values, (axes.index("Y"), axes.index("X")), (0, 1)).reshape(page.imagelength, page.imagewidth, bands)
    native = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("=")))
    if page.photometric == 2 or bands == 1:
        return fitted(native, channels)
    if bands != channels:
        raise _misfit(bands, "", channels)
    return native


@cache
def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise FewbitError(
            "TIFF files of many bands, or of 16 bits in colour, need tifffile: pip install 'fewbit[tiff]'."
        ) from error
    return tifffile


def shown(values: Array) -> Image.Image:
    """A picture of 8 bits in RGB: the first three bands, or the first as grey where there are fewer."""
    few = values[..., :3] if values.shape[2] >= 3 else values[..., :1].repeat(3, axis=2)
    return Image.fromarray(few if few.dtype == np.uint8 else (few / 257).round().astype(np.uint8))
