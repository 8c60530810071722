"""Verdicts on nodes, and what the rules of all runtimes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fewbit.lint.graph import DEQUANTIZE, Graph, Node, Quantizer


@dataclass(frozen=True)
class Verdict:
    """Whether a node runs in integers, the deciding rule in one line, and what to change where it does not."""

    integer: bool
    rule: str
    change: str = ""


class Rules(Protocol):
    """The rules of one runtime for one graph."""

    def verdict(self, node: Node) -> Verdict: ...


def front(graph: Graph, name: str) -> Quantizer | None:
    """The DequantizeLinear in front of a reader, looking through nodes that only move values."""
    node = graph.producer.get(name)
    while node is not None and node.moves and node.inputs:
        node = graph.producer.get(node.inputs[0])
    return graph.quantizer(node) if node is not None and node.op == DEQUANTIZE else None


def origin(graph: Graph, name: str) -> str:
    """Where a tensor comes from, for a message."""
    node = graph.producer.get(name)
    while node is not None and node.moves and node.inputs:
        name, node = node.inputs[0], graph.producer.get(node.inputs[0])
    if node is None:
        return "a constant" if name in graph.constants else f"the input {name}"
    return f"{node.op} {node.name}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
