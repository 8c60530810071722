"""What a model takes: the image and other inputs, and batches of them on their way through it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import Tensor

from fewbit.errors import BadModel, UnknownName


@dataclass(frozen=True, eq=False)
class Input:
    """A tensor that a model takes: its name in the file, its shape for one image (without the batch where it `has_batch`) and
    its type. Of the images `value` is None; of any other input it is the constant (with a batch of 1 where it has one), or,
    where a value comes with `each` image, an example. `others` are there where images may have other sizes than `shape`: those
    at which the files are compared, each another in every size that is free; `limits` say, as formulas of height and width, for
    which sizes the model is what was exported.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    has_batch: bool = True
    value: Tensor | None = None
    each: bool = False
    others: tuple[tuple[int, ...], ...] = ()
    limits: tuple[str, ...] = ()

    @property
    def is_image(self) -> bool:
        """Whether it is the images, which no constant and no example stands for."""
        return self.value is None

    @property
    def free(self) -> tuple[int, ...]:
        """The places of `shape` where other sizes are possible."""
        return tuple(i for i, n in enumerate(self.others[0] if self.others else ()) if n != self.shape[i])

    def __str__(self) -> str:
        sizes = ["batch"] * self.has_batch + ["?" if n < 0 else str(n) for n in self.shape]
        return f"{self.name} ({', '.join(sizes)}) {str(self.dtype).removeprefix('torch.')}"


# images (b, c, h, w); or these, and of every input that comes with an image a tensor with a row for each
Batch = Tensor | tuple[Tensor, ...]

FEW = (1, 3, 4)  # channels that a picture may have
CHANNELS = (3, 4)  # of an image in colours, rather than a mask, where nothing says which is which
LOUD = 100.0  # what other images of a batch are multiplied with, to show whether one depends on them
PLACES = ("channels", "height", "width")  # of the shape of an image
ALONE = (Input("images", ()),)  # of a model that takes nothing but images


def images_of(batch: Batch) -> Tensor:
    """The images (b, c, h, w) of a batch."""
    return batch[0] if isinstance(batch, tuple) else batch


def image_among(inputs: Sequence[Input]) -> Input:
    """The input that takes the images; its shape is (channels, height, width)."""
    return next(one for one in inputs if one.is_image)


def named_places(free: Sequence[int]) -> str:
    """Places of the shape of an image in words."""
    return " and ".join(PLACES[i] for i in free)


def advice_on_channels(dims: Sequence[int | str | None]) -> str:
    """What to do where the channels of an image (its dimensions without the batch) seem to stand behind height and width, in a
    sentence that begins with a space; empty where they do not.
    """
    if dims[-1] not in FEW or any(one in FEW for one in dims[:-1]):
        return ""
    shape = ", ".join(str(one) for one in dims)
    return (
        f" The model takes ({shape}), so its channels seem to be last; here they are first. Export it with channels first, "
        "as `python -m tf2onnx.convert --inputs-as-nchw NAME` does, or give floats in its own order, in .npy files or arrays."
    )


def count(batch: Batch) -> int:
    """How many images are in a batch."""
    return len(images_of(batch))


def rows(batch: Batch, indices: slice | Tensor) -> Batch:
    """Some images of a batch, with what comes with them."""
    return tuple(part[indices] for part in batch) if isinstance(batch, tuple) else batch[indices]


def parts(batch: Batch, size: int) -> list[Batch]:
    """A batch in batches of `size`, the last perhaps smaller."""
    return [rows(batch, slice(first, first + size)) for first in range(0, count(batch), size)]


def one_and_parts(batch: Batch, size: int) -> list[Batch]:
    """The first image alone, as a file is run that serves one image, and the others in batches of `size`."""
    return [rows(batch, slice(1)), *parts(rows(batch, slice(1, None)), size)] if size > 1 else parts(batch, size)


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches as one."""
    if isinstance(batches[0], tuple):
        return tuple(torch.cat(column) for column in zip(*batches, strict=True))
    return torch.cat(list(batches))  # type: ignore[arg-type]


def fed(inputs: Sequence[Input], batch: Batch) -> tuple[Tensor, ...]:
    """A tensor for each input of a model, in order; constants have a row for each image where the input has a batch."""
    images, *others = batch if isinstance(batch, tuple) else (batch,)
    each = dict(zip((one.name for one in inputs if one.each), others, strict=True))
    return tuple(images if one.is_image else each[one.name] if one.each else _spread(one, len(images)) for one in inputs)


def arrays_of(inputs: Sequence[Input], batch: Batch) -> list[NDArray[Any]]:
    """The same for a runtime."""
    return [value.detach().numpy() for value in fed(inputs, batch)]


def example(inputs: Sequence[Input], images: Tensor) -> Batch:
    """Images with examples of what comes with each of them."""
    others = [_spread(one, len(images)) for one in inputs if one.each]
    return (images, *others) if others else images


def dotted(name: str, path: Sequence[Any]) -> str:
    """The name of a tensor in a nested argument: its keys and places behind the argument's name."""
    return ".".join((name, *(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)))


def flat(trees: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested arguments by their names."""
    leaves = ((name, pytree.tree_flatten_with_path(tree)[0]) for name, tree in trees.items())
    return {dotted(name, path): leaf for name, found in leaves for path, leaf in found}


def _spread(one: Input, images: int) -> Tensor:
    assert one.value is not None
    return one.value.expand(images, *one.shape).contiguous() if one.has_batch else one.value


def the_image(ports: Sequence[Input], given: Collection[str], ref: str, each: Collection[str] = ()) -> Input:
    """The one input that may be an image and is not `given` anything; where there is none, the first of those that `each` item
    of the images brings. Raises BadModel where that is none or several, UnknownName where a name that is given is nearly one of
    them.
    """
    maps = [port for port in ports if len(port.shape) == 3 and port.has_batch and port.dtype.is_floating_point]
    images = [port for port in maps if port.name not in given] or [port for port in maps if port.name in each][:1]
    if len(images) == 1:
        return images[0]
    takes = f"{ref} takes {', '.join(map(str, ports)) or 'nothing'}"
    if not images:
        raise BadModel(f"{takes}; one has to be an image in floats: (batch, channels, height, width).")
    names = [port.name for port in ports]
    for name in sorted({*given} - {*names}):
        if difflib.get_close_matches(name, names, cutoff=0.5):
            raise UnknownName(f"input of {ref}", name, names)
    likely = next((port for port in images if port.shape[0] in CHANNELS), images[0])
    raise incomplete(ref, map(str, ports), [port.name for port in images if port is not likely])


def incomplete(ref: str, takes: Iterable[str], missing: Sequence[str]) -> BadModel:
    """The error about inputs that nothing is given for."""
    typed = " ".join(f"--input {name}=VALUE" for name in missing)
    return BadModel(
        f"{ref} takes {', '.join(takes)}. One is the image; {' and '.join(missing)} must be given as well: {typed}, where "
        f"VALUE is a number, a list of numbers or a .npy file (in Python inputs={{'{missing[0]}': ...}}); or with each image, "
        "in dicts or a .npz file with these names."
    )
