"""One part of a graph while it is learnt: soft codes, steps and biases, and the loop that moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.choose.blocks import Part
from fewbit.choose.choose import ELEMENTS, Choosing
from fewbit.choose.distill import Straight
from fewbit.choose.soft_codes import Reconstruct, Soft, cosine, soft_fake
from fewbit.choose.weights import finite, tensor_of
from fewbit.core.grid import TINY, values
from fewbit.core.values import Choice, Graph
from fewbit.execute.overlay import Env, Overlay

SCORED = 16  # images whose outputs are compared at a time


@dataclass(frozen=True)
class Lesson:
    """What a part reads of all images, in the quantized model (`read`) and in float (`exact`), and its float output.

    `counts` are its sizes for one image; `weight` says how much each element of the output matters (None: all alike).
    """

    part: Part
    read: Mapping[Node, Tensor]
    exact: Mapping[Node, Tensor]
    output: Tensor
    counts: Mapping[Node, int]
    weight: Tensor | None = None

    def given(self, images: Tensor, mixed: Callable[[Tensor, Tensor], Tensor] | None = None) -> Env:
        """What the part reads of some of the images, mixed with what it reads in float."""
        env: Env = {node: count * len(images) for node, count in self.counts.items()}
        for node, x in self.read.items():
            env[node] = x[images] if mixed is None else mixed(x[images], self.exact[node][images])
        return env

    def error(self, overlay: Overlay, images: Tensor) -> float:
        """The squared error of a part's output for some of the images, over the variance of the float output."""
        lost, seen = 0.0, self.output[images]
        for some in images.split(SCORED):
            y = overlay.value(self.part.nodes, self.given(some))
            lost += float(self.loss(y, some).double()) * len(some)
        return lost / len(images) / float(seen.double().var(unbiased=False).clamp_min(TINY))

    def loss(self, y: Tensor, images: Tensor) -> Tensor:
        """The mean squared error of an output for some of the images."""
        square = (y - self.output[images]).square()
        return (square if self.weight is None else square * self.weight[images]).mean()


class SoftOverlay(Overlay):
    """An overlay that passes gradients through rounding and, with a probability, leaves elements of activations as they are."""

    drop: float = 0.0
    generator: torch.Generator | None = None
    steps: Mapping[str, Tensor]
    _seen: dict[tuple[str, int], tuple[Tensor, Tensor]]

    def __init__(self, graph: Graph, ops: tuple[str, ...]) -> None:
        super().__init__(graph, ops)
        self.steps, self._seen = {}, {}

    def read(self, x: Tensor, choice: Choice) -> Tensor:
        key = (choice.site, id(x))
        if key not in self._seen:  # all readers of a tensor get the same
            self._seen[key] = (x, self._dropped(x, choice))
        return self._seen[key][1]

    def forget(self) -> None:
        self._seen.clear()

    def mixed(self, x: Tensor, other: Tensor) -> Tensor:
        """x, with each element that of the other with probability `drop`."""
        if self.drop <= 0:
            return x
        if self.drop >= 1:
            return other
        return torch.where(torch.rand(x.shape, generator=self.generator) < self.drop, other, x)

    def _dropped(self, x: Tensor, choice: Choice) -> Tensor:
        if self.drop >= 1:
            return x
        if choice.site in self.steps:
            q = soft_fake(x, self.steps[choice.site].exp(), choice.qparams.zero, choice.grid)
        else:
            q = Straight.apply(x, choice.qparams, choice.grid)  # type: ignore[no-untyped-call]
        return self.mixed(q, x)


