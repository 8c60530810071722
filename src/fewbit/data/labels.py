"""The class of an image: a number, a name of a class, or a row of numbers with a single 1, as data sets have them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.data.bands import Array
from fewbit.data.decode import KNOWN
from fewbit.errors import BadImages

LABELS = ("labels", "label")  # keys of a class in a dict: whatever else is there these count
MAYBE = ("target", "y", "class")  # and where they are not there, one of these
Classes = int | Sequence[str] | None  # how many there are, or their names in the order of the outputs


class BadLabel(BadImages):
    """A label that cannot be used: the image could be, without it."""

    remedy = "Fix the labels, or use --no-labels"


def is_label(value: Any) -> bool:
    """Whether a value is a label and no image: a number, an array of at most one dimension, or text that names no file."""
    if isinstance(value, str):
        return Path(value).suffix.lower() not in (*KNOWN, ".npy") and not os.path.exists(value)
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim < 2
    return _is_number(value)


def class_of(label: Any, classes: Classes) -> int | None:
    """The class that a label says; None has none. Raises BadLabel, without the name of the image."""
    if label is None:
        return None
    value = _plain(label)
    if isinstance(value, str):
        return _named(value, classes)
    if _is_number(value) and float(value).is_integer():
        return int(value)
    count = classes if classes is None or isinstance(classes, int) else len(classes)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.shape == (count,):
        ones = np.flatnonzero(value)
        if len(ones) == 1 and value[ones[0]] == 1:
            return int(ones[0])
    row = "" if count is None else f", or a row of {count} numbers, one of them 1 and the others 0"
    raise BadLabel(f"its label is {_shown(label, value)}; a class is an integer{row}")


def checked_labels(values: Any, names: Sequence[str], classes: Classes, where: str) -> Array:
    """The classes of images (n,) as int64, from their labels. Raises BadImages for another kind or count, and for an index that
    is not a class.
    """
    try:
        labels = np.asarray(_plain(values) if isinstance(values, Tensor) else values)
    except ValueError as error:
        raise BadImages(f"{where} has labels that are no list of integers: {error}. Fix them, or use --no-labels.") from error
    labels = np.atleast_1d(labels)
    if labels.shape[0] == len(names) and (labels.ndim == 2 or labels.dtype.kind in "UOf") and labels.ndim < 3:
        labels = np.array([_of_row(label, name, classes) for label, name in zip(labels, names, strict=True)])
    if labels.dtype.kind not in "iu" or labels.shape != (len(names),):
        raise BadImages(
            f"{where} has labels of type {labels.dtype} and shape {labels.shape}; "
            f"allowed are integers of shape ({len(names)},), one for each image. Fix them, or use --no-labels."
        )
    count = classes if classes is None or isinstance(classes, int) else len(classes)
    wrong = np.flatnonzero((labels < 0) | (labels >= (2**31 if count is None else count)))
    if len(wrong):
        allowed = "0 to 2147483647" if count is None else f"0 to {count - 1}, the model's classes"
        problem = f"{names[wrong[0]]} has label {labels[wrong[0]]}"
        raise BadImages(f"{problem}; allowed is {allowed}. Fix it, or use --no-labels.")
    return labels.astype(np.int64)


def _of_row(label: Any, name: str, classes: Classes) -> int:
    try:
        found = class_of(label, classes)
    except BadLabel as error:
        raise BadLabel(f"{name}: {error}. {BadLabel.remedy}.") from error
    if found is None:
        raise BadLabel(f"{name}: it has no label, and others have one. {BadLabel.remedy}.")
    return found


def _plain(label: Any) -> Any:
    """A label as a number, text or an array; a single number in an array or tensor is that number."""
    if isinstance(label, Tensor):
        label = (label.float() if label.dtype == torch.bfloat16 else label).detach().cpu().numpy()
    if isinstance(label, list | tuple) and label and all(_is_number(one) for one in label):
        label = np.array(label)
    single = isinstance(label, np.generic) or (isinstance(label, np.ndarray) and label.shape in ((), (1,)))
    return label.item() if single else label


def _named(name: str, classes: Classes) -> int:
    if classes is None or isinstance(classes, int):
        raise BadLabel(f"its label is the text '{name}'; a class is an integer, or with --classes FILE one of its names")
    if (times := list(classes).count(name)) != 1:
        known = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
        found = "is none of the names" if not times else f"names {times}"
        raise BadLabel(
            f"its label '{name}' {found} of the {len(classes)} classes ({known}); give their order with --classes FILE"
        )
    return list(classes).index(name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _shown(label: Any, value: Any) -> str:
    """What a label is that is no class."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(label, np.ndarray | Tensor):
        return f"of type {label.dtype} and shape {tuple(label.shape)}"
    return f"of type {type(label).__name__}"
