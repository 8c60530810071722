"""LAPQ: a plan for each norm p, the best of them, then one factor for each of its scales, all together.

The loss is that of the whole quantized model. A line search moves one scale, or a few; what comes before the first op that
reads it is computed once, see `Model`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.fx import Node

from fewbit.capture.sites import readers
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import Context
from fewbit.choose.loss import BATCH, ModelLoss
from fewbit.choose.powell import Parabola, Point, Powell, parabola
from fewbit.choose.range_method import RangeMethod
from fewbit.choose.ranges import MseRange, Ranges
from fewbit.core.grid import TINY, QParams
from fewbit.core.plan import Choice, PassLog, Plan, SameAs, described
from fewbit.core.shelf import count_of
from fewbit.errors import BadImages, BadValues
from fewbit.execute.executor import Executor
from fewbit.execute.stream import Stream

LOSSES = ("kl", "labels")


class OutOfBudgetError(Exception):
    """The budget of the search is spent."""


@dataclass(frozen=True)
class JointSearch:
    """All scales of a model together, against the model's own loss (LAPQ, Nahshan et al. 2021).

    A start by layer-wise Lp norms, then Powell's method on the loss of the whole quantized model.

        p* = argmin of a parabola through (p, L(a(p)))     a(p): every range with the smallest mean |x - fake(x)|^p
        minimise   L(a(p*) · e^u)                          u: one number for each free scale, all together

    L is the KL divergence of the model's answers from the float model's (`kl`) or their cross-entropy with labels (`labels`),
    mean over at most `images` calibration images. p takes `points` values on [low, high]; with 0 the ranges of `start` are
    used unchanged. Factors e^u stay in [smallest, largest]. A line search starts with `step` and ends at `tolerance`,
    both of u. `sweeps` are outer iterations; `coordinate` leaves out the extrapolation behind each and moves one scale at a
    time only.
    The search ends after `seconds` (None: never), or after `evaluations` of its loss, which do not depend on the machine; the
    plan is the best point that was evaluated.
    """

    start: Ranges = Ranges(MseRange(), MseRange())
    low: float = 2.0
    high: float = 4.0
    points: int = 10
    method: Literal["powell", "coordinate"] = "powell"
    sweeps: int = 1
    loss: Literal["kl", "labels"] = "kl"
    images: int = 512
    smallest: float = 0.25
    largest: float = 4.0
    step: float = 0.1
    tolerance: float = 0.01
    seconds: float | None = 300.0
    evaluations: int | None = None

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "all scales together, for the loss of the whole model"

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high or min(self.points, self.sweeps) < 0 or self.images < 1:
            raise ValueError(f"0 < low <= high, points and sweeps >= 0 and images >= 1 are allowed, not {self}")
        if not 0 < self.smallest < 1 < self.largest or not 0 < self.tolerance <= self.step:
            raise ValueError(f"0 < smallest < 1 < largest and 0 < tolerance <= step are allowed, not {self}")
        if self.seconds is not None and self.seconds < 0:
            raise ValueError(f"seconds >= 0 or None is allowed, not {self.seconds}")
        if self.evaluations is not None and self.evaluations < 1:
            raise ValueError(f"evaluations >= 1 or None is allowed, not {self.evaluations}")

    @property
    def norms(self) -> list[float]:
        """The values of p, both ends first and then always in the widest gap, so that the first few span the range."""
        remaining = [float(p) for p in np.linspace(self.low, self.high, self.points)]
        order = [remaining.pop(0)] if remaining else []
        while remaining:
            order.append(remaining.pop(int(np.argmax([min(abs(p - q) for q in order) for p in remaining]))))
        return order

    def check(self, context: Context) -> None:
        """Raises BadImages where the loss needs labels and there are none, FewbitError where the target has groups."""
        context.refuse_groups(self)
        context.need_images()
        if self.loss == "labels" and context.labels is None:
            raise BadImages("--loss labels needs calibration images with labels; give those, or leave it at --loss kl.")

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan at the best point evaluated. The context's journal has the losses that a killed run has computed."""
        batches = context.batched(BATCH, self.images)
        measure = ModelLoss.of(context.graph, batches, context.labels if self.loss == "labels" else None)
        start = _start(self, plan, context, measure, batches)
        model = Model(start.plan, context, measure, batches, described(self))
        losses: list[float] = []
        best, over = np.zeros(len(model.free)), False

        def late() -> bool:
            journal = context.journal
            return self.seconds is not None and not journal.replaying and journal.seconds >= self.seconds

        def loss(x: Point) -> float:
            nonlocal best
            if losses and (late() or len(losses) == self.evaluations):
                raise OutOfBudgetError
            value = context.journal.value(hashlib.sha256(x.tobytes()).hexdigest()[:16], lambda: model(x))
            if value < min(losses, default=math.inf):
                best = x.copy()
            losses.append(value)
            context.progress(f"{min(losses):.4g} after {len(losses)}")
            return value

        try:
            self.powell(loss, len(model.free), model.kinds)
        except OutOfBudgetError:
            over = late()
        if not math.isfinite(min(losses)):
            raise BadValues(
                f"the loss of the whole model ({measure.what}) is not a finite number for any of {len(losses)} plans, so "
                "none can be chosen by it. Look at the model's outputs, or take --recipe fast."
            )
        images = count_of(batches)
        return model.plan(best, self._log(start, losses, images, len(model.free), measure.what, out_of_time=over))

    @property
    def powell(self) -> Powell:
        """The search for ln(factor) of each scale."""
        low, high = math.log(self.smallest), math.log(self.largest)
        return Powell(low, high, self.step, self.tolerance, self.sweeps, self.method)

    def ranges(self, p: float | None) -> Ranges:
        """The start with another p in those of its range methods that have one."""

        def normed(method: RangeMethod) -> RangeMethod:
            return replace(method, p=p) if p is not None and isinstance(method, MseRange) else method

        return replace(self.start, activations=normed(self.start.activations), weights=normed(self.start.weights))

    def _log(self, start: Start, losses: Sequence[float], images: int, sites: int, what: str, *, out_of_time: bool) -> PassLog:
        rows = tuple({"evaluation": i, "loss": _json(v), "best": _json(b)} for i, v, b in thinned(losses))
        summary = {
            "loss": what,
            "images": images,
            "sites": sites,
            "norms": [{"p": p, "loss": _json(v)} for p, v in sorted(start.losses.items())],
            "parabola": None if start.fit is None else asdict(start.fit),
            "p": start.p,
            "start": _json(losses[0]),
            "best": _json(min(losses)),
            "evaluations": len(losses),
            "seconds": self.seconds,
            "out_of_time": out_of_time,
        }
        return PassLog.of("joint search", self, rows, summary)