class Learner:
    """What of a part is learnt, from what the work has of it; `overlay` runs the quantized model as it is."""

    def __init__(self, work: Choosing, settings: Reconstruct, lesson: Lesson, overlay: Overlay) -> None:
        self.work, self.settings, self.lesson = work, settings, lesson
        graph, part = work.graph, lesson.part
        inside = set(part.nodes)
        self.soft = SoftOverlay(graph, tuple(work.allowed.integer_ops))
        self.soft.drop = settings.drop
        nodes = overlay.nodes
        for choice in work.choices.values():
            if any(user in inside for user in nodes[graph.site(choice.site).tensor].users):
                self.soft.set(choice)
        self._weights: dict[str, Soft] = {}
        self._steps: dict[str, Tensor] = {}
        self._biases: dict[str, tuple[Tensor, float, Tensor]] = {}
        for name in part.ops:
            op = graph.op(name)
            site = graph.site(op.operands["weight"])
            choice = work.choices[site.name]
            shared = any(reader not in part.ops for reader, _ in site.readers)
            if settings.learn_codes and not shared and choice.codes is not None:
                self._weights[site.name] = settings.open(finite(graph, site), choice.codes, choice.qparams, choice.grid)
        if settings.learn_steps:
            followed = {c.why.removeprefix(ELEMENTS) for c in work.choices.values() if c.why.startswith(ELEMENTS)}
            for site in graph.sites:
                tensor = nodes[site.tensor]
                ours = all(user in inside for user in tensor.users) and any(reader in part.ops for reader, _ in site.readers)
                if ours and site.role != "weight" and work.is_free(site) and site.name not in followed:
                    self._steps[site.name] = work.choices[site.name].qparams.scale.log().clone().requires_grad_()
        if settings.learn_biases:
            env = lesson.given(torch.arange(len(lesson.output))[:SCORED])
            with torch.no_grad():
                overlay.run(part.nodes, env)
            for name in part.ops:
                op = graph.op(name)
                bias = self._bias(name)
                self._biases[name] = (bias, float(env[nodes[op.node]].std()), torch.zeros_like(bias).requires_grad_())
        self.soft.steps = self._steps

    def learn(self, images: Tensor, seconds: float | None, clock: Callable[[], float], generator: torch.Generator) -> int:
        """The steps that were taken: all, or as many as are done after `seconds` of the clock."""
        settings, lesson = self.settings, self.lesson
        weights = [soft.parameter for soft in self._weights.values()]
        biases = [change for _, _, change in self._biases.values()]
        groups = [
            {"params": found, "lr": rate, "full": rate, "falls": falls}
            for found, rate, falls in (
                (weights, settings.rate, settings.rounding == "straight"),
                (list(self._steps.values()), settings.step_rate, True),
                (biases, settings.bias_rate, True),
            )
            if found
        ]
        self.soft.generator = generator
        if not groups or not settings.steps:
            return 0
        optimizer = torch.optim.Adam(groups)
        parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
        count = sum(w.numel() for w in weights)
        first = self._start(images)
        done = 0
        while True:
            spent = 0.0 if seconds is None else (clock() / seconds if seconds > 0 else 1.0)
            progress = max(done / settings.steps, spent)
            if progress >= 1:
                return done
            rows = images[torch.randperm(len(images), generator=generator)[: settings.batch]]
            with torch.enable_grad():
                loss = lesson.loss(self._output(rows), rows) / first
                beta = settings.beta(progress)
                if beta is not None and settings.pull and settings.rounding == "sigmoid":
                    loss = loss + settings.pull * sum(w.pull(beta) for w in self._weights.values()) / max(count, 1)
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * (cosine(progress) if group["falls"] else 1.0)
            optimizer.step()
            done += 1

    def codes(self) -> dict[str, Tensor]:
        return {name: soft.codes() for name, soft in self._weights.items()}

    def steps(self) -> dict[str, Tensor]:
        return {name: step.detach().exp().clamp_min(TINY) for name, step in self._steps.items()}

    def biases(self) -> dict[str, Tensor]:
        return {name: (start + unit * change.detach()) for name, (start, unit, change) in self._biases.items()}

    def _bias(self, name: str) -> Tensor:
        """The float bias (c_out,) of an op as the work has it."""
        op = self.work.graph.op(name)
        found = self.work.bias(op)
        if isinstance(found, Tensor):
            return found
        if isinstance(found, Choice):
            assert found.codes is not None
            return values(found.codes, found.qparams, found.grid)
        if "bias" in op.operands:
            return tensor_of(self.work.graph, self.work.graph.site(op.operands["bias"]))
        return torch.zeros(self.work.graph.site(op.operands["weight"]).shape[0])

    def _output(self, rows: Tensor) -> Tensor:
        """The part's output for some images, with soft codes."""
        soft, lesson = self.soft, self.lesson
        soft.forget()
        for name, weight in self._weights.items():
            soft.give(name, weight.real())
        for name, (start, unit, change) in self._biases.items():
            soft.set_bias(name, start + unit * change)
        env = lesson.given(rows, soft.mixed)
        soft.run(lesson.part.nodes, env)
        found: Tensor = env[lesson.part.output]
        return found

    def _start(self, images: Tensor) -> float:
        """The error before anything has moved, on some of the images, > 0."""
        some = images[: 2 * SCORED]
        with torch.no_grad():
            y = torch.cat([self._hard(rows) for rows in some.split(SCORED)])
            return max(float(self.lesson.loss(y, some)), TINY)

    def _hard(self, rows: Tensor) -> Tensor:
        env = self.lesson.given(rows)
        self.soft.drop, kept = 0.0, self.soft.drop
        self.soft.forget()
        self.soft.run(self.lesson.part.nodes, env)
        self.soft.drop = kept
        found: Tensor = env[self.lesson.part.output]
        return found
