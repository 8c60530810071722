"""A step for each channel where it costs nothing: what depthwise convolutions read, and what convolutions give to float nodes.

Runtimes have one step for all channels of an activation, and the channels of a net of depthwise convolutions differ a
hundredfold. Such a convolution takes each channel by itself, with a weight that has a step of its own: it may read a channel
times any number, which its weight is divided by. Where what reads a convolution's result is float, the result may be
divided by channel and multiplied again. The numbers are powers of two: they round nothing, the float function stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule, Node

from fewbit.capture.kinds import CLAMPS, CONCATS, MAX_POOLS, PADS
from fewbit.capture.residual import CONVOLUTIONS
from fewbit.capture.structure import own_weight
from fewbit.core.device import wide
from fewbit.core.fx import MOVES, add_constant, aten, is_call
from fewbit.core.graph import Graph, Op, Site

CARRIES: set[Callable[..., Any]] = {*MOVES, *PADS, *MAX_POOLS, *CLAMPS, *CONCATS}  # what gives codes on
SHARES = 17  # of the codes that are below zero, tried
REACH = 8.0  # of the root of the mean square; in between is where YOLOX-nano loses least (docs/zoo.md)
WORTH = 4.0  # times smaller squared steps, one bit, are worth a product by channel in each call
LEAST = 2.0**-10  # of the widest channel; a narrower one counts as so wide


@dataclass(frozen=True)
class Place:
    """A site whose channels may have steps of their own: the convolution that writes it (None: a float node does) and those
    that read it (none: float nodes do).
    """

    site: Site
    writer: Op | None
    readers: tuple[Op, ...]

    @property
    def multiplied(self) -> bool:
        """Whether a product by channel stands there, as a float node writes or reads it."""
        return self.writer is None or not self.readers


def places(graph: Graph, sites: Collection[str]) -> Iterator[Place]:
    """The places in graph order; `sites` are those that have a grid."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    by_node = {op.node: op for op in graph.ops}
    for site in graph.sites:
        node = nodes[site.tensor]
        if site.name not in sites or site.axis is not None or len(site.shape) != 4 or node.op != "call_function":
            continue
        maker = (
            cast(Node, node.args[0]) if is_call(node, aten.relu.default) and len(node.all_input_nodes[0].users) == 1 else node
        )
        writer = by_node.get(maker.name)
        if writer is not None and (writer.kind not in CONVOLUTIONS or not own_weight(graph, writer)):
            continue
        readers = [graph.op(name) for name, operand in site.readers if operand != "output"]
        others = [op for op in (graph.op(name) for name, operand in site.readers if operand == "output") if op != writer]
        if any(all(name in sites for name in _joined(op)) for op in others):  # integers by themselves
            continue
        if any(op.kind != "depthwise" or nodes[op.node].args[0] is not node or not own_weight(graph, op) for op in readers):
            continue
        alone = len(node.users) == len(readers)
        if (readers and (alone if writer else not is_call(node, *CARRIES))) or (
            not readers and writer and not any(is_call(user, *CARRIES) for user in node.users)
        ):
            yield Place(site, writer, tuple(readers))


def _joined(op: Op) -> list[str]:
    """The activations that an op reads."""
    return [site for operand, site in op.operands.items() if operand not in ("weight", "bias", "output")]


def evened(low: Float[Tensor, "c"], high: Float[Tensor, "c"], squares: Float[Tensor, "c"]) -> Float[Tensor, "c"]:
    """The powers of two that channels are divided by, so that with one step and one zero point for all of them the steps of
    channels are as small as they can be: the smallest product over all shares of the codes that are below zero.

    What a channel reaches counts in the middle, on a scale of logarithms, between its extremes and `REACH` times the root of
    its mean square (`squares`): most channels have long tails, and one step for all serves their bodies.
    """
    body = REACH * wide(squares).sqrt()
    low, high = (_between(wide(end), body) for end in ((-low).clamp_min(0), high.clamp_min(0)))
    low = -low
    if not bool((high > low).any()):
        return torch.ones(len(low), device=low.device)
    best: Tensor | None = None
    for share in torch.linspace(0, 1, SHARES, dtype=torch.float64).tolist():
        if (share == 0 and bool(low.any())) or (share == 1 and bool(high.any())):
            continue
        step = torch.maximum(-low / max(share, 1e-9), high / max(1 - share, 1e-9))
        step = step.clamp_min(float(step.amax()) * LEAST)
        if best is None or float(step.log().sum()) < float(best.log().sum()):
            best = step
    assert best is not None
    exponents = (best / best.amax()).log2().ceil()
    return torch.exp2(exponents - exponents.mean().round()).float()


def _between(end: Tensor, body: Tensor) -> Tensor:
    """The geometric mean of an extreme and of the body, where the body ends before it."""
    return (end * torch.minimum(end, body)).sqrt()


def steps(low: Float[Tensor, "c"], high: Float[Tensor, "c"], scale: Float[Tensor, "c"]) -> dict[str, float]:
    """The geometric mean over channels of a step's square, in units of 1 / (codes - 1)^2: `before` with one step for all,
    `after` with what one step for the divided channels leaves to each.
    """
    wide, even = (
        float((high / s).amax().clamp_min(0) - (low / s).amin().clamp_max(0)) for s in (torch.ones_like(scale), scale)
    )
    return {"before": wide**2, "after": even**2 * float(scale.log().mean().exp()) ** 2}


def with_factors(graph: Graph, factors: Mapping[str, Tensor]) -> Graph:
    """`graph`, whose module is changed in place: the tensor of each site by name times a factor for each channel, for its
    readers that are ops, and where there are none (a result), for all of its readers.
    """
    module, sites = graph.module, []
    nodes = {node.name: node for node in module.graph.nodes}
    for site in graph.sites:
        if site.name not in factors:
            sites.append(site)
            continue
        node = nodes[site.tensor]
        readers = {graph.op(name).node for name, operand in site.readers if operand != "output"}
        users = [user for user in node.users if not readers or user.name in readers]
        behind = _multiplied(module, node, site, factors[site.name])
        for user in users:
            user.replace_input_with(node, behind)
        sites.append(replace(site, tensor=behind.name) if readers else site)
    return replace(graph, sites=tuple(sites))


def _multiplied(module: GraphModule, node: Node, site: Site, factor: Tensor) -> Node:
    constant = add_constant(module, f"{site.name}_factor", factor.view(1, -1, 1, 1), node.next)
    with module.graph.inserting_after(constant):
        behind = module.graph.call_function(aten.mul.Tensor, (node, constant))
    behind.meta = {name: value for name, value in node.meta.items() if name != "macs"}
    return behind
