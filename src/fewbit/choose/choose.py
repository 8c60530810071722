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
from fewbit.choose.correct import OutputBias
from fewbit.choose.scales.ranges import Samples
from fewbit.choose.scales.search import Product, Range
from fewbit.errors import BadValues
from fewbit.grid import Affine, Grid, codes, fake, values
from fewbit.observe.stats import Stats
from fewbit.recipes import Recipe
from fewbit.replay import OpSample
from fewbit.target.legal import Slot, legal
from fewbit.target.spec import Target
from fewbit.types import Choice, Graph, Op, Plan, Refusal, Site

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
    samples: Mapping[str, OpSample] | None = None,
) -> Plan:
    """The plan for a graph on a target: a choice for every site that is read in integers.

    `stats` has a histogram for every activation site; `name` is the recipe's, for the record; `samples` is what single ops
    read, for a recipe that searches or corrects on their outputs. Raises UnknownName for a pattern in `keep_float` that
    matches nothing, BadValues where a weight is not finite.
    """
    if recipe.needs_samples and samples is None:
        raise ValueError(f"recipe {name or recipe!r} needs what single ops read: choose(..., samples=op_samples(...))")
    samples = samples or {}
    answer = legal(
        graph,
        target,
        weight_bits=bits.weights,
        activation_bits=bits.activations,
        keep_float=keep_float,
        everything=everything,
    )
    choices: dict[str, Choice] = {}
    searched: dict[str, Choice] = {}
    refusals = list(answer.refusals)
    for site in graph.sites:
        slot = answer.slots.get(site.name)
        if slot is None or site.role == "bias":
            continue
        progress(site.name)
        if site.role == "weight":
            least = _least_step(graph, site, choices)
            found = searched.get(site.name)
            choices[site.name] = _weight(graph, site, slot, recipe, target, choices, refusals, least, found)
        else:
            choice = _moved(graph, site, slot, choices) or _activation(site, slot, recipe, stats)
            choices[site.name] = choice
            if recipe.search is not None:
                sampled = [op for op in _readers(graph, site, answer.integer_ops) if op.name in samples]
                if sampled:
                    ranged = not choice.why and slot.fixed_scale is None
                    seen = Samples.of_histogram(stats.sites[site.name]) if ranged else None
                    found_steps = _search(graph, choice, seen, sampled, recipe, answer.slots, samples)
                    choices[site.name] = found_steps.pop(site.name)
                    searched |= found_steps
    biases: dict[str, Tensor] = {}
    for op in graph.ops:  # biases follow from the steps of input and weight
        if op.name not in answer.integer_ops or "weight" not in op.operands:
            continue
        bias = op.operands.get("bias", "")
        corrected = None
        if recipe.correction is not None and op.name in samples:
            corrected = _corrected(graph, op, recipe.correction, samples[op.name], choices)
        steps = choices[op.operands["input"]].affine.scale * choices[op.operands["weight"]].affine.scale
        if bias in answer.slots:
            choices[bias] = _bias(graph, graph.site(bias), answer.slots[bias], steps, corrected)
        elif corrected is not None:
            integer = op.operands.get("output", "") in choices  # this kernel adds in int32: the bias is a multiple of the steps
            biases[op.name] = _multiples(corrected, steps) if integer else corrected
    ordered = {s.name: choices[s.name] for s in graph.sites if s.name in choices}
    return Plan(
        target.name,
        name or repr(recipe),
        str(bits),
        ordered,
        answer.integer_ops,
        tuple(refusals),
        tuple(keep_float),
        biases=biases,
    )


def _readers(graph: Graph, site: Site, integer_ops: Sequence[str]) -> list[Op]:
    """The integer ops that read an activation site against a weight."""
    names = [name for name, operand in site.readers if operand == "input" and name in integer_ops]
    return [op for op in map(graph.op, names) if "weight" in op.operands]


