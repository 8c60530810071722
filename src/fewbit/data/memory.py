"""A cache of decoded images, so that a calibration image is decoded once however often it is read."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

GIB = 1 << 30


class Memory:
    """Normalized images by row: in memory up to `limit` bytes, then in a file without a name in `folder`.

    Without a folder, or where its disk is full, what is over the limit is decoded again each time.
    """

    def __init__(self, limit: int = GIB, folder: Path | None = None) -> None:
        self._free, self._folder = limit, folder
        self._cached: dict[int, Tensor] = {}
        self._spilled: dict[int, tuple[int, tuple[int, ...]]] = {}  # row -> (first byte, shape)
        self._file: IO[bytes] | None = None

    def __contains__(self, row: int) -> bool:
        return row in self._cached or row in self._spilled

    def __getitem__(self, row: int) -> Tensor:
        """The image at a row, float32 (c, h, w)."""
        if row in self._cached:
            return self._cached[row]
        assert self._file is not None
        start, shape = self._spilled[row]
        self._file.seek(start)
        values = np.frombuffer(self._file.read(4 * int(np.prod(shape))), np.float32)
        return torch.from_numpy(values.copy()).reshape(shape)

    def keep(self, row: int, image: Tensor) -> Tensor:
        """Keep an image, and give it back."""
        size = image.numel() * image.element_size()
        if size <= self._free:
            self._free -= size
            self._cached[row] = image
        elif self._folder is not None:
            with suppress(OSError):
                self._file = self._file or tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
                start = self._file.seek(0, 2)
                self._file.write(image.contiguous().numpy().tobytes())
                self._file.flush()
                self._spilled[row] = (start, tuple(image.shape))
        return image
