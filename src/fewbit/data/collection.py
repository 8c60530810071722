"""Images as Python programs have them: a DataLoader, Dataset, list or generator of pictures, arrays, paths, pairs or dicts.

What an item is, its type says and never its values: PIL images, paths, encoded bytes and uint8 or uint16 arrays are pictures,
which are prepared as those of a folder are; floats of the model's size are inputs of the model, taken as they are. Every item
is read once; what it gives lies on a shelf, so that a random transform or a generator gives the same image again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from fewbit.core.inputs import Input, flat
from fewbit.core.shelf import Shelf
from fewbit.data.arrays import named_arrays
from fewbit.data.bands import Array, channels_last, is_pixels, of_picture
from fewbit.data.beside import IMAGES, Keys, row_of, trees
from fewbit.data.decode import Item, decode, is_input
from fewbit.data.preprocess import Preprocess
from fewbit.data.sources import Found, checked_labels, spread
from fewbit.errors import BadImages, stopped

ENDLESS = 1000  # images that are read of a source without a length where no number is given


@dataclass(frozen=True, eq=False)
class Data:
    """Images of a DataLoader, Dataset, list or generator, with a `transform` that is called with the image of each item.

    Items are PIL images, paths, encoded bytes, arrays or tensors, (image, label) pairs, dicts such as `{"image", "label"}` or
    `{"pixel_values"}`, or batches of these. `transform` gives a picture, an input of the model, or a dict with `pixel_values`.
    """

    source: Any
    transform: Callable[[Any], Any] | None = None


def check_source(source: Any, name: str = "images") -> None:
    """Raise BadImages for what cannot be a source of images, under the name of its option; nothing is opened."""
    if is_collection(source):
        data = source.source if isinstance(source, Data) else source
        if isinstance(data, str | Path):
            raise BadImages(
                f"{name}: fewbit.Data('{data}', ...) has a path, and a transform takes images; give it a list of files, "
                f"fewbit.Data(sorted(pathlib.Path('{data}').rglob('*.png')), transform=...), or without a transform the path: "
                f"'{data}'."
            )
        if isinstance(data, bytes) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
            raise BadImages(
                f"{name} of type {type(data).__name__} were given; give a path, a NumPy array, a tensor, (images, labels), or "
                "a DataLoader, Dataset, list or generator of images, perhaps as fewbit.Data(source, transform=...)."
            )
    elif isinstance(source, tuple) and len(source) != 2:
        raise BadImages(f"{name}: a tuple of {len(source)} was given; allowed is (images, labels). Give those two.")
    elif isinstance(source, str | Path):
        kinds = "Give a folder of images, or a .parquet, .npy or .npz file."
        if not os.path.exists(source):
            raise BadImages(f"{source} does not exist. {kinds}")
        if not os.path.isdir(source) and not os.path.isfile(source):
            raise BadImages(f"{source} is neither a file nor a folder. {kinds}")
        if os.path.isfile(source) and (suffix := Path(source).suffix) not in (".parquet", ".npy", ".npz"):
            raise BadImages(f"{source} is a '{suffix}' file. {kinds}")


def is_collection(source: Any) -> bool:
    """Whether `source` is read item by item: no path, no array, and no (images, labels) of an array of images."""
    first = source[0] if isinstance(source, tuple) and source else source
    if isinstance(source, str | Path) or first is source:
        return not isinstance(source, str | Path) and not _is_array(source)
    labels = source[1] if len(source) == 2 else None
    several = labels is not None and ((_is_array(labels) and labels.ndim == 1) or isinstance(labels, list))
    return not _is_array(first) or (first.ndim == 3 and not several)  # grey pictures (n, h, w) with their labels


def examples(source: Any) -> tuple[dict[str, Any], Any]:
    """By name what comes with the first image of a source, as nested tensors, and a source from which nothing is lost. Where no
    name is a usual one of an image, the image may be among them: the model's names say which it is.

    What cannot be read has nothing with it; whoever reads the images says why.
    """
    if not is_collection(source):
        is_file = isinstance(source, str | Path) and Path(source).suffix == ".npz" and os.path.isfile(source)
        arrays = named_arrays(Path(source)) if is_file else {}
        return row_at({name: array for name, array in arrays.items() if name not in ("images", "labels")}, 0), source
    data = source if isinstance(source, Data) else Data(source)
    items: Any = [data.source] if isinstance(data.source, Mapping) else data.source
    once = isinstance(items, Iterator)
    try:
        with torch.random.fork_rng(devices=[]):
            by_index = hasattr(items, "__getitem__") and not isinstance(items, IterableDataset)
            first = items[0] if by_index else next(iter(items))
            data = replace(data, source=_again(first, items)) if once else data
            rest = _all_of(first)
            image, _, rest = _apart(first, False, Keys())[0] if rest is None else (None, None, rest)
            made = {} if data.transform is None or image is None else Keys().beside(data.transform(image))
    except Exception as error:
        if halt := stopped(error):
            raise halt from error
        return {}, replace(data, source=_failing(error)) if once and data.source is items else data
    whole = {name: pytree.tree_map(_first_row, tree) for name, tree in trees(made).items()}
    return {**trees(rest), **whole}, data


def _all_of(item: Any) -> dict[str, Any] | None:
    """What belongs to the first image of a dict that has none of the usual names of an image; None of anything else."""
    one = item[0] if isinstance(item, list) and item else item
    if not isinstance(one, Mapping) or Keys().of_image(one) is not None:
        return None
    values = Keys().beside(one)
    return row_at(values, 0) if any(is_batch(value) for value in values.values()) else values


def _again(first: Any, items: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from items


def _failing(error: Exception) -> Iterator[Any]:
    if not isinstance(error, StopIteration):
        raise error
    yield from ()


def _first_row(value: Tensor) -> Tensor:
    """A value without a batch of one, which processors of images make."""
    return value[0] if value.ndim and len(value) == 1 else value


@dataclass(frozen=True, eq=False)
class Kept:
    """What was read: the path of a file, or pixels at an index of the shelf."""

    places: tuple[Path | int, ...]
    shelf: Shelf

    def items(self, rows: Sequence[int]) -> Iterator[Item]:
        for row in rows:
            place = self.places[row]
            yield place if isinstance(place, Path) else self.shelf[place].numpy()


def read(
    source: Any, preprocess: Preprocess, classes: int | Sequence[str] | None, *, labels: bool, limit: int | None, seed: int,
    skip_bad: bool, others: Sequence[Input] = (), image: str = "images",
) -> Found:  # fmt: skip
    """At most `limit` images, drawn with `seed` where any item can be asked for, else the first, each with what `others` take;
    `image` is the name of the model's input that is the image. Raises BadImages.
    """
    check_source(source)
    data = source if isinstance(source, Data) else Data(source)
    what, items = type(data.source).__name__, data.source
    if isinstance(items, Mapping):
        items = [items]
    rows, most, part = _drawn(items, limit, seed)
    reader = _Reader(preprocess, data.transform, labels, others, Keys(image, [one.name.split(".")[0] for one in others]))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of shuffling and random transforms: a resumed run reads the same
        for index, get in _taken(items, rows, most, what):
            try:
                reader.add(f"{what}:{index}", get, most)
            except BadImages as error:
                if halt := stopped(error):
                    raise halt from error
                if not skip_bad:
                    remedy = (
                        error.remedy
                        if isinstance(error, _BadLabel)
                        else "Fix or remove it, or leave such images out with --skip-bad"
                    )
                    raise BadImages(f"{error}. {remedy}.") from error
                reader.bad.append(str(error))
            if len(reader.names) == most:
                break
    names = tuple(reader.names)
    if not names:
        raise BadImages(f"{what} gives no images: {(*reader.bad, 'it is empty')[0]}. A generator can be read only once.")
    indices = checked_labels(reader.labels, names, classes, what) if None not in reader.labels else None
    store = Kept(tuple(reader.places), reader.shelf)
    return Found(names, indices, store, f"{what}{part}", tuple(reader.bad), reader.notes(what), reader.beside)


def _drawn(items: Any, limit: int | None, seed: int) -> tuple[list[int] | None, int | None, str]:
    """The rows to ask for (None: the first that come), how many images to stop at, and that in words."""
    try:
        count = len(items)
    except (TypeError, NotImplementedError):
        count = None
    if count is None or not hasattr(items, "__getitem__") or isinstance(items, IterableDataset):
        most = ENDLESS if count is None and limit is None else limit
        return None, most, "" if most is None else f", the first {most} images at most"
    if limit is None or limit >= count:
        return list(range(count)), limit, ""
    return spread(count, limit, seed), limit, f", {limit} of {count} at random (seed {seed})"


def _taken(items: Any, rows: list[int] | None, most: int | None, what: str) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Each item's index, and a function that gives it."""
    if rows is not None:
        yield from ((row, partial(items.__getitem__, row)) for row in rows)
        return
    count = 0
    try:
        for item in itertools.islice(items, most):
            yield count, partial(next, iter((item,)))
            count += 1
    except Exception as error:
        raise BadImages(f"{what} failed at item {count}: {_reason(error)}. Fix it.") from error