def _search(
    graph: Graph,
    choice: Choice,
    seen: Samples | None,
    ops: Sequence[Op],
    recipe: Recipe,
    slots: Mapping[str, Slot],
    samples: Mapping[str, OpSample],
) -> dict[str, Choice]:
    """The choices of an input site and of the weights of all ops that read it, by site name; the weights have no codes yet.

    The input's step stays where nothing was `seen` (it is pinned, or another tensor's). A weight goes to the next grid where
    its codes are not safe.
    """
    assert recipe.search is not None
    weights = {op.name: op.operands["weight"] for op in ops}
    tensors = {op.name: _finite(graph, graph.site(weights[op.name])) for op in ops}
    given: Range | Affine = choice.affine if seen is None else Range(seen.low[0], seen.high[0], choice.grid)
    level = {op.name: 0 for op in ops}
    while True:
        products = []
        for op in ops:
            w, grid = tensors[op.name], slots[weights[op.name]].grids[level[op.name]]
            rows = Samples.of_weight(w, grid)
            low, high = (rows.low, rows.high) if grid.axis is not None else (rows.low[0], rows.high[0])
            bias = _constant(graph, graph.site(op.operands["bias"])) if "bias" in op.operands else None
            sample = samples[op.name]
            products.append(Product(sample.rows, w.flatten(1), Range(low, high, grid), sample.attention, bias))
        found = recipe.search(products, given, choice.grid)
        unsafe = []
        for op, p, affine in zip(ops, products, found.weights, strict=True):
            slot = slots[weights[op.name]]
            q = recipe.rounding(p.weight, affine, p.range.grid)
            last = level[op.name] == len(slot.grids) - 1
            if slot.pair_bits is not None and not last and not pairs_are_safe(q, choice.grid, slot.pair_bits):
                unsafe.append(op.name)
        if not unsafe:
            break
        level |= {name: level[name] + 1 for name in unsafe}
    result = {}
    method = repr(recipe.search)
    for op, p, affine in zip(ops, products, found.weights, strict=True):
        name = weights[op.name]
        result[name] = Choice(name, "weight", p.range.grid, affine, f"{method}, {recipe.rounding!r}")
    read = choice if seen is None else replace(choice, affine=found.input, method=method)
    return {**result, choice.site: read}


def _corrected(graph: Graph, op: Op, correction: OutputBias, sample: OpSample, choices: Mapping[str, Choice]) -> Tensor:
    """The bias (c_out,) of an op after correction on its samples."""
    read, weight = choices[op.operands["input"]], choices[op.operands["weight"]]
    assert weight.codes is not None
    w = _constant(graph, graph.site(weight.site)).flatten(1)
    quantized = values(weight.codes.to(torch.int32), weight.affine, weight.grid).flatten(1)
    bias = _constant(graph, graph.site(op.operands["bias"])) if "bias" in op.operands else torch.zeros(len(w))
    rows = sample.rows.flatten(0, 1)
    return correction(rows @ w.t(), fake(rows, read.affine, read.grid) @ quantized.t(), bias)


def _multiples(bias: Tensor, steps: Tensor) -> Tensor:
    """A bias rounded to whole steps (c_out,)."""
    grid = Grid(32, axis=0)
    affine = Affine(steps.expand(bias.shape).contiguous(), torch.zeros(bias.shape, dtype=torch.int32))
    return values(codes(bias, affine, grid), affine, grid)


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
    searched: Choice | None = None,
) -> Choice:
    """The first grid that the target allows and whose products are safe in its accumulator; a search has found it already."""
    w = _finite(graph, site)
    op = graph.op(site.readers[0][0])
    if searched is not None:
        grid, choice = searched.grid, _coded(searched, w, recipe, least)
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
    if grid.axis is None:
        affine = Affine(affine.scale.squeeze(0), affine.zero.squeeze(0))
    choice = Choice(site.name, site.role, grid, affine, f"{recipe.weights!r}, {recipe.rounding!r}")
    return _coded(choice, w, recipe, least)


def _coded(choice: Choice, w: Tensor, recipe: Recipe, least: Tensor) -> Choice:
    """The choice of a weight with its codes; no step is below the least one."""
    grid = choice.grid
    scale = choice.affine.scale.maximum(least if grid.axis is not None else least.max())
    affine = Affine(scale, choice.affine.zero)
    return replace(choice, affine=affine, codes=recipe.rounding(w, affine, grid).to(grid.container))


def _finite(graph: Graph, site: Site) -> Tensor:
    """A weight. Raises BadValues where it holds anything that is no number."""
    w = _constant(graph, site)
    if not bool(torch.isfinite(w).all()):
        raise BadValues(f"{site.name} holds NaN or infinite values; only finite weights can be quantized.")
    return w


def _bias(graph: Graph, site: Site, slot: Slot, steps: Tensor, corrected: Tensor | None = None) -> Choice:
    b = _constant(graph, site) if corrected is None else corrected
    affine = Affine(steps.expand(b.shape).contiguous(), torch.zeros(b.shape, dtype=torch.int32))
    found = codes(b, affine, slot.grids[0])
    why = "input step times weight step" + ("" if corrected is None else "; the mean error is taken out")
    return Choice(site.name, site.role, slot.grids[0], affine, "derived", codes=found, why=why)


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
