"""Module scope: the steps of a whole attention module or MLP, searched on what the module gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.structure import modules
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import Context
from fewbit.choose.objectives import Pearson, Similarity
from fewbit.choose.output_scores import Range
from fewbit.choose.output_search import GAIN, observed_range, refuse_channel_widths
from fewbit.core.grid import QParams
from fewbit.core.plan import Choice, PassLog, Plan
from fewbit.core.shelf import Rebatched
from fewbit.execute.executor import Env, Executor
from fewbit.execute.stream import walked


@dataclass(frozen=True)
class ModuleSearch:
    """The objective of OutputSearch on the output of an attention module or MLP instead of each op's.

        maximise   (1/N) Σ_i Γ(Y_i, Ŷ_i)      Y the module's float output, Ŷ that of the module with all of its sites quantized

    One step at a time, in graph order: `candidates` on [low, high] times the whole range, all other steps as they are, for at
    most `rounds` rounds or until none moves. A step moves only where the objective gains. The module reads its float input,
    of `images` images.
    """

    objective: Similarity = Pearson()
    low: float = 0.5
    high: float = 1.2
    candidates: int = 20
    rounds: int = 2
    images: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high or min(self.candidates, self.rounds, self.images) < 1:
            raise ValueError(f"0 < low < high, and candidates, rounds and images >= 1 are allowed, not {self}")

    def check(self, context: Context) -> None:
        """Raises FewbitError where an activation or a row of weights has many scales, BadImages without images."""
        context.refuse_channel_scales(self)
        context.refuse_groups(self)
        context.need_images()

    def __call__(self, plan: Plan, context: Context) -> Plan:
        """The plan with the free scales of each attention module and MLP searched on the module's output."""
        refuse_channel_widths(plan)
        graph, builder = context.graph, PlanBuilder(plan, context)
        images = Rebatched(context.batches, self.images)[0]
        whole = [m for m in modules(graph) if all(op in plan.integer_ops for op in m.ops)]
        walk = walked(graph, [(module.ops, (module.output,)) for module in whole], [images])

        def rescaled(choice: Choice, qparams: QParams) -> Choice | None:
            return builder.rescaled(choice, qparams, repr(self))

        for module, (inner, (given,), (exact,)) in zip(whole, walk, strict=True):
            read = {site for op in module.ops for site in graph.op(op).operands.values()}
            free = [s.name for s in graph.sites if s.name in read and s.name in plan.choices and plan.choices[s.name].is_free]
            ranges = {name: observed_range(context, name, builder.choices[name].grid) for name in free}
            overlay = Executor(graph, module.ops, builder.choices)
            for choice in self.search(overlay, inner, given, exact, builder.choices, ranges, rescaled).values():
                builder.set(choice)
            context.progress(module.name)
        return builder.plan(PassLog("module search", repr(self)))

    def search(
        self,
        overlay: Executor,
        nodes: Sequence[Node],
        given: Env,
        exact: Tensor,
        start: Mapping[str, Choice],
        ranges: Mapping[str, Range],
        rescaled: Callable[[Choice, QParams], Choice | None],
    ) -> dict[str, Choice]:
        """The choices of the sites that have a range, by name, each from `rescaled` (None: not allowed) with its new scale.

        `overlay` holds `start`; `nodes` compute the module from `given`, the last of them its output.
        """

        def score() -> float:
            return float(self.objective(exact.flatten(1), overlay.value(nodes, given).flatten(1)[None]))

        choices, best = {name: start[name] for name in ranges}, score()
        for _ in range(self.rounds):
            moved = False
            for name, seen in ranges.items():
                for choice in self._tried(choices[name], seen, rescaled):
                    overlay.set(choice)
                    found = score()
                    if found > best + GAIN:
                        choices[name], best, moved = choice, found, True
                overlay.set(choices[name])
            if not moved or math.isclose(best, 1.0):
                break
        return choices

    def _tried(self, choice: Choice, seen: Range, rescaled: Callable[[Choice, QParams], Choice | None]) -> Iterable[Choice]:
        for factor in torch.linspace(self.low, self.high, self.candidates):
            found = rescaled(choice, seen.qparams(factor.expand(seen.low.shape)))
            if found is not None:
                yield found
