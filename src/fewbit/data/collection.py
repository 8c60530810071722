"""Images as Python programs have them: a DataLoader, Dataset, list or generator of pictures, arrays, paths, pairs or dicts.

What an item is, its type says and never its values: PIL images, paths, encoded bytes and uint8 or uint16 arrays are pictures,
which are prepared as those of a folder are; floats of the model's size are inputs of the model, taken as they are. Every item
is read once; what it gives lies on a shelf, so that a random transform or a generator gives the same image again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fewbit.core.inputs import Input
from fewbit.core.shelf import Shelf
from fewbit.data.arrays import named_arrays
from fewbit.data.beside import Keys, trees
from fewbit.data.decode import Item
from fewbit.data.items import Reader, is_array, is_batch, parts_of, reason_of, row_at
from fewbit.data.labels import BadLabel, checked_labels, is_label
from fewbit.data.preprocess import Preprocess
from fewbit.data.sources import Found, spread
from fewbit.errors import BadImages, stopped

BY_NAME = Keys(maybe=())  # where inputs of the model may be called as labels sometimes are
ENDLESS = 1000  # images that are read of a source without a length where no number is given


@dataclass(frozen=True, eq=False)
class Data:
    """Images of a DataLoader, Dataset, list or generator, with a `transform` that is called with the image of each item.

    Items are PIL images, paths, encoded bytes, arrays or tensors, (image, label) pairs, dicts such as `{"image", "label"}` or
    `{"pixel_values"}`, or batches of these. `transform` gives a picture, an input of the model, or a dict with `pixel_values`.
    """

    source: Any
    transform: Callable[[Any], Any] | None = None


def check_source(source: Any, name: str = "images", more: str = "") -> None:
    """Raise BadImages for what cannot be a source of images, under the name of its option; nothing is opened. `more` says
    what else can be done where a path is none.
    """
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
        refuse_unequal(data, name)
    elif isinstance(source, tuple) and len(source) != 2:
        raise BadImages(f"{name}: a tuple of {len(source)} was given; allowed is (images, labels). Give those two.")
    elif isinstance(source, str | Path):
        kinds = f"Give a folder of images, or a .parquet, .npy or .npz file.{more}"
        if not os.path.exists(source):
            raise BadImages(f"{source} does not exist. {kinds}")
        if not os.path.isdir(source) and not os.path.isfile(source):
            raise BadImages(f"{source} is neither a file nor a folder. {kinds}")
        if os.path.isfile(source) and (suffix := Path(source).suffix) not in (".parquet", ".npy", ".npz"):
            raise BadImages(f"{source} is a '{suffix}' file. {kinds}")


def check_files(source: Any, name: str, *, skip_bad: bool) -> None:
    """Raise BadImages where a list of images, with or without labels, names files that are not there; with `skip_bad` where
    none is. Nothing is opened.
    """
    items = source[0] if is_two_lists(source) else source
    if not isinstance(items, list | tuple) or not is_collection(source):
        return
    paths = [image for image in map(_image_of, items) if isinstance(image, str | Path)]
    gone = [path for path in paths if not os.path.isfile(path)]
    if not gone or (skip_bad and len(gone) < len(items)):
        return
    several = f"; of {len(items)} images {len(gone)} are not there" if len(gone) > 1 else ""
    others = ", or leave out what is not there with --skip-bad" if len(gone) < len(items) else ""
    if os.path.isdir(gone[0]):
        raise BadImages(f"{name}: {gone[0]} is a folder, and a list is of files; give one folder by itself, or its files.")
    raise BadImages(f"{name}: {gone[0]} does not exist{several}. Give files of images, or a folder{others}.")


def _image_of(item: Any) -> Any:
    """The image of an item, as a dict or a pair has it."""
    if isinstance(item, Mapping):
        return item.get(BY_NAME.of_image(item))
    return item[0] if isinstance(item, tuple) and len(item) == 2 else item


def is_two_lists(source: Any) -> bool:
    """Whether it is (images, labels) of a list of images: the second holds labels alone, which are no images."""
    if not (isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], list | tuple)):
        return False
    labels = source[1]
    if is_array(labels):
        return labels.ndim == 1 or (labels.ndim == 2 and len(labels) == len(source[0]))
    return isinstance(labels, list | tuple) and bool(labels) and all(map(is_label, labels))


def refuse_unequal(source: Any, name: str) -> None:
    """Raise BadImages for a list of images with another number of labels."""
    if is_two_lists(source) and len(source[0]) != len(source[1]):
        counts = f"{len(source[0])} images and {len(source[1])} labels"
        raise BadImages(f"{name}: {counts} were given; give a label for each image, or the list of images alone.")


def is_collection(source: Any) -> bool:
    """Whether `source` is read item by item: no path, no array, and no (images, labels) of an array of images."""
    first = source[0] if isinstance(source, tuple) and source else source
    if isinstance(source, str | Path) or first is source:
        return not isinstance(source, str | Path) and not is_array(source)
    labels = source[1] if len(source) == 2 else None
    several = labels is not None and ((is_array(labels) and labels.ndim == 1) or isinstance(labels, list))
    return not is_array(first) or (first.ndim == 3 and not several)  # grey pictures (n, h, w) with their labels


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
            image, _, rest = parts_of(first, False, BY_NAME)[0] if rest is None else (None, None, rest)
            made = {} if data.transform is None or image is None else BY_NAME.beside(data.transform(image))
    except Exception as error:
        if halt := stopped(error):
            raise halt from error
        return {}, replace(data, source=_failing(error)) if once and data.source is items else data
    whole = {name: pytree.tree_map(_first_row, tree) for name, tree in trees(made).items()}
    return {**trees(rest), **whole}, data


def _all_of(item: Any) -> dict[str, Any] | None:
    """What belongs to the first image of a dict that has none of the usual names of an image; None of anything else."""
    one = item[0] if isinstance(item, list) and item else item
    if not isinstance(one, Mapping) or BY_NAME.of_image(one) is not None:
        return None
    values = BY_NAME.beside(one)
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
    if is_two_lists(items):
        items = list(zip(*items, strict=True))
    rows, most, part = _drawn(items, limit, seed)
    reader = Reader(
        preprocess, data.transform, labels, classes, others, Keys(image, [one.name.split(".")[0] for one in others])
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of shuffling and random transforms: a resumed run reads the same
        for index, get in _taken(items, rows, most, what, skip_bad):
            try:
                reader.add(f"{what}:{index}", get, most)
            except BadImages as error:
                if halt := stopped(error):
                    raise halt from error
                if not skip_bad:
                    remedy = (
                        error.remedy
                        if isinstance(error, BadLabel)
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


def _taken(
    items: Any, rows: list[int] | None, most: int | None, what: str, skip_bad: bool
) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Each item's index, and a function that gives it. Raises BadImages where a source that is read in order fails."""
    if rows is not None:
        yield from ((row, partial(items.__getitem__, row)) for row in rows)
        return
    count = 0
    try:
        for item in itertools.islice(items, most):
            yield count, partial(next, iter((item,)))
            count += 1
    except Exception as error:
        if halt := stopped(error):
            raise halt from error
        raise BadImages(f"{what} failed at {_remedied(items, count, reason_of(error), skip_bad)}") from error


def _remedied(items: Any, count: int, why: str, skip_bad: bool) -> str:
    """Where a source that is read in order failed and why, and what to do."""
    if not isinstance(items, DataLoader):
        cannot = " --skip-bad cannot leave it out, as nothing comes after it: give a list or a Dataset." if skip_bad else ""
        return f"item {count}: {why}. Fix it.{cannot}"
    place = "item" if items.batch_size is None and items.batch_sampler is None else "batch"
    where = "; with num_workers=0 in the DataLoader the error shows where" if items.num_workers else ""
    dataset = (
        "its Dataset has to leave it out itself"
        if isinstance(items.dataset, IterableDataset)
        else ("give its Dataset (loader.dataset) in its place, of which it can")
    )
    cannot = f" --skip-bad cannot leave out items of a DataLoader: {dataset}." if skip_bad else ""
    return f"{place} {count}: {why}. Fix it{where}.{cannot}"
