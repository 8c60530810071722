"""The slots of a recipe in order: what is legal, the ranges, the codes of the weights, the biases that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.rewrite import MOVES, aten, constant, is_call
from fewbit.choose.bits import Bits
from fewbit.choose.scales.ranges import Samples
from fewbit.errors import BadValues
from fewbit.grid import Affine, Grid, codes
from fewbit.observe.stats import Stats
from fewbit.recipes import Recipe
from fewbit.target.legal import Slot, legal
from fewbit.target.spec import Target
from fewbit.types import Choice, Graph, Plan, Refusal, Site

MAX_POOLS = (aten.max_pool2d.default,)  # of codes that grow with the value: the largest is one of them


W8A8 = Bits()
BIAS_CODE = 2**30  # the largest code of a bias: half of int32 is left for the products


def choose(
    graph: Graph,
    stats: Stats,
    target: Target,
    recipe: Recipe,
    *,
    name: str = "",
    bits: Bits = W8A8,
    keep_float: Sequence[str] = (),
    everything: bool = False,
    progress: Callable[[str], None] = lambda site: None,
) -> Plan:
    """The plan for a graph on a target: a choice for every site that is read in integers.

    `stats` has a histogram for every activation site; `name` is the recipe's, for the record. Raises UnknownName for a
    pattern in `keep_float` that matches nothing, BadValues where a weight is not finite.
    """
    answer = legal(
        graph,
        target,
        weight_bits=bits.weights,
        activation_bits=bits.activations,
        keep_float=keep_float,
        everything=everything,
    )
    choices: dict[str, Choice] = {}
    refusals = list(answer.refusals)
    for site in graph.sites:
        slot = answer.slots.get(site.name)
        if slot is None or site.role == "bias":
            continue
        progress(site.name)
        if site.role == "weight":
            least = _least_step(graph, site, choices)
            choices[site.name] = _weight(graph, site, slot, recipe, target, choices, refusals, least)
        else:
            choices[site.name] = _moved(graph, site, slot, choices) or _activation(site, slot, recipe, stats)
    for op in graph.ops:  # biases follow from the steps of input and weight
        bias = op.operands.get("bias", "")
        if op.name in answer.integer_ops and bias in answer.slots:
            steps = choices[op.operands["input"]].affine.scale * choices[op.operands["weight"]].affine.scale
            choices[bias] = _bias(graph, graph.site(bias), answer.slots[bias], steps)
    ordered = {s.name: choices[s.name] for s in graph.sites if s.name in choices}
    return Plan(target.name, name or repr(recipe), str(bits), ordered, answer.integer_ops, tuple(refusals), tuple(keep_float))


def _moved(graph: Graph, site: Site, slot: Slot, choices: dict[str, Choice]) -> Choice | None:
    """The choice of a tensor whose codes everyone reads, for one that holds some of its elements in other places.

    Codes move without loss. Another step would round them a second time, which runtimes leave out.
    """
    owner = {s.tensor: s.name for s in graph.sites if s.name in choices and choices[s.name].everyone}
    node = next(n for n in graph.module.graph.nodes if n.name == site.tensor)
    while is_call(node, *MOVES, *MAX_POOLS) and node.name not in owner:
        node = cast(Node, node.args[0])
    found = choices.get(owner.get(node.name, ""))
    if found is None or found.grid != slot.grids[0] or found.site == site.name or slot.fixed_scale is not None:
        return None
    return replace(found, site=site.name, role=site.role, everyone=slot.everyone, why=f"elements of {found.site}")


def _activation(site: Site, slot: Slot, recipe: Recipe, stats: Stats) -> Choice:
    grid = slot.grids[0]
    if slot.fixed_scale is not None:
        step = slot.fixed_scale * 2.0 ** (8 - grid.bits)  # fewer bits, the same range
        affine = Affine(torch.tensor(step), torch.tensor(0, dtype=torch.int32))
        return Choice(site.name, site.role, grid, affine, "fixed", everyone=slot.everyone, why="pinned by the target")
    affine = recipe.activations(Samples.of_histogram(stats.sites[site.name]), grid)
    affine = Affine(affine.scale.squeeze(0), affine.zero.squeeze(0))
    return Choice(site.name, site.role, grid, affine, repr(recipe.activations), everyone=slot.everyone)


def _weight(
    graph: Graph,
    site: Site,
    slot: Slot,
    recipe: Recipe,
    target: Target,
    choices: dict[str, Choice],
    refusals: list[Refusal],
    least: Tensor,
) -> Choice:
    """The first grid that the target allows and whose products are safe in its accumulator."""
    w = _constant(graph, site)
    if not bool(torch.isfinite(w).all()):
        raise BadValues(f"{site.name} holds NaN or infinite values; only finite weights can be quantized.")
    op = graph.op(site.readers[0][0])
    grid, choice = slot.grids[0], _weight_on(site, w, slot.grids[0], recipe, least)
    if slot.pair_bits is None:
        return choice
    activation = choices[op.operands["input"]].grid
    for grid in slot.grids:
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


def _least_step(graph: Graph, site: Site, choices: Mapping[str, Choice]) -> Tensor:
    """The smallest step of each channel with which the bias, in units of input step times weight step, leaves room in int32.

    A dead channel has weights near 0 and a bias that is not: its code would fill the accumulator and the sum wrap around.
    Where the plan leaves the bias float a runtime may still quantize it so when it loads the file (onnxruntime does).
    """
    op = graph.op(site.readers[0][0])
    bias = op.operands.get("bias", "")
    if not bias:
        return torch.tensor(0.0)
    return _constant(graph, graph.site(bias)).abs() / (choices[op.operands["input"]].affine.scale * BIAS_CODE)


def _weight_on(site: Site, w: Tensor, grid: Grid, recipe: Recipe, least: Tensor) -> Choice:
    affine = recipe.weights(Samples.of_weight(w, grid), grid)
    affine = Affine(affine.scale.maximum(least if grid.axis is not None else least.max()), affine.zero)
    if grid.axis is None:
        affine = Affine(affine.scale.squeeze(0), affine.zero.squeeze(0))
    found = recipe.rounding(w, affine, grid).to(grid.container)
    return Choice(site.name, site.role, grid, affine, f"{recipe.weights!r}, {recipe.rounding!r}", codes=found)


def _bias(graph: Graph, site: Site, slot: Slot, steps: Tensor) -> Choice:
    b = _constant(graph, site)
    affine = Affine(steps.expand(b.shape).contiguous(), torch.zeros(b.shape, dtype=torch.int32))
    found = codes(b, affine, slot.grids[0])
    return Choice(site.name, site.role, slot.grids[0], affine, "derived", codes=found, why="input step times weight step")


def _constant(graph: Graph, site: Site) -> Tensor:
    node = next(n for n in graph.module.graph.nodes if n.name == site.tensor)
    return constant(graph.module, node)


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
