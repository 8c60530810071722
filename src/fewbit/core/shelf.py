"""What would grow with the number of images: in a file, and in memory one batch at a time."""

from __future__ import annotations

import math
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fewbit.core.device import CPU
from fewbit.core.inputs import Batch, count, joined, rows
from fewbit.errors import BadFile


@dataclass(frozen=True)
class _Place:
    """A tensor in a file: its first byte, and how its numbers lie behind that."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def span(self) -> int:
        """The numbers from its first to its last."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)) if 0 not in self.shape else 0

    def row(self, i: int) -> _Place:
        """One entry of the first dimension, which stays."""
        return replace(self, start=self.start + i * self.strides[0] * self.dtype.itemsize, shape=(1, *self.shape[1:]))


class Shelf(Sequence[Any]):
    """Values, such as a tensor for each batch of images, in a file without a name in `folder` (None: the system's own).

    A value is a tensor, a number or a tuple of them. Reading gives tensors of the reader's own, on the device and with the
    strides that they had: kernels add them up in the same order. The file's pages are the system's, which drops them when
    memory is short. Raises BadFile where the disk is full.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._values: list[Any] = []
        self._end = 0

    @staticmethod
    def of(values: Iterable[Any], folder: Path | None = None) -> Shelf:
        """A shelf with these values."""
        shelf = Shelf(folder)
        for value in values:
            shelf.append(value)
        return shelf

    def append(self, value: Any) -> None:
        self._values.append(tree_map_only(Tensor, self._write, value))

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        return tree_map_only(_Place, self._read, self._values[i])

    @property
    def firsts(self) -> list[int]:
        """The number of the first row of each value, which are tensors, and last that of all rows."""
        return [0, *torch.tensor([place.shape[0] for place in self._values]).cumsum(0).tolist()]

    def rows(self, indices: Tensor) -> Tensor:
        """The rows with these numbers, counted through all values."""
        firsts, rows = self.firsts, []
        for index in indices.tolist():
            k = bisect_right(firsts, index) - 1
            rows.append(self._read(self._values[k].row(index - firsts[k])))
        return torch.cat(rows)

    def _write(self, value: Tensor) -> _Place:
        place = _Place(self._end, tuple(value.shape), value.stride(), value.dtype, value.device)
        flat = value.detach().as_strided((place.span,), (1,), value.storage_offset()).to(CPU)
        rest = flat.view(torch.uint8).numpy().data
        self._file.seek(self._end)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            size = math.ceil(len(rest) / 2**20)
            raise BadFile(
                f"{size} MB of intermediate values cannot be written: {error.strerror}. Free some space, give another folder "
                "(--out DIR) or fewer images (--calibration)."
            ) from error
        self._end = self._file.tell()
        return place

    def _read(self, place: _Place) -> Tensor:
        flat = torch.empty(place.span, dtype=place.dtype)
        rest = flat.view(torch.uint8).numpy().data
        self._file.seek(place.start)
        while rest:
            rest = rest[self._file.readinto(rest) :]
        return flat.to(place.device).as_strided(place.shape, place.strides)


class Rebatched(Sequence[Any]):
    """`most` of the images of batches that are equally long (the last may be shorter), in batches of another size, each made
    when it is read. They are spread evenly over all images: those of a class lie side by side.
    """

    def __init__(self, batches: Sequence[Batch], size: int, most: int | None = None) -> None:
        self.batches, self.size = batches, size
        self.own = count(batches[0]) if batches else 1
        self.whole = count_of(batches)
        self.total = self.whole if most is None else min(most, self.whole)

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        first = range(0, self.total, self.size)[i]
        places = [k * self.whole // self.total for k in range(first, min(first + self.size, self.total))]
        found = groupby(places, lambda place: place // self.own)
        return joined([rows(self.batches[k], torch.tensor([place % self.own for place in some])) for k, some in found])


def count_of(batches: Sequence[Batch]) -> int:
    """How many images there are in batches that are equally long; the last may be shorter."""
    return count(batches[0]) * (len(batches) - 1) + count(batches[-1]) if batches else 0
