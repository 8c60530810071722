"""Files that belong to images: masks, depth maps or target pictures in a folder, under the names of the images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewbit.core.task import Scored
from fewbit.core.walk import below
from fewbit.errors import BadImages
from fewbit.task.names import paired, plain
from fewbit.task.rows import unpacked

NUMBERED = re.compile(r".*\.(parquet|npy|npz):\d+")  # what a row of a file is called that has no path
Array = NDArray[np.generic]


def beside(folder: Path, images: Scored, suffixes: Sequence[str], what: str) -> list[Path]:
    """For each image the file of its path (in the folder, or the end of it) with one of the suffixes.

    Raises BadImages where one has none or several or is a row that has no path, and where two images would have the same.
    """
    if not os.path.isdir(folder):
        raise BadImages(
            f"--annotations {folder} is not a folder; {what} are files ({', '.join(suffixes)}) under the images' names."
            f"{unpacked(folder)}"
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
    """The numbers of a .npy file, or of a picture: grey levels (h, w), of one with a palette the numbers in it, of one of 1 bit
    0 and 255, as its black and white are; or 8-bit colours (h, w, 3). Raises BadImages.
    """
    if path.suffix.lower() == ".npy":
        with _readable(path):
            array: Array = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "biuf":
            raise BadImages(f"{path} has no real numbers, but {array.dtype}. Save an array of floats or of integers.")
        return array
    with _opened(path) as picture:
        if picture.mode in ("L", "P", "RGB") or picture.mode.startswith("I"):
            return np.asarray(picture)
        return np.asarray(picture.convert("L" if picture.mode == "1" else "RGB"))


def kind_of(path: Path) -> str:
    """The type of the numbers of a .npy file, the mode in Pillow of a picture. Raises BadImages."""
    if path.suffix.lower() == ".npy":
        return str(read_array(path).dtype)
    with _opened(path) as picture:
        return picture.mode


def read_picture(path: Path, bands: int) -> Array:
    """A picture as it is seen, numbers from 0 to 1 (h, w, channels) in float32: black is 0 and white is 1 in 1, 8 and 16 bits,
    and the numbers of a palette are its colours. Where `bands` is 1, what has colours that are all grey in a palette, or grey
    and alpha, has one channel; else channels are as they are stored. Alpha is left out.

    Raises BadImages for what cannot be read, and for floats or integers of 32 bits, whose white nobody knows.
    """
    with _opened(path) as picture:
        mode, white = picture.mode, 255
        if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):
            array, white = np.asarray(picture), 65535
        elif mode in ("I", "F"):
            kind = "floats" if mode == "F" else "integers of 32 bits"
            raise BadImages(f"{path} has {kind} (mode {mode} of Pillow), whose white nobody knows; save it with 8 or 16 bits.")
        elif mode in ("1", "L") or (mode == "LA" and bands == 1):
            array = np.asarray(picture.convert("L"))
        else:
            array = np.asarray(picture.convert("RGB"))
            if mode in ("P", "PA") and bands == 1 and bool((array == array[:, :, :1]).all()):
                array = array[:, :, 0]
    array = array[:, :, None] if array.ndim == 2 else array
    return array.astype(np.float32) / white


def one_band(path: Path, what: str, palette: bool) -> None:
    """Raise BadImages for a picture of several bands where it has to have a number for each pixel, as `what` have, and for one
    with a `palette` where they have none.
    """
    if path.suffix.lower() == ".npy":
        return
    with _opened(path) as picture:
        bands, mode = picture.getbands(), picture.mode
    grey = "grey (mode L or I;16 of Pillow)"
    if len(bands) > 1:
        more = " or with a palette of these numbers (mode P)" if palette else ""
        raise BadImages(
            f"{path} has {len(bands)} bands ({', '.join(bands)}), and {what} have one, a number for each pixel. Save it as "
            f"{grey}{more}."
        )
    if mode == "P" and not palette:
        raise BadImages(f"{path} has a palette, whose numbers are colours, and {what} have none. Save it as {grey}.")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What is raised where a file is not what its name says becomes BadImages."""
    try:
        yield
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImages(f"{path} cannot be read: {error}. Write it again.") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture, whose pixels are read inside. Raises BadImages."""
    with _readable(path), Image.open(path) as picture:
        yield picture


def same_size(path: Path, found: Sequence[int], name: str, size: tuple[int, int]) -> None:
    """Raise BadImages where a map (h, w) has not the size of its picture."""
    if tuple(found) != size:
        raise BadImages(
            f"{path} is {' x '.join(map(str, found))} pixels (height x width), and {name} is {size[0]} x {size[1]}; "
            "give one number for each pixel of the picture."
        )
