"""Run a graph and watch some of its nodes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.fx import Interpreter, Node

from fewbit.core.values import Graph


class Watcher(Interpreter):
    """Runs a graph and hands the value of each watched node to a function; nothing is kept."""

    def __init__(self, graph: Graph, see: Callable[[str, Tensor], None], nodes: dict[str, list[str]]) -> None:
        super().__init__(graph.module, garbage_collect_values=True)
        self.see = see
        self.watched = nodes

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        for site in self.watched.get(n.name, ()):
            self.see(site, value)
        return value
