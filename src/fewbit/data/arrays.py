"""Images as one array (n, h, w, c) or (n, c, h, w), in memory or in a NumPy file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.core.pixels import CLIPS
from fewbit.data.bands import Array, channels_behind, is_pixels
from fewbit.errors import BadImages
from fewbit.files import is_archive


def numpy_file(path: Path, image: str = "") -> tuple[Array, Array | None, Mapping[str, Array]]:
    """Images, labels and the other arrays of a file; .npy stays on disk, .npz has `images`, one named as the model's `image`
    or a single array, and perhaps `labels`. Raises BadImages.
    """
    arrays = named_arrays(path)
    labels = arrays.pop("labels", None)
    key = next((key for key in (image, "images") if key in arrays), None)
    if key is None and len(arrays) != 1:
        wanted = " or ".join(f"'{name}'" for name in dict.fromkeys((image or "images", "images")))
        raise BadImages(f"{path} has the arrays {', '.join(arrays)}; needed is {wanted}, and 'labels' if there are any.")
    return arrays.pop(next(iter(arrays)) if key is None else key), labels, arrays


def named_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name, that of a .npy file as `images`. Raises BadImages where it cannot be read."""
    try:
        if path.suffix == ".npy":
            return {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
        if not is_archive(path):
            raise ValueError("it is not an archive of arrays")
        with np.load(path, allow_pickle=False) as file:
            return {name: _stored(file, name) for name in file.files}
    except Exception as error:  # NumPy raises whatever zip, pickle and the header parser raise
        found = re.sub(r":? *<[^<>]* at 0x\w+>", "", str(error))
        raise BadImages(f"{path} is not a readable NumPy file: {found}. Write it with numpy.save or savez.") from error


def _stored(file: Any, name: str) -> Array:
    """An array of an .npz file. Raises ValueError where its header says more bytes than there are, before they are reserved."""
    member = name if name in file.zip.namelist() else f"{name}.npy"
    with file.zip.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
    needed, size = math.prod(shape) * dtype.itemsize, file.zip.getinfo(member).file_size
    if needed > size:
        raise ValueError(f"array {name} of shape {shape} needs {needed:,} bytes, it has {size:,}")
    return file[name]  # type: ignore[no-any-return]


def placed(source: Any, where: str, size: tuple[int, int, int]) -> tuple[Array, bool]:
    """Images as an array of pixels or of inputs of the model, and whether channels come first. Raises BadImages."""
    try:
        if isinstance(source, Tensor):
            source = (source.float() if source.dtype == torch.bfloat16 else source).detach().cpu()
        values = np.asarray(source)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise BadImages(f"{where} is not a plain array ({error}). Give a dense one on the processor.") from error
    problem = f"{where} has type {values.dtype} and shape {values.shape}"
    channels, pixels = size[0], is_pixels(values)
    if channels == 1 and values.ndim == 3 and pixels:
        values = values[..., None]  # grey pictures (n, h, w)
    shape, allowed = values.shape, f"uint8 or uint16 (n, h, w, {channels}) or (n, {channels}, h, w)"
    floats = f"normalized floats (n, {size[0]}, {size[1]}, {size[2]})"
    if len(shape) != 4 or not (values.dtype.kind == "f" or pixels):
        advice = CLIPS if len(shape) == 5 else "Give one of these."
        raise BadImages(f"{problem}; allowed is {allowed}, or {floats}. {advice}")
    if 0 in shape:
        raise BadImages(f"{problem}: it holds no {'pixels' if shape[0] else 'images'}. Give one with n, h and w of 1 or more.")
    if not pixels and shape[1:] != size:
        advice = channels_behind(shape, size) or "Resize them, or give uint8 or uint16 pixels."
        raise BadImages(f"{problem}; allowed is {floats}. {advice}")
    first, last = shape[1] == channels, shape[3] == channels
    if pixels and first == last:
        which = "both ends could be the channels" if first else f"neither end has {channels} channels, which the model takes"
        raise BadImages(f"{problem}: {which}; allowed is {allowed}. Transpose it.")
    return values, first
