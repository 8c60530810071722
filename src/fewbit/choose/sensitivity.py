"""The loss for each width of a single module: the terms that an allocation adds up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.capture.structure import Module, scale_behind
from fewbit.core.device import CPU, on
from fewbit.core.graph import Graph, Op
from fewbit.core.inputs import Batch
from fewbit.core.plan import Plan
from fewbit.core.task import mean_divergence
from fewbit.execute.executor import Executor
from fewbit.execute.stream import Stream, joined_values, walked
from fewbit.task import task_of
from fewbit.workers import LOCAL, Workers, in_order


@dataclass(frozen=True)
class Sensitivity:
    """Of one module: the loss at each width, and the mean nuclear norm of its float output where that is part of it."""

    module: Module
    losses: Mapping[int, float]
    nuclear: float | None = None


class ModuleMeasure(ABC):
    """From uniform plans by width to the sensitivity of each module; `images` is how many calibration images it looks at."""

    images: int

    def __call__(
        self,
        graph: Graph,
        modules: Sequence[Module],
        plans: Mapping[int, Plan],
        batches: Sequence[Batch],
        progress: Callable[[str], None] = lambda module: None,
    ) -> list[Sensitivity]:
        results = []
        names = [self.outputs(graph, module) for module in modules]
        nodes = {node.name: node for node in graph.module.graph.nodes}
        walk = walked(graph, [(module.ops, some) for module, some in zip(modules, names, strict=True)], batches)
        for module, some, (inner, given, exact) in zip(modules, names, walk, strict=True):
            loss, nuclear = self.against(graph, module, exact)
            wanted = [nodes[name] for name in some]
            executors = {bits: Executor.of(graph, plan, module.ops) for bits, plan in plans.items()}
            losses = {bits: loss(joined_values(one, wanted, inner, given)) for bits, one in executors.items()}
            results.append(Sensitivity(module, losses, nuclear))
            progress(module.name)
        return results

    @abstractmethod
    def outputs(self, graph: Graph, module: Module) -> tuple[str, ...]:
        """The names of the nodes that are looked at."""

    @abstractmethod
    def against(
        self, graph: Graph, module: Module, exact: Sequence[Tensor]
    ) -> tuple[Callable[[Sequence[Tensor]], float], float | None]:
        """The loss of quantized values of those nodes, from their float values; the nuclear norm where that is part of it."""


@dataclass(frozen=True)
class NuclearNorm(ModuleMeasure):
    """Ω(b) = Σ_j σ_j(Y) · ||Ŷ(b) - Y||² (Liu et al. 2021, section 3.4), each module on its float inputs.

    Y is the attention map of an attention module, A = Q Kᵀ as in the paper's equation 3, scaled (`map`: or the probabilities),
    and the output of any other module. An attention map has a matrix for each head; nuclear norms and squared errors are means
    over images and heads. The nuclear norm is computed once, of the float output.
    """

    map: Literal["logits", "probabilities"] = "logits"
    images: int = 8

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "the error of each module's output, weighed by its nuclear norm"

    def outputs(self, graph: Graph, module: Module) -> tuple[str, ...]:
        scores = self._scores(graph, module)
        if module.map is None or (self.map == "logits" and scores is None):
            return (module.output,)
        return (module.map if self.map == "probabilities" or scores is None else scores.node,)

    def against(
        self, graph: Graph, module: Module, exact: Sequence[Tensor]
    ) -> tuple[Callable[[Sequence[Tensor]], float], float | None]:
        scores, scale = self._scores(graph, module), 1.0
        if self.map == "logits" and module.map is not None and scores is not None:
            scale = scale_behind(next(node for node in graph.module.graph.nodes if node.name == scores.node))
        y = matrices(exact[0] * scale, module, graph)
        nuclear = nuclear_norms(y).mean().item()

        def omega(quantized: Sequence[Tensor]) -> float:
            return nuclear * (matrices(quantized[0] * scale, module, graph) - y).square().sum((1, 2)).mean().item()

        return omega, nuclear

    def _scores(self, graph: Graph, module: Module) -> Op | None:
        """The op of the attention scores."""
        return next((op for op in map(graph.op, module.ops) if "query" in op.operands), None)


@dataclass(frozen=True)
class OutputKL(ModuleMeasure):
    """How far the model's outputs are from the float model's where only one module is quantized, in the terms of its task (of a
    classifier the KL divergence of the answers), mean over images.

    A module's error is measured where it counts, at the outputs; the losses of modules are assumed to add up.
    """

    images: int = 16

    def describe(self) -> str:
        """What it does, in a phrase for people."""
        return "how far the model's outputs move where one module alone is quantized"

    def outputs(self, graph: Graph, module: Module) -> tuple[str, ...]:
        output = next(node for node in graph.module.graph.nodes if node.op == "output")
        (given,) = output.args
        return tuple(node.name for node in (given if isinstance(given, tuple | list) else (given,)))

    def against(
        self, graph: Graph, module: Module, exact: Sequence[Tensor]
    ) -> tuple[Callable[[Sequence[Tensor]], float], float | None]:
        task, exact = task_of(graph), on(tuple(exact), CPU)

        def divergence(quantized: Sequence[Tensor]) -> float:
            return mean_divergence(task, exact, on(tuple(quantized), CPU), module.name)

        return divergence, None


@dataclass(frozen=True)
class Losses:
    """The loss of outputs, as `OutputKL` has it, with some ops of a plan in integers. Calls of one object differ in no ops but
    those that are `changed`, and what is ahead of them is computed once.
    """

    graph: Graph
    plan: Plan
    batches: Sequence[Batch]

    @cached_property
    def stream(self) -> Stream:
        return Stream(Executor(self.graph), self.batches)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """The outputs of the float model."""
        return joined(Stream(Executor(self.graph), self.batches).outputs())

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __call__(self, ops: Sequence[str], changed: Sequence[str]) -> float:
        exact = self.exact
        self.stream.overlay = Executor.of(self.graph, self.plan, ops)
        outputs = joined(self.stream.outputs_from(self._first(changed)))
        what = ", ".join(ops[:2]) + (f" and {len(ops) - 2} other ops" if len(ops) > 2 else "")
        return mean_divergence(task_of(self.graph), exact, outputs, what)

    def of_each(
        self, sets: Sequence[tuple[Sequence[str], Sequence[str]]], workers: Workers = LOCAL
    ) -> Iterator[float]:  # fmt: skip
        """The loss of each of many (ops, changed), in their order, whoever computes it."""
        return in_order(workers, self._of, sets)

    def _of(self, given: tuple[Sequence[str], Sequence[str]]) -> float:
        return self(*given)

    def _first(self, changed: Sequence[str]) -> int:
        """The place of the first node that sees whether ops are in integers: they, and who else reads what they read."""
        nodes, ops = self.stream.overlay.nodes, [self.graph.op(name) for name in changed]
        tensors = {nodes[self.graph.site(site).tensor] for op in ops for site in op.operands.values()}
        readers = {user for tensor in tensors for user in tensor.users} | {nodes[op.node] for op in ops}
        return min(self.stream.index[reader] for reader in readers if reader in self.stream.index)


def joined(outputs: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The outputs of all batches together, on the processor: a task knows no other device."""
    return tuple(on(torch.cat(column), CPU) for column in zip(*outputs, strict=True))


def matrices(y: Tensor, module: Module, graph: Graph) -> Float[Tensor, "matrices rows columns"]:
    """A module's output as matrices: of an attention map one for each image and head, of anything else one for each image, its
    places by its channels; an output without places is a row."""
    if module.map is not None:
        return y.flatten(0, -3)
    if graph.op(module.ops[-1]).kind in ("conv", "depthwise"):
        return y.flatten(2)
    return y.reshape(len(y), -1, y.shape[-1])


def nuclear_norms(y: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, "matrices"]:
    """The sum of the singular values of each matrix."""
    return cast(Tensor, torch.linalg.svdvals(y).sum(-1))
