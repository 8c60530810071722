"""Objects in COCO's JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fewbit.errors import BadImages, UnknownName
from fewbit.task.names import paired, plain
from fewbit.task.rows import KINDS, Row, check_size, four, is_number, text_of, whole

TOP = "images, annotations and categories"


def _json(path: Path) -> Any:
    try:
        return json.loads(text_of(path))
    except (OSError, ValueError, RecursionError) as error:
        raise BadImages(f"{path} cannot be read as JSON: {error}. Give {KINDS}.") from error


def coco(
    path: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]], classes: Sequence[str], count: int | None
) -> list[list[Row]]:
    file = _json(path)
    if isinstance(file, list):
        raise BadImages(
            f"{path} holds a list, as predictions in COCO's format are; the annotations are needed, a file with "
            f"{TOP}. Give that to --annotations."
        )
    images, listed, annotations = (
        _list(path, file, name, keys)
        for name, keys in (("images", ("id", "file_name")), ("categories", ("id", "name")), ("annotations", ("image_id",)))
    )
    entries = _entries(path, images)
    known, same = list(entries), list(entries.values())
    categories = _categories(path, listed)
    _check_names(path, categories, annotations)
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
    by_image: dict[Any, list[tuple[int, Any]]] = {one["id"]: [] for one in images}
    for i, one in enumerate(annotations):
        if one["image_id"] not in by_image:
            raise BadImages(
                f"{path}: {_called('annotations', i, one)} has image_id {one['image_id']!r:.40}, which is the id "
                f"of no image of the file{_like(one['image_id'], by_image)}. Fix it, or list its image."
            )
        by_image[one["image_id"]].append((i, one))
    rows = []
    for place, name, (high, wide) in zip(places, names, sizes, strict=True):
        some: list[Row] = []
        for image in same[place]:
            check_size(path, name, (image.get("width"), image.get("height")), (wide, high))
            here = [_coco_row(path, i, one, index) for i, one in by_image[image["id"]]]
            there = {(row.box, row.label) for row in some}
            some += [row for row in here if (row.box, row.label) not in there]
        rows.append(some)
    return rows


def _list(path: Path, file: Any, name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of a list of the file, each with these keys. Raises BadImages that names the entry, by its place and id, and
    what it lacks.
    """
    if not isinstance(file, dict) or name not in file:
        has = f"has {', '.join(map(str, file))[:80] or 'nothing'}" if isinstance(file, dict) else f"is {file!r:.40}"
        raise BadImages(f"{path} is not in COCO's format: it has no {name}. It needs {TOP}, and {has}.")
    if not isinstance(file[name], list):
        raise BadImages(f"{path} is not in COCO's format: {name} is {file[name]!r:.40}, and a list is needed.")
    for i, one in enumerate(file[name]):
        if not isinstance(one, dict):
            raise BadImages(
                f"{path} is not in COCO's format: {name}[{i}] is {one!r:.40}, and an object with {' and '.join(keys)} is "
                "needed."
            )
        if lacking := next((key for key in keys if one.get(key) is None), None):
            raise BadImages(f"{path}: {_called(name, i, one)} has no {lacking}. Write it, or leave that entry out.")
        for key in ("id", "image_id"):
            if key in keys and not isinstance(one[key], int | float | str):
                found = f"{key} {one[key]!r:.40}; a number or a text"
                raise BadImages(f"{path}: {_called(name, i, one)} has {found} is needed. Fix it.")
    return list(file[name])


def _called(name: str, place: int, one: dict[str, Any]) -> str:
    """What an entry of a list is called: by its id, without one by its place, counted from 0."""
    single = {"images": "image", "categories": "category", "annotations": "annotation"}[name]
    return f"{name}[{place}]" if one.get("id") is None else f"{single} {one['id']!s:.40}"


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
        number, name = whole(path, "category", one["id"]), str(one["name"])
        if found.setdefault(number, name) != name:
            raise BadImages(
                f"{path} has the categories {found[number]!r:.40} and {name!r:.40} under the one id {number}. Give each an id "
                "of its own."
            )
    return found


def _check_names(path: Path, categories: Mapping[int, str], annotations: Iterable[dict[str, Any]]) -> None:
    """Raise BadImages for two ids of one name that both have annotations: one class, or two of which one is misnamed."""
    ids, used = dict[str, int](), [one.get("category_id") for one in annotations]
    for number, name in categories.items():
        if number in used and ids.setdefault(name, number) != number:
            raise BadImages(
                f"{path} has the category {name!r:.40} under two ids, {ids[name]} and {number}, and annotations of both. Give "
                "each its own name, or all of these annotations one id."
            )


def _like(number: Any, known: Iterable[Any]) -> str:
    """What to know of an id that looks like one of another type, "7" like 7."""
    return next((f" ({one!r:.40} is one, which is another type)" for one in known if str(one) == str(number)), "")


def _coco_row(path: Path, place: int, one: dict[str, Any], index: dict[int, int]) -> Row:
    where = f"{path}: {_called('annotations', place, one)}"
    if "bbox" not in one:
        raise BadImages(
            f"{where} has no bbox: x, y, width, height in pixels. Give COCO's file of boxes, or write the box of each."
        )
    if "category_id" not in one:
        raise BadImages(f"{where} has no category_id. Write it, or leave that entry out.")
    x, y, w, h = four(where, one["bbox"])
    category, crowd, area = one["category_id"], one.get("iscrowd"), one.get("area")
    if not is_number(category) or category not in index:
        known = f"are {min(index)} to {max(index)}" if index else "are none"
        raise BadImages(f"{where} has category_id {category!r:.40}, and the file's categories {known}; fix it.")
    if crowd not in (None, 0, 1):
        raise BadImages(f"{where} has iscrowd {crowd!r:.40}; 0 and 1 are allowed. Fix it.")
    if area is not None and (not is_number(area) or not 0 <= area < math.inf):
        raise BadImages(
            f"{where} has area {area!r:.40}; a number of square pixels, 0 or more, is needed. Fix it or leave it out."
        )
    return Row(where, (x, y, x + w, y + h), index[category], f"bbox {one['bbox']}", bool(crowd), area)


def _indices(path: Path, categories: dict[int, str], names: Sequence[str], count: int | None) -> dict[int, int]:
    """From the ids of a file to the model's classes: by name where those are known, else in their order where there are as
    many, or as they are where they begin at 0. `count` is None where nobody knows how many classes there are. Raises BadImages.
    """
    if names:
        places = {name: i for i, name in enumerate(names)}
        for name in categories.values():
            if name not in places:
                raise BadImages(
                    f"{path}: {UnknownName('category', name, names)} Or give the model's names: fewbit quantize --classes FILE."
                )
        return {number: places[name] for number, name in categories.items()}
    if len(categories) == count:
        return {number: i for i, number in enumerate(sorted(categories))}
    if categories and min(categories) == 0 and (count is None or max(categories) < count):
        return {number: number for number in categories}
    which = "give the names of the model's classes in order: fewbit quantize --classes FILE."
    if count is None:
        known = f"{min(categories)} to {max(categories)}" if categories else "none"
        raise BadImages(
            f"{path} has {len(categories)} categories (ids {known}), and nobody knows how many classes the model has or which "
            f"is which, since they have no names; {which}"
        )
    raise BadImages(
        f"{path} has {len(categories)} categories and the model {count} classes without names, so nobody can say which is "
        f"which; {which}"
    )
