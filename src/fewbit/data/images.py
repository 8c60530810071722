"""Images from folders, parquet, NumPy files or memory, as normalized batches with labels in the model's class order.

Pictures are decoded by Pillow with as many bands as the model has channels, RGB as timm has it (data/decode.py). Nothing is
decoded before a batch asks for it, except that `open_images` decodes every chosen image once, so that a broken one is found
early, and one that is calibrated and scored on.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fewbit.core.inputs import Batch, Input
from fewbit.core.task import Placement
from fewbit.data.bands import shown
from fewbit.data.beside import Columns, columns
from fewbit.data.classes import read_classes
from fewbit.data.collection import check_source, is_collection, read
from fewbit.data.decode import checked, decode, encoded, is_input
from fewbit.data.floats import Floats
from fewbit.data.memory import Memory
from fewbit.data.preprocess import Preprocess, as_input
from fewbit.data.sources import Found, Parquet, Store, find, some, spread
from fewbit.errors import BadImages

GLANCED = 8  # images of a source that are decoded before a model is loaded
COMMON = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # which decode for any number of channels alike


@dataclass(frozen=True, eq=False)
class Images:
    """Images that can be read again and again: `labels` are int64 class indices (n,), or None where nobody knows.

    `names` say where each image came from, `source` all of it in a phrase, and `notes` what was left out, a sentence each.
    `pixels` are hashes of the pixels. What has been decoded is in `memory`, which subsets share. `others` have by row what
    comes with the images. `truth` is what is known of each image beside a class, as the model's task reads it.
    """

    names: tuple[str, ...]
    labels: Tensor | None
    preprocess: Preprocess
    source: str
    store: Store
    rows: tuple[int, ...]
    pixels: tuple[bytes, ...]
    notes: tuple[str, ...] = ()
    memory: Memory | None = None
    others: Columns = ()
    truth: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Batches:
        """Normalized float32 inputs, `size` at a time and then the rest."""
        if size < 1:
            raise BadImages(f"the batch size is {size}; allowed is 1 or more.")
        return Batches(self, size)

    def inputs(self) -> Iterator[Float[Tensor, "c h w"]]:
        """Each image as the model takes it. Raises BadImages that names a broken image."""
        memory = self.memory
        missing = [memory is None or row not in memory for row in self.rows]
        items = self.store.items([row for row, new in zip(self.rows, missing, strict=True) if new])
        for name, row, new in zip(self.names, self.rows, missing, strict=True):
            if not new and memory is not None:
                yield memory[row]
            else:
                image = as_input(next(items), name, self.preprocess)
                yield image if memory is None else memory.keep(row, image)

    def remembered(self, memory: Memory) -> Images:
        """The same images, each decoded once and then taken from `memory`."""
        return dataclasses.replace(self, memory=memory)

    @property
    def paths(self) -> tuple[str, ...]:
        """What a file that belongs to an image is found by: the path that a row of parquet has for its image, else the name."""
        if not isinstance(self.store, Parquet):
            return self.names
        return tuple(path or name for path, name in zip(self.store.own_paths(self.rows), self.names, strict=True))

    def subset(self, indices: Iterable[int]) -> Images:
        """The images at `indices`, in that order. Raises IndexError for an index outside."""
        chosen = [range(len(self))[i] for i in indices]
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            labels=None if self.labels is None else self.labels[chosen],
            rows=tuple(self.rows[i] for i in chosen),
            pixels=tuple(self.pixels[i] for i in chosen),
            truth=None if self.truth is None else [self.truth[i] for i in chosen],
        )

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each picture in pixels. Raises BadImages for inputs of the model, which are no pictures."""
        found = []
        for name, item in zip(self.names, self.store.items(self.rows), strict=True):
            if isinstance(item, np.ndarray) and is_input(item):
                raise BadImages(
                    f"{name} is an input of the model and no picture, so nobody can say where its annotations lie; give "
                    "pictures, or leave --annotations out."
                )
            high, wide, _ = decode(item, name, self.preprocess.size[0]).shape
            found.append((high, wide))
        return found

    def placed(self, size: tuple[int, int]) -> Placement:
        """Where a picture of a size (height, width) comes to lie in the input of the model."""
        return self.preprocess.placement(*size)

    def thumbnail(self, i: int, pixels: int) -> Image.Image:
        """The whole picture `i` in RGB with no side over `pixels`, its first three bands or its first as grey; a normalized
        array is shown as the model sees it.
        """
        item = next(iter(self.store.items((self.rows[i],))))
        if isinstance(item, np.ndarray) and is_input(item):
            picture = self.preprocess.undo(torch.from_numpy(item))
        else:
            picture = shown(decode(item, self.names[i], self.preprocess.size[0]))
        picture.thumbnail((pixels, pixels))
        return picture

    def data_uri(self, i: int, pixels: int) -> str:
        """The thumbnail of picture `i` as a PNG inside a data URI, for a page that loads nothing."""
        return data_uri(self.thumbnail(i, pixels))

    def fingerprint(self) -> str:
        """SHA-256 (hex) over every image's name, size in bytes and bytes as stored, in order; labels are not in it."""
        digest = hashlib.sha256()
        for name, item in zip(self.names, self.store.items(self.rows), strict=True):
            if isinstance(item, np.ndarray):
                data = str((item.dtype.str, item.shape)).encode() + item.tobytes()
            else:
                data = encoded(item, name)
            digest.update(f"{len(name.encode())} {name} {len(data)} ".encode())
            digest.update(data)
        for column in self.others:
            for row in self.rows:
                digest.update(column[row].numpy().tobytes())
        return digest.hexdigest()


