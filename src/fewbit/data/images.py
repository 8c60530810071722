"""Images from folders, parquet, NumPy files or memory, as normalized batches with labels in the model's class order.

Pixels are decoded by Pillow and converted to RGB as timm does (grey is repeated, alpha is dropped, CMYK is converted).
EXIF orientation is NOT applied, which is timm's behaviour too. Nothing is decoded before a batch asks for it, except
that `open_images` decodes every chosen image once, JPEG at an eighth of its size, so that a broken one is found early.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fewbit.data.classes import read_classes
from fewbit.data.decode import Array, check, decode, encoded
from fewbit.data.memory import Memory
from fewbit.data.preprocess import Preprocess, as_input
from fewbit.data.sources import InMemory, Store, find
from fewbit.errors import BadImages


@dataclass(frozen=True, eq=False)
class Images:
    """Images that can be read again and again: `labels` are int64 class indices (n,), or None where nobody knows.

    `names` say where each image came from, `skipped` which were left out as broken, `source` all of it in a phrase. What has
    been decoded is in `memory`, which subsets share.
    """

    names: tuple[str, ...]
    labels: Tensor | None
    preprocess: Preprocess
    source: str
    store: Store
    rows: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    memory: Memory | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Batches:
        """Normalized float32 inputs, `size` at a time and then the rest."""
        if size < 1:
            raise BadImages(f"the batch size is {size}; allowed is 1 or more.")
        return Batches(self, size)

    def inputs(self) -> Iterator[Float[Tensor, "3 h w"]]:
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

    def subset(self, indices: Iterable[int]) -> Images:
        """The images at `indices`, in that order. Raises IndexError for an index outside."""
        chosen = [range(len(self))[i] for i in indices]
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            labels=None if self.labels is None else self.labels[chosen],
            rows=tuple(self.rows[i] for i in chosen),
        )

    def thumbnail(self, i: int, pixels: int) -> Image.Image:
        """The whole picture `i` in RGB with no side over `pixels`; a normalized array is shown as the model sees it."""
        item = next(iter(self.store.items((self.rows[i],))))
        if isinstance(item, np.ndarray) and item.dtype != np.uint8:
            picture = self.preprocess.undo(torch.from_numpy(item))
        else:
            picture = decode(item, self.names[i])
        picture.thumbnail((pixels, pixels))
        return picture

    def data_uri(self, i: int, pixels: int) -> str:
        """The thumbnail of picture `i` as a PNG inside a data URI, for a page that loads nothing."""
        buffer = io.BytesIO()
        self.thumbnail(i, pixels).save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

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
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Batches(Sequence[Tensor]):
    """Images in batches (b, 3, h, w) of `size`, the last perhaps shorter, each read when it is asked for."""

    images: Images
    size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        inputs = self.images.inputs()
        while batch := list(itertools.islice(inputs, self.size)):
            yield torch.stack(batch)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        first = range(0, len(self.images), self.size)[i]
        return torch.stack(list(self.images.subset(range(len(self.images))[first : first + self.size]).inputs()))


def open_images(
    source: str | Path | Array | Tensor | tuple[Any, Any],
    preprocess: Preprocess,
    *,
    classes: int | Sequence[str] | None = None,
    labels: bool = True,
    limit: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> Images:
    """The images of a folder, a parquet, .npy or .npz file, an array, or an (array, labels) pair.

    `classes` is the model's class count, or its class names in output order; `labels=False` ignores all labels. At most
    `limit` images are drawn with `seed`, spread evenly over the classes, and stay in natural order; a smaller limit
    draws a subset of a larger one. With `skip_bad` broken images are left out after the draw. Raises BadImages.
    """
    names, class_indices, store, description = find(source, preprocess, classes, labels)
    if limit is not None and limit < 1:
        raise BadImages(f"the limit is {limit} images; allowed is 1 or more.")
    rows = list(range(len(names)))
    if limit is not None and limit < len(names):
        rows = spread(len(names) if class_indices is None else class_indices, limit, seed)
        description += f", {limit} of {len(names)} at random (seed {seed})"
    good: list[int] = []
    skipped: list[str] = []
    for row, item in zip(rows, store.items(rows), strict=True):
        try:
            check(item, names[row])
            good.append(row)
        except BadImages as error:
            if not skip_bad:
                raise BadImages(f"{error} Mend or remove it, or leave such images out with --skip-bad.") from error
            skipped.append(names[row])
    if not good:
        raise BadImages(f"{description}: none of its {len(rows)} images can be read, e.g. {skipped[0]}. Give other images.")
    return Images(
        names=tuple(names[row] for row in good),
        labels=None if class_indices is None else torch.from_numpy(class_indices[good]),
        preprocess=preprocess,
        source=description,
        store=store,
        rows=tuple(good),
        skipped=tuple(skipped),
    )


def spread(labels: int | Array, limit: int, seed: int) -> list[int]:
    """`limit` rows in rising order, as many of each label as of any other while they last; an int is just n."""
    indices = np.zeros(labels, np.int64) if isinstance(labels, int) else labels
    generator = np.random.default_rng(seed)
    counts: dict[int, int] = {}
    turn = dict(zip(np.unique(indices).tolist(), generator.permutation(len(np.unique(indices))).tolist(), strict=True))
    order = []
    for row in generator.permutation(len(indices)).tolist():
        label = int(indices[row])
        counts[label] = counts.get(label, 0) + 1
        order.append((counts[label], turn[label], row))
    return sorted(row for _, _, row in sorted(order)[:limit])


__all__ = ["Images", "Memory", "Preprocess", "open_images", "read_classes", "spread"]


def refuse_same(calibration: Images, scored: Images) -> None:
    """Raise BadImages where one source is given for both; arrays are one source where they are the same array."""
    arrays = [images.store for images in (calibration, scored) if isinstance(images.store, InMemory)]
    if len(arrays) == 2 and calibration.source.startswith("array") and arrays[0].values is not arrays[1].values:
        return
    if calibration.source == scored.source:
        raise BadImages(f"{calibration.source} is given for calibration and for scoring; scores need images of their own.")