def _json(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


@dataclass(frozen=True)
class Start:
    """What the search starts from: a plan at p (None: the ranges as they are), and the losses that decided for it."""

    plan: Plan
    p: float | None
    losses: Mapping[float, float]
    fit: Parabola | None


def _start(search: JointSearch, plan: Plan, context: Context, measure: ModelLoss, batches: Sequence[Tensor]) -> Start:
    """The p with the smallest loss, of all `norms` and the vertex of the parabola through their losses.

    After half of the time no further value is evaluated; the first always is.
    """
    losses: dict[float, float] = {}
    best: tuple[float, Plan] | None = None
    journal = context.journal

    def attempt(p: float) -> None:
        nonlocal best
        context.progress(f"p = {p:.3g}")
        plans: list[Plan] = []

        def compute() -> float:
            plans.append(search.ranges(p)(plan, context))
            return measure(Executor.of(context.graph, plans[0]), batches)

        losses[p] = journal.value(f"p = {p!r}", compute)
        if plans and losses[p] == min(losses.values()):
            best = p, plans[0]

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
        return Start(search.ranges(None)(plan, context), None, {}, None)
    p = min(losses, key=losses.__getitem__)
    return Start(best[1] if best is not None and best[0] == p else search.ranges(p)(plan, context), p, losses, fit)


class Model:
    """The loss of the quantized model as a function of ln(factor) of each free scale (n,), and its plan.

    All channels of a weight share one factor; its codes are computed again, and biases follow. Where two points in a row
    differ only from some op on, the model is computed from there on.
    """

    def __init__(self, plan: Plan, context: Context, measure: ModelLoss, batches: Sequence[Tensor], method: str) -> None:
        self.measure, self.method, graph = measure, method, context.graph
        self.overlay = Executor.of(graph, plan)
        self.builder = PlanBuilder(plan, context, self.overlay)
        self.free = [s.name for s in graph.sites if s.name in plan.choices and plan.choices[s.name].is_free]
        self._start = {name: plan.choices[name] for name in self.free}
        followers = {name: self._followers(name) for name in self.free}
        integer = [op for op in graph.ops if op.name in plan.integer_ops]
        self._ops = {
            name: [op for op in integer if any(op.operands.get(k) in {name, *followers[name]} for k in ("input", "weight"))]
            for name in self.free
        }
        self.walk = Stream(self.overlay, batches, folder=context.folder)
        self._first = np.array([self._place(name, followers[name]) for name in self.free], np.int64)
        self._at = self._last = np.zeros(len(self.free))

    def __call__(self, x: Point) -> float:
        if not self._move(x):
            return math.inf
        outputs = self.walk.outputs_from(self._differ(x, self._last))
        self._last = x.copy()
        return self.measure.total(outputs)

    @property
    def kinds(self) -> list[Point]:
        """Two directions: all weights, and all activations."""
        weights = np.array([self._start[name].role == "weight" for name in self.free], np.float64)
        return [direction for direction in (weights, 1 - weights) if direction.any()]

    def plan(self, x: Point, *logs: PassLog) -> Plan:
        """The plan at a point that has a loss."""
        if not self._move(x):
            raise ValueError("a weight has no safe codes at this point")
        return self.builder.plan(*logs)

    def _differ(self, x: Point, y: Point) -> int:
        """The place of the first node that computes something else at y than at x."""
        places = self._first[x != y]
        return int(places.min()) if len(places) else len(self.walk.order)

    def _move(self, x: Point) -> bool:
        """Give the scales of a point to all that has or follows them; False, and nothing moves, where codes are not safe."""
        builder, before = self.builder, dict(self.builder.choices)
        builder.overlay, ops = None, dict[str, Any]()  # nothing is shown before all of it is safe
        factors = dict(zip(self.free, np.exp(x).tolist(), strict=True))
        changed = [name for name, a, b in zip(self.free, x, self._at, strict=True) if a != b]
        for name in changed:
            ops |= {op.name: op for op in self._ops[name]}
            if self._start[name].role != "weight":
                choice = self._scaled_choice(name, factors)
                assert choice is not None
                builder.set(choice)
        weight_sites = {op.operands["weight"] for op in ops.values() if "weight" in op.operands}  # biases need room in them
        for name in (name for name in self.free if name in weight_sites):
            weight_choice = self._scaled_choice(name, factors)
            if weight_choice is None:
                builder.choices, builder.overlay = before, self.overlay
                return False
            builder.set(weight_choice)
        builder.overlay = self.overlay
        for name, choice in builder.choices.items():
            if choice is not before[name]:
                self.overlay.set(choice)
        for op in ops.values():
            if "weight" in op.operands:
                builder.decide_bias(op)
        self._at = x.copy()
        return True

    def _scaled_choice(self, name: str, factors: Mapping[str, float]) -> Choice | None:
        """A free choice with its scale at the start times a factor, a weight with its codes."""
        start, factor = self._start[name], factors[name]
        if factor == 1 and start.role != "weight":
            return start
        qparams = QParams((start.qparams.scale * factor).clamp_min(TINY), start.qparams.zero)
        return self.builder.rescaled(start, qparams, start.method if factor == 1 else self.method)

    def _followers(self, name: str) -> list[str]:
        """The sites that hold codes of a site in other places."""
        direct = [c.site for c in self.builder.choices.values() if c.source == SameAs(name)]
        return [site for follower in direct for site in (follower, *self._followers(follower))]

    def _place(self, name: str, followers: Sequence[str]) -> int:
        """The first node that computes something else when a free scale moves."""
        graph, nodes = self.builder.graph, self.overlay.nodes
        affected: list[Node] = [nodes[op.node] for op in self._ops[name]]
        for site in (name, *followers):
            choice = self.builder.choices[site]
            if choice.role != "weight":
                affected += readers(graph, choice, self.builder.allowed.integer_ops, nodes[graph.site(site).tensor])
        return min((self.walk.index[node] for node in affected if node in self.walk.index), default=0)


def thinned(losses: Sequence[float], most: int = 500) -> Iterator[tuple[int, float, float]]:
    """(evaluation, loss, the best so far) of every few evaluations, at most `most` or one more, the last one among them."""
    every, best = -(-len(losses) // most) or 1, math.inf
    for i, loss in enumerate(losses):
        best = min(best, loss)
        if i % every == 0 or i == len(losses) - 1:
            yield i, loss, best
