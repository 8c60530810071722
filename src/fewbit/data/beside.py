"""What comes with an image under the names of a model's other inputs: the rest of a dict, an array of a .npz file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fewbit.core.inputs import Input
from fewbit.data.labels import LABELS, MAYBE, BadLabel
from fewbit.errors import BadImages

IMAGES = ("pixel_values", "image", "images", "img")  # keys of an image in a dict
Columns = tuple[Sequence[Tensor], ...]  # for each input, what it takes by row of a source


@dataclass(frozen=True)
class Keys:
    """The name of the model's input that is the image (empty: not known yet), and the names of those that come with it.

    `maybe` are keys of a class where no usual one is there: none as long as the model's inputs, which may have such names, are
    not known.
    """

    image: str = ""
    others: Collection[str] = ()
    maybe: Collection[str] = MAYBE

    def of_image(self, item: Mapping[Any, Any]) -> Any:
        """The key of the image in a dict, or None: the name of the model's input, or a usual one that no other input has."""
        return next((key for key in (self.image, *IMAGES) if key in item and key not in self.others), None)

    def of_label(self, item: Mapping[Any, Any]) -> Any:
        """The key of its class, or None. Raises BadLabel where two may be it."""
        free = [key for key in item if key not in (self.image, *self.others)]
        usual, maybe = ([key for key in keys if key in free] for keys in (LABELS, self.maybe))
        if not usual and len(maybe) > 1:
            raise BadLabel(f"its keys {' and '.join(maybe)} may each be its label; call the right one '{LABELS[1]}'")
        return (*usual, *maybe, None)[0]

    def beside(self, item: Any) -> dict[str, Any]:
        """What a dict holds beside its image and its label; nothing of anything else."""
        if not isinstance(item, Mapping):
            return {}
        own = self.of_image(item), self.of_label(item)
        return {str(key): value for key, value in item.items() if key not in own}


def trees(item: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that are numbers, or nested dicts and tuples of numbers, as tensors."""
    found = {name: pytree.tree_map(as_tensor, value) for name, value in item.items()}
    return {n: tree for n, tree in found.items() if all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(tree))}


def as_tensor(value: Any) -> Any:
    """Numbers as a tensor, 64-bit floats in 32; anything else stays as it is."""
    if not isinstance(value, Tensor | np.ndarray | np.generic | int | float):
        return value
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except TypeError:
        return value
    return tensor.float() if tensor.is_floating_point() else tensor


def row_of(one: Input, values: Mapping[str, Any]) -> Tensor:
    """What an input takes with an image whose dict holds `values`. Raises BadImages for another shape, type or NaN."""
    if one.name not in values:
        raise BadImages(f"it has no '{one.name}', which the model takes with each image")
    value = as_tensor(values[one.name])
    if isinstance(value, Tensor) and tuple(value.shape) == (1, *one.shape):
        value = value[0]
    if not isinstance(value, Tensor) or tuple(value.shape) != one.shape:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise BadImages(f"its '{one.name}' has {found}; the model takes {one}")
    if bool(value.isnan().any()):
        raise BadImages(f"its '{one.name}' holds NaN; all must be numbers")
    return value.to(one.dtype)


def columns(others: Sequence[Input], found: Mapping[str, Any], names: Sequence[str], where: str) -> Columns:
    """What each of the inputs takes, by row of a source. Raises BadImages where that has nothing for one, or for another number
    of images.
    """
    result = []
    for one in others:
        if one.name not in found:
            raise BadImages(
                f"{where} has no '{one.name}', which the model takes with each image: {one}. Give a list of dicts or a .npz "
                f"file with it, or, when the model is quantized, the same for all: fewbit quantize --input {one.name}=VALUE."
            )
        values = found[one.name]
        if len(values) != len(names):
            raise BadImages(f"{where} has {len(values)} '{one.name}' and {len(names)} images; give one for each image.")
        if isinstance(values, np.ndarray):
            values = _column(one, values, names, where)
        result.append(values)
    return tuple(result)


def _column(one: Input, values: np.ndarray, names: Sequence[str], where: str) -> Tensor:
    rows = []
    for name, value in zip(names, values, strict=True):
        try:
            rows.append(row_of(one, {one.name: value}))
        except BadImages as error:
            raise BadImages(f"{name}: {error}. Fix {where}.") from error
    return torch.stack(rows)
