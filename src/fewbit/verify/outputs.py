"""Last outputs of a runtime against those of the executor, with the limit that follows from float32.

A kernel stores and adds numbers in another order than PyTorch, so outputs that mean the same differ in their last digits.
How far depends on what stands before them: a deep tail, a division by a small number or a large gain makes it more. It is
measured. What an op computes in float32 is what it would compute exactly from inputs that are a little off (backward error);
for sums of n terms each input is off by about sqrt(n) units of 2**-24, its own rounding (Higham and Mary 2019). So the graph
runs a second time, and each op reads its inputs moved by `STEP`, up or down at random. How far the outputs move then is what
rounding can do to this graph on these images, and `MARGIN` times that is the limit. In ten networks of
different families right runtimes stayed below 0.6 of the movement; a wrong kernel was 6,000 times above the limit.

Where rounding moves a number to another code, a few numbers move far (the boxes of one query of a DETR), and the largest
difference says little of all others. So the middle one of all differences has a limit as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from fewbit.core.checks import Gap, OutputCheck
from fewbit.core.fx import MOVES, is_constant
from fewbit.core.inputs import Batch, Input, arrays_of
from fewbit.core.pages import give_back
from fewbit.errors import BadModel
from fewbit.execute.executor import Executor
from fewbit.load.ports import outputs_of
from fewbit.load.program import graph_module
from fewbit.onnx_file import load_proto
from fewbit.runtimes import Session, open_session

UNIT = 2.0**-24  # the largest relative error of one rounding to float32
STEP = 16 * UNIT  # of sums of 256 terms one by one, or of some thousands in the lanes of a vector
MARGIN = 4.0
DISTURBANCES = 8  # where one may miss it: each moves a number on a border to the other side in about every second one

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Moved:
    """How far an output is from another: the largest difference of two numbers, and the middle one."""

    largest: float = 0.0
    usual: float = 0.0

    def __or__(self, other: Moved) -> Moved:
        """The larger of each."""
        return Moved(max(self.largest, other.largest), max(self.usual, other.usual))


def given_by(session: Session, inputs: Sequence[Input], batch: Batch, names: Sequence[str]) -> Outputs:
    """What a session gives for a batch of images."""
    return picked(session.run(*arrays_of(inputs, batch)), names)


def picked(values: Mapping[str, NDArray[Any]], names: Sequence[str]) -> Outputs:
    """Those of a session's arrays that are named."""
    return {name: torch.from_numpy(np.array(values[name])) for name in names}


def named(outputs: Sequence[Tensor], names: Sequence[str]) -> Outputs:
    """The outputs of an executor by the names that they have in a file."""
    return dict(zip(names, outputs, strict=True))


def joined(batches: Sequence[Outputs]) -> Outputs:
    """The outputs of all batches."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def joined_where_alike(batches: Sequence[Outputs]) -> Outputs:
    """The outputs of a file for all batches, without those whose rows have another shape in some batch, as where a file drops
    the first dimension of one image: they are not there then, and so not what is expected.
    """
    shapes = {name: [tuple(batch[name].shape[1:]) if batch[name].ndim else None for batch in batches] for name in batches[0]}
    alike = [name for name, found in shapes.items() if None not in found and len({*found}) == 1]
    return joined([{name: batch[name] for name in alike} for batch in batches])


def disturbances(
    executor: Executor, rounded: Collection[str] = (), seed: int = 0, step: float = STEP
) -> Mapping[str, Callable[..., Any]]:
    """For `Executor.__call__`: functions of the nodes that move each number that they read by `step`, up or down at random.

    Constants stay, and so does what is only put elsewhere or changed in place. Nodes of `rounded` read rows that a kernel
    rounds to 8 bits by itself: their numbers move by half of such a step.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(x: Any, node: Any, coarse: bool) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not isinstance(node, Node) or is_constant(node):
            return x
        sign = 2 * torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8) - 1
        numbers = x.nan_to_num(0.0, 0.0, 0.0)  # infinities of a mask stay what they are
        return x + sign * (numbers.abs().amax(-1, keepdim=True) / 254 if coarse else step * numbers)

    def call(node: Node) -> Callable[..., Any]:
        target, places, coarse = cast(Callable[..., Any], node.target), len(node.args), node.name in rounded
        return lambda *args, **kwargs: target(
            *(moved(x, node.args[i], coarse) if i < places else x for i, x in enumerate(args)), **kwargs
        )

    nodes = [node for node in executor.order if node.op == "call_function" and node.target not in MOVES]
    return {node.name: call(node) for node in nodes if not getattr(getattr(node.target, "_schema", None), "is_mutable", False)}


def with_rounding(
    executor: Executor,
    images: Sequence[Batch],
    names: Sequence[str],
    rounded: Collection[str] = (),
    times: int = 1,
    step: float = STEP,
) -> tuple[Outputs, Mapping[str, Moved]]:
    """The outputs of an executor for all batches, and how far rounding moves each; `rounded` as in `disturbances`.

    `times` disturbances are tried, each of its own seed: a number on the border of two codes falls to the other side in some.
    """
    exact, moved = list[Outputs](), dict.fromkeys(names, Moved())
    with torch.no_grad():
        for batch in images:
            exact.append(named(executor(batch), names))
        for seed in range(times):
            noise = disturbances(executor, rounded, seed, step)
            for batch, ours in zip(images, exact, strict=True):
                disturbed = named(executor(batch, calls=noise), names)
                moved = {name: moved[name] | apart(disturbed[name], ours[name], name) for name in names}
    return joined(exact), moved


