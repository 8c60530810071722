"""Objects on images, as people write them down: COCO's JSON, YOLO's text files, Pascal VOC's XML, parquet with `objects`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torchvision.ops import box_area

from fewbit.core.task import Placement, Scored
from fewbit.errors import BadImages, UnknownName
from fewbit.task.folder import beside

LARGEST = sys.float_info.max
OUTSIDE = 1.0  # pixels that a box may reach over the border, by rounding
KINDS = "COCO's .json, a folder of YOLO's .txt or Pascal VOC's .xml files, or .parquet with objects {bbox, category}"


@dataclass(frozen=True)
class Objects:
    """The objects of one picture: corners (n, 4) in its pixels, classes (n,), crowds (n,) and areas (n,) in square pixels, and
    where the picture lies in the model's input.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor
    placement: Placement


@dataclass(frozen=True)
class Row:
    """One object as it was read: `where` names it, corners in pixels."""

    where: str
    box: tuple[float, float, float, float]
    label: int
    crowd: bool = False
    area: float | None = None


def read(path: Path, images: Scored, names: Sequence[str], classes: int) -> list[Objects]:
    """The objects of each image; `names` are those of the model's `classes`, if known. Raises BadImages for a file that is
    none, an image without annotation, a class that is not there, a box outside its image, or no object at all.
    """
    sizes = images.sizes()
    if path.suffix.lower() == ".json":
        rows = _coco(path, images.names, sizes, names, classes)
    elif path.suffix.lower() == ".parquet":
        rows = _parquet(path, images.names)
    elif path.is_dir():
        voc = any(path.rglob("*.xml"))
        rows = (_voc if voc else _yolo)(path, images.names, sizes, names)
    else:
        raise BadImages(f"--annotations {path}: it is no file that holds objects. Give {KINDS}.")
    if not any(rows):
        raise BadImages(f"--annotations {path} has no object on any of the {len(sizes)} scored images; give others.")
    found = []
    for some, size in zip(rows, sizes, strict=True):
        for row in some:
            _check(row, size, classes)
        found.append(_objects(some, images.placed(size)))
    return found


def _objects(rows: Sequence[Row], placement: Placement) -> Objects:
    boxes = torch.tensor([row.box for row in rows], dtype=torch.float64).view(-1, 4)
    given = torch.tensor([math.nan if row.area is None else row.area for row in rows], dtype=torch.float64)
    labels, crowd = (torch.tensor([getattr(row, name) for row in rows], dtype=torch.int64) for name in ("label", "crowd"))
    return Objects(boxes, labels, crowd, torch.where(given.isnan(), box_area(boxes), given), placement)


def _check(row: Row, size: tuple[int, int], classes: int) -> None:
    high, wide = size
    x0, y0, x1, y1 = row.box
    inside = -OUTSIDE <= x0 <= x1 <= wide + OUTSIDE and -OUTSIDE <= y0 <= y1 <= high + OUTSIDE  # not so for NaN
    if not inside:
        corners = ", ".join(f"{v:g}" for v in row.box)
        raise BadImages(
            f"{row.where} is a box from ({corners}), and its picture is {wide} x {high} pixels; boxes have to lie inside. Mend "
            "it, or give the annotations of these very pictures."
        )
    if not 0 <= row.label < classes:
        raise BadImages(f"{row.where} has class {row.label}; the model has classes 0 to {classes - 1}. Mend it.")


