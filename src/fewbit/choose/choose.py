"""The slots of a recipe in order: what is legal, the ranges, the codes of the weights, the biases that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from types import MappingProxyType
from typing import TypedDict, Unpack, cast

import torch
from torch import Tensor

from fewbit.capture.sites import owner_of, tensor_of
from fewbit.capture.units import units
from fewbit.choose.correct import OutputBias, WeightMean
from fewbit.choose.fisher import weighted_samples
from fewbit.choose.gptq import Gptq
from fewbit.choose.layers import Layers, Solved, few_enough, solve, too_many
from fewbit.choose.output_search import Pair, Product, Range, times
from fewbit.choose.ranges import Samples, ranged
from fewbit.choose.rank_flips import rank_flips
from fewbit.choose.recipe import Recipe
from fewbit.choose.weights import (
    codes_are_safe,
    finite,
    overflowing,
    pairs_are_safe,
    real_weight,
    recoded,
    weight_choice,
)
from fewbit.core.bits import Bits
from fewbit.core.grid import Grid, QParams, codes, fake, of_bias, values
from fewbit.core.values import Choice, Fallback, Graph, Json, Op, Plan, Site
from fewbit.errors import FewbitError
from fewbit.execute.overlay import Overlay, Stream, walked
from fewbit.execute.samples import ChannelSample, OpSample, PairSample, read_as
from fewbit.observe.stats import Histogram, Stats
from fewbit.target.allowed import Allowed, AllowedGrids, allowed
from fewbit.target.spec import Target

W8A8 = Bits()
ELEMENTS = "elements of "  # why a site has the step of the one that is named behind it
SHARED = "one step with "  # why a site has the step of several


class Asked(TypedDict, total=False):
    """What every way to a plan may be told: `choose`, `lapq` and `finetune`.

    `name` is the recipe's, for the record; `samples` is what single ops read, for a recipe that searches or corrects on their
    outputs; `channels` the values of activations by channel, where the target has a step for each.
    """

    name: str
    bits: Bits
    keep_float: Sequence[str]
    everything: bool
    samples: Mapping[str, OpSample | PairSample] | None
    channels: Mapping[str, ChannelSample]


class Options(Asked, total=False):
    """What `choose` and `choosing` may be told besides: `images` are the batches that were sampled, for a recipe whose inputs
    are sequential or that searches whole modules.
    """

    images: Iterable[Tensor]
    progress: Callable[[str], None]


def choose(graph: Graph, stats: Stats, target: Target, recipe: Recipe, **options: Unpack[Options]) -> Plan:
    """The plan for a graph on a target: a choice for every site that is read in integers.

    `stats` has a histogram for every activation site. Raises UnknownName for a pattern in `keep_float` that matches nothing,
    BadValues where a weight is not finite, FewbitError for a recipe that searches one step where the target has many.
    """
    if recipe.joint is not None:
        name = options.get("name") or recipe
        raise ValueError(f"recipe {name!r} searches all steps together: lapq(graph, stats, target, recipe, images)")
    if recipe.tune is not None:
        raise ValueError(f"recipe {options.get('name') or recipe!r} trains weights: finetune(graph, ..., recipe, real, made)")
    if recipe.rebuild is not None:
        name = options.get("name") or recipe
        raise ValueError(f"recipe {name!r} learns weights unit by unit: reconstruct(graph, stats, target, recipe, images)")
    return choosing(graph, stats, target, recipe, **options).plan()


def choosing(
    graph: Graph,
    stats: Stats,
    target: Target,
    recipe: Recipe,
    *,
    name: str = "",
    bits: Bits = W8A8,
    keep_float: Sequence[str] = (),
    everything: bool = False,
    samples: Mapping[str, OpSample | PairSample] | None = None,
    channels: Mapping[str, ChannelSample] = MappingProxyType({}),
    images: Iterable[Tensor] = (),
    progress: Callable[[str], None] = lambda site: None,
) -> Choosing:
    """What `choose` makes its plan of: every choice but the biases, still open for other steps."""
    if recipe.needs_samples and samples is None:
        raise ValueError(f"recipe {name or recipe!r} needs what single ops read: choose(..., samples=op_samples(...))")
    bits = bits.of(graph)
    keep_float = (*keep_float, *bits.floats)
    answer = allowed(
        graph,
        target,
        weight_bits=bits.weights,
        activation_bits=bits.activations,
        widths=bits.ops,
        keep_float=keep_float,
        everything=everything,
    )
    if not bits.asked and not bits.exceptions and answer.sites and all(graph.site(s).role == "weight" for s in answer.sites):
        bits = replace(bits, asked=f"w{bits.weights}")  # nothing else has any
    if answer.channel_axes and (
        recipe.search is not None or recipe.module is not None or isinstance(recipe.correction, OutputBias)
    ):
        raise FewbitError(
            f"recipe {name or recipe!r} searches one step for an activation and {target.name} has one for each channel; give "
            "another target, or --recipe minmax, percentile, mse, kl or aciq."
        )
    moves = (recipe.search, recipe.module, recipe.joint, recipe.tune, recipe.rebuild)
    if any(stage is not None for stage in moves) and any(grid.group_size for grid in answer.grids.values()):
        raise FewbitError(
            f"recipe {name or recipe!r} moves one step for a row of weights and {target.name} has one for each block; give "
            "another target, or --recipe minmax, mse or fast."
        )
    if missing := [site for site in answer.channel_axes if site not in channels]:
        raise ValueError(f"{target.name} needs values by channel of {missing[0]}: choose(..., channels=channel_samples(...))")
    batches = list(images) if recipe.needs_images else []
    if recipe.needs_images and not batches:
        raise ValueError(f"recipe {name or recipe!r} needs calibration images: choose(..., images=batches)")
    weighted: Mapping[str, Samples] = {}
    if recipe.gradients:
        searched = [name for name, slot in answer.sites.items() if graph.site(name).axis is None and slot.grids[0].axis is None]
        weighted = weighted_samples(graph, searched, batches, sum(map(len, batches)))
    fixed: Mapping[str, Choice] = {}
    for one_pass in recipe.passes:
        work = Choosing(
            graph, stats, target, one_pass, answer, dict(samples or {}), list(answer.fallbacks), name, bits, keep_float,
            channels, fixed=fixed, weighted=weighted,
        )  # fmt: skip
        if one_pass.sequential:
            walking = few_enough(graph, batches) if isinstance(recipe.rounding, Gptq) else batches
            work.fallbacks += too_many(batches, walking)
            work.stream = Stream(Overlay(graph, answer.integer_ops), walking)
            if isinstance(recipe.rounding, Gptq):
                work.layers = Layers(graph, work.stream, walking)
        work.walk(progress)
        fixed = work.searched
    if recipe.module is not None:
        work.modules(torch.cat(batches)[: recipe.module.images], progress)
    if (refused := _one_width(graph, target, recipe, work.choices)) is not None:
        work.fallbacks.append(refused)
    return work


@dataclass
class Choosing:
    """What has been chosen so far, site by site in graph order; `searched` are weights whose step a search has found.

    `unranked` are the steps that the same search finds without ranking, `flips` what that does to each attention head. `found`
    are the objectives of each search before and after; `fixed` are weights whose step an earlier pass has found; `tuned` are
    biases (c_out,) by op that training has found.
    """

    graph: Graph
    stats: Stats
    target: Target
    recipe: Recipe
    allowed: Allowed
    samples: dict[str, OpSample | PairSample]
    fallbacks: list[Fallback]
    name: str = ""
    bits: Bits = W8A8
    keep_float: Sequence[str] = ()
    channels: Mapping[str, ChannelSample] = field(default_factory=dict)
    stream: Stream | None = None
    choices: dict[str, Choice] = field(default_factory=dict)
    searched: dict[str, Choice] = field(default_factory=dict)
    unranked: dict[str, QParams] = field(default_factory=dict)
    flips: list[dict[str, Json]] = field(default_factory=list)
    found: list[dict[str, Json]] = field(default_factory=list)
    fixed: Mapping[str, Choice] = field(default_factory=dict)
    weighted: Mapping[str, Samples] = field(default_factory=dict)
    layers: Layers | None = None
    solved: dict[str, Solved] = field(default_factory=dict)
    tuned: dict[str, Tensor] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The plan, with the biases that follow from the steps."""
        biases = self.biases()
        ridges = [{"op": name, "ridge": found.ridge} for name, found in self.solved.items()]
        return Plan(
            self.target.name,
            self.name or repr(self.recipe),
            str(self.bits),
            {s.name: self.choices[s.name] for s in self.graph.sites if s.name in self.choices},
            self.allowed.integer_ops,
            (*self.fallbacks, *overflowing(self.graph, self.choices, biases, self.allowed)),
            tuple(self.keep_float),
            {key: rows for key, rows in (("ranking", self.flips), ("search", self.found), ("ridge", ridges)) if rows},
            biases=biases,
        )

    def walk(self, progress: Callable[[str], None] = lambda site: None) -> None:
        """Choose for every site that the target has a slot for, in graph order; biases follow at the end."""
        for site in self.graph.sites:
            slot = self.allowed.sites.get(site.name)
            if slot is None or site.role == "bias":
                continue
            progress(site.name)
            if site.role == "weight":
                self.weight(site, slot)
            else:
                self.activation(site, slot)

    def activation(self, site: Site, slot: AllowedGrids) -> None:
        """The range of a tensor; where ops with weights read it, a search of their steps, where a product does, of its two."""
        group = next((group for group in self.allowed.shared if site.name in group), ())
        moved = None if group else _moved(self.graph, site, slot, self.choices)
        choice = moved or self._ranged(site, slot, group)
        self._set(choice)
        ops = [op for op in self._readers(site) if op.name in self.samples]
        if self.stream is not None and ops:
            read = self.stream.at(self.stream.overlay.nodes[site.tensor])
            for op in ops:
                self.samples[op.name] = read_as(self.graph, op, self.samples[op.name], site.tensor, read)
        if self.recipe.search is None:
            return
        weighted = [op for op in ops if "weight" in op.operands]
        if weighted:
            self._search(choice, weighted)
        for op in ops:
            others = [s for s in op.operands.values() if s in self.choices]
            if isinstance(self.samples[op.name], PairSample) and len(others) == 2:
                self._search_pair(op)

    def _ranged(self, site: Site, slot: AllowedGrids, group: Sequence[str] = ()) -> Choice:
        """The choice of an activation by its range, or that of the group that it has one step with; by those of its channels
        where the target has a step for each.
        """
        recipe, grid = self.recipe, slot.grids[0]
        if slot.fixed_scale is not None and not (recipe.free_softmax and slot.convention):
            qparams = QParams(torch.tensor(slot.fixed_scale), torch.tensor(slot.fixed_zero, dtype=torch.int32))
            return Choice(
                site.name, site.role, grid, qparams, "fixed", all_readers=slot.all_readers, why="pinned by the target"
            )
        if grid.axis is None:
            seen = reduce(Histogram.merge, (self.stats.sites[name] for name in group or (site.name,)))
            qparams = recipe.activations(self.weighted.get(site.name) or Samples.of_histogram(seen), grid)
            qparams = QParams(qparams.scale.squeeze(0), qparams.zero.squeeze(0))
            if group:
                why = SHARED + ", ".join(name for name in group if name != site.name)
                method = repr(recipe.activations)
                return Choice(site.name, site.role, grid, qparams, method, all_readers=slot.all_readers, why=why)
        else:
            found = self.channels[site.name]
            if recipe.channels is not None and recipe.channels.activations and grid.bits <= recipe.channels.nominal:
                widths = recipe.channels(found.values.std(1, unbiased=False), grid.bits, symmetric=grid.symmetric)
                grid = replace(grid, bits=max(*widths, 1), widths=widths)
            qparams = ranged(recipe.activations, Samples.of_channels(found.values, found.low, found.high), grid)
        return Choice(site.name, site.role, grid, qparams, repr(recipe.activations), all_readers=slot.all_readers)

    def weight(self, site: Site, slot: AllowedGrids) -> None:
        """The codes of a weight."""
        found = self.searched.get(site.name)
        self._set(weight_choice(self.graph, site, slot, self.recipe, self.target, self.choices, self.fallbacks, found))
        op = self.graph.op(site.readers[0][0])
        if self.layers is not None and (solved := solve(self.layers, site, slot, self.recipe, self.choices)) is not None:
            self.solved[op.name] = solved
            self._set(solved.choice)
        if self.stream is not None and (bias := self.bias(op)) is not None:
            real = values(bias.codes, bias.qparams, bias.grid) if isinstance(bias, Choice) and bias.codes is not None else bias
            self.stream.overlay.set_bias(op.name, cast(Tensor, real))

    def modules(self, images: Tensor, progress: Callable[[str], None]) -> None:
        """The steps of each unit's sites, searched on the unit's output for images (b, c, h, w)."""
        search, graph = self.recipe.module, self.graph
        assert search is not None

        def made(choice: Choice, qparams: QParams) -> Choice | None:
            return self.remade(choice, qparams, repr(search))

        found = [u for u in units(graph) if all(op in self.allowed.integer_ops for op in u.ops)]
        walk = walked(graph, [(u.ops, u.output) for u in found], images)
        for unit, (inner, given, exact) in zip(found, walk, strict=True):
            read = {site for op in unit.ops for site in graph.op(op).operands.values()}
            free = [site.name for site in graph.sites if site.name in read and self.is_free(site)]
            ranges = {name: self._seen(name, self.choices[name].grid) for name in free}
            overlay = Overlay(graph, unit.ops, self.choices)
            self.choices |= search(overlay, inner, given, exact, self.choices, ranges, made)
            progress(unit.name)
        for name, choice in self.choices.items():
            if choice.why.startswith(ELEMENTS):
                owner = self.choices[choice.why.removeprefix(ELEMENTS)]
                self.choices[name] = replace(choice, qparams=owner.qparams, method=owner.method)

    def is_free(self, site: Site) -> bool:
        """A site whose step is nobody else's."""
        choice = self.choices.get(site.name)
        return choice is not None and site.role != "bias" and (site.role == "weight" or not choice.why)

    def _seen(self, name: str, grid: Grid) -> Range:
        """What was seen of an activation, or is there of a weight."""
        site = self.graph.site(name)
        if site.role != "weight":
            seen = Samples.of_histogram(self.stats.sites[name])
            return Range(seen.low[0], seen.high[0], grid)
        rows = Samples.of_weight(finite(self.graph, site), grid)
        low, high = (rows.low, rows.high) if grid.axis is not None else (rows.low[0], rows.high[0])
        return Range(low, high, grid)

    def remade(self, choice: Choice, qparams: QParams, method: str) -> Choice | None:
        """A choice with another step; None where the codes of a weight would not be safe."""
        moved = replace(choice, qparams=qparams, method=method)
        if choice.role != "weight":
            return moved
        site, slot = self.graph.site(choice.site), self.allowed.sites[choice.site]
        coded_again = recoded(self.graph, site, moved, self.recipe, self.choices, slot)
        return coded_again if codes_are_safe(self.graph, site, coded_again, self.choices, slot) else None

    def biases(self) -> dict[str, Tensor]:
        """The biases that were corrected and stay float, by op name; those that are integers become choices."""
        found = {}
        for op in self.graph.ops:
            if op.name not in self.allowed.integer_ops or "weight" not in op.operands:
                continue
            bias = self.bias(op)
            if isinstance(bias, Choice):
                self.choices[bias.site] = bias
            elif bias is not None:
                found[op.name] = bias
        return found

    def _set(self, choice: Choice) -> None:
        self.choices[choice.site] = choice
        if self.stream is not None:
            self.stream.overlay.set(choice)

    def _readers(self, site: Site) -> list[Op]:
        """The integer ops that read an activation site."""
        read = [name for name, operand in site.readers if operand != "output" and name in self.allowed.integer_ops]
        return [self.graph.op(name) for name in dict.fromkeys(read)]

    def _given(self, choice: Choice) -> Range | QParams:
        """Where a search starts: the range that was seen or the recipe's; the step itself where it is pinned or another's."""
        assert self.recipe.search is not None
        if choice.why:
            return choice.qparams
        if self.recipe.search.start == "recipe":
            return Range.of(choice.qparams, choice.grid)
        return self._seen(choice.site, choice.grid)

    def _weight_range(self, site: str, grid: Grid) -> Range:
        """The same for a weight."""
        assert self.recipe.search is not None
        if self.recipe.search.start == "seen":
            return self._seen(site, grid)
        samples = Samples.of_weight(finite(self.graph, self.graph.site(site)), grid)
        qparams = self.recipe.weights(samples, grid)
        return Range.of(qparams if grid.axis is not None else QParams(qparams.scale[0], qparams.zero[0]), grid)

    def _search(self, choice: Choice, ops: Sequence[Op]) -> None:
        """Search the step of an input and of the weights of all ops that read it.

        A weight goes to the next grid where its codes are not safe.
        """
        recipe, graph = self.recipe, self.graph
        assert recipe.search is not None
        correction = recipe.correction if isinstance(recipe.correction, OutputBias) else None
        weights = {op.name: op.operands["weight"] for op in ops}
        tensors = {op.name: finite(graph, graph.site(weights[op.name])) for op in ops}
        level = {op.name: 0 for op in ops}
        given = self._given(choice)
        while True:
            products = []
            for op in ops:
                slot, sample = self.allowed.sites[weights[op.name]], self.samples[op.name]
                assert isinstance(sample, OpSample)
                seen = self._weight_range(weights[op.name], slot.grids[level[op.name]])
                bias = tensor_of(graph, graph.site(op.operands["bias"])) if "bias" in op.operands else None
                w = tensors[op.name].flatten(1)
                before = self.fixed.get(weights[op.name])
                start = before.qparams if before is not None and before.grid == seen.grid else None
                products.append(Product(sample.rows, w, seen, sample.attention, bias, sample.read, start=start))
            found = recipe.search(products, given, choice.grid, correction)
            unsafe = []
            for op, p, qparams in zip(ops, products, found.weights, strict=True):
                slot = self.allowed.sites[weights[op.name]]
                q = recipe.rounding(p.weight, qparams, p.range.grid)
                last = level[op.name] == len(slot.grids) - 1
                if slot.pair_bits is not None and not last and not pairs_are_safe(q, choice.grid, slot.pair_bits):
                    unsafe.append(op.name)
            if not unsafe:
                break
            level |= {name: level[name] + 1 for name in unsafe}
        if recipe.search.ranking is not None and any(p.attention is not None for p in products):
            plain = replace(recipe.search, ranking=None)(products, given, choice.grid, correction)
            self.unranked[choice.site] = plain.input
            self.unranked |= {weights[op.name]: qparams for op, qparams in zip(ops, plain.weights, strict=True)}
        for op, p, qparams in zip(ops, products, found.weights, strict=True):
            site = weights[op.name]
            self.searched[site] = Choice(site, "weight", p.range.grid, qparams, f"{recipe.search!r}, {recipe.rounding!r}")
        if isinstance(given, Range):
            self._set(replace(choice, qparams=found.input, method=repr(recipe.search)))
        self.found.append({"input": choice.site, "ops": list(weights), "before": found.before, "after": found.after})

    def _search_pair(self, op: Op) -> None:
        """Search the steps of the two operands of a product; an operand that others read as well keeps its step."""
        assert self.recipe.search is not None
        sample = self.samples[op.name]
        assert isinstance(sample, PairSample)
        both = [self.choices[site] for site in list(op.operands.values())[:2]]
        alone = [len(self._readers(self.graph.site(choice.site))) == 1 for choice in both]
        given = [self._given(choice) if own else choice.qparams for choice, own in zip(both, alone, strict=True)]
        pair = Pair(sample, both[0].grid, both[1].grid, "query" in op.operands)
        found = self.recipe.search.pair(pair, given[0], given[1])
        for choice, start, qparams in zip(both, given, found, strict=True):
            if isinstance(start, Range):
                self._set(replace(choice, qparams=qparams, method=repr(self.recipe.search)))
        if self.recipe.search.ranking is not None and pair.ranked:
            plain = replace(self.recipe.search, ranking=None).pair(pair, given[0], given[1])
            self.unranked |= {choice.site: qparams for choice, qparams in zip(both, plain, strict=True)}
            self.flips += rank_flips(self.graph, op, self.samples, {**self.searched, **self.choices}, self.unranked)

    def bias(self, op: Op) -> Choice | Tensor | None:
        """The bias of an op: a choice where it is an integer, a tensor (c_out,) where it was corrected, else None."""
        bias, sample = op.operands.get("bias", ""), self.samples.get(op.name)
        corrected = self.solved[op.name].bias if op.name in self.solved else None
        if isinstance(self.recipe.correction, OutputBias | WeightMean) and isinstance(sample, OpSample):
            corrected = self._corrected(op, sample)
        corrected = self.tuned.get(op.name, corrected)
        if op.operands["input"] not in self.choices:
            return corrected
        read, weight = (self.choices[op.operands[operand]].qparams for operand in ("input", "weight"))
        if read.scale.ndim or weight.scale.ndim > 1:  # many steps for one sum: no step of a bias is theirs
            return corrected
        steps = of_bias(read, weight, self.graph.site(op.operands["weight"]).shape[0])
        if bias in self.allowed.sites:
            return _integer_bias(self.graph, self.graph.site(bias), self.allowed.sites[bias], steps, corrected)
        if corrected is not None and op.operands.get("output", "") in self.allowed.sites:
            return _multiples(corrected, steps)  # this kernel adds in int32: the bias is a multiple of the steps
        return corrected

    def _corrected(self, op: Op, sample: OpSample) -> Tensor:
        """The bias (c_out,) of an op after correction on its samples."""
        graph, read, weight = self.graph, self.choices.get(op.operands["input"]), self.choices[op.operands["weight"]]
        w, quantized = tensor_of(graph, graph.site(weight.site)).flatten(1), real_weight(weight)
        bias = tensor_of(graph, graph.site(op.operands["bias"])) if "bias" in op.operands else torch.zeros(len(w))
        rows = sample.rows.flatten(0, 1)
        if isinstance(self.recipe.correction, WeightMean):
            return bias + self.recipe.correction.offset(w, quantized) * times(rows.mean(0), torch.ones_like(w))
        assert isinstance(self.recipe.correction, OutputBias)
        given = rows if sample.read is None else sample.read.flatten(0, 1)
        given = given if read is None else fake(given, read.qparams, read.grid)
        return self.recipe.correction(times(rows, w), times(given, quantized), bias)


