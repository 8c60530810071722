"""The inputs of a model: which one is the image, and what the others are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fewbit.core.inputs import Input, dotted, flat, incomplete, the_image
from fewbit.core.pixels import CLIPS
from fewbit.errors import BadModel, UnknownName

IMAGES = "images"  # what files call the image of a model that takes nothing else and does not say
USUAL = ("pixel_values", "images", "image", "imgs", "img", "pixels", "inputs", "input", "x")  # names of an argument that is it

LAYERS_3D = (nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)


@dataclass(frozen=True)
class Given:
    """What the inputs are given that are not the image: constants by name, nested as the model takes them, where None stands
    for the image; and by name an example of what comes with each image, nested as well.
    """

    constants: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)

    @property
    def brought(self) -> frozenset[str]:
        """The names of tensors that come with each image, or are the image, and that no constant stands for."""
        return frozenset(flat(self.each)) - {*self.constants}


@dataclass(frozen=True)
class Arguments:
    """How a module is called: its arguments, with the name of an input in the place of every tensor."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def image(shape: Sequence[int], name: str = IMAGES) -> Input:
    """The input that is the image (channels, height, width)."""
    return Input(name, tuple(shape))


def of_module(module: nn.Module, shape: Sequence[int], given: Given, ref: str) -> tuple[tuple[Input, ...], Arguments | None]:
    """The inputs of a module in the order of its `forward`, and how it is called; None: with the image alone.

    The image is an argument that nothing is given for: of several one with a usual name, else the first; where all are given,
    the first that each item of the images brings. Raises BadModel for another one that is needed, UnknownName for what it does
    not take.
    """
    kinds = inspect.signature(module.forward).parameters.values()
    named = [p for p in kinds if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names, needed = [p.name for p in named], [p.name for p in named if p.default is p.empty]
    one = {name: pytree.tree_map(lambda x: x[None], tree) for name, tree in given.each.items() if name in names}
    trees = {**one, **given.constants}
    unknown = [name for name in trees if name not in names]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in kinds):
        raise UnknownName(f"input of {ref}", unknown[0], names)
    for parameter in named:
        _refuse_flag(parameter, given.constants.get(parameter.name), ref)
    own = any(leaf is None for tree in trees.values() for leaf in pytree.tree_leaves(tree))
    free = [name for name in needed or names if name not in trees]
    named_by_items = not own and not free
    if named_by_items:
        from_items = given.each.keys() - given.constants
        free = [name for name in needed or names if name in from_items and isinstance(given.each[name], Tensor)][:1]
    if not own and not names:
        takes = ", ".join(map(str, kinds))
        raise BadModel(
            f"{ref} names no input: its forward({takes}) has none. The image needs one: give a module whose forward has it, as "
            "in def forward(self, image)."
        )
    if not own and not free:
        raise BadModel(f"{ref} takes {', '.join(names)}, and all of them are given; leave out the one that is the image.")
    chosen = next((name for name in USUAL if name in free), free[0]) if free else ""
    if not own:
        trees[chosen] = None
    if missing := [name for name in needed if name not in trees]:
        raise incomplete(ref, names, missing)
    if len(trees) == 1 and not own and not named_by_items:
        by_name = chosen != names[0] or named[0].kind is inspect.Parameter.KEYWORD_ONLY
        return (image(shape),), Arguments((), {chosen: IMAGES}) if by_name else None
    inputs, kwargs = list[Input](), dict[str, Any]()
    for name in sorted(trees, key=lambda name: names.index(name) if name in names else len(names)):
        leaves, spec = pytree.tree_flatten_with_path(trees[name])
        each = name in given.each and name not in given.constants
        paths = [dotted(name, path) for path, _ in leaves]
        kwargs[name] = pytree.tree_unflatten(paths, spec)
        inputs += [_of(path, leaf, shape, each) for path, (_, leaf) in zip(paths, leaves, strict=True)]
    return tuple(inputs), Arguments((), kwargs)


