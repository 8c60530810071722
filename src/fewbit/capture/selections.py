"""Nodes that choose by comparing numbers: places (top-k, sorting, the place of the largest or smallest), and a side of a
threshold (what is less than, at least and their like; the whole number that a number is rounded to).
"""

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
COMPARISONS: Mapping[Any, str] = {  # and the ONNX operator that gives the same; "not equal" is Not behind Equal
    **dict.fromkeys((aten.lt.Scalar, aten.lt.Tensor), "Less"),
    **dict.fromkeys((aten.gt.Scalar, aten.gt.Tensor), "Greater"),
    **dict.fromkeys((aten.le.Scalar, aten.le.Tensor), "LessOrEqual"),
    **dict.fromkeys((aten.ge.Scalar, aten.ge.Tensor), "GreaterOrEqual"),
    **dict.fromkeys((aten.eq.Scalar, aten.eq.Tensor), "Equal"),
    **dict.fromkeys((aten.ne.Scalar, aten.ne.Tensor), "Not"),
}
STEPS: Mapping[Any, str] = {  # what makes whole numbers of real ones, or what is not zero true, in the same way
    aten.floor.default: "Floor",
    aten.ceil.default: "Ceil",
    aten.round.default: "Round",
    aten.trunc.default: "Mul",  # of what is rounded down without its sign, and the sign
    aten.sign.default: "Sign",
    aten.to.dtype: "Cast",
}
OF_SHAPES = {  # what these give follows from the shape of what they read
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}


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


def thresholds(graph: Graph) -> list[Node]:
    """The comparisons and the steps of real numbers that follow from the inputs, where other nodes read what they give; not
    those of integers, constants and shapes, which are the same everywhere.
    """
    computed = set[Node]()
    for node in graph.nodes:
        gives_numbers = "tensor_meta" in node.meta and node.target not in OF_SHAPES  # a size is none
        if node.op == "placeholder" or (gives_numbers and any(read in computed for read in node.all_input_nodes)):
            computed.add(node)
    return [
        node for node in graph.nodes
        if node in computed and is_call(node, *COMPARISONS, *STEPS) and any(map(_is_real, node.all_input_nodes))
        and not (is_call(node, aten.to.dtype) and _is_real(node))
        and any(user.op != "output" for user in node.users)
    ]  # fmt: skip


def operator_of(node: Node) -> str:
    """The ONNX operator that chooses what a node of `selectors` or `thresholds` does."""
    found = COMPARISONS.get(node.target) or STEPS.get(node.target)
    return found or SELECTORS[node.target].operator


def _is_real(node: Node) -> bool:
    dtype = getattr(node.meta.get("tensor_meta"), "dtype", None)
    return dtype is not None and dtype.is_floating_point
