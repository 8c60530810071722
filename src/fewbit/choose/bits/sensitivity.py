"""How much the model suffers where one module has a width: the losses that an allocation adds up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from fewbit.capture.units import Unit
from fewbit.overlay import Env, Overlay, Stream, between
from fewbit.replay import scale_behind
from fewbit.types import Graph, Plan


@dataclass(frozen=True)
class Sensitivity:
    """Of one unit: the loss at each width, and the mean nuclear norm of its float output where that is part of it."""

    unit: Unit
    losses: Mapping[int, float]
    nuclear: float | None = None


class Measure(Protocol):
    """From uniform plans by width to the sensitivity of each unit; `images` is how many calibration images it looks at."""

    @property
    def images(self) -> int: ...

    def __call__(
        self,
        graph: Graph,
        found: Sequence[Unit],
        plans: Mapping[int, Plan],
        batch: Tensor,
        progress: Callable[[str], None] = ...,
    ) -> list[Sensitivity]: ...


@dataclass(frozen=True)
class NuclearNorm:
    """Ω(b) = Σ_j σ_j(Y) · ||Ŷ(b) - Y||² (Liu et al. 2021, section 3.4), each unit on its float inputs.

    Y is the attention map of an attention module, A = Q Kᵀ as in the paper's equation 3, scaled (`map`: or the probabilities),
    and the output of any other unit. An attention map has a matrix for each head; nuclear norms and squared errors are means
    over images and heads. The nuclear norm is computed once, of the float output.
    """

    map: Literal["logits", "probabilities"] = "logits"
    images: int = 8

    def __call__(
        self,
        graph: Graph,
        found: Sequence[Unit],
        plans: Mapping[int, Plan],
        batch: Tensor,
        progress: Callable[[str], None] = lambda unit: None,
    ) -> list[Sensitivity]:
        overlays = {bits: Overlay.of(graph, plan) for bits, plan in plans.items()}
        outputs = {u.name: self._output(graph, u) for u in found}
        results = []
        for unit, inner, env in _walked(graph, found, {name: node for name, (node, _) in outputs.items()}, batch):
            output, scale = outputs[unit.name]
            exact = matrices(_computed(Overlay(graph, ()), inner, env, output) * scale, unit, graph)
            nuclear = nuclear_norms(exact).mean().item()
            errors = {}
            for bits, overlay in overlays.items():
                quantized = matrices(_computed(overlay, inner, env, output) * scale, unit, graph)
                errors[bits] = (quantized - exact).square().sum((1, 2)).mean().item()
            results.append(Sensitivity(unit, {bits: nuclear * error for bits, error in errors.items()}, nuclear))
            progress(unit.name)
        return results

    def _output(self, graph: Graph, unit: Unit) -> tuple[Node, float]:
        """The node of Y, and what it is multiplied by."""
        nodes = {node.name: node for node in graph.module.graph.nodes}
        scores = [op for op in map(graph.op, unit.ops) if "query" in op.operands]
        if unit.map is None or (self.map == "logits" and not scores):
            return nodes[unit.output], 1.0
        if self.map == "probabilities":
            return nodes[unit.map], 1.0
        return nodes[scores[0].node], scale_behind(nodes[scores[0].node])


@dataclass(frozen=True)
class OutputKL:
    """KL divergence of the model's answers from the float model's where only one unit is quantized, mean over images.

    A unit's error is measured where it counts, behind all that follows; the losses of units are taken to add up.
    """

    images: int = 16

    def __call__(
        self,
        graph: Graph,
        found: Sequence[Unit],
        plans: Mapping[int, Plan],
        batch: Tensor,
        progress: Callable[[str], None] = lambda unit: None,
    ) -> list[Sensitivity]:
        last = next(node for node in graph.module.graph.nodes if node.op == "output").all_input_nodes[0]
        results = []
        for unit, inner, env in _walked(graph, found, {u.name: last for u in found}, batch):
            exact = _computed(Overlay(graph, ()), inner, env, last).flatten(1).log_softmax(1)
            losses = {}
            for bits, plan in plans.items():
                overlay = Overlay.of(graph, plan, unit.ops)
                quantized = _computed(overlay, inner, env, last).flatten(1).log_softmax(1)
                losses[bits] = max(0.0, (exact.exp() * (exact - quantized)).sum(1).mean().item())
            results.append(Sensitivity(unit, losses))
            progress(unit.name)
        return results


def matrices(y: Tensor, unit: Unit, graph: Graph) -> Float[Tensor, "matrices rows columns"]:
    """A unit's output as matrices: of an attention map one for each image and head, of anything else one for each image, its
    places by its channels; an output without places is a row."""
    if unit.map is not None:
        return y.flatten(0, -3)
    if graph.op(unit.ops[-1]).kind in ("conv", "depthwise"):
        return y.flatten(2)
    return y.reshape(len(y), -1, y.shape[-1])


def nuclear_norms(y: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, "matrices"]:
    """The sum of the singular values of each matrix."""
    return cast(Tensor, torch.linalg.svdvals(y).sum(-1))


def _walked(
    graph: Graph, found: Sequence[Unit], outputs: Mapping[str, Node], batch: Tensor
) -> Iterator[tuple[Unit, list[Node], Env]]:
    """Each unit, the nodes from its ops to an output, and the float values that they read; one unit's values at a time."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    parts = {u.name: between([outputs[u.name]], [nodes[graph.op(name).node] for name in u.ops]) for u in found}
    stream = Stream(Overlay(graph, ()), [batch], [read for _, reads in parts.values() for read in reads])
    for unit in found:
        inner, reads = parts[unit.name]
        yield unit, inner, {read: stream.at(read)[0] for read in reads}


def _computed(overlay: Overlay, inner: Sequence[Node], given: Env, output: Node) -> Any:
    env = dict(given)
    with torch.no_grad():
        overlay.run(inner, env)
    return env[output]
