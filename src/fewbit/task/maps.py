"""Maps: outputs with a number for each pixel, and files with one for each pixel of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbit.core.task import Output, Placement, Scored
from fewbit.errors import BadModel
from fewbit.task.folder import beside, one_band, read_array, same_size


@dataclass(frozen=True)
class Map:
    """A map of numbers in a file, and where its picture lies in the model's input. `one` is a number that is written for 1."""

    path: Path
    placement: Placement
    one: int | None = None

    def placed(self, size: tuple[int, int], outside: float) -> Tensor:
        """The map as the model's input sees it, (h, w) of `size`: nearest pixels, `outside` where the picture is not."""
        array = torch.from_numpy(np.ascontiguousarray(read_array(self.path)).astype(np.float64))
        if self.one is not None:
            array = torch.where(array == self.one, 1.0, array)
        rows, columns = (
            (((torch.arange(n) + 0.5) * whole / n - shift) / scale).floor().long()
            for n, whole, scale, shift in zip(
                size, self.placement.size, reversed(self.placement.scale), reversed(self.placement.shift), strict=True
            )
        )
        inside = (rows >= 0)[:, None] & (rows < len(array))[:, None] & (columns >= 0) & (columns < array.shape[1])
        found = array[rows.clamp(0, len(array) - 1)][:, columns.clamp(0, array.shape[1] - 1)]
        return torch.where(inside, found, outside)


def maps(folder: Path, images: Scored, suffixes: Sequence[str], what: str, palette: bool = True) -> list[Map]:
    """The map of each image, `what` they are, as pictures with or without a `palette` of their numbers. Raises BadImages where
    one is missing, or has not the size of its picture.
    """
    found = []
    for path, name, size in zip(beside(folder, images, suffixes, what), images.names, images.sizes(), strict=True):
        one_band(path, what, palette)
        same_size(path, read_array(path).shape, name, size)
        found.append(Map(path, images.placed(size)))
    return found


def one_map(outputs: Sequence[Output], channels: Sequence[int] | None, what: str) -> tuple[int, tuple[int, ...]]:
    """The number and shape of the output that is a map, of several the one named `out`, `logits` or `predicted_depth`.

    A map is (h, w), or (channels, h, w) of as many real numbers as `channels` allows; where it allows any (None), of one
    integer or boolean as well, the class of each pixel. Raises BadModel.
    """

    def fits(one: Output) -> bool:
        if len(one.shape) != 3:
            return len(one.shape) == 2
        return one.shape[0] == 1 or one.is_real if channels is None else one.is_real and one.shape[0] in channels

    found = [i for i, one in enumerate(outputs) if fits(one)]
    named = [i for i in found if outputs[i].name in ("out", "logits", "predicted_depth")] or found
    if len(named) != 1:
        raise BadModel(f"{what} is needed, one alone or named `out` or `logits`")
    return named[0], outputs[named[0]].shape
