"""Objects on images, as people write them down: COCO's JSON, YOLO's text files, Pascal VOC's XML, parquet with `objects`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torchvision.ops import box_area

from fewbit.core.task import Placement, Scored
from fewbit.core.walk import below
from fewbit.errors import BadImages, UnknownName
from fewbit.task.folder import beside
from fewbit.task.names import paired, plain

LARGEST = sys.float_info.max
OUTSIDE = 1.0  # pixels that a box may reach over the border, by rounding
KINDS = "COCO's .json, a folder of YOLO's .txt or Pascal VOC's .xml files, or .parquet with objects {bbox, category}"
ROW = re.compile(r"(.*\.parquet):(\d+)")  # the name of an image that is a row of parquet


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
    kinds = {file.suffix.lower() for file in below(path)[0]} if path.is_dir() else set[str]()
    are_rows = all(ROW.fullmatch(name) for name in images.names)
    if path.suffix.lower() == ".json":
        rows = _coco(path, images.names, sizes, names, classes)
    elif path.suffix.lower() == ".parquet" or (are_rows and ".parquet" in kinds):
        rows = _parquet(path, images.names, sizes)
    elif path.is_dir():
        rows = (_voc if ".xml" in kinds else _yolo)(path, images.names, sizes, names)
    else:
        raise BadImages(f"--annotations {path}: it is not a file that holds objects. Give {KINDS}.")
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
            f"{row.where} is a box from ({corners}), and its picture is {wide} x {high} pixels; boxes have to lie inside. Fix "
            "it, or give the annotations of these very pictures."
        )
    if not 0 <= row.label < classes:
        raise BadImages(f"{row.where} has class {row.label}; the model has classes 0 to {classes - 1}. Fix it.")


def _check_size(where: Path | str, name: str, said: tuple[Any, ...], real: tuple[int, int]) -> None:
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
        number = float(value) if isinstance(value, str) or _is_number(value) else None
    except ValueError:
        number = None
    if number is None:
        raise BadImages(f"{where} is {value!r:.40}; a number of pixels is needed. Fix it or leave it out.")
    return (int(number) if number.is_integer() else number) or None


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
        entries = _entries(path, file["images"])
        known, same = list(entries), list(entries.values())
        categories = _categories(path, file["categories"])
        index = _indices(path, categories, classes, count)

        def unclear(name: str, found: Sequence[int]) -> BadImages:
            some = " and ".join(known[i] for i in found[:2])
            if found:
                return BadImages(f"{path} lists {some}, and {name} could be either; give file_name as the images are called.")
            return BadImages(
                f"{path} lists no image {name}; every scored image has to be in it, also one without objects. Add it, or give "
                "the file of these images."
            )

        places = paired([plain(name) for name in names], known, str(path), unclear)
        by_image: dict[Any, list[Any]] = {one["id"]: [] for one in file["images"]}
        for one in file["annotations"]:
            if one["image_id"] not in by_image:
                raise BadImages(
                    f"{path}: annotation {one.get('id', '?')!s:.40} has image_id {one['image_id']!r:.40}, which is the id "
                    f"of no image of the file{_like(one['image_id'], by_image)}. Fix it, or list its image."
                )
            by_image[one["image_id"]].append(one)
        rows = []
        for place, name, (high, wide) in zip(places, names, sizes, strict=True):
            some: list[Row] = []
            for image in same[place]:
                _check_size(path, name, (image.get("width"), image.get("height")), (wide, high))
                here = [_coco_row(path, one, index) for one in by_image[image["id"]]]
                there = {(row.box, row.label) for row in some}
                some += [row for row in here if (row.box, row.label) not in there]
            rows.append(some)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadImages(f"{path} is not in COCO's format: {error!r}. It needs images, annotations and categories.") from error
    return rows


def _entries(path: Path, images: Any) -> dict[str, list[Any]]:
    """The images that a file lists, by path: one that is listed under several ids has all of their annotations, each box once.
    Raises BadImages for one id of several images.
    """
    entries, names = dict[str, list[Any]](), dict[Any, str]()
    for one in images:
        name = PurePosixPath(plain(str(one["file_name"]))).as_posix()
        if one["id"] not in names:
            entries.setdefault(name, []).append(one)
        elif names[one["id"]] != name:
            raise BadImages(
                f"{path} lists {names[one['id']]} and {name} under the one id {one['id']!r:.40}, so nobody can say whose the "
                "annotations are. Give each image an id of its own."
            )
        names[one["id"]] = name
    return entries


def _categories(path: Path, listed: Any) -> dict[int, str]:
    """The names of categories by id. Raises BadImages for one id of several names."""
    found: dict[int, str] = {}
    for one in listed:
        number, name = _whole(path, "category", one["id"]), str(one["name"])
        if found.setdefault(number, name) != name:
            raise BadImages(
                f"{path} has the categories {found[number]!r:.40} and {name!r:.40} under the one id {number}. Give each an id "
                "of its own."
            )
    return found


def _like(number: Any, known: Iterable[Any]) -> str:
    """What to know of an id that looks like one of another type, "7" like 7."""
    return next((f" ({one!r:.40} is one, which is another type)" for one in known if str(one) == str(number)), "")


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
        raise BadImages(f"{where} has category_id {category!r:.40}, and the file's categories {known}; fix it.")
    if crowd not in (None, 0, 1):
        raise BadImages(f"{where} has iscrowd {crowd!r:.40}; 0 and 1 are allowed. Fix it.")
    if area is not None and (not _is_number(area) or not 0 <= area < math.inf):
        raise BadImages(
            f"{where} has area {area!r:.40}; a number of square pixels, 0 or more, is needed. Fix it or leave it out."
        )
    return Row(where, (x, y, x + w, y + h), index[category], bool(crowd), area)


def _is_number(value: Any) -> bool:
    """Whether a value that was read is a number that a float holds; NaN is one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not LARGEST < abs(value) < math.inf


