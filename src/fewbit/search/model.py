"""A model as a search sees it: its dimensions, the plan of a candidate, and what that plan loses.

Ranges are taken of one tensor at a time, so those of a width are the same whatever the other widths are: each is computed
once and candidates are put together from them. `choose` with the candidate's widths makes the same plan (tests/search).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from fewbit.choose.choose import ELEMENTS, Choosing
from fewbit.choose.loss import BATCH, Measure, Walk
from fewbit.core.bits import Bits
from fewbit.core.values import Choice, Graph, Op, Plan, Site
from fewbit.errors import BadImages, FewbitError
from fewbit.execute.overlay import Overlay
from fewbit.observe.stats import Stats
from fewbit.recipes import RECIPES, Recipe
from fewbit.search.space import Candidate, Dimension
from fewbit.target.allowed import Allowed, AllowedGrids, allowed
from fewbit.target.spec import Target

FLOAT = 0  # an option that is no width
LEAST = 4  # bits (HAGO)


@dataclass(frozen=True)
class Settings:
    """What a search may decide: widths of `weights` only or of `all` edges, from `most` bits down to `least`."""

    edges: str = "weights"
    most: int = 8
    least: int = LEAST

    def __post_init__(self) -> None:
        if self.edges not in ("weights", "all"):
            raise FewbitError(f"--edges {self.edges} is not understood; allowed are weights (activations keep 8 bits) and all.")
        if not 2 <= self.least <= self.most <= 16:
            raise FewbitError(
                f"--widths {self.least}-{self.most} is not understood; 2 to 16 are allowed, the smaller one first."
            )


@dataclass
class Ranges(Choosing):
    """Choosing with a memory: `known` has every choice that was made, by what it depends on."""

    known: dict[Any, Any] = field(default_factory=dict)

    def _ranged(self, site: Site, slot: AllowedGrids, group: Sequence[str] = ()) -> Choice:
        key = site.name, slot.grids[0], slot.fixed_scale, slot.all_readers, tuple(group)
        if key not in self.known:
            self.known[key] = super()._ranged(site, slot, group)
        return cast(Choice, self.known[key])

    def weight(self, site: Site, slot: AllowedGrids) -> None:
        read = self.choices[self.graph.op(site.readers[0][0]).operands["input"]]
        key = site.name, slot.grids, slot.pair_bits, read.grid, id(read.qparams)
        if key not in self.known:
            super().weight(site, slot)
            self.known[key] = self.choices[site.name], read  # the range is held, so that its id stays its own
        self._set(self.known[key][0])

    def bias(self, op: Op) -> Choice | Tensor | None:
        read, weight = (self.choices[op.operands[k]] for k in ("input", "weight"))
        key = op.name, "bias", id(read.qparams), id(weight.qparams), op.operands.get("bias", "") in self.allowed.sites
        if key not in self.known:
            self.known[key] = super().bias(op), read, weight
        return cast("Choice | Tensor | None", self.known[key][0])


class Model:
    """A graph on a target with a recipe of ranges. Raises FewbitError for a recipe that looks at more than one tensor."""

    def __init__(
        self, graph: Graph, stats: Stats, target: Target, recipe: Recipe, *, name: str = "", settings: Settings | None = None,
        keep_float: Sequence[str] = (), everything: bool = False,
    ) -> None:  # fmt: skip
        if recipe != Recipe(recipe.activations, recipe.weights, recipe.rounding, recipe.about, sensitivity=recipe.sensitivity):
            plain = ", ".join(n for n, r in RECIPES.items() if r.is_plain)
            raise FewbitError(
                f"--recipe {name} looks at more than one tensor, so its steps change with every width that a search tries; "
                f"search with one of {plain}, then give the point that you like to fewbit quantize --recipe {name}."
            )
        self.graph, self.stats, self.target, self.recipe, self.name = graph, stats, target, recipe, name
        self.settings = settings or Settings()
        self.keep_float, self.everything = tuple(keep_float), everything
        self._known: dict[Any, Any] = {}
        self._allowed: dict[tuple[str, ...], Allowed] = {}
        most = self.settings.most
        base = self.plan(Bits(most, most))
        self.moved = {c.site: c.why.removeprefix(ELEMENTS) for c in base.choices.values() if c.why.startswith(ELEMENTS)}
        self.base = base

    def dimensions(self, floats: Mapping[str, bool]) -> tuple[Dimension, ...]:
        """In graph order: each integer op with a width for its weight, and with `all` edges each activation with one.

        `floats`: ops that may stay float, and whether they begin there. An op without a weight that is in it is a dimension
        with two options. The limit of an edge is what the target's type for it holds.
        """
        found, seen = [], set[str]()
        for op in self.graph.ops:
            if op.name not in self.base.integer_ops:
                continue
            if self.settings.edges == "all":
                for site in op.operands.values():
                    choice = self.base.choices.get(site)
                    if choice is None or site in seen or choice.codes is not None or site in self.moved:
                        continue
                    seen.add(site)
                    found.append(Dimension(site, self._widths(choice)))
            weight = self.base.choices.get(op.operands.get("weight", ""))
            widths = (self.settings.most,) if weight is None else self._widths(weight)
            if op.name in floats:
                found.append(Dimension(op.name, (FLOAT, *widths), 0 if floats[op.name] else 1))
            elif len(widths) > 1:
                found.append(Dimension(op.name, widths))
        return tuple(found)

    def _widths(self, choice: Choice) -> tuple[int, ...]:
        most = min(choice.grid.bits, self.settings.most)
        return tuple(range(most, min(self.settings.least, most) - 1, -1))

    def bits(self, dimensions: Sequence[Dimension], candidate: Candidate, asked: str = "") -> Bits:
        """The widths of a candidate, as `--bits` of a file has them."""
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
        return Bits(self.settings.most, self.settings.most, widths, asked, (), tuple(floats))

    def allowed(self, bits: Bits) -> Allowed:
        """What runs in integers, and on which grids."""
        return allowed(
            self.graph, self.target, weight_bits=bits.weights, activation_bits=bits.activations, widths=bits.ops,
            keep_float=(*self.keep_float, *bits.floats), everything=self.everything,
        )  # fmt: skip

    def kept(self, floats: tuple[str, ...]) -> Allowed:
        """The same for the widest of all widths, with some ops in float; asked often, so it is remembered."""
        if floats not in self._allowed:
            self._allowed[floats] = self.allowed(Bits(self.settings.most, self.settings.most, floats=floats))
        return self._allowed[floats]

    def plan(self, bits: Bits) -> Plan:
        """The plan that `choose` makes for these widths."""
        answer = self.allowed(bits)
        if answer.channel_axes:
            raise FewbitError(
                f"{self.target.name} has a step for each channel of an activation; give another target to search."
            )
        work = Ranges(
            self.graph, self.stats, self.target, self.recipe, answer, {}, list(answer.fallbacks), self.name, bits,
            (*self.keep_float, *bits.floats), known=self._known,
        )  # fmt: skip
        work.walk()
        return work.plan()


class Loss:
    """The loss of plans on images: KL divergence from the float model, or cross-entropy with labels.

    Plans in a row that are the same up to some node are computed from there on. Raises BadImages where labels are asked for
    and there are none.
    """

    def __init__(self, graph: Graph, images: Sequence[Tensor], labels: Tensor | None, kind: str = "kl") -> None:
        if kind not in ("kl", "labels"):
            raise FewbitError(f"--loss {kind} is not understood; allowed are kl (against the float model) and labels.")
        if kind == "labels" and labels is None:
            raise BadImages("--loss labels needs calibration images with labels; give those, or leave it at --loss kl.")
        batches = list(torch.cat(list(images)).split(BATCH))
        self.graph = graph
        self.measure = Measure.of(graph, batches, labels if kind == "labels" else None)
        self.walk = Walk(Overlay(graph, ()), batches)
        self._place = {op.name: self.walk.index[self.walk.overlay.nodes[op.node]] for op in graph.ops}
        self._walked = self._asked = Plan("", "", "", {}, ())

    def __call__(self, plan: Plan) -> float:
        self.walk.overlay = Overlay.of(self.graph, plan)
        if self.differ(plan, self._walked) < self.walk.place:
            self.walk.back()
        self.walk.to(self.differ(plan, self._asked))  # the next plan is likely to differ from there on as well
        self._walked = self._asked = plan
        return self.measure.total(self.walk.answers())

    def differ(self, a: Plan, b: Plan) -> int:
        """The place of the first node that may compute something else."""
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
    """Whether two choices are made of the same numbers."""
    if a is None or b is None:
        return a is b
    return a is b or (a.qparams is b.qparams and a.codes is b.codes and a.grid == b.grid and a.all_readers == b.all_readers)


def scored(
    model: Model, loss: Loss, dimensions: Sequence[Dimension], always: Sequence[str] = ()
) -> Callable[[Candidate], float]:
    """candidate -> loss; `always` are ops that stay float whatever the candidate."""

    def score(candidate: Candidate) -> float:
        bits = model.bits(dimensions, candidate)
        return loss(model.plan(replace(bits, floats=(*always, *bits.floats))))

    return score