def about_image(module: nn.Module, inputs: Sequence[Input], arguments: Arguments | None) -> str:
    """How to name the argument that is the image where a module has several and the one that was taken is not called so, in a
    sentence that begins with a space; else empty.
    """
    kinds = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in kinds if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    given = arguments.kwargs if arguments else dict.fromkeys(names[:1], inputs[0].name)
    images = [one.name for one in inputs if one.is_image]
    taken = next((name for name, value in given.items() if value in images), "")
    others = [name for name in names if name not in given]
    if not taken or taken in USUAL or not others:
        return ""
    return (
        f" The image was given to {taken}; where it belongs to {' or '.join(others[:4])}, name that, in Python "
        f'inputs={{"{others[0]}": None}}, or give a module whose forward takes the image alone.'
    )


def about_clips(module: nn.Module) -> str:
    """What to do with clips, where a module has 3D layers, in a sentence that begins with a space; else empty."""
    return f" {CLIPS}" if any(isinstance(part, LAYERS_3D) for part in module.modules()) else ""


def _refuse_flag(parameter: inspect.Parameter, value: Any, ref: str) -> None:
    """Raise BadModel where an argument that is true or false, by its default or its annotation, is given a value."""
    if is_flag(value) and (isinstance(parameter.default, bool) or parameter.annotation in (bool, "bool")):
        raise BadModel(f"{ref}: {about_flag(parameter.name, value)}")


def is_flag(value: Any) -> bool:
    """Whether a value is a single true or false."""
    return isinstance(value, Tensor) and value.dtype == torch.bool and not value.ndim


def about_flag(name: str, value: Tensor) -> str:
    """What to say of an argument of Python's that is given true or false."""
    return (
        f"{name} is a flag, {bool(value)}, and inputs are tensors. Give a module around it, whose forward calls it so: "
        f"def forward(self, x): return self.net(x, {name}={bool(value)})."
    )


def _of(name: str, value: Tensor | None, shape: Sequence[int], each: bool) -> Input:
    """An input with a value, which is that of one image where its first dimension is 1."""
    if value is None:
        return image(shape, name)
    value = value.float() if value.is_floating_point() else value
    batched = value.ndim > 0 and len(value) == 1
    return Input(name, tuple(value.shape[1:] if batched else value.shape), value.dtype, batched, value, each)


def of_ports(ports: Sequence[Input], given: Given, ref: str) -> tuple[Input, ...]:
    """The inputs of a program or a file, whose shapes (-1: free) and types are known, with their values.

    Raises BadModel where it is not clear which one is the image, where one is missing or of another shape or type, UnknownName
    for a name that is not there.
    """
    names = [port.name for port in ports]
    each = {name: value for name, value in flat(given.each).items() if any(p.has_batch and p.name == name for p in ports)}
    values = {**each, **given.constants}
    if unknown := [name for name in given.constants if name not in names]:
        raise UnknownName(f"input of {ref}", unknown[0], names)
    found = the_image(ports, values, ref, given.brought)
    if missing := [name for name in names if name not in values and name != found.name]:
        raise incomplete(ref, map(str, ports), missing)
    return tuple(port if port.name == found.name else _filled(port, values[port.name], given, ref) for port in ports)


def _filled(port: Input, value: Any, given: Given, ref: str) -> Input:
    """The input with a value of its shape and type; a batch of 1 may be left out."""
    if not isinstance(value, Tensor):
        raise BadModel(f"{ref} takes {port}; input {port.name} is given a {type(value).__name__}, one array is needed.")
    each = port.name not in given.constants
    whole = value[None] if port.has_batch and value.ndim == len(port.shape) else value
    own = tuple(whole.shape[1:] if port.has_batch else whole.shape)
    fits = len(own) == len(port.shape) and all(want in (n, -1) for n, want in zip(own, port.shape, strict=True))
    exact = port.dtype.is_floating_point or torch.equal(whole.to(port.dtype).to(whole.dtype), whole)
    if not fits or not exact or (port.has_batch and len(whole) != 1):
        kind = str(value.dtype).removeprefix("torch.")
        raise BadModel(f"{ref} takes {port}; input {port.name} is given {kind} numbers of shape {tuple(value.shape)}. Fix it.")
    return replace(port, shape=own, value=whole.to(port.dtype), each=each)
