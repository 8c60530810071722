"""LAPQ on a graph: a plan for each norm p, the best of them, then one factor for each of its steps, all together.

The loss is that of the whole quantized model. A line search moves one step, or a few; what comes before the first op that
reads it is computed once, see `Model`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.sites import readers
from fewbit.choose.choose import ELEMENTS, Asked, Choosing, choosing
from fewbit.choose.loss import BATCH, Measure, Walk
from fewbit.choose.powell import JointSearch, Parabola, Point, parabola, thinned
from fewbit.choose.ranges import MseRange, RangeMethod
from fewbit.choose.recipe import Recipe
from fewbit.core.grid import TINY, QParams
from fewbit.core.values import Choice, Graph, Json, Plan
from fewbit.errors import BadImages
from fewbit.execute.overlay import Overlay
from fewbit.files import Journal
from fewbit.observe.stats import Stats
from fewbit.target.spec import Target

SAID = {"kl": "KL from the float model", "labels": "cross-entropy with labels"}


class OutOfBudgetError(Exception):
    """The budget of the search is spent."""


def lapq(
    graph: Graph,
    stats: Stats,
    target: Target,
    recipe: Recipe,
    images: Iterable[Tensor],
    *,
    labels: Tensor | None = None,
    journal: Journal | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **asked: Unpack[Asked],
) -> Plan:
    """The plan of a recipe with a joint search. `images` are batches of calibration images, `labels` (n,) their classes.

    `journal` has the losses that a killed run has computed. Raises BadImages where the loss needs labels and there are none.
    """
    search = recipe.joint
    assert search is not None
    batches = list(torch.cat(list(images))[: search.images].split(BATCH))
    if search.loss == "labels" and labels is None:
        raise BadImages("--loss labels needs calibration images with labels; give those, or leave it at --loss kl.")
    measure = Measure.of(graph, batches, labels if search.loss == "labels" else None)
    journal = journal or Journal()

    def chosen(p: float | None) -> Choosing:
        return choosing(graph, stats, target, _with_norm(recipe, p), images=torch.cat(batches).split(8), **asked)

    start = _start(search, chosen, measure, batches, journal, progress)
    model = Model(start.work, measure, batches, repr(search))
    losses: list[float] = []
    best = np.zeros(len(model.free))

    def late() -> bool:
        return search.seconds is not None and not journal.replaying and journal.seconds >= search.seconds

    def loss(x: Point) -> float:
        nonlocal best
        if losses and (late() or len(losses) == search.evaluations):
            raise OutOfBudgetError
        found = journal.value(hashlib.sha256(x.tobytes()).hexdigest()[:16], lambda: model(x))
        if found < min(losses, default=math.inf):
            best = x.copy()
        losses.append(found)
        progress(f"{min(losses):.4g} after {len(losses)}")
        return found

    over = False
    try:
        search.search(loss, len(model.free), model.kinds)
    except OutOfBudgetError:
        over = late()
    plan = model.plan(best)
    record: Json = {
        "loss": SAID[search.loss],
        "images": sum(map(len, batches)),
        "sites": len(model.free),
        "norms": [{"p": p, "loss": _json(v)} for p, v in sorted(start.losses.items())],
        "parabola": None if start.fit is None else asdict(start.fit),
        "p": start.p,
        "start": _json(losses[0]),
        "best": _json(min(losses)),
        "evaluations": len(losses),
        "curve": [[i, _json(v), _json(b)] for i, v, b in thinned(losses)],
        "seconds": search.seconds,
        "out_of_time": over,
    }
    return replace(plan, extra={**plan.extra, "joint": record})


def _json(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _with_norm(recipe: Recipe, p: float | None) -> Recipe:
    """The recipe with another p in those of its ranges that have one."""

    def normed(method: RangeMethod) -> RangeMethod:
        return replace(method, p=p) if p is not None and isinstance(method, MseRange) else method

    return replace(recipe, activations=normed(recipe.activations), weights=normed(recipe.weights))


@dataclass(frozen=True)
class Start:
    """What the search starts from: choices at p (None: the recipe's own ranges), and the losses that decided for it."""

    work: Choosing
    p: float | None
    losses: Mapping[float, float]
    fit: Parabola | None


def _start(
    search: JointSearch,
    chosen: Callable[[float | None], Choosing],
    measure: Measure,
    batches: Sequence[Tensor],
    journal: Journal,
    progress: Callable[[str], None],
) -> Start:
    """The p with the smallest loss, of all values tried and the vertex of the parabola through them.

    With half of the time gone no further value is tried, but always the first.
    """
    losses: dict[float, float] = {}
    best: tuple[float, Choosing] | None = None

    def attempt(p: float) -> None:
        nonlocal best
        progress(f"p = {p:.3g}")
        made: list[Choosing] = []

        def compute() -> float:
            made.append(chosen(p))
            plan = made[0].plan()
            return measure(Overlay.of(made[0].graph, plan), batches)

        losses[p] = journal.value(f"p = {p!r}", compute)
        if made and losses[p] == min(losses.values()):
            best = p, made[0]

    def late() -> bool:
        return search.seconds is not None and journal.seconds >= search.seconds / 2

    for p in search.norms:
        if losses and not journal.replaying and late():
            break
        attempt(p)
    fit = parabola(list(losses), list(losses.values()))
    if fit is not None and fit.vertex is not None and fit.vertex not in losses and (journal.replaying or not late()):
        attempt(fit.vertex)
    if not losses:
        return Start(chosen(None), None, {}, None)
    p = min(losses, key=losses.__getitem__)
    work = best[1] if best is not None and best[0] == p else chosen(p)
    return Start(work, p, losses, fit)


class Model:
    """The loss of the quantized model as a function of ln(factor) of each free step (n,), and its plan.

    Free is a step that is not pinned and nobody else's. All channels of a weight share one factor; its codes are made again,
    and biases follow. Points of which two in a row differ from some op on only are computed from there on.
    """

    def __init__(self, work: Choosing, measure: Measure, batches: Sequence[Tensor], method: str) -> None:
        self.work, self.measure, self.method = work, measure, method
        graph, integer = work.graph, work.allowed.integer_ops
        self.free = [site.name for site in graph.sites if work.is_free(site)]
        self._start = {name: work.choices[name] for name in self.free}
        floats = work.biases()
        self.overlay = Overlay(graph, integer, work.choices)
        for op, bias in floats.items():
            self.overlay.set_bias(op, bias)
        self._followers: dict[str, list[str]] = {}
        for choice in work.choices.values():
            if choice.why.startswith(ELEMENTS):
                self._followers.setdefault(self._owner(choice), []).append(choice.site)
        self._ops = {
            name: [op for op in graph.ops if op.name in integer and self._reads(op.operands, name)] for name in self.free
        }
        self.walk = Walk(self.overlay, batches)
        self._first = np.array([self._place(name) for name in self.free], np.int64)
        self._at = self._walked = self._asked = np.zeros(len(self.free))

    def __call__(self, x: Point) -> float:
        if not self._move(x):
            return math.inf
        if self._differ(x, self._walked) < self.walk.place:
            self.walk.back()
        self.walk.to(self._differ(x, self._asked))  # the next point is likely to differ from there on as well
        self._walked = self._asked = x.copy()
        return self.measure.total(self.walk.answers())

    @property
    def kinds(self) -> list[Point]:
        """Two directions: all weights, and all activations."""
        weights = np.array([self._start[name].role == "weight" for name in self.free], np.float64)
        return [direction for direction in (weights, 1 - weights) if direction.any()]

    def plan(self, x: Point) -> Plan:
        """The plan at a point that has a loss."""
        if not self._move(x):
            raise ValueError("a weight has no safe codes at this point")
        return self.work.plan()

    def _differ(self, x: Point, y: Point) -> int:
        """The place of the first node that computes something else at y than at x."""
        places = self._first[x != y]
        return int(places.min()) if len(places) else len(self.walk.order)

    def _move(self, x: Point) -> bool:
        """Give the steps of a point to all that has or follows them; False, and nothing moves, where codes are not safe."""
        work = self.work
        before, moved, ops = dict(work.choices), dict[str, Choice](), dict[str, Any]()
        factors = dict(zip(self.free, np.exp(x).tolist(), strict=True))
        changed = [name for name, a, b in zip(self.free, x, self._at, strict=True) if a != b]
        for name in changed:
            ops |= {op.name: op for op in self._ops[name]}
            if self._start[name].role != "weight":
                choice = self._scaled(name, factors)
                assert choice is not None
                moved[name] = choice
                for follower in self._followers.get(name, ()):
                    moved[follower] = replace(work.choices[follower], qparams=choice.qparams, method=choice.method)
        work.choices |= moved
        read = {op.operands["weight"] for op in ops.values() if "weight" in op.operands}  # a bias has room by its weight's step
        for name in (name for name in self.free if name in read):
            made = self._scaled(name, factors)
            if made is None:
                work.choices.clear()
                work.choices |= before
                return False
            moved[name] = work.choices[name] = made
        for choice in moved.values():
            self.overlay.set(choice)
        for op in ops.values():
            if "weight" in op.operands:
                bias = work.bias(op)
                if isinstance(bias, Choice):
                    self.overlay.set(bias)
                elif bias is not None:
                    self.overlay.set_bias(op.name, bias)
        self._at = x.copy()
        return True

    def _scaled(self, name: str, factors: Mapping[str, float]) -> Choice | None:
        """A free choice with its step at the start times a factor, a weight with its codes."""
        start, factor = self._start[name], factors[name]
        if factor == 1 and start.role != "weight":
            return start
        qparams = QParams((start.qparams.scale * factor).clamp_min(TINY), start.qparams.zero)
        return self.work.remade(start, qparams, start.method if factor == 1 else self.method)

    def _owner(self, choice: Choice) -> str:
        while choice.why.startswith(ELEMENTS):
            choice = self.work.choices[choice.why.removeprefix(ELEMENTS)]
        return choice.site

    def _reads(self, operands: Mapping[str, str], name: str) -> bool:
        """Whether an op's input or weight has the step of a free site."""
        return any(operands.get(k) in {name, *self._followers.get(name, ())} for k in ("input", "weight"))

    def _place(self, name: str) -> int:
        """The first node that computes something else when a free step moves."""
        graph, nodes = self.work.graph, self.overlay.nodes
        found: list[Node] = [nodes[op.node] for op in self._ops[name]]
        for site in (name, *self._followers.get(name, ())):
            choice = self.work.choices[site]
            if choice.role != "weight":
                found += readers(graph, choice, self.work.allowed.integer_ops, nodes[graph.site(site).tensor])
        return min((self.walk.index[node] for node in found if node in self.walk.index), default=0)