def _check_size(path: Path, name: str, said: tuple[Any, Any], real: tuple[int, int]) -> None:
    """Raise BadImages where a file says another (width, height) of a picture, so that its boxes lie in other pixels."""
    if said != real:
        raise BadImages(
            f"{path} says that {name} is {said[0]} x {said[1]} pixels, and it is {real[0]} x {real[1]}; give the annotations "
            "of these very pictures."
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise BadImages(f"{path} cannot be read as JSON: {error}. Give {KINDS}.") from error


def _text(path: Path) -> str:
    """The text of a file, in UTF-8 with or without a mark in front. Raises BadImages for other bytes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        kind = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "packed by gzip"}.get(
            error.object[:2], "other bytes"
        )
        raise BadImages(f"{path} is {kind} and no text in UTF-8; unpack it or save it as UTF-8.") from error


def _coco(
    path: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]], classes: Sequence[str], count: int
) -> list[list[Row]]:
    file = _json(path)
    if isinstance(file, list):
        raise BadImages(
            f"{path} holds a list, as predictions in COCO's format are; the annotations are needed, a file with images, "
            "annotations and categories. Give that to --annotations."
        )
    try:
        listed = {str(one["file_name"]): one for one in file["images"]}
        categories = {_whole(path, "category", one["id"]): str(one["name"]) for one in file["categories"]}
        by_image: dict[Any, list[Any]] = {}
        for one in file["annotations"]:
            by_image.setdefault(one["image_id"], []).append(one)
        index = _indices(path, categories, classes, count)
        whole = {PurePosixPath(name).name: one for name, one in listed.items()}
        rows = []
        for name, (high, wide) in zip(names, sizes, strict=True):
            image = listed.get(name) or whole.get(PurePosixPath(name).name)
            if image is None:
                raise BadImages(f"{path} lists no image {name}; every scored image has to be in it, also one without objects.")
            _check_size(path, name, (image.get("width", wide), image.get("height", high)), (wide, high))
            rows.append([_coco_row(path, one, index) for one in by_image.get(image["id"], [])])
    except (KeyError, TypeError, AttributeError) as error:
        raise BadImages(f"{path} is not in COCO's format: {error!r}. It needs images, annotations and categories.") from error
    return rows


def _coco_row(path: Path, one: Any, index: dict[int, int]) -> Row:
    where = f"{path}: annotation {one.get('id', '?')!s:.40}"
    if "bbox" not in one:
        raise BadImages(
            f"{where} has no bbox: x, y, width, height in pixels. Give COCO's file of boxes, or write the box of each."
        )
    x, y, w, h = _four(where, one["bbox"])
    category, crowd, area = one["category_id"], one.get("iscrowd"), one.get("area")
    if not _is_number(category) or category not in index:
        known = f"are {min(index)} to {max(index)}" if index else "are none"
        raise BadImages(f"{where} has category_id {category!r:.40}, and the file's categories {known}; mend it.")
    if crowd not in (None, 0, 1):
        raise BadImages(f"{where} has iscrowd {crowd!r:.40}; 0 and 1 are allowed. Mend it.")
    if area is not None and (not _is_number(area) or not 0 <= area < math.inf):
        raise BadImages(
            f"{where} has area {area!r:.40}; a number of square pixels, 0 or more, is needed. Mend it or leave it out."
        )
    return Row(where, (x, y, x + w, y + h), index[category], bool(crowd), area)


def _is_number(value: Any) -> bool:
    """Whether a value that was read is a number that a float holds; NaN is one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not LARGEST < abs(value) < math.inf


def _four(where: str, box: Any) -> tuple[float, float, float, float]:
    """x, y, width and height in pixels as they were read. Raises BadImages for what is no list of four numbers."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
        raise BadImages(f"{where} has bbox {box!r:.60}; four numbers are needed: x, y, width, height in pixels. Mend it.")
    x, y, w, h = map(float, box)
    return x, y, w, h


def _whole(path: Path, what: str, number: Any) -> int:
    """The number of a class or category as it was read. Raises BadImages for what is no whole number."""
    if not _is_number(number) or not float(number).is_integer():
        raise BadImages(f"{path} has {what} {number!r:.40}; a whole number is needed. Mend it.")
    return int(number)


def _indices(path: Path, categories: dict[int, str], names: Sequence[str], count: int) -> dict[int, int]:
    """From the ids of a file to the model's classes: by name where those are known, else in their order where there are as
    many, or as they are where they begin at 0. Raises BadImages.
    """
    if names:
        places = {name: i for i, name in enumerate(names)}
        for name in categories.values():
            if name not in places:
                raise BadImages(f"{path}: {UnknownName('category', name, names)} Or give the model's names: --classes FILE.")
        return {number: places[name] for number, name in categories.items()}
    if len(categories) == count:
        return {number: i for i, number in enumerate(sorted(categories))}
    if categories and min(categories) == 0 and max(categories) < count:
        return {number: number for number in categories}
    raise BadImages(
        f"{path} has {len(categories)} categories and the model {count} classes without names, so nobody can say which is "
        "which; give the names of the model's classes in order: --classes FILE."
    )


def _yolo(folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]], classes: Sequence[str]) -> list[list[Row]]:
    rows = []
    for file, (high, wide) in zip(beside(folder, names, (".txt",), "annotations"), sizes, strict=True):
        some = []
        for number, line in enumerate(_lines(file), 1):
            where = f"{file}, line {number},"
            try:
                label, x, y, w, h = line.split()
                left, top = (float(x) - float(w) / 2) * wide, (float(y) - float(h) / 2) * high
                box = (left, top, left + float(w) * wide, top + float(h) * high)
                some.append(Row(where, box, int(label)))
            except ValueError:
                raise BadImages(
                    f"{where} is {line!r:.60}; a class and four numbers are needed: center x, center y, width, height as "
                    "shares of the picture."
                ) from None
        rows.append(some)
    return rows


def _lines(file: Path) -> Iterable[str]:
    try:
        return [line for line in _text(file).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadImages(f"{file} cannot be read: {error}. Write it again.") from error


def _voc(folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]], classes: Sequence[str]) -> list[list[Row]]:
    if not classes:
        raise BadImages(f"{folder} names classes, and the model's have no names; give them in order: --classes FILE.")
    rows = []
    for file, name, (high, wide) in zip(beside(folder, names, (".xml",), "annotations"), names, sizes, strict=True):
        try:
            root = ElementTree.fromstring(_text(file))
            some, said = [], [float(root.findtext(f"size/{side}") or 0) for side in ("width", "height")]
            width, height = (int(n) if n.is_integer() else n for n in said)
            _check_size(file, name, (width or wide, height or high), (wide, high))  # 0 is written by tools that do not know it
            for one in root.iter("object"):
                label = str(one.findtext("name"))
                corners = [float(str(one.findtext(f"bndbox/{end}"))) for end in ("xmin", "ymin", "xmax", "ymax")]
                if label not in classes:
                    raise BadImages(f"{file}: {UnknownName('class', label, classes)}")
                x0, y0, x1, y1 = corners
                where = f"{file}: {label}"
                some.append(Row(where, (x0 - 1, y0 - 1, x1, y1), classes.index(label), one.findtext("difficult") == "1"))
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise BadImages(f"{file} is not in Pascal VOC's format: {error}. Give {KINDS}.") from error
        rows.append(some)
    return rows


def _parquet(path: Path, names: Sequence[str]) -> list[list[Row]]:
    """The column `objects` of the file whose rows the images are: boxes as x, y, width, height in pixels, and classes."""
    try:
        column = pq.read_table(path, columns=["objects"])["objects"].to_pylist()
        rows = []
        for name in names:
            place = int(name.rpartition(":")[2])
            one, where = column[place], f"{path}, row {place}:"
            some = []
            for box, label in zip(one["bbox"], one["category"], strict=True):
                x, y, w, h = _four(where, box)
                some.append(Row(where, (x, y, x + w, y + h), _whole(path, "category", label)))
            rows.append(some)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BadImages(f"{path} has no objects {{bbox, category}} for the scored images: {error}. Give {KINDS}.") from error
    return rows
