"""Rows of attention's probabilities with one maximum: a fixed step for all of them is then a step of each row's own.

Most rows of a softmax are flat and some are sharp, so that with one step for all the flat ones have few codes or none.
Multiplying a row of the left operand of a product by a number multiplies that row of the result by it:

    P V = diag(m) (diag(1/m) P) V        m the largest probability of each query

The rows of diag(1/m) P are exp(logit - largest logit), which FlashAttention (Dao et al. 2022) keeps until it divides by the
sum: the largest number of each is 1, whatever the image is. The product stays an integer one with static steps; m, one number
for each query, multiplies its float result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import cast

from torch.fx import Node

from fewbit.capture.canonicalize import SOFTMAX
from fewbit.capture.kinds import shape_for_one
from fewbit.core.fx import VIEWS, argument, aten, call_like, is_call
from fewbit.core.graph import Graph, Site
from fewbit.core.grid import Grid

CODES = 255  # as many steps as these serve flat rows as well


def flat_rows(graph: Graph, grids: Mapping[str, Grid]) -> Iterator[Site]:
    """The sites of probabilities that have few codes: what a softmax along the last axis gives to one product."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    for site in graph.sites:
        grid = grids.get(site.name)
        if site.role != "probs" or grid is None or grid.high - grid.low >= CODES or len(site.readers) != 1:
            continue
        if _whole_rows(nodes[site.tensor]):
            yield site


def _whole_rows(node: Node) -> bool:
    """Whether each row of a tensor is one row of a softmax, so that its largest number is not zero."""
    keys = shape_for_one(node)[-1:]
    while is_call(node, *VIEWS) and shape_for_one(node)[-1:] == keys:
        node = cast(Node, node.args[0])
    if not is_call(node, *SOFTMAX) or shape_for_one(node)[-1:] != keys:
        return False
    return argument(node, 1, "dim") in (-1, len(shape_for_one(node)) - 1)


def with_maxima(graph: Graph, sites: Collection[str]) -> Graph:
    """`graph`, whose module is changed in place: the rows of each of the sites divided by their maxima, and the product that
    reads them times these.
    """
    nodes = {node.name: node for node in graph.module.graph.nodes}
    tensors = {site.name: _divided(graph, nodes, site) for site in graph.sites if site.name in sites}
    return replace(graph, sites=tuple(replace(s, tensor=tensors[s.name]) if s.name in tensors else s for s in graph.sites))


def _divided(graph: Graph, nodes: Mapping[str, Node], site: Site) -> str:
    """The name of the divided rows, which one product reads now."""
    fx, rows = graph.module.graph, nodes[site.tensor]
    product = nodes[graph.op(site.readers[0][0]).node]
    largest = call_like(fx, product, aten.amax.default, rows, [-1], True)
    divided = call_like(fx, product, aten.div.Tensor, rows, largest)
    users = list(product.users)
    result = call_like(fx, product.next, aten.mul.Tensor, product, largest)
    product.replace_input_with(rows, divided)
    for user in users:
        user.replace_input_with(product, result)
    for node, like in ((divided, rows), (result, product)):
        node.meta = {name: value for name, value in like.meta.items() if name != "macs"}
    meta = rows.meta["tensor_meta"]
    largest.meta["tensor_meta"] = meta._replace(shape=(*meta.shape[:-1], 1))
    return divided.name
