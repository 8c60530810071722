"""One block of a graph while it is learned: soft codes, scales and biases, and the loop that moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.residual import Block
from fewbit.choose.builder import PlanBuilder
from fewbit.choose.headroom import weight_of
from fewbit.choose.soft_codes import Soft, cosine, open_codes, soft_fake, straight
from fewbit.core.device import wide
from fewbit.core.grid import TINY
from fewbit.core.plan import Choice, SameAs
from fewbit.core.shelf import Shelf
from fewbit.execute.executor import Env, Executor

if TYPE_CHECKING:
    from fewbit.choose.reconstruct import Reconstruct

SCORED = 16  # images whose outputs are compared at a time


@dataclass(frozen=True)
class Lesson:
    """A block's inputs for all images, in the quantized model (`read`) and in float (`exact`), and its float output.

    `counts` are its sizes for one image; `weight` says how much each element of the output matters, as a factor for each row
    of all images and one for each channel (None: all alike).
    """

    block: Block
    read: Mapping[Node, Shelf]
    exact: Mapping[Node, Shelf]
    output: Shelf
    counts: Mapping[Node, int]
    weight: tuple[Tensor, Tensor] | None = None

    def given(self, images: Tensor, mixed: Callable[[Tensor, Tensor], Tensor] | None = None) -> Env:
        """The block's inputs for some of the images, mixed with its float inputs."""
        env: Env = {node: count * len(images) for node, count in self.counts.items()}
        for node, x in self.read.items():
            env[node] = x.rows(images) if mixed is None else mixed(x.rows(images), self.exact[node].rows(images))
        return env

    def error(self, executor: Executor, images: Tensor) -> float:
        """The squared error of a block's output for some of the images, over the variance of the float output."""
        total, mean = 0.0, self._mean(images, lambda y: y)
        for part in images.split(SCORED):
            y = executor.value(self.block.nodes, self.given(part))
            total += float(wide(self.loss(y, part))) * len(part)
        return total / len(images) / max(self._mean(images, lambda y: (y - mean).square()), TINY)

    def _mean(self, images: Tensor, function: Callable[[Tensor], Tensor]) -> float:
        """The mean of a function of the float output's elements over some of the images."""
        parts = images.split(SCORED)
        return sum(float(function(wide(self.output.rows(part))).mean()) * len(part) for part in parts) / len(images)

    def loss(self, y: Tensor, images: Tensor) -> Tensor:
        """The mean squared error of an output for some of the images."""
        square = (y - self.output.rows(images)).square()
        return (square if self.weight is None else square * (self.weight[0][images] * self.weight[1])).mean()


@dataclass
class SoftRead:
    """What readers of activations get: codes with a gradient, and with probability `drop` the float value (QDrop).

    `scales` are the logarithms of scales that are learned, by site.
    """

    drop: float
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:
        if self.drop >= 1:
            return x
        if choice.site in self.scales:
            return self.mixed(soft_fake(x, self.scales[choice.site].exp(), choice.qparams.zero, choice.grid), x)
        return self.mixed(straight(x, choice), x)

    def mixed(self, x: Tensor, other: Tensor) -> Tensor:
        """x, with each element that of the other with probability `drop`."""
        if self.drop <= 0:
            return x
        if self.drop >= 1:
            return other
        return torch.where((torch.rand(x.shape, generator=self.generator) < self.drop).to(x.device), other, x)