def _multiples(bias: Tensor, steps: QParams) -> Tensor:
    """A bias rounded to whole steps (c_out,)."""
    grid = Grid(32, axis=0)
    return values(codes(bias, steps, grid), steps, grid)


def _moved(graph: Graph, site: Site, slot: AllowedGrids, choices: dict[str, Choice]) -> Choice | None:
    """The choice of a tensor whose codes all_readers reads, for one that holds some of its elements in other places.

    Codes move without loss. Another step would round them a second time, which runtimes leave out.
    """
    owner = {s.tensor: s.name for s in graph.sites if s.name in choices and choices[s.name].all_readers}
    name = owner_of(next(n for n in graph.module.graph.nodes if n.name == site.tensor), owner)
    found = None if name is None else choices[name]
    if found is None or found.grid != slot.grids[0] or found.site == site.name or slot.fixed_scale is not None:
        return None
    return replace(found, site=site.name, role=site.role, all_readers=slot.all_readers, why=ELEMENTS + found.site)


def _one_width(graph: Graph, target: Target, recipe: Recipe, choices: Mapping[str, Choice]) -> Fallback | None:
    """What a recipe with widths of channels did not get: activations that have one step, on this target, for all of them."""
    asked = recipe.channels
    if asked is None or not asked.activations:
        return None
    plain = {c.site for c in choices.values() if c.codes is None and c.grid.axis is None and c.grid.bits <= asked.nominal}
    if not plain:
        return None
    share = sum(op.macs for op in graph.ops if plain & {op.operands.get("input")}) / max(graph.macs, 1)
    why = f"{target.name} has one scale for all channels of an activation"
    return Fallback(f"{len(plain)} activations", "a width for each channel", "one width", why, share)


def _integer_bias(graph: Graph, site: Site, slot: AllowedGrids, steps: QParams, corrected: Tensor | None) -> Choice:
    found = codes(tensor_of(graph, site) if corrected is None else corrected, steps, slot.grids[0])
    why = "input step times weight step" + ("" if corrected is None else "; the mean error is taken out")
    return Choice(site.name, site.role, slot.grids[0], steps, "derived", codes=found, why=why)
