"""What a file says of the images that its model takes, and of the model's classes: checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewbit.core.pixels import FIELDS, for_channels, order_for_channels
from fewbit.errors import BadFile, BadImages, BadModel, UnknownName

MEANS = '{"mean": [0.5, 0.5, 0.5]}'
WHOLE = {"interpolation": "bicubic", "resize": "squash", "crop_pct": 1.0}  # what a Python file means that says no more


def beside(path: Path) -> dict[str, Any]:
    """The record beside an exported program, empty where there is none. Raises BadFile or BadModel that name the file."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} is not JSON ({error}); fix it, or remove it and give --mean, --std, ...") from error
    if not isinstance(record, dict):
        raise BadFile(f"{path} holds a {type(record).__name__}; a record is needed, as in {MEANS}.")
    if record and not record.keys() & CONSTANTS.keys():
        raise BadFile(f"{path} has none of {', '.join(CONSTANTS)}; give one of these, as in {MEANS}, or remove it.")
    return checked(record, str(path))


def checked(record: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A record whose fields are what they have to be, for the channels of its input_size, if that is said; `names` is what they
    are called there. Raises BadModel.
    """
    known = {field: value for field, value in record.items() if value is not None}
    called = {field: (names or {}).get(field, field) for field in known}
    try:
        found = {k: CHECKS[k](v, called[k]) if k in CHECKS else v for k, v in known.items()}
        if "input_size" in found:
            _check_channels(found, called)
        return found
    except (BadImages, UnknownName) as error:
        raise BadModel(f"{where}: {error}") from error


def _check_channels(record: Mapping[str, Any], called: Mapping[str, str]) -> None:
    channels = record["input_size"][0]
    try:
        for field in ("mean", "std"):
            if field in record:
                for_channels(record[field], channels, called[field])
        if "channel_order" in record:
            order_for_channels(record["channel_order"], channels, called["channel_order"])
    except BadImages as error:
        raise BadImages(f"{error} The input size is {record['input_size']}.") from error


def _task(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadImages(f"{name} is {repr(value)[:80]}; the name of a task is needed, as in detect:detr.")
    return value


def _class_names(value: Any, name: str) -> tuple[str, ...]:
    if not (isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value)):
        raise BadImages(f"{name} is {repr(value)[:80]}; a list of names is needed, one for each output in order.")
    return tuple(value)


CHECKS: Mapping[str, Callable[[Any, str], Any]] = {
    **{name: field.check for name, field in FIELDS.items()},
    "classes": _class_names,
    "task": _task,
}
CONSTANTS = {name: name.upper() for name in CHECKS}
