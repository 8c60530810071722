"""A cache of decoded images, so that a calibration image is decoded once however often it is read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fewbit.core.shelf import Shelf
from fewbit.errors import BadFile


class Memory:
    """Normalized images by row, in a file without a name in `folder`; where its disk is full they are decoded each time.
    Pickled, for another process, it begins without any.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._shelf, self._places = Shelf(folder), dict[int, int]()

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def __getitem__(self, row: int) -> Tensor:
        """The image at a row, float32 (c, h, w)."""
        image: Tensor = self._shelf[self._places[row]]
        return image

    def keep(self, row: int, image: Tensor) -> Tensor:
        """Keep an image, and give it back."""
        with suppress(BadFile):
            self._shelf.append(image)
            self._places[row] = len(self._shelf) - 1
        return image
