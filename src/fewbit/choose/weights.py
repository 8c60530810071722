"""The codes of a weight: a grid whose products are safe in the accumulator, a step that leaves room for the bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewbit.capture.sites import tensor_of
from fewbit.choose.correct import WeightMean
from fewbit.choose.ranges import Samples, ranged
from fewbit.choose.recipe import Recipe
from fewbit.core.grid import Grid, QParams, in_multiples, rowwise, values
from fewbit.core.values import Choice, Fallback, Graph, Site
from fewbit.errors import BadValues
from fewbit.target.allowed import Allowed, AllowedGrids
from fewbit.target.spec import Target
from fewbit.target.sums import largest_sum

BIAS_CODE = 2**30  # the largest code of a bias: half of int32 is left for the products
ROUNDS = 64  # of making steps larger until sums fit; each takes at least a thousandth of the excess away


def weight_choice(
    graph: Graph,
    site: Site,
    slot: AllowedGrids,
    recipe: Recipe,
    target: Target,
    choices: Mapping[str, Choice],
    fallbacks: list[Fallback],
    searched: Choice | None = None,
) -> Choice:
    """The first grid that the target allows and whose products are safe in its accumulator; a search has found it already.

    A grid that had to be narrower is added to the fallbacks. Raises BadValues where the weight is not finite.
    """
    w = finite(graph, site)
    op = graph.op(site.readers[0][0])
    room = room_of(graph, site, choices, slot)
    if searched is not None:
        grid, choice = searched.grid, coded(searched, w, recipe, room)
    else:
        grid, choice = slot.grids[0], _weight_on(site, w, slot.grids[0], recipe, room)
    if slot.pair_bits is None:
        return choice
    activation = choices[op.operands["input"]].grid
    for grid in slot.grids if searched is None else ():
        choice = _weight_on(site, w, grid, recipe, room)
        assert choice.codes is not None
        if pairs_are_safe(choice.codes, activation, slot.pair_bits):
            break
    if grid != slot.grids[0]:
        why = f"two products can saturate {slot.pair_bits} bits on {target.name}"
        share = op.macs / max(graph.macs, 1)
        fallbacks.append(Fallback(site.name, f"{slot.grids[0].bits} bits", f"{grid.bits} bits", why, share))
        choice = replace(choice, why=why)
    return choice


@dataclass(frozen=True)
class Room:
    """What the accumulator leaves for a weight: the smallest step of each channel, () or (channels,), and the largest sum.

    `most` is None where no sum can leave the accumulator. `largest` is the largest code of what the weight multiplies, and
    `bias` the magnitude of the bias in units of the input's step, () or (channels,).
    """

    least: Tensor
    most: int | None = None
    largest: int = 0
    bias: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    def excess(self, q: Tensor, scale: Tensor) -> Tensor:
        """How many times too large the largest sum of each channel is, (channels,), for codes (channels, ...)."""
        assert self.most is not None
        return (q.flatten(1).double().abs().sum(1) * self.largest + (self.bias / scale).ceil()) / self.most


def recoded(
    graph: Graph, site: Site, choice: Choice, recipe: Recipe, choices: Mapping[str, Choice], slot: AllowedGrids,
    tuned: tuple[Tensor, Tensor | None] | None = None,
) -> Choice:  # fmt: skip
    """The choice of a weight whose step has changed, with its codes; of a weight and bias that were `tuned`, with theirs."""
    w, bias = (finite(graph, site), None) if tuned is None else tuned
    return coded(choice, w, recipe, room_of(graph, site, choices, slot, bias))


def coded(choice: Choice, w: Tensor, recipe: Recipe, room: Room) -> Choice:
    """The choice of a weight with its codes. Where sums could leave the accumulator, the steps of those channels are larger."""
    grid = choice.grid
    least = rowwise(room.least * max(grid.multiples, 1), choice.qparams.scale) if grid.axis is not None else room.least.max()
    scale = in_multiples(choice.qparams.scale.maximum(least), grid)
    made = _with_step(choice, w, recipe, scale)
    for _ in range(ROUNDS if room.most is not None else 0):
        assert made.codes is not None
        excess = room.excess(made.codes, scale)
        excess = excess if grid.axis is not None else excess.max()
        if bool((excess <= 1).all()):
            break
        scale = torch.where(excess > 1, scale * (excess * 1.001).float(), scale)
        made = _with_step(choice, w, recipe, scale)
    return made


def _with_step(choice: Choice, w: Tensor, recipe: Recipe, scale: Tensor) -> Choice:
    qparams = QParams(scale, choice.qparams.zero)
    return replace(choice, qparams=qparams, codes=recipe.rounding(w, qparams, choice.grid).to(choice.grid.container))


def finite(graph: Graph, site: Site) -> Tensor:
    """A weight. Raises BadValues where it holds anything that is no number."""
    w = tensor_of(graph, site)
    if not bool(torch.isfinite(w).all()):
        raise BadValues(f"{site.name} holds NaN or infinite values; only finite weights can be quantized.")
    return w


def real_weight(choice: Choice) -> Tensor:
    """The real numbers of a weight's codes, (channels, ...) flattened to rows."""
    assert choice.codes is not None
    return values(choice.codes.to(torch.int32), choice.qparams, choice.grid).flatten(1)


def codes_are_safe(graph: Graph, site: Site, made: Choice, choices: Mapping[str, Choice], slot: AllowedGrids) -> bool:
    """Whether the codes of a weight are safe in the target's accumulator; on the last grid that it allows they are taken as
    they are.
    """
    if slot.pair_bits is None or made.grid == slot.grids[-1]:
        return True
    assert made.codes is not None
    read = graph.op(site.readers[0][0]).operands["input"]
    return pairs_are_safe(made.codes, choices[read].grid, slot.pair_bits)


