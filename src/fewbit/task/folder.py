"""Files that belong to images: masks, depth maps or target pictures in a folder, under the names of the images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewbit.core.task import Scored
from fewbit.core.walk import below
from fewbit.errors import BadImages
from fewbit.task.names import paired, plain

NUMBERED = re.compile(r".*\.(parquet|npy|npz):\d+")  # what a row of a file is called that has no path
Array = NDArray[np.generic]


def beside(folder: Path, images: Scored, suffixes: Sequence[str], what: str) -> list[Path]:
    """For each image the file of its path (in the folder, or the end of it) with one of the suffixes.

    Raises BadImages where one has none or several or is a row that has no path, and where two images would have the same.
    """
    if not os.path.isdir(folder):
        raise BadImages(
            f"--annotations {folder} is not a folder; {what} are files ({', '.join(suffixes)}) under the images' names."
        )
    listed = [path.as_posix() for path in below(folder)[0] if path.suffix.lower() in suffixes]
    files = [folder / name for name in listed]

    if numbered := next((path for path in images.paths if NUMBERED.fullmatch(path)), ""):
        raise BadImages(
            f"{numbered} is a row without a path, and {what} are found by the path of each picture; give a folder of pictures "
            "(--score DIR), or parquet whose column image has a path in each row, or leave --annotations out."
        )

    def unclear(name: str, found: Sequence[int]) -> BadImages:
        some = " and ".join(str(files[i]) for i in found[:2])
        has = f"{len(found)} files, {some}" if found else "no file"
        return BadImages(
            f"{name} has {has} in {folder}; {what} are files {PurePosixPath(name).stem}{'|'.join(suffixes)}, one for each "
            "scored image. Add or remove files, or leave --annotations out."
        )

    paths = [plain(path) for path in images.paths]
    return [files[i] for i in paired(paths, listed, f"--annotations {folder}", unclear, stems=True)]


def read_array(path: Path) -> Array:
    """The numbers of a .npy file, or the pixels of a picture as they are stored: (h, w), or (h, w, 3). Raises BadImages."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]
        with Image.open(path) as picture:
            return np.asarray(picture if picture.mode in ("L", "P", "I;16", "I", "RGB", "1") else picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadImages(f"{path} cannot be read: {error}. Write it again.") from error


def one_band(path: Path, what: str) -> None:
    """Raise BadImages for a picture of several bands where it has to have a number for each pixel, as `what` have."""
    if path.suffix.lower() == ".npy":
        return
    try:
        with Image.open(path) as picture:
            bands = picture.getbands()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadImages(f"{path} cannot be read: {error}. Write it again.") from error
    if len(bands) > 1:
        raise BadImages(
            f"{path} has {len(bands)} bands ({', '.join(bands)}), and {what} have one, a number for each pixel. Save it as "
            "grey (mode L or I;16 of Pillow) or with a palette of these numbers (mode P)."
        )


def same_size(path: Path, found: Sequence[int], name: str, size: tuple[int, int]) -> None:
    """Raise BadImages where a map (h, w) has not the size of its picture."""
    if tuple(found) != size:
        raise BadImages(
            f"{path} is {' x '.join(map(str, found))} pixels (height x width), and {name} is {size[0]} x {size[1]}; "
            "give one number for each pixel of the picture."
        )
