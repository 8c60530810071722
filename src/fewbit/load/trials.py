"""A model and its program are run: whether they give the same, twice, in another place of a batch, and for one image alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from fewbit.core.inputs import LOUD, Input, example, fed, image_among
from fewbit.errors import BadModel, stopped
from fewbit.load.contexts import evaluating, quiet
from fewbit.load.inputs import Arguments
from fewbit.load.ports import NamedPorts, batch_of, key_of, no_tensors, tensors_in
from fewbit.load.program import graph_module

ROUNDING = 2.0**-20  # of an image, as sums of 256 terms in float32 round
TIES = 4.0  # times as many numbers as rounding moves to another side may change with the size of the batch
PASSES = 8  # of a program that draws random numbers, to see whether they change its answer


def noise_of(batch: int | None, input_shape: Sequence[int]) -> Tensor:
    return torch.rand(batch or 2, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def tensors_of(inputs: Sequence[Input], images: Tensor) -> dict[str, Tensor]:
    """Images and examples of the other inputs, as NamedPorts takes them; copies: a model may write into them."""
    values = fed(inputs, example(inputs, images))
    return {key_of(one.name): value.clone() for one, value in zip(inputs, values, strict=True)}


def same_again(function: Callable[[], Any], ref: str, passes: int = 2) -> Any:
    """What a model gives. Raises BadModel where another pass gives something else."""
    first, *others = (function() for _ in range(passes))
    for other in others:
        for one, two in zip(tensors_in(first), tensors_in(other), strict=True):
            if one.shape != two.shape or not alike(one.double(), two.double()):
                raise BadModel(
                    f"{ref} gives two answers for one image: something in it is random (dropout left on, random masks). "
                    "Make it deterministic in eval mode; a random model cannot be compared with its integers."
                )
    return first


def alike(one: Tensor, two: Tensor) -> bool:
    """Equal up to what the order of a sum changes."""
    largest = float(one.nan_to_num().abs().max()) if one.numel() else 0.0
    return torch.allclose(one, two, rtol=0, atol=1e-4 * largest, equal_nan=True)


def all_alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """As many tensors, each of the shape and, up to what the order of a sum changes, with the numbers of its partner."""
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(a.shape == b.shape and alike(a.double(), b.double()) for a, b in pairs)


def refuse_random(program: ExportedProgram, inputs: Sequence[Input], ref: str) -> bool:
    """Whether one image alone has the outputs that it has in a batch of two; True where a batch is written in the program.

    Raises BadModel where a program gives two answers for one image: its operators are random, or the images of a batch depend
    on each other, so that one has other outputs in another place, or where other images stand beside it.
    """
    graphs = (part.graph for part in program.graph_module.modules() if isinstance(part, GraphModule))
    draws = any(_draws(node) for graph in graphs for node in graph.nodes)
    batch = batch_of(program, inputs)
    if batch == 1 and not draws:
        return True
    run, noise = graph_module(program), noise_of(batch, image_among(inputs).shape)
    values = fed(inputs, example(inputs, noise))
    if draws:
        with torch.no_grad():
            same_again(lambda: run(*_copies(values)), ref, PASSES)
    if batch == 1:
        return True
    beside = torch.cat([noise[-1:], LOUD * noise[:-1]])
    turned = fed(inputs, example(inputs, beside))
    with torch.no_grad():
        here, there = (pytree.tree_leaves(run(*_copies(given))) for given in (values, turned))
    if not all(alike(a[-1].double(), b[0].double()) for a, b in zip(here, there, strict=True) if a.ndim):
        written = "" if batch is None else f"has a batch of {batch} written in it, and "
        raise BadModel(
            f"{ref} {written}gives one image other outputs in another place of the batch, or beside other images: its images "
            "depend on each other, as by a mean over the batch. Fix that, or export it for one image."
            f"{_several(batch, here)}"
        )
    return batch is not None or _is_alone(run, inputs, noise[-1:], [value[-1:] for value in here])


def _several(batch: int | None, outputs: Sequence[Tensor]) -> str:
    """What else it may be where an output has several dimensions of the batch's size."""
    shape = next((tuple(one.shape) for one in outputs if batch is not None and one.shape[1:].count(batch)), None)
    if shape is None:
        return ""
    return (
        f" Or the batch is not the first dimension: an output is {shape}, where {batch} stands more than once. Export it with "
        "another batch, which tells them apart."
    )


def as_alone(module: nn.Module, program: ExportedProgram, inputs: Sequence[Input], arguments: Arguments | None) -> bool:
    """Whether a program gives for one image alone what the module gives, which may do something of its own with a batch of
    one: torch.export takes a free batch for two or more.
    """
    called = NamedPorts(module, arguments or Arguments((inputs[0].name,)))
    image = noise_of(1, image_among(inputs).shape)
    with evaluating(called), torch.no_grad():
        try:
            with quiet():
                want = tensors_in(called.result(tensors_of(inputs, image)))
            got = pytree.tree_leaves(graph_module(program)(*_copies(fed(inputs, example(inputs, image)))))
        except Exception as error:
            if halt := stopped(error):
                raise halt from error
            return False  # why is said where it is exported for one image
    return all_alike(want, got)


def left_out(
    module: nn.Module, program: ExportedProgram, inputs: Sequence[Input], arguments: Arguments | None
) -> dict[str, Any]:  # fmt: skip
    """What a module gives beside tensors, by name."""
    called = NamedPorts(module, arguments or Arguments((inputs[0].name,)))
    with quiet(), evaluating(called), torch.no_grad():
        return no_tensors(called.result(tensors_of(inputs, noise_of(batch_of(program, inputs), image_among(inputs).shape))))


def _is_alone(run: GraphModule, inputs: Sequence[Input], image: Tensor, row: Sequence[Tensor]) -> bool:
    """Whether an image alone has the outputs of `row`, but for numbers that change as much where rounding moves the image."""
    with torch.no_grad():
        alone = pytree.tree_leaves(run(*_copies(fed(inputs, example(inputs, image)))))
        if any(a.shape != b.shape for a, b in zip(alone, row, strict=True)):
            return False
        if all_alike(alone, row):
            return True
        moved = pytree.tree_leaves(run(*_copies(fed(inputs, example(inputs, image * (1 + ROUNDING))))))
    return all(c.shape != a.shape or _unlike(a, b) <= TIES * _unlike(a, c) for a, b, c in zip(alone, row, moved, strict=True))


def _unlike(one: Tensor, two: Tensor) -> float:
    """The share of numbers that differ by more than the order of a sum changes."""
    a, b = one.double().nan_to_num(), two.double().nan_to_num()
    return float(((a - b).abs() > 1e-4 * a.abs().max()).double().mean()) if a.numel() else 0.0


def _copies(values: Iterable[Tensor]) -> Iterator[Tensor]:
    return (value.clone() for value in values)


def _draws(node: Node) -> bool:
    """Whether an operator draws random numbers; dropout that is off and attention without dropout do not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if "dropout" in str(node.target) and len(node.args) == 3:
        return bool(node.args[1] and node.args[2])
    if "attention" in str(node.target):
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    return True
