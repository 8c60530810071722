"""Nodes that choose places by comparing numbers: top-k, sorting, the place of the largest or smallest."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from fewbit.core.fx import aten, is_call


@dataclass(frozen=True)
class Selector:
    """What a function chooses: the ONNX operator that does the same, whether the largest come first (None: its arguments
    say), and whether it gives one place alone.
    """

    operator: str
    largest: bool | None = None
    single: bool = False


SELECTORS: Mapping[Any, Selector] = {
    aten.topk.default: Selector("TopK"),
    aten.sort.default: Selector("TopK"),
    aten.sort.stable: Selector("TopK"),
    aten.argsort.default: Selector("TopK"),
    aten.argmax.default: Selector("ArgMax", largest=True, single=True),
    aten.argmin.default: Selector("ArgMin", largest=False, single=True),
    aten.max.dim: Selector("ArgMax", largest=True, single=True),
    aten.min.dim: Selector("ArgMin", largest=False, single=True),
}
OPERATORS = {selector.operator for selector in SELECTORS.values()}


def places_of(node: Node) -> Node | None:
    """The node whose value is the places that a selector has chosen; None where nothing reads them."""
    if node.target in (aten.argsort.default, aten.argmax.default, aten.argmin.default):
        return node if node.users else None
    return next((user for user in node.users if is_call(user, operator.getitem) and user.args[1] == 1 and user.users), None)


def selectors(graph: Graph) -> list[Node]:
    """The nodes of a graph that choose by comparing numbers, in order; of those for one place the ones whose place is read."""
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target in SELECTORS]
    return [node for node in nodes if not SELECTORS[node.target].single or places_of(node) is not None]


def selections(graph: Graph) -> list[Node]:
    """Those whose places other nodes read: what stands behind them depends on which of equal numbers comes first."""
    return [
        node for node in selectors(graph)
        if (places := places_of(node)) is not None and any(user.op != "output" for user in places.users)
    ]  # fmt: skip
