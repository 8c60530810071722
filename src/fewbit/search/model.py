"""A model in a search: its dimensions, the plan of a candidate, and the loss of that plan.

Ranges are chosen for one tensor at a time, so they do not depend on the widths of other tensors: each is computed once,
and candidates are assembled from them. `choose` with the candidate's widths makes the same plan (tests/search).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from fewbit.choose import Bits, Context, Recipe
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.headroom import overflowing
from fewbit.choose.loss import BATCH, ModelLoss
from fewbit.choose.ranges import moved_codes
from fewbit.core.graph import Graph, Site
from fewbit.core.plan import Bias, Choice, Plan, SameAs
from fewbit.core.shelf import Rebatched
from fewbit.errors import BadImages, FewbitError
from fewbit.execute.executor import Executor
from fewbit.execute.stream import Stream
from fewbit.recipes import plain_ranges
from fewbit.search.space import Candidate, Dimension
from fewbit.target.allowed import Allowed
from fewbit.target.grids import AllowedGrids

FLOAT = 0  # an option that is not a width
LEAST = 4  # bits (HAGO)


@dataclass(frozen=True)
class Settings:
    """What a search varies: widths of `weights` only or of `all` edges, from `most` bits down to `least`."""

    edges: str = "weights"
    most: int = 8
    least: int = LEAST

    def __post_init__(self) -> None:
        if self.edges not in ("weights", "all"):
            raise FewbitError(f"--edges {self.edges} is not understood; allowed are weights (activations keep 8 bits) and all.")
        if not 2 <= self.least <= self.most <= 16:
            raise FewbitError(f"--least {self.least} is not allowed; it should be 2 to {self.most}, the target's widest.")


class Model:
    """A graph on a target with a range recipe. Raises FewbitError for a recipe that looks at more than one tensor."""

    def __init__(self, context: Context, recipe: Recipe, settings: Settings | None = None) -> None:
        self.context, self.recipe, self.ranges = context, recipe, plain_ranges(recipe, context.name)
        self.graph, self.target = context.graph, context.target
        self.settings = settings or Settings()
        self._cache: dict[Any, Any] = {}  # choices and biases by what they depend on
        self._allowed: dict[tuple[str, ...], Allowed] = {}
        most = self.settings.most
        self.base = self.plan(Bits(most, most))
        self.moved = {c.site: c.source.site for c in self.base.choices.values() if isinstance(c.source, SameAs)}

    def __reduce__(self) -> Any:
        """For another process, which computes the ranges again."""
        return Model, (self.context, self.recipe, self.settings)

    def dimensions(self, floats: Mapping[str, bool]) -> tuple[Dimension, ...]:
        """In graph order: each integer op with a width for its weight, and with `all` edges each activation with one.

        `floats`: ops that may stay float, and whether they start so. One of them without a weight is a dimension with two
        options. The largest width of an edge is that of the target's type for it.
        """
        dimensions, visited = [], set[str]()
        for op in self.graph.ops:
            if op.name not in self.base.integer_ops:
                continue
            if self.settings.edges == "all":
                for site in op.operands.values():
                    choice = self.base.choices.get(site)
                    if choice is None or site in visited or choice.codes is not None or site in self.moved:
                        continue
                    visited.add(site)
                    dimensions.append(Dimension(site, self._widths(choice)))
            weight = self.base.choices.get(op.operands.get("weight", ""))
            widths = (self.settings.most,) if weight is None else self._widths(weight)
            if op.name in floats:
                dimensions.append(Dimension(op.name, (FLOAT, *widths), 0 if floats[op.name] else 1))
            elif len(widths) > 1:
                dimensions.append(Dimension(op.name, widths))
        return tuple(dimensions)

    def _widths(self, choice: Choice) -> tuple[int, ...]:
        most = min(choice.grid.bits, self.settings.most)
        return tuple(range(most, min(self.settings.least, most) - 1, -1))

    def bits(self, dimensions: Sequence[Dimension], candidate: Candidate, spec: str = "") -> Bits:
        """The widths of a candidate, as a `--bits` file has them."""
        widths: dict[str, int] = {}
        floats = []
        for dimension, k in zip(dimensions, candidate, strict=True):
            option, operands = dimension.options[k], {op.name: op.operands for op in self.graph.ops}.get(dimension.name)
            if option == FLOAT:
                floats.append(dimension.name)
            elif operands is None:
                widths[dimension.name] = option
                widths |= {site: option for site, owner in self.moved.items() if owner == dimension.name}
            elif "weight" in operands:
                widths[operands["weight"]] = option
        return Bits(self.settings.most, self.settings.most, widths, spec, (), tuple(floats))

    def with_floats(self, floats: tuple[str, ...]) -> Allowed:
        """What runs in integers at the largest width with some ops in float; cached."""
        if floats not in self._allowed:
            bits = Bits(self.settings.most, self.settings.most, floats=floats)
            self._allowed[floats] = replace(self.context, bits=bits).allowed
        return self._allowed[floats]

    def plan(self, bits: Bits) -> Plan:
        """The plan that `choose` makes for these widths."""
        context = replace(self.context, bits=bits)
        if context.allowed.channel_axes:
            raise FewbitError(
                f"{self.target.name} has a scale for each channel of an activation; give another target to search."
            )
        builder = PlanBuilder(context.start(repr(self.recipe)), context)
        for site in self.graph.sites:
            grids = context.allowed.sites.get(site.name)
            if grids is None or site.role == "bias":
                continue
            if site.role == "weight":
                self._set_weight(builder, site, grids)
            else:
                builder.set(self._activation(builder, site, grids))
        plan = builder.plan()
        biases = {name: self._bias(plan, name) for name in plan.biases}
        plan = replace(plan, biases=biases)
        return replace(plan, fallbacks=(*plan.fallbacks, *overflowing(self.graph, plan, context.allowed)))

    def _activation(self, builder: PlanBuilder, site: Site, grids: AllowedGrids) -> Choice:
        context = builder.context
        group = next((group for group in context.allowed.shared if site.name in group), ())
        choice = None if group else moved_codes(self.graph, site, grids, builder.choices)
        key = site.name, grids.grids[0], grids.fixed_scale, grids.all_readers, group
        if choice is None and key not in self._cache:
            self._cache[key] = self.ranges.activation(context, site, grids, group)
        return choice or cast(Choice, self._cache[key])

    def _set_weight(self, builder: PlanBuilder, site: Site, grids: AllowedGrids) -> None:
        activation = builder.choices.get(self.graph.op(site.readers[0][0]).operands["input"])
        key = site.name, grids.grids, grids.pair_bits, None if activation is None else (activation.grid, id(activation.qparams))
        if key not in self._cache:
            choice, why = self.ranges.weight(builder.context, site, grids, builder.choices)
            self._cache[key] = replace(choice, why=why), why, activation  # holds the range, so that its id is not reused
        choice, why, _ = self._cache[key]
        builder.set_weight(choice, grids.grids[0], why)

    def _bias(self, plan: Plan, name: str) -> Bias:
        """The same object for the same numbers, so that `Loss` knows what has changed."""
        op, bias = self.graph.op(name), plan.biases[name]
        qparams = [plan.choices[op.operands[k]].qparams for k in ("input", "weight") if op.operands[k] in plan.choices]
        key = name, bias.integer is None, *map(id, qparams)
        return cast(Bias, self._cache.setdefault(key, (bias, qparams))[0])


class Loss:
    """The loss of plans on images: KL divergence from the float model, or cross-entropy with labels.

    A plan that equals the last one up to some node is computed from that node on. Raises BadImages where `kind` is labels
    and there are none.
    """

    def __init__(self, graph: Graph, images: Sequence[Tensor], labels: Tensor | None, kind: str = "kl") -> None:
        if kind not in ("kl", "labels"):
            raise FewbitError(f"--loss {kind} is not understood; allowed are kl (against the float model) and labels.")
        if kind == "labels" and labels is None:
            raise BadImages("--loss labels needs calibration images with labels; give those, or leave it at --loss kl.")
        batches = Rebatched(images, graph.at_a_time(BATCH))
        self.graph, self.given = graph, (images, labels, kind)
        self.measure = ModelLoss.of(graph, batches, labels if kind == "labels" else None)
        self.walk = Stream(Executor(graph, ()), batches)
        self._place = {op.name: self.walk.index[self.walk.overlay.nodes[op.node]] for op in graph.ops}
        self._last = Plan("", "", "", {}, ())

    def __reduce__(self) -> Any:
        """For another process, which computes the float outputs again."""
        images, *others = self.given
        return Loss, (self.graph, list(images), *others)

    def __call__(self, plan: Plan) -> float:
        self.walk.overlay = Executor.of(self.graph, plan)
        outputs = self.walk.outputs_from(self.differ(plan, self._last))
        self._last = plan
        return self.measure.total(outputs)

    def differ(self, a: Plan, b: Plan) -> int:
        """The index of the first node whose result may differ."""
        places = [self._place[name] for name in set(a.integer_ops) ^ set(b.integer_ops)]
        places += [self._place[k] for k in {*a.biases, *b.biases} if a.biases.get(k) is not b.biases.get(k)]
        names = {site for op in set(a.integer_ops) ^ set(b.integer_ops) for site in self.graph.op(op).operands.values()}
        names |= {k for k in {*a.choices, *b.choices} if not _same(a.choices.get(k), b.choices.get(k))}
        index = self.walk.index
        for name in names:
            site = self.graph.site(name)
            tensor = self.walk.overlay.nodes[site.tensor]
            places += [self._place[op] for op, _ in site.readers]
            places += [index[user] for user in tensor.users if user in index]
        return min(places, default=len(self.walk.order))


def _same(a: Choice | None, b: Choice | None) -> bool:
    """Whether two choices have the same numbers."""
    if a is None or b is None:
        return a is b
    return a is b or (a.qparams is b.qparams and a.codes is b.codes and a.grid == b.grid and a.all_readers == b.all_readers)


@dataclass(frozen=True)
class Scored:
    """candidate -> loss; `always` are ops that stay float whatever the candidate."""

    model: Model
    loss: Loss
    dimensions: Sequence[Dimension]
    always: Sequence[str] = ()

    def __call__(self, candidate: Candidate) -> float:
        bits = self.model.bits(self.dimensions, candidate)
        return self.loss(self.model.plan(replace(bits, floats=(*self.always, *bits.floats))))
