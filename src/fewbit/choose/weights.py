"""The codes of a weight: a grid whose products are safe in the accumulator, a step that leaves room for the bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.capture.rewrite import constant
from fewbit.choose.correct import WeightMean
from fewbit.choose.scales.ranges import Samples, ranged
from fewbit.errors import BadValues
from fewbit.grid import Affine, Grid, values
from fewbit.recipes import Recipe
from fewbit.target.legal import Slot
from fewbit.target.spec import Target
from fewbit.types import Choice, Graph, Refusal, Site

BIAS_CODE = 2**30  # the largest code of a bias: half of int32 is left for the products


def weight_choice(
    graph: Graph,
    site: Site,
    slot: Slot,
    recipe: Recipe,
    target: Target,
    choices: Mapping[str, Choice],
    refusals: list[Refusal],
    searched: Choice | None = None,
) -> Choice:
    """The first grid that the target allows and whose products are safe in its accumulator; a search has found it already.

    A grid that had to be narrower is added to the refusals. Raises BadValues where the weight is not finite.
    """
    w = finite(graph, site)
    op = graph.op(site.readers[0][0])
    least = least_step(graph, site, choices)
    if searched is not None:
        grid, choice = searched.grid, coded(searched, w, recipe, least)
    else:
        grid, choice = slot.grids[0], _weight_on(site, w, slot.grids[0], recipe, least)
    if slot.pair_bits is None:
        return choice
    activation = choices[op.operands["input"]].grid
    for grid in slot.grids if searched is None else ():
        choice = _weight_on(site, w, grid, recipe, least)
        assert choice.codes is not None
        if pairs_are_safe(choice.codes, activation, slot.pair_bits):
            break
    if grid != slot.grids[0]:
        why = f"two products can saturate {slot.pair_bits} bits on {target.name}"
        share = op.macs / max(graph.macs, 1)
        refusals.append(Refusal(site.name, f"{slot.grids[0].bits} bits", f"{grid.bits} bits", why, share))
        choice = replace(choice, why=why)
    return choice


def recoded(graph: Graph, site: Site, choice: Choice, recipe: Recipe, choices: Mapping[str, Choice]) -> Choice:
    """The choice of a weight whose step has changed, with its codes."""
    return coded(choice, finite(graph, site), recipe, least_step(graph, site, choices))


def coded(choice: Choice, w: Tensor, recipe: Recipe, least: Tensor) -> Choice:
    """The choice of a weight with its codes; no step is below the least one, of shape () or (channels,)."""
    grid = choice.grid
    scale = choice.affine.scale.maximum(least if grid.axis is not None else least.max())
    affine = Affine(scale, choice.affine.zero)
    return replace(choice, affine=affine, codes=recipe.rounding(w, affine, grid).to(grid.container))


def finite(graph: Graph, site: Site) -> Tensor:
    """A weight. Raises BadValues where it holds anything that is no number."""
    w = tensor_of(graph, site)
    if not bool(torch.isfinite(w).all()):
        raise BadValues(f"{site.name} holds NaN or infinite values; only finite weights can be quantized.")
    return w


def tensor_of(graph: Graph, site: Site) -> Tensor:
    """The constant behind a weight or bias site."""
    node = next(n for n in graph.module.graph.nodes if n.name == site.tensor)
    return constant(graph.module, node)


def real_weight(choice: Choice) -> Tensor:
    """The real numbers of a weight's codes, (channels, ...) flattened to rows."""
    assert choice.codes is not None
    return values(choice.codes.to(torch.int32), choice.affine, choice.grid).flatten(1)


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


def least_step(graph: Graph, site: Site, choices: Mapping[str, Choice]) -> Tensor:
    """The smallest step of each channel with which the bias, in units of input step times weight step, leaves room in int32.

    A dead channel has weights near 0 and a bias that is not: its code would fill the accumulator and the sum wrap around.
    Where the plan leaves the bias float a runtime may still quantize it so when it loads the file (onnxruntime does).
    """
    op = graph.op(site.readers[0][0])
    bias = op.operands.get("bias", "")
    if not bias:
        return torch.tensor(0.0)
    return tensor_of(graph, graph.site(bias)).abs() / (choices[op.operands["input"]].affine.scale.max() * BIAS_CODE)


def _weight_on(site: Site, w: Tensor, grid: Grid, recipe: Recipe, least: Tensor) -> Choice:
    if (
        recipe.channels is not None
        and recipe.channels.weights
        and grid.axis is not None
        and grid.bits <= recipe.channels.nominal
    ):
        widths = recipe.channels(w.flatten(1).std(1, unbiased=False), grid.bits, symmetric=grid.symmetric)
        grid = replace(grid, bits=max(widths), widths=widths)
    affine = ranged(recipe.weights, Samples.of_weight(w, grid), grid)
    if grid.axis is None:
        affine = Affine(affine.scale.squeeze(0), affine.zero.squeeze(0))
    choice = coded(Choice(site.name, site.role, grid, affine, f"{recipe.weights!r}, {recipe.rounding!r}"), w, recipe, least)
    if not isinstance(recipe.correction, WeightMean) or not recipe.correction.variance or grid.axis is None:
        return choice
    ratio = recipe.correction.ratio(w.flatten(1), real_weight(choice))
    return replace(choice, affine=Affine((choice.affine.scale * ratio).maximum(least), choice.affine.zero))