@dataclass
class _Reader:
    """The images that have been read so far; `bad` are sentences on items that are none."""

    preprocess: Preprocess
    transform: Callable[[Any], Any] | None
    labelled: bool
    others: Sequence[Input] = ()
    keys: Keys = field(default_factory=Keys)
    names: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    places: list[Path | int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    shelf: Shelf = field(default_factory=Shelf)
    beside: dict[str, Shelf] = field(default_factory=dict)  # by name what the other inputs take, for each image
    firsts: dict[bool, str] = field(default_factory=dict)  # the first input of the model, the first picture
    ends: tuple[float, float] = (np.inf, -np.inf)

    def add(self, name: str, get: Callable[[], Any], most: int | None) -> None:
        """The images of an item, up to `most` in all. Raises BadImages that names the item and, in a batch, the image."""
        try:
            images = _apart(get(), self.labelled, self.keys)
        except Exception as error:
            raise _of(error, name) from error
        for k, (image, label, rest) in enumerate(images[: None if most is None else most - len(self.names)]):
            one = name if len(images) == 1 else f"{name}:{k}"
            try:
                made, more = self._transformed(image)
                values = flat(trees({**rest, **more}))
                found = {other.name: row_of(other, values) for other in self.others}
                self._keep(one, self._prepared(made), _class(label))
                for key, value in found.items():
                    self.beside.setdefault(key, Shelf()).append(value)
            except Exception as error:
                raise _of(error, one) from error

    def _transformed(self, image: Any) -> tuple[Any, dict[str, Any]]:
        """What a transform makes of an image, and what it gives beside it."""
        if self.transform is None:
            return image, {}
        made = self.transform(image)
        image, _ = _pair(made, self.keys)
        if (isinstance(image, list) or (_is_array(image) and image.ndim == 4)) and len(image) == 1:
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
        if not _is_array(image):
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
            raise _BadLabel(f"it has {'no' if label is None else 'a'} label, unlike {self.names[0]}")
        if not isinstance(image, Path):
            self.shelf.append(torch.from_numpy(image))
        if not isinstance(image, Path) and not picture:
            self.ends = min(self.ends[0], float(image.min())), max(self.ends[1], float(image.max()))
        self.firsts.setdefault(picture, name)
        self.names.append(name)
        self.labels.append(label)
        self.places.append(image if isinstance(image, Path) else len(self.shelf) - 1)

    def notes(self, what: str) -> tuple[str, ...]:
        """A warning where inputs of the model look as if they had not been normalized."""
        low, high = self.ends
        if not 0 <= low <= high <= 1 or self.preprocess.ends()[0].max() >= 0:
            return ()
        return (
            f"All values of {what} lie from {low:.2g} to {high:.2g}. Floats are taken as they are: subtract the mean and "
            "divide by the deviation of each channel if the model was trained so, or give uint8 pictures.",
        )


def _apart(item: Any, labelled: bool, keys: Keys) -> list[tuple[Any, Any, dict[str, Any]]]:
    """The images of an item, one or a batch, each with its label or None, and with what a dict holds beside them."""
    image, label = _pair(item, keys)
    label, rest = label if labelled else None, keys.beside(item)
    if not is_batch(image):
        return [(image, label, rest)]
    labels = [None] * len(image) if label is None else label
    if len(labels) != len(image):
        raise _BadLabel(f"it has {len(image)} images and {len(labels)} labels")
    pairs = [(*_pair(one, keys), own) for one, own in zip(image, labels, strict=True)]
    return [
        (one, (label if own is None else own) if labelled else None, {**row_at(rest, k), **keys.beside(image[k])})
        for k, (one, label, own) in enumerate(pairs)
    ]


def is_batch(image: Any) -> bool:
    """Whether it is several images."""
    return isinstance(image, list | tuple) or (_is_array(image) and image.ndim == 4)


def row_at(values: Mapping[str, Any], k: int) -> dict[str, Any]:
    """What belongs to one image of a batch."""
    return {name: pytree.tree_map(lambda value: value[k], tree) for name, tree in trees(values).items()}


def _pair(item: Any, keys: Keys) -> tuple[Any, Any]:
    """An item's image, or images, and its label: of a dict by its keys, of a tuple the first two. A list is a batch, unless
    it is what a DataLoader makes of pairs: a batch of images and one of labels.
    """
    if isinstance(item, Mapping):
        image, label = keys.of_image(item), keys.of_label(item)
        if image is None:
            allowed = ", ".join(dict.fromkeys((keys.image or IMAGES[0], *IMAGES)))
            found = f"a dict with the keys {', '.join(map(str, item))}" if item else "an empty dict"
            raise BadImages(f"it is {found}; one of the keys {allowed} is needed, with the image")
        return item[image], None if label is None else item[label]
    if not isinstance(item, list | tuple) or not item:
        return item, None
    batch = _is_array(item[0]) and item[0].ndim == 4 and len(item) <= 2
    if isinstance(item, tuple) or batch or (len(item) == 2 and _is_class(item[1])):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor)


def _is_class(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _class(label: Any) -> int | None:
    value = label.item() if _is_array(label) and label.ndim == 0 else label
    if value is not None and not _is_class(value):
        shape = f" and shape {tuple(value.shape)}" if _is_array(value) else ""
        raise _BadLabel(f"its label is of type {value.dtype if shape else type(value).__name__}{shape}; a class is an integer")
    return None if value is None else int(value)


class _BadLabel(BadImages):
    """A label that cannot be used: the image could be, without it."""

    remedy = "Fix the labels, or use --no-labels"


def _of(error: Exception, name: str) -> BadImages:
    """What is wrong with an item, under its name."""
    return (type(error) if isinstance(error, _BadLabel) else BadImages)(f"{name}: {_reason(error)}")


def _reason(error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    return text if isinstance(error, BadImages) else f"{type(error).__name__}: {text}"
