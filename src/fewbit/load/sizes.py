"""Images of other sizes: a program that leaves height and width free, and the sizes that it was looked at with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import SymInt, Tensor, nn
from torch.export import ExportedProgram

from fewbit.core.inputs import PLACES, Input, example, fed, image_among, named_places
from fewbit.errors import BadModel, stopped
from fewbit.load.contexts import evaluating
from fewbit.load.export import export
from fewbit.load.inputs import Arguments
from fewbit.load.ports import NamedPorts, batch_of, image_of, key_of, tensors_in
from fewbit.load.program import graph_module
from fewbit.load.trials import all_alike, noise_of, tensors_of

OTHERS = "cannot be exported, or give other numbers"
# What is added to height and width: 1, 2, 4, 8, 16 and 32, as behind strides of 1, 2, 4, ... padding and windows depend on the
# remainder, which such a step changes whatever the window is. Some are smaller, none keeps the sides' proportion.
STEPS = ((1, 3), (-2, 2), (4, -4), (8, 24), (-16, 16), (16, -8), (32, 64), (-32, 32))
SMALLEST = 2
LAST = ((14, 28),)  # and twice the sides
Called = Callable[[Tensor], Any]  # what a model gives for images


class Sizes(Enum):
    """Which sizes of images are to stay free."""

    WRITTEN = "those that a file or a program leaves free; a module has one size"
    ONE = "none, whatever a file or a program leaves free"
    ANY = "height and width, of a module as well"

    def of(self, free: Sequence[int]) -> tuple[int, ...]:
        """The places (of channels, height, width) that stay free of those that a file or a program leaves `free`."""
        return () if self is Sizes.ONE else tuple(free)

    @property
    def of_module(self) -> tuple[int, ...]:
        """The places that are to stay free of a module."""
        return (1, 2) if self is Sizes.ANY else ()


def exported(
    module: nn.Module, inputs: Sequence[Input], arguments: Arguments | None, batches: Sequence[int | None],
    free: Sequence[int] = (),
) -> tuple[ExportedProgram, tuple[Input, ...]]:  # fmt: skip
    """The program of a module as `export` gives it, for images of any size in the places of `free` where it can be; and the
    inputs, of which the image then has another size, for which the program gives what the module gives.
    """
    found = _with_free_sizes(module, inputs, arguments, batches[0], free)
    if found is not None:
        return found
    program = export(module, inputs, arguments, batches)
    batch = batch_of(program, inputs)
    if batch != batches[0] and (found := _with_free_sizes(module, inputs, arguments, batch, free)):
        return found
    return program, tuple(inputs)


def _with_free_sizes(
    module: nn.Module, inputs: Sequence[Input], arguments: Arguments | None, batch: int | None, free: Sequence[int]
) -> tuple[ExportedProgram, tuple[Input, ...]] | None:
    if not free:
        return None
    try:
        program = export(module, inputs, arguments, (batch,), free)
        left = free_sizes(image_of(program, inputs))
        if left != tuple(free):  # written in the model, which the program has as a symbol of one value
            return _with_free_sizes(module, inputs, arguments, batch, left)
    except BadModel:
        return None
    called = NamedPorts(module, arguments or Arguments((inputs[0].name,)))
    with evaluating(called):
        looked = with_other_sizes(lambda images: called.result(tensors_of(inputs, images)), program, inputs)
    return None if looked is None else (program, looked)


def with_other_sizes(model: Called, program: ExportedProgram, inputs: Sequence[Input]) -> tuple[Input, ...] | None:
    """The inputs, the image with the other sizes for which the model runs; None where there is none, or where the program gives
    something else than the model for one of those that are tried.
    """
    run, found = graph_module(program), list[tuple[int, ...]]()
    for other, last in _others(image_among(inputs).shape, free_sizes(image_of(program, inputs))):
        if last and found:
            break
        images = noise_of(batch_of(program, inputs) or 1, other)
        with torch.no_grad():
            try:
                want = tensors_in(model(images))
            except Exception as error:
                if halt := stopped(error):
                    raise halt from error
                continue  # the model takes no such size, and nothing is said about it
            try:
                got = pytree.tree_leaves(run(*fed(inputs, example(inputs, images))))
            except Exception as error:
                if halt := stopped(error):
                    raise halt from error
                return None
        if not all_alike(want, got):
            return None
        found.append(other)
    if not found:
        return None
    limits = limits_of(program, inputs)
    return tuple(replace(one, others=tuple(found), limits=limits) if one.is_image else one for one in inputs)


def limits_of(program: ExportedProgram, inputs: Sequence[Input]) -> tuple[str, ...]:
    """For which heights and widths a program is the model that was exported, where it branches on them: `height <= 200`."""
    image, name = image_of(program, inputs), image_among(inputs).name
    found = dict[str, None]()
    for place in free_sizes(image):
        size = image.shape[1 + place]
        bounds: Any = program.range_constraints.get(size.node.expr) if isinstance(size, SymInt) else None
        pairs: tuple[tuple[str, Any], ...] = (("<=", bounds.upper), (">=", bounds.lower)) if bounds else ()
        for sign, bound in pairs:
            if bound.is_Integer and bound > SMALLEST:  # torch gives everything that is free this least size
                found[f"{PLACES[place]} {sign} {bound}"] = None
    of_image = r"L(?:\['\w+'\])+" if len(inputs) == 1 else rf"L(?:\['\w+'\])*\['(?:{re.escape(name)}|{key_of(name)})'\]"
    for guard in getattr(program, "_guards_code", None) or ():  # relations of the two, which have no public name
        said = re.sub(rf"{of_image}\.size\(\)\[([23])\]", lambda match: PLACES[int(match[1]) - 1], guard)
        if re.search(r"[^<>=] ?[<>]=? ", said) and "L[" not in said:
            found[said.replace("*", " * ")] = None
    return tuple(found)


def free_sizes(image: Tensor) -> tuple[int, ...]:
    """The places of (channels, height, width) that a program leaves free; `image` is its fake one."""
    return tuple(i for i, n in enumerate(image.shape[1:]) if isinstance(n, SymInt) and n.node.maybe_as_int() is None)


def size_of(image: Tensor, asked: Sequence[int] | None, ref: str) -> tuple[int, int, int]:
    """(channels, height, width): what a program fixes, and what is asked for where it leaves a size free."""
    fixed = [n if isinstance(n, int) else None for n in image.shape[1:]]
    if asked is None and None in fixed:
        raise BadModel(f"{ref} was exported for any {named_places(free_sizes(image))}. Say one size: --input-size 3,224,224.")
    size = tuple(wanted if n is None else n for n, wanted in zip(fixed, asked or fixed, strict=True))
    if asked is not None and size != tuple(asked):
        raise BadModel(f"{ref} was exported for input {size}, not {tuple(asked)}; leave --input-size out.")
    return size  # type: ignore[return-value]


def about_sizes(ref: str, inputs: Sequence[Input], free: Sequence[int]) -> tuple[str, ...]:
    """A sentence about the sizes of images that were to stay free."""
    if not free:
        return ()
    image = image_among(inputs)
    takes, size = f"{ref} takes images of any {named_places(free)}", " x ".join(map(str, image.shape[1:]))
    if not image.others:
        return (f"{takes}; the files that come out take {size} alone: others {OTHERS}.",)
    compared = ", ".join(" x ".join(map(str, other[1:])) for other in image.others)
    limits = f" Beyond {' and '.join(image.limits)} the model is another one, and the files are not." if image.limits else ""
    free_too = f"the files that come out leave {named_places(image.free)} free as well"
    return (f"{takes}; {free_too}, and are compared at {size}, {compared}. Other sizes are not looked at.{limits}",)


def without_size(ref: str, more: str = "") -> BadModel:
    """The error for a model that does not say the size of its images."""
    return BadModel(f"{ref} does not say its input size. Give it: --input-size 3,224,224 (input_size=(3, 224, 224)).{more}")


def of_one_size(inputs: Sequence[Input], ref: str) -> BadModel:
    """The error for a model that takes one size of images, where --dynamic-size was given."""
    size = " x ".join(map(str, image_among(inputs).shape[1:]))
    return BadModel(f"{ref} takes images of {size} alone: others {OTHERS}. Leave --dynamic-size out.")


def _others(shape: tuple[int, ...], free: Sequence[int]) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Sizes to try, and whether each is one of the `LAST`, which are for models that take no size before them."""
    high, wide = shape[1:]
    steps = [(pair, False) for pair in STEPS] + [(pair, True) for pair in (*LAST, (high, wide))]
    for (higher, wider), last in steps:
        other = tuple(n if i in free else shape[i] for i, n in enumerate((shape[0], high + higher, wide + wider)))
        if other != shape and min(other) > 0:
            yield other, last


def by_guards(program: ExportedProgram, inputs: Sequence[Input]) -> Called:
    """A program as the model that it was exported from: it refuses sizes that it was not exported for."""
    checking = program.module()

    def call(images: Tensor) -> Any:
        assert program.call_spec.in_spec is not None
        args, kwargs = pytree.tree_unflatten(fed(inputs, example(inputs, images)), program.call_spec.in_spec)
        return checking(*args, **kwargs)

    return call
