"""An item of a collection: its images, one or a batch, their labels, and what comes with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from PIL import Image
from torch import Tensor

from fewbit.core.inputs import Input, flat
from fewbit.core.shelf import Shelf
from fewbit.data.bands import Array, channels_behind, channels_last, is_pixels, of_picture
from fewbit.data.beside import IMAGES, Keys, row_of, trees
from fewbit.data.decode import decode, is_input
from fewbit.data.labels import BadLabel, Classes, class_of, is_label
from fewbit.data.preprocess import Preprocess
from fewbit.errors import BadImages


@dataclass
class Reader:
    """The images that have been read so far; `bad` are sentences on items that are none."""

    preprocess: Preprocess
    transform: Callable[[Any], Any] | None
    labelled: bool
    classes: Classes = None
    others: Sequence[Input] = ()
    keys: Keys = field(default_factory=Keys)
    names: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    places: list[Path | int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    shelf: Shelf = field(default_factory=Shelf)
    beside: dict[str, Shelf] = field(default_factory=dict)  # by name what the other inputs take, for each image
    firsts: dict[bool, str] = field(default_factory=dict)  # the first input of the model, the first picture
    ignored: str = ""

    def add(self, name: str, get: Callable[[], Any], most: int | None) -> None:
        """The images of an item, up to `most` in all. Raises BadImages that names the item and, in a batch, the image."""
        try:
            item = get()
            images = parts_of(item, self.labelled, self.keys)
        except Exception as error:
            raise named(error, name) from error
        self.ignored = self.ignored or ignored(item)
        for k, (image, label, rest) in enumerate(images[: None if most is None else most - len(self.names)]):
            one = name if len(images) == 1 else f"{name}:{k}"
            try:
                made, more = self._transformed(image)
                values = flat(trees({**rest, **more}))
                found = {other.name: row_of(other, values) for other in self.others}
                self._keep(one, self._prepared(made), class_of(label, self.classes))
                for key, value in found.items():
                    self.beside.setdefault(key, Shelf()).append(value)
            except Exception as error:
                raise named(error, one) from error

    def _transformed(self, image: Any) -> tuple[Any, dict[str, Any]]:
        """What a transform makes of an image, and what it gives beside it."""
        if self.transform is None:
            return image, {}
        made = self.transform(image)
        image, _ = _pair(made, self.keys)
        if (isinstance(image, list) or (is_array(image) and image.ndim == 4)) and len(image) == 1:
            image = image[0]
        return image, self.keys.beside(made)

    def _prepared(self, image: Any) -> Path | Array:
        """An image as it is stored: a path, pixels (h, w, channels), or a float32 input of the model."""
        if isinstance(image, str | Path):
            return Path(image)
        if isinstance(image, bytes):
            return decode(image, "the picture", self.preprocess.size[0])
        if isinstance(image, Image.Image):
            return of_picture(image, self.preprocess.size[0])
        if not is_array(image):
            raise BadImages(f"it is of type {type(image).__name__}; {self._allowed}")
        if isinstance(image, Tensor):
            image = (image.float() if image.dtype == torch.bfloat16 else image).detach().cpu().numpy()
        return self._checked(image)

    def _checked(self, image: Array) -> Array:
        shape, size = image.shape, self.preprocess.size
        if image.dtype.kind == "f" and shape == size:
            with np.errstate(over="ignore"):  # what becomes infinite is refused
                return image.astype(np.float32)
        if is_pixels(image):
            return channels_last(image, size[0])
        if image.dtype.kind == "f" and (advice := channels_behind(shape, size)):
            raise BadImages(f"it has type {image.dtype} and shape {shape}; inputs of the model are floats {size}. {advice}")
        other = f", and {self.firsts[False]} shape {size}" if image.dtype.kind == "f" and False in self.firsts else ""
        raise BadImages(f"it has type {image.dtype} and shape {shape}{other}; {self._allowed}")

    @property
    def _allowed(self) -> str:
        size, c = self.preprocess.size, self.preprocess.size[0]
        arrays = f"uint8 or uint16 (h, w, {c}) or ({c}, h, w)"
        return f"allowed are pictures (PIL, path, {arrays}) and inputs of the model, floats {size}"

    def _keep(self, name: str, image: Path | Array, label: int | None) -> None:
        picture = not is_input(image)
        if self.firsts and picture not in self.firsts:
            kinds = "a picture", "an input of the model"
            this, that = kinds if picture else kinds[::-1]
            raise BadImages(f"it is {this}, and {self.firsts[not picture]} is {that}; give one kind")
        if self.names and (label is None) != (self.labels[0] is None):
            raise BadLabel(f"it has {'no' if label is None else 'a'} label, unlike {self.names[0]}")
        if not isinstance(image, Path):
            self.shelf.append(torch.from_numpy(image))
        self.firsts.setdefault(picture, name)
        self.names.append(name)
        self.labels.append(label)
        self.places.append(image if isinstance(image, Path) else len(self.shelf) - 1)

    def notes(self, what: str) -> tuple[str, ...]:
        """What of the items of a source was not looked at."""
        taken = (
            "the first is taken as the image, the second as its label" if self.labelled else "the first is taken as the image"
        )
        ignored = f"Items of {what} hold more than an image and a label: {taken}, and what follows is ignored ({self.ignored})."
        return (ignored,) if self.ignored else ()


def parts_of(item: Any, labelled: bool, keys: Keys) -> list[tuple[Any, Any, dict[str, Any]]]:
    """The images of an item, one or a batch, each with its label or None, and with what a dict holds beside them."""
    image, label = _pair(item, keys)
    label, rest = label if labelled else None, keys.beside(item)
    if not is_batch(image):
        return [(image, label, rest)]
    labels: Any = [None] * len(image) if label is None else label
    if not hasattr(labels, "__len__") or (is_array(labels) and not labels.ndim):
        labels = [labels]
    if len(labels) != len(image):
        raise BadLabel(f"it has {len(image)} images and {len(labels)} labels")
    pairs = [(*_pair(one, keys), own) for one, own in zip(image, labels, strict=True)]
    return [
        (one, (label if own is None else own) if labelled else None, {**row_at(rest, k), **keys.beside(image[k])})
        for k, (one, label, own) in enumerate(pairs)
    ]


def is_batch(image: Any) -> bool:
    """Whether it is several images."""
    return isinstance(image, list | tuple) or (is_array(image) and image.ndim == 4)


def row_at(values: Mapping[str, Any], k: int) -> dict[str, Any]:
    """What belongs to one image of a batch."""
    return {name: pytree.tree_map(lambda value: value[k], tree) for name, tree in trees(values).items()}


def _pair(item: Any, keys: Keys) -> tuple[Any, Any]:
    """An item's image, or images, and its label: of a dict by its keys, of a tuple the first two; any other list is a batch."""
    if isinstance(item, Mapping):
        image, label = keys.of_image(item), keys.of_label(item)
        if image is None:
            allowed = ", ".join(dict.fromkeys((keys.image or IMAGES[0], *IMAGES)))
            found = f"a dict with the keys {', '.join(map(str, item))}" if item else "an empty dict"
            raise BadImages(f"it is {found}; one of the keys {allowed} is needed, with the image")
        return item[image], None if label is None else item[label]
    if not _is_pair(item):
        return item, None
    return item[0], item[1] if len(item) > 1 else None