def data_uri(picture: Image.Image) -> str:
    """A picture as a PNG inside a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True, eq=False)
class Batches(Sequence[Any]):
    """Images in batches of `size`, the last perhaps smaller, each read when it is asked for."""

    images: Images
    size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        inputs = self.images.inputs()
        for i in range(len(self)):
            yield self._with_others(torch.stack(list(itertools.islice(inputs, self.size))), i)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        place = range(len(self))[i]
        rows = range(len(self.images))[place * self.size : (place + 1) * self.size]
        return self._with_others(torch.stack(list(self.images.subset(rows).inputs())), place)

    def _with_others(self, images: Tensor, place: int) -> Batch:
        if not self.images.others:
            return images
        rows = self.images.rows[place * self.size : (place + 1) * self.size]
        return images, *(torch.stack([column[row] for row in rows]) for column in self.images.others)


def open_images(
    source: Any,
    preprocess: Preprocess,
    *,
    classes: int | Sequence[str] | None = None,
    labels: bool = True,
    limit: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    others: Sequence[Input] = (),
    image: str = "images",
) -> Images:
    """The images of a folder, a parquet, .npy or .npz file, an array, (array, labels) or a source of data/collection.py.

    `classes` is the model's class count, or its class names in output order; `labels=False` ignores all labels. At most
    `limit` images are drawn with `seed`, spread evenly over the classes, and stay in natural order; a smaller limit
    draws a subset of a larger one. With `skip_bad` broken images are left out after the draw. `others` are inputs of the model
    that come with each image, `image` is the name of the one that is. Raises BadImages.
    """
    check_source(source)
    if limit is not None and limit < 1:
        raise BadImages(f"the limit is {limit} images; allowed is 1 or more.")
    if is_collection(source):
        options: dict[str, Any] = {"limit": limit, "seed": seed, "skip_bad": skip_bad, "others": others, "image": image}
        found = read(source, preprocess, classes, labels=labels, **options)
    else:
        found = find(source, preprocess, classes, labels, image)
    names, class_indices, description, what = found.names, found.labels, found.description, found.description
    _refuse_unreadable(found, skip_bad=skip_bad)
    rows = list(range(len(names)))
    if limit is not None and limit < len(names):
        rows = spread(len(names) if class_indices is None else class_indices, limit, seed)
        description += f", {limit} of {len(names)} at random (seed {seed})"
    good, floats = _looked_at(found, rows, preprocess, skip_bad=skip_bad)
    skipped = [names[row] for row in rows if row not in good]
    if not good:
        raise BadImages(f"{description}: none of its {len(rows)} images can be read, e.g. {skipped[0]}. Give other images.")
    bad = [*found.unreadable, *skipped]
    left_out = (f"{len(bad)} of {description} cannot be read and are left out: {some(bad)}.",) if bad else ()
    return Images(
        names=tuple(names[row] for row in good),
        labels=None if class_indices is None else torch.from_numpy(class_indices[list(good)]),
        preprocess=preprocess,
        source=description,
        store=found.store,
        rows=tuple(good),
        pixels=tuple(good.values()),
        notes=(*found.notes, *floats.notes(what, preprocess), *left_out),
        others=columns(others, found.beside, names, description),
    )


def glance(source: Any, *, skip_bad: bool) -> None:
    """Raise BadImages for a folder or parquet file without images, or of which the first few do not decode; a look before a
    model is loaded, which may take minutes. Whoever opens the images looks at all of them.
    """
    if not isinstance(source, str | Path) or not (os.path.isdir(source) or Path(source).suffix == ".parquet"):
        return
    found = find(source, Preprocess((3, 1, 1)), None, labels=False)
    _refuse_unreadable(found, skip_bad=skip_bad)
    rows = range(min(GLANCED, len(found.names)))
    common = [row for row in rows if Path(found.names[row]).suffix.lower() in COMMON]  # in others the model's channels matter
    _looked_at(found, common, Preprocess((3, 1, 1)), skip_bad=skip_bad)


def _refuse_unreadable(found: Found, *, skip_bad: bool) -> None:
    if found.unreadable and not skip_bad:
        raise BadImages(f"in {found.description} {found.unreadable[0]}. Fix or remove it, or leave such out with --skip-bad.")


def _looked_at(found: Found, rows: Sequence[int], preprocess: Preprocess, *, skip_bad: bool) -> tuple[dict[int, bytes], Floats]:
    """The rows that can be read, each with the hash of its pixels, and the ends of floats. Raises BadImages for others, unless
    `skip_bad`.
    """
    good: dict[int, bytes] = {}
    floats = Floats()
    for row, item in zip(rows, found.store.items(rows), strict=True):
        name = found.names[row]
        if preprocess.whole and is_input(item):
            raise BadImages(
                f"{name} is of floats, and a file that normalizes inside takes pixels: give pictures or uint8 arrays, or "
                "leave out --normalize-inside."
            )
        try:
            good[row] = checked(item, name, preprocess.size[0])
            if isinstance(item, np.ndarray) and is_input(item):
                floats.see(item)
        except BadImages as error:
            if not skip_bad:
                raise BadImages(f"{error} Fix or remove it, or leave such images out with --skip-bad.") from error
    return good, floats


__all__ = [
    "Images",
    "Memory",
    "Preprocess",
    "data_uri",
    "glance",
    "open_images",
    "read_classes",
    "spread",
]
