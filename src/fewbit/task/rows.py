"""One object as a file has it, and what its numbers may be, whatever the format."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import BadImages

LARGEST = sys.float_info.max
OUTSIDE = 1.0  # pixels that a box may reach over the border, by rounding
PACKED = (".gz", ".tgz", ".zip", ".tar", ".bz2", ".xz", ".7z", ".rar", ".zst")
GZIP = b"\x1f\x8b"

KINDS = "COCO's .json, a folder of YOLO's .txt or Pascal VOC's .xml files, or .parquet with objects {bbox, category}"


@dataclass(frozen=True)
class Row:
    """One object as it was read: `where` names it, corners in pixels, and `written` is its box in the words of the file."""

    where: str
    box: tuple[float, float, float, float]
    label: int
    written: str
    crowd: bool = False
    area: float | None = None
    shares: tuple[float, ...] = ()  # YOLO's numbers


def check_box(row: Row, size: tuple[int, int]) -> None:
    """Raise BadImages for a box with numbers that are none, one of negative width or height, and one outside its picture, whose
    `size` is (height, width) in pixels.
    """
    (high, wide), (x0, y0, x1, y1) = size, row.box
    if not all(map(math.isfinite, row.box)):
        raise BadImages(f"{row.where} has {row.written}; only finite numbers are places in a picture. Fix it.")
    if negative := [name for name, low, end in (("width", x0, x1), ("height", y0, y1)) if end < low]:
        raise BadImages(
            f"{row.where} has {row.written}, a box of negative {' and '.join(negative)}; width and height are 0 or more, and "
            "the smaller corner comes first. Fix it."
        )
    if -OUTSIDE <= x0 <= x1 <= wide + OUTSIDE and -OUTSIDE <= y0 <= y1 <= high + OUTSIDE:
        return
    if not all(0 <= share <= 1 for share in row.shares):
        raise BadImages(
            f"{row.where} has {row.written}; YOLO's numbers are shares of the picture, from 0 to 1. Divide x and width by the "
            f"picture's width in pixels ({wide}), y and height by its height ({high})."
        )
    corners = ", ".join(f"{v:g}" for v in row.box)
    raise BadImages(
        f"{row.where} is a box from ({corners}), and its picture is {wide} x {high} pixels; boxes have to lie inside. Fix "
        "it, or give the annotations of these very pictures."
    )


def check_size(where: Path | str, name: str, said: tuple[Any, ...], real: tuple[int, int]) -> None:
    """Raise BadImages where a file says another (width, height) of a picture, so that its boxes lie in other pixels. What is
    not said, or said as 0, is not known.
    """
    found = [_pixels(f"{where}: {side} of {name}", value) for side, value in zip(("width", "height"), said, strict=True)]
    width, height = (right if one is None else one for one, right in zip(found, real, strict=True))
    if (width, height) != real:
        raise BadImages(
            f"{where} says that {name} is {width} x {height} pixels, and it is {real[0]} x {real[1]}; give the annotations "
            "of these very pictures."
        )


def _pixels(where: str, value: Any) -> int | float | None:
    """A side of a picture as it was read, also as text; None where it is unknown. Raises BadImages for what is not a number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value) if isinstance(value, str) or is_number(value) else None
    except ValueError:
        number = None
    if number is None:
        raise BadImages(f"{where} is {value!r:.40}; a number of pixels is needed. Fix it or leave it out.")
    return (int(number) if number.is_integer() else number) or None


def text_of(path: Path) -> str:
    """The text of a file, in UTF-8 with or without a mark in front. Raises BadImages for other bytes."""
    read = bytes_of(path)
    try:
        return read.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}.get(read[:2], "other bytes")
        raise BadImages(f"{path} is {kind} and no text in UTF-8; save it as UTF-8.") from error


def bytes_of(path: Path) -> bytes:
    """What a file holds. Raises BadImages where that is packed."""
    read = path.read_bytes()
    if read.startswith((GZIP, b"PK\x03\x04")):
        raise BadImages(f"{path} is packed by {'gzip' if read.startswith(GZIP) else 'zip'}; unpack it.")
    return read


def unpacked(path: Path) -> str:
    """What to do first about a file that is packed, by its name; nothing for another."""
    return f" It is packed ({path.suffix}): unpack it." if path.suffix.lower() in PACKED else ""


def is_number(value: Any) -> bool:
    """Whether a value that was read is a number that a float holds; NaN is one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not LARGEST < abs(value) < math.inf


def four(where: str, box: Any) -> tuple[float, float, float, float]:
    """x, y, width and height in pixels as they were read. Raises BadImages for what is not a list of four numbers."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(is_number, box)):
        raise BadImages(f"{where} has bbox {box!r:.60}; four numbers are needed: x, y, width, height in pixels. Fix it.")
    x, y, w, h = map(float, box)
    return x, y, w, h


def whole(where: Path | str, what: str, number: Any) -> int:
    """The number of a class or category as it was read. Raises BadImages for what is not a whole number."""
    if not is_number(number) or not float(number).is_integer():
        raise BadImages(f"{where} has {what} {number!r:.40}; a whole number is needed. Fix it.")
    return int(number)