class Learner:
    """The learned values of a block, which begin at those of the plan; `executor` runs the current quantized model."""

    def __init__(self, builder: PlanBuilder, settings: Reconstruct, lesson: Lesson, executor: Executor) -> None:
        self.builder, self.settings, self.lesson = builder, settings, lesson
        graph, block = builder.graph, lesson.block
        inside = set(block.nodes)
        self.reading = SoftRead(settings.drop)
        self.soft = Executor(graph, builder.allowed.integer_ops, read=self.reading)
        nodes = executor.nodes
        for choice in builder.choices.values():
            if any(user in inside for user in nodes[graph.site(choice.site).tensor].users):
                self.soft.set(choice)
        for name, bias in builder.biases.items():
            if graph.op(name).operands.get("bias", "") in builder.allowed.sites:
                self.soft.set_bias(name, bias.values)
        self._weights: dict[str, Soft] = {}
        self._scales: dict[str, Tensor] = {}
        self._biases: dict[str, tuple[Tensor, float, Tensor]] = {}
        for name in block.ops:
            op = graph.op(name)
            site = graph.site(op.operands["weight"])
            choice = builder.choices[site.name]
            shared = any(reader not in block.ops for reader, _ in site.readers)
            if settings.learn_codes and not shared and choice.codes is not None:
                self._weights[site.name] = open_codes(
                    settings.rounding, weight_of(graph, site), choice.codes, choice.qparams, choice.grid
                )
        if settings.learn_scales:
            followed = {c.source.site for c in builder.choices.values() if isinstance(c.source, SameAs)}
            for site in graph.sites:
                tensor = nodes[site.tensor]
                ours = all(user in inside for user in tensor.users) and any(reader in block.ops for reader, _ in site.readers)
                own = builder.choices.get(site.name)
                if ours and site.role != "weight" and own is not None and own.is_free and site.name not in followed:
                    self._scales[site.name] = own.qparams.scale.log().clone().requires_grad_()
        if settings.learn_biases:
            env = lesson.given(torch.arange(lesson.output.firsts[-1])[:SCORED])
            with torch.no_grad():
                executor.run(block.nodes, env)
            for name in block.ops:
                op = graph.op(name)
                start = builder.real_bias(op)
                self._biases[name] = (start, float(env[nodes[op.node]].std()), torch.zeros_like(start).requires_grad_())
        self.reading.scales = self._scales

    def learn(self, images: Tensor, seconds: float | None, clock: Callable[[], float], generator: torch.Generator) -> int:
        """Learn, and return the number of iterations: all, or as many as fit into `seconds` of the clock."""
        settings, lesson = self.settings, self.lesson
        weights = [soft.parameter for soft in self._weights.values()]
        biases = [change for _, _, change in self._biases.values()]
        groups = [
            {"params": tensors, "lr": rate, "full": rate, "falls": falls}
            for tensors, rate, falls in (
                (weights, settings.lr, settings.rounding == "straight"),
                (list(self._scales.values()), settings.scale_lr, True),
                (biases, settings.bias_lr, True),
            )
            if tensors
        ]
        self.reading.generator = generator
        if not groups or not settings.iterations:
            return 0
        optimizer = torch.optim.Adam(groups)
        parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
        count = sum(w.numel() for w in weights)
        first = self._start(images)
        done = 0
        while True:
            time_share = 0.0 if seconds is None else (clock() / seconds if seconds > 0 else 1.0)
            progress = max(done / settings.iterations, time_share)
            if progress >= 1:
                return done
            rows = images[torch.randperm(len(images), generator=generator)[: settings.batch]]
            with torch.enable_grad():
                loss = lesson.loss(self._output(rows), rows) / first
                beta = settings.beta(progress)
                if beta is not None and settings.rounding_weight and settings.rounding == "sigmoid":
                    loss = loss + settings.rounding_weight * sum(w.rounding_loss(beta) for w in self._weights.values()) / max(
                        count, 1
                    )
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * (cosine(progress) if group["falls"] else 1.0)
            optimizer.step()
            done += 1

    def codes(self) -> dict[str, Tensor]:
        return {name: soft.codes() for name, soft in self._weights.items()}

    def scales(self) -> dict[str, Tensor]:
        return {name: scale.detach().exp().clamp_min(TINY) for name, scale in self._scales.items()}

    def biases(self) -> dict[str, Tensor]:
        return {name: (start + unit * change.detach()) for name, (start, unit, change) in self._biases.items()}

    def _output(self, rows: Tensor) -> Tensor:
        """The block's output for some images, with soft codes."""
        soft, lesson = self.soft, self.lesson
        for name, weight in self._weights.items():
            soft.give(name, weight.real())
        for name, (start, unit, change) in self._biases.items():
            soft.set_bias(name, start + unit * change)
        env = lesson.given(rows, self.reading.mixed)
        soft.run(lesson.block.nodes, env)
        output: Tensor = env[lesson.block.output]
        return output

    def _start(self, images: Tensor) -> float:
        """The error before anything has moved, on some of the images, > 0."""
        sample = images[: 2 * SCORED]
        with torch.no_grad():
            y = torch.cat([self._hard(rows) for rows in sample.split(SCORED)])
            return max(float(self.lesson.loss(y, sample)), TINY)

    def _hard(self, rows: Tensor) -> Tensor:
        env = self.lesson.given(rows)
        self.reading.drop, drop = 0.0, self.reading.drop
        self.soft.run(self.lesson.block.nodes, env)
        self.reading.drop = drop
        output: Tensor = env[self.lesson.block.output]
        return output