def sums_are_safe(
    graph: Graph, site: Site, made: Choice, choices: Mapping[str, Choice], slot: AllowedGrids, bias: Tensor | None = None
) -> bool:
    """Whether no sum of a weight's codes, with the step of its input and its bias (None: the graph's), can leave the target's
    accumulator, nor any two of its products their own.
    """
    assert made.codes is not None
    room = room_of(graph, site, choices, slot, bias)
    if bool((made.qparams.scale < rowwise(room.least, made.qparams.scale)).any()):
        return False
    if room.most is not None and bool((room.excess(made.codes, made.qparams.scale) > 1).any()):
        return False
    return codes_are_safe(graph, site, made, choices, slot)


def pairs_are_safe(q: Tensor, activation: Grid, bits: int) -> bool:
    """No two products of one output channel can leave a signed sum of `bits`, whatever the activation codes are.

    Any two products, not only neighbours: how a kernel packs them is its own business. `q` is (channels, ...).
    """
    rows = q.flatten(1).to(torch.int64)
    if rows.shape[1] == 1:
        rows = torch.cat([rows, torch.zeros_like(rows)], 1)
    ends = torch.stack([rows * activation.low, rows * activation.high])
    highest = ends.amax(0).topk(2, 1).values.sum(1).max()
    lowest = ends.amin(0).topk(2, 1, largest=False).values.sum(1).min()
    return bool(highest <= 2 ** (bits - 1) - 1) and bool(lowest >= -(2 ** (bits - 1)))


def overflowing(graph: Graph, choices: Mapping[str, Choice], biases: Mapping[str, Tensor], answer: Allowed) -> list[Fallback]:
    """A fallback for each op with a weight whose sums can leave its accumulator after all: a correction has moved its bias."""
    found = []
    for op in graph.ops:
        if op.name not in answer.integer_ops or "weight" not in op.operands:
            continue
        site = graph.site(op.operands["weight"])
        accumulator = answer.sites[site.name].accumulator
        bias = choices.get(op.operands.get("bias", ""))
        real = biases.get(op.name) if bias is None else values(bias.codes.int(), bias.qparams, bias.grid)  # type: ignore[union-attr]
        room = room_of(graph, site, choices, answer.sites[site.name], real)
        weight = choices[site.name]
        assert weight.codes is not None
        if room.most is not None and bool((room.excess(weight.codes, weight.qparams.scale) > 1).any()):
            fit = f"sums within {accumulator.bits} bits"
            share = op.macs / max(graph.macs, 1)
            found.append(Fallback(op.name, fit, "sums that may leave them", "the bias was moved after the weights", share))
    return found


def room_of(
    graph: Graph, site: Site, choices: Mapping[str, Choice], slot: AllowedGrids, corrected: Tensor | None = None
) -> Room:
    """What the accumulator leaves for a weight. The smallest step is the one with which the bias, in units of input step times
    weight step, leaves half of it.

    A dead channel has weights near 0 and a bias that is not: its code would fill the accumulator and the sum wrap around.
    Where the plan leaves the bias float a runtime may still quantize it so when it loads the file (onnxruntime does).
    """
    op = graph.op(site.readers[0][0])
    bias, read = op.operands.get("bias", ""), choices.get(op.operands["input"])
    if read is None:  # a float activation: the sum is float
        return Room(torch.tensor(0.0))
    if not bias and corrected is None:
        unit = torch.tensor(0.0)
    else:
        real = tensor_of(graph, graph.site(bias)) if corrected is None else corrected
        unit = real.abs() / read.qparams.scale.max()
    accumulator = slot.accumulator
    least = unit / min(BIAS_CODE, 2 ** (accumulator.bits - 2))
    narrow = torch.iinfo(read.grid.container).bits <= accumulator.operand_bits
    most = largest_sum(accumulator)
    if (
        not narrow
        or slot.grids[0].group_size
        or (op.reduction_size or 0) * read.grid.largest * slot.grids[0].largest < most - BIAS_CODE
    ):
        return Room(least)
    return Room(least, most, read.grid.largest, unit)


def _weight_on(site: Site, w: Tensor, grid: Grid, recipe: Recipe, room: Room) -> Choice:
    if (
        recipe.channels is not None
        and recipe.channels.weights
        and grid.axis is not None
        and grid.bits <= recipe.channels.nominal
    ):
        widths = recipe.channels(w.flatten(1).std(1, unbiased=False), grid.bits, symmetric=grid.symmetric)
        grid = replace(grid, bits=max(widths), widths=widths)
    qparams = ranged(recipe.weights, Samples.of_weight(w, grid), grid)
    if grid.axis is None:
        qparams = QParams(qparams.scale.squeeze(0), qparams.zero.squeeze(0))
    if grid.group_size:
        qparams = QParams(qparams.scale.view(len(w), -1), qparams.zero.view(len(w), -1))
    choice = coded(Choice(site.name, site.role, grid, qparams, f"{recipe.weights!r}, {recipe.rounding!r}"), w, recipe, room)
    if not isinstance(recipe.correction, WeightMean) or not recipe.correction.variance or grid.axis is None:
        return choice
    ratio = recipe.correction.ratio(w.flatten(1), real_weight(choice))
    return replace(
        choice,
        qparams=QParams(
            (choice.qparams.scale * rowwise(ratio, choice.qparams.scale)).maximum(rowwise(room.least, choice.qparams.scale)),
            choice.qparams.zero,
        ),
    )
