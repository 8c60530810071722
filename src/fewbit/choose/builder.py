"""A plan while one pass changes it: choices and biases go in, everything that depends on them is updated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.capture.sites import tensor_of
from fewbit.choose.context import Context
from fewbit.choose.headroom import coded, codes_are_safe, headroom, weight_of
from fewbit.core.device import on
from fewbit.core.graph import Op, Site
from fewbit.core.grid import Grid, QParams, codes, of_bias
from fewbit.core.plan import Bias, Choice, Fallback, PassLog, Plan, SameAs
from fewbit.execute.executor import Executor


class PlanBuilder:
    """The choices and biases of a plan, open for one pass. With an `overlay`, each change is visible in it at once.

    The codes of a site that holds another's codes follow that site; integer biases follow the scales of input and weight.
    """

    def __init__(self, plan: Plan, context: Context, overlay: Executor | None = None) -> None:
        self.context, self.graph, self.allowed = context, context.graph, context.allowed
        self._plan, self.overlay = plan, overlay
        self.choices, self.biases = dict(plan.choices), dict(plan.biases)
        self.fallbacks = list(plan.fallbacks)

    def plan(self, *logs: PassLog) -> Plan:
        """The plan as it is now, with the biases that follow from the scales, and the logs of the pass."""
        for op in self.weighted_ops():
            self.decide_bias(op)
        order = {op.name: i for i, op in enumerate(self.graph.ops)}
        return replace(
            self._plan,
            choices={s.name: self.choices[s.name] for s in self.graph.sites if s.name in self.choices},
            biases={name: self.biases[name] for name in sorted(self.biases, key=order.__getitem__)},
            fallbacks=tuple(dict.fromkeys(self.fallbacks)),
            log=(*self._plan.log, *logs),
        )

    def set(self, choice: Choice) -> None:
        """Take a choice; the sites that hold its codes elsewhere follow."""
        choice = on(choice, self.graph.device)
        self.choices[choice.site] = choice
        if self.overlay is not None:
            self.overlay.set(choice)
        for other in [c for c in self.choices.values() if c.source == SameAs(choice.site)]:
            self.set(replace(other, qparams=choice.qparams, method=choice.method))

    def set_weight(self, choice: Choice, first: Grid, why: str) -> None:
        """Take the choice of a weight whose first grid was not safe, or was: the fallback says which."""
        self.fallbacks = [f for f in self.fallbacks if not (f.site == choice.site and f.kind == "accumulator")]
        if why:
            op = self.graph.op(self.graph.site(choice.site).readers[0][0])
            share = self.graph.share(op.macs)
            actual = f"{choice.grid.bits} bits"
            self.fallbacks.append(Fallback(choice.site, f"{first.bits} bits", actual, why, share, "accumulator"))
        self.set(choice if choice.why == why else replace(choice, why=why))

    def correct(self, op: str, bias: Tensor) -> None:
        """Take a float bias (c_out,) from a method for an op."""
        self.biases[op] = Bias(on(bias, self.graph.device))
        self.decide_bias(self.graph.op(op))

    def decide_bias(self, op: Op) -> Bias | None:
        """The bias of an op as its file will hold it, decided here alone; None where the graph's own float bias stays.

        It is an integer where the target stores it so, or, once a method has changed it, where the kernel adds in integers.
        """
        current, site = self.biases.get(op.name), op.operands.get("bias", "")
        real = None if current is None else current.real
        integer = self._integer_bias(op, site, real)
        if integer is not None:
            self.biases[op.name] = Bias(tensor_of(self.graph, self.graph.site(site)) if real is None else real, integer)
        elif real is not None:
            self.biases[op.name] = Bias(real)
        bias = self.biases.get(op.name)
        if self.overlay is not None:
            self.overlay.set_bias(op.name, None if bias is None else bias.values)
        return bias

    def _integer_bias(self, op: Op, site: str, real: Tensor | None) -> Choice | None:
        if op.operands["input"] not in self.choices or op.operands["weight"] not in self.choices:
            return None
        activation, weight = (self.choices[op.operands[operand]].qparams for operand in ("input", "weight"))
        if activation.scale.ndim or weight.scale.ndim > 1:  # many scales for one sum: no scale of a bias is theirs
            return None
        qparams = of_bias(activation, weight, self.graph.site(op.operands["weight"]).shape[0])
        if site in self.allowed.sites:
            grid = self.allowed.sites[site].grids[0]
            real_bias = tensor_of(self.graph, self.graph.site(site)) if real is None else real
            return Choice(f"{op.name}:bias", "bias", grid, qparams, "derived", codes=codes(real_bias, qparams, grid))
        if real is not None and op.name in self.allowed.integer_results:  # this kernel adds in int32
            grid = Grid(32, axis=0)
            return Choice(f"{op.name}:bias", "bias", grid, qparams, "derived", codes=codes(real, qparams, grid))
        return None

    def weighted_ops(self) -> Iterable[Op]:
        """The integer ops with a weight, in graph order."""
        integer = set(self.allowed.integer_ops)
        return [op for op in self.graph.ops if op.name in integer and "weight" in op.operands]

    def readers(self, site: Site) -> list[Op]:
        """The integer ops that read an activation site."""
        names = [name for name, operand in site.readers if operand != "output" and name in self.allowed.integer_ops]
        return [self.graph.op(name) for name in dict.fromkeys(names)]

    def rescaled(self, choice: Choice, qparams: QParams, method: str) -> Choice | None:
        """A choice with another scale; None where the codes of a weight would not be safe."""
        candidate = replace(choice, qparams=qparams, method=method)
        if choice.role != "weight":
            return candidate
        recoded = self.recoded(candidate)
        return recoded if codes_are_safe(self.graph, recoded, self.choices, self.allowed.sites[choice.site]) else None

    def recoded(self, choice: Choice, w: Tensor | None = None, bias: Tensor | None = None) -> Choice:
        """The choice of a weight with the nearest codes of `w` and room for `bias`; None: the graph's own."""
        site = self.graph.site(choice.site)
        room = headroom(self.graph, site, self.choices, self.allowed.sites[choice.site], bias)
        return coded(choice, weight_of(self.graph, site) if w is None else w, room)

    def real_bias(self, op: Op) -> Tensor:
        """The float numbers (c_out,) that an op adds now; zeros where it adds none."""
        if op.name in self.biases:
            return self.biases[op.name].values
        if "bias" in op.operands:
            return tensor_of(self.graph, self.graph.site(op.operands["bias"]))
        return torch.zeros(self.graph.site(op.operands["weight"]).shape[0], device=self.graph.device)

    def restore(self, choices: Mapping[str, Choice], biases: Mapping[str, Bias | None]) -> None:
        """Take back choices and biases as they were; a bias of None is none of a method's."""
        for choice in choices.values():
            self.choices[choice.site] = choice
            if self.overlay is not None:
                self.overlay.set(choice)
        for name, bias in biases.items():
            self.biases.pop(name, None)
            if bias is not None:
                self.biases[name] = bias
            self.decide_bias(self.graph.op(name))