def apart(a: Tensor, b: Tensor, name: str = "an output") -> Moved:
    """How far two outputs are from each other; equal infinities and two NaN differ by nothing. Of integers the share of unequal
    ones.

    Raises BadModel where the shapes differ: how many numbers there are follows from numbers then.
    """
    if a.shape != b.shape:
        raise BadModel(
            f"{name} has the shape {tuple(a.shape)} or {tuple(b.shape)} for the same images, and rounding alone decides which, "
            "so it cannot be compared. Let the model give what stands in front of the nodes that select."
        )
    if not a.numel():
        return Moved()
    if not a.is_floating_point():
        return Moved(float((a != b).double().mean()))
    same = (a == b) | (a.isnan() & b.isnan())
    differences = torch.where(same, 0.0, (a.double() - b.double()).abs()).flatten()
    return Moved(float(differences.max()), float(differences.median()))


def judged(place: str, expected: Outputs, found: Outputs, moved: Mapping[str, Moved]) -> tuple[OutputCheck, ...]:
    """The check of every output; `moved` is how far rounding moves each, `place` says which file ran where."""
    return tuple(_judged(place, name, value, found.get(name), moved[name]) for name, value in expected.items())


def _judged(place: str, name: str, expected: Tensor, found: Tensor | None, moved: Moved) -> OutputCheck:
    if found is None or found.shape != expected.shape:
        return OutputCheck(place, name, float("inf"), 0.0, 0.0, 0.0)
    expected, step = expected.to(found.dtype), STEP
    if found.dtype in (torch.float16, torch.bfloat16):  # a file may give fewer digits than are computed
        step = torch.finfo(found.dtype).eps
    if expected.is_floating_point():
        finite = expected[expected.isfinite()]
        own = step * (float(finite.abs().max()) if finite.numel() else 0.0)
        limit, usual_limit = MARGIN * moved.largest + own, MARGIN * moved.usual + own
    else:  # one of them may stand on a boundary that no disturbance has crossed
        limit, usual_limit = MARGIN * moved.largest + 1 / max(expected.numel(), 1), math.inf
    rows, columns = (x.double().reshape(max(len(x), 1), -1) for x in (expected, found))
    cosine = float(torch.nn.functional.cosine_similarity(rows.flatten(), columns.flatten(), dim=0))
    agreement = 100 * float((rows.argmax(1) == columns.argmax(1)).double().mean())
    found_apart = apart(expected, found)
    return OutputCheck(place, name, found_apart.largest, limit, cosine, agreement, found_apart.usual, usual_limit)


def gaps(place: str, free: Outputs, found: Outputs) -> tuple[Gap, ...]:
    """How far the outputs of a file are from those of a simulation that runs by itself."""
    return tuple(_gap(place, name, value, found.get(name)) for name, value in free.items())


def _gap(place: str, name: str, free: Tensor, found: Tensor | None) -> Gap:
    finite = free[free.isfinite()].double() if free.is_floating_point() else None
    spread = None if finite is None else float(finite.std(correction=0)) if finite.numel() else 0.0
    if found is None or found.shape != free.shape:
        return Gap(place, name, math.inf, math.inf, spread)
    moved = apart(free.to(found.dtype), found, name)
    return Gap(place, name, moved.largest, moved.usual, spread)


def twin_checks(
    program: ExportedProgram, inputs: Sequence[Input], twin: Path, runtime: str, images: Sequence[Batch], where: str = ""
) -> tuple[OutputCheck, ...]:
    """The float twin in a runtime against the model that was given, run by PyTorch, on batches of images; `where` ends the
    place of each check.
    """
    names, own = (
        [output.name for output in outputs_of(program)],
        {one.name for one in load_proto(twin, data=False).graph.output},
    )
    session = open_session(runtime, twin, outputs=[name for name in names if name not in own])
    found = [given_by(session, inputs, batch, names) for batch in images]
    del session
    give_back()  # it has the weights, which the executor reads as well
    return program_checks(program, inputs, found, images, f"float.onnx in {runtime}{where}")


def program_checks(
    program: ExportedProgram, inputs: Sequence[Input], found: Sequence[Outputs], images: Sequence[Batch], place: str,
    step: float = STEP, tries: Sequence[int] = (1, DISTURBANCES),
) -> tuple[OutputCheck, ...]:  # fmt: skip
    """What a file gave for batches of images against a program, run by PyTorch; `step` is how far rounding moves what an op of
    the file reads. The numbers of disturbances in `tries` are tried in turn, the next where the last explain too little.
    """
    executor, names = Executor(graph_module(program), inputs=inputs), [output.name for output in outputs_of(program)]
    checks, theirs = tuple[OutputCheck, ...](), joined_where_alike(found)
    for times in tries:
        given, moved = with_rounding(executor, images, names, times=times, step=step)
        checks = judged(place, given, theirs, moved)
        if not any(check.wrong for check in checks):
            break
    return checks
