"""Objects on images, as people write them down: COCO's JSON, YOLO's text files, Pascal VOC's XML, parquet with `objects`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torchvision.ops import box_area

from fewbit.core.task import Placement, Scored
from fewbit.core.walk import below
from fewbit.errors import BadImages, UnknownName
from fewbit.task.coco import coco
from fewbit.task.folder import beside
from fewbit.task.names import paired
from fewbit.task.rows import KINDS, Row, bytes_of, check_box, check_size, four, text_of, unpacked, whole

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


def read(path: Path, images: Scored, names: Sequence[str], classes: int | None) -> list[Objects]:
    """The objects of each image; `names` are those of the model's `classes`, each if known. Raises BadImages for a file that is
    none, an image without annotation, a class that is not there, a box outside its image, or no object at all.
    """
    sizes = images.sizes()
    kinds = {file.suffix.lower() for file in below(path)[0]} if path.is_dir() else set[str]()
    are_rows = all(ROW.fullmatch(name) for name in images.names)
    if path.suffix.lower() == ".json":
        rows = coco(path, images.paths, sizes, names, classes)
    elif path.suffix.lower() == ".parquet" or (are_rows and ".parquet" in kinds):
        rows = _parquet(path, images.names, sizes)
    elif path.is_dir():
        rows = (_voc if ".xml" in kinds else _yolo)(path, images, sizes, names)
    else:
        raise BadImages(f"--annotations {path}: it is not a file that holds objects.{unpacked(path)} Give {KINDS}.")
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


def _check(row: Row, size: tuple[int, int], classes: int | None) -> None:
    check_box(row, size)
    if row.label < 0 or (classes is not None and row.label >= classes):
        allowed = "classes are counted from 0" if classes is None else f"the model has classes 0 to {classes - 1}"
        raise BadImages(f"{row.where} has class {row.label}; {allowed}. Fix it.")


def _yolo(folder: Path, images: Scored, sizes: Sequence[tuple[int, int]], classes: Sequence[str]) -> list[list[Row]]:
    rows = []
    for file, (high, wide) in zip(beside(folder, images, (".txt",), "annotations"), sizes, strict=True):
        some = []
        for number, line in enumerate(_lines(file), 1):
            where = f"{file}, line {number},"
            try:
                label, x, y, w, h, *confidence = line.split()
                if len(confidence) > 1 or not float(label).is_integer() or not all(0 <= float(c) <= 1 for c in confidence):
                    raise ValueError
                left, top = (float(x) - float(w) / 2) * wide, (float(y) - float(h) / 2) * high
                box = (left, top, left + float(w) * wide, top + float(h) * high)
                shares = (float(x), float(y), float(w), float(h))
                some.append(Row(where, box, int(float(label)), repr(line.strip()), shares=shares))
            except (ValueError, OverflowError):
                raise BadImages(
                    f"{where} is {line!r:.60}; a class and four numbers are needed: center x, center y, width, height as "
                    "shares of the picture, and perhaps a confidence (0 to 1), which is not looked at. Fix it."
                ) from None
        rows.append(some)
    return rows


def _lines(file: Path) -> Iterable[str]:
    try:
        return [line for line in text_of(file).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadImages(f"{file} cannot be read: {error}. Write it again.") from error


def _voc(folder: Path, images: Scored, sizes: Sequence[tuple[int, int]], classes: Sequence[str]) -> list[list[Row]]:
    if not classes:
        raise BadImages(
            f"{folder} names classes, and the model's have no names; give them in order: fewbit quantize --classes FILE."
        )
    rows = []
    for file, name, (high, wide) in zip(beside(folder, images, (".xml",), "annotations"), images.names, sizes, strict=True):
        try:
            root = ElementTree.fromstring(bytes_of(file))  # XML says its own encoding
            some = []
            check_size(file, name, (root.findtext("size/width"), root.findtext("size/height")), (wide, high))
            for number, one in enumerate(root.iter("object"), 1):
                label = _voc_text(file, number, one, "name")
                if label not in classes:
                    raise BadImages(f"{file}, object {number}: {UnknownName('class', label, classes)}")
                where = f"{file}, object {number} ({label:.40}),"
                corners = [_voc_text(file, number, one, f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax")]
                x0, y0, x1, y1 = _numbers(where, corners)
                written = "xmin, ymin, xmax, ymax of {}, {}, {}, {}".format(*corners)
                crowd = one.findtext("difficult") == "1"
                some.append(Row(where, (x0 - 1, y0 - 1, x1, y1), classes.index(label), written, crowd))
        except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
            raise BadImages(f"{file} is not in Pascal VOC's format: {error}. Give {KINDS}.") from error
        rows.append(some)
    return rows


def _voc_text(file: Path, number: int, one: ElementTree.Element, tag: str) -> str:
    """The text of a tag inside object `number` of a file, counted from 1. Raises BadImages where there is none."""
    text = (one.findtext(tag) or "").strip()
    if not text:
        name = (one.findtext("name") or "").strip()
        called = f" ({name:.40})" if name else ""
        raise BadImages(
            f"{file}, object {number}{called}, has no {tag}; each object needs name and bndbox with xmin, ymin, xmax, ymax in "
            "pixels. Fix it."
        )
    return text


def _numbers(where: str, texts: Sequence[str]) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise BadImages(f"{where} has xmin, ymin, xmax, ymax of {', '.join(texts):.80}; numbers are needed. Fix it.") from None


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
        check_size(where, name, tuple(None if one is None else one[row] for one in said), size[::-1])
        some, one = [], columns["objects"][row]
        for box, label in zip(one["bbox"], one["category"], strict=True):
            x, y, w, h = four(where, box)
            some.append(Row(where, (x, y, x + w, y + h), whole(where, "category", label), f"bbox {[x, y, w, h]}"))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadImages(f"{where} has no objects {{bbox, category}}: {error!r}. Give {KINDS}.") from error
    return some