def _is_pair(item: Any) -> bool:
    """Whether it begins with an image, or images, and their label: a tuple, and a list as a DataLoader makes of a tuple."""
    if isinstance(item, tuple):
        return bool(item)
    if not isinstance(item, list) or not item:
        return False
    is_whole_batch = is_array(item[0]) and item[0].ndim == 4
    if is_whole_batch or len(item) == 1:
        return is_whole_batch
    if isinstance(item[0], list | tuple):  # of paths or of what else cannot be stacked, with their classes
        return is_array(item[1]) and item[1].ndim == 1 and len(item[1]) == len(item[0])
    return is_label(item[1])


def ignored(item: Any) -> str:
    """The types of what stands behind the image and the label of an item; empty where nothing does."""
    if _is_pair(item):
        return ", ".join(_type(value) for value in item[2:])
    return ignored(item[0]) if isinstance(item, list) and item else ""


def _type(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if is_array(value) else type(value).__name__


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor)


def named(error: Exception, name: str) -> BadImages:
    """What is wrong with an item, under its name."""
    return (type(error) if isinstance(error, BadLabel) else BadImages)(f"{name}: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """An error in one line; of one that a worker of a DataLoader passes on, its own last line without the traceback."""
    text = str(error).strip().rstrip(".")
    if "Original Traceback (most recent call last)" in text:
        return text.splitlines()[-1]
    return text if isinstance(error, BadImages) else f"{type(error).__name__}: {text}"