def _four(where: str, box: Any) -> tuple[float, float, float, float]:
    """x, y, width and height in pixels as they were read. Raises BadImages for what is not a list of four numbers."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
        raise BadImages(f"{where} has bbox {box!r:.60}; four numbers are needed: x, y, width, height in pixels. Fix it.")
    x, y, w, h = map(float, box)
    return x, y, w, h


def _whole(where: Path | str, what: str, number: Any) -> int:
    """The number of a class or category as it was read. Raises BadImages for what is not a whole number."""
    if not _is_number(number) or not float(number).is_integer():
        raise BadImages(f"{where} has {what} {number!r:.40}; a whole number is needed. Fix it.")
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
                label, x, y, w, h, *confidence = line.split()
                if len(confidence) > 1 or not float(label).is_integer() or not all(0 <= float(c) <= 1 for c in confidence):
                    raise ValueError
                left, top = (float(x) - float(w) / 2) * wide, (float(y) - float(h) / 2) * high
                box = (left, top, left + float(w) * wide, top + float(h) * high)
                some.append(Row(where, box, int(float(label))))
            except (ValueError, OverflowError):
                raise BadImages(
                    f"{where} is {line!r:.60}; a class and four numbers are needed: center x, center y, width, height as "
                    "shares of the picture, and perhaps a confidence (0 to 1), which is not looked at. Fix it."
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
            some = []
            _check_size(file, name, (root.findtext("size/width"), root.findtext("size/height")), (wide, high))
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


def _parquet(path: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[list[Row]]:
    """The column `objects` of the files whose rows the images are: boxes as x, y, width, height in pixels, and classes."""
    places = []
    for name in names:
        if (row := ROW.fullmatch(name)) is None:
            raise BadImages(
                f"{path} is parquet, whose objects are those of the pictures in its rows, and {name} is not one of them. Give "
                f"the pictures of {path} themselves (--score {path}), or annotations in another form: COCO's .json, .txt, .xml."
            )
        places.append((row[1], int(row[2])))
    shown = [Path(path.name)] if path.is_file() else [file for file in below(path)[0] if file.suffix.lower() == ".parquet"]
    files, listed = [path] if path.is_file() else [path / file for file in shown], [file.as_posix() for file in shown]

    def unclear(name: str, found: Sequence[int]) -> BadImages:
        has = f"{len(found)} files" if found else "no file"
        return BadImages(
            f"--annotations {path} has {has} {name}, whose rows are scored; objects are those of the rows of a file of the "
            "same name. Give the file or folder that holds the scored images."
        )

    shards = list(dict.fromkeys(shard for shard, _ in places))
    own = {shard: files[i] for shard, i in zip(shards, paired(shards, listed, f"--annotations {path}", unclear), strict=True)}
    read = {shard: _columns(file) for shard, file in own.items()}
    return [
        _parquet_row(f"{own[shard]}, row {row}:", name, read[shard], row, size)
        for name, (shard, row), size in zip(names, places, sizes, strict=True)
    ]


def _columns(file: Path) -> dict[str, list[Any]]:
    """The column `objects`, with `width` and `height` where they are there."""
    try:
        names = [name for name in ("objects", "width", "height") if name == "objects" or name in pq.read_schema(file).names]
        return {name: column.to_pylist() for name, column in zip(names, pq.read_table(file, columns=names), strict=True)}
    except (OSError, ValueError, KeyError) as error:
        raise BadImages(f"{file} has no objects {{bbox, category}} for the scored images: {error}. Give {KINDS}.") from error


def _parquet_row(where: str, name: str, columns: Mapping[str, list[Any]], row: int, size: tuple[int, int]) -> list[Row]:
    try:
        said = columns.get("width"), columns.get("height")
        _check_size(where, name, tuple(None if one is None else one[row] for one in said), size[::-1])
        some, one = [], columns["objects"][row]
        for box, label in zip(one["bbox"], one["category"], strict=True):
            x, y, w, h = _four(where, box)
            some.append(Row(where, (x, y, x + w, y + h), _whole(where, "category", label)))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadImages(f"{where} has no objects {{bbox, category}}: {error!r}. Give {KINDS}.") from error
    return some
