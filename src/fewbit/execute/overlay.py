"""Overlay: parts of the float graph computed with the numbers of some choices, while others are not made yet.

`simulate` is a whole plan as a module; this runs any nodes, from values that are given, with whatever has been chosen so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.fx import constant, is_constant
from fewbit.capture.sites import readers
from fewbit.core.grid import fake, values
from fewbit.core.values import Choice, Graph, Plan

Env = dict[Node, Any]


class Overlay:
    """Runs nodes of a graph; a node reads the quantized tensors of the choices, and the biases that were corrected.

    Of `choices`, those that the integer ops read.
    """

    def __init__(self, graph: Graph, integer_ops: Sequence[str], choices: Mapping[str, Choice] = MappingProxyType({})) -> None:
        self.graph = graph
        self.nodes = {node.name: node for node in graph.module.graph.nodes}
        self._integer_ops = integer_ops
        self._fakes: dict[tuple[Node, Node], Choice] = {}
        self._constants: dict[tuple[Node, Node], Tensor] = {}
        self._biases: dict[Node, Tensor] = {}
        read = {site for name in integer_ops for site in graph.op(name).operands.values()}
        for choice in choices.values():
            if choice.site in read:
                self.set(choice)

    @staticmethod
    def of(graph: Graph, plan: Plan, ops: Sequence[str] | None = None) -> Overlay:
        """The numbers of a plan, or of those of its ops that are named."""
        names = plan.integer_ops if ops is None else [op for op in ops if op in plan.integer_ops]
        overlay = Overlay(graph, names, plan.choices)
        for name in names:
            if name in plan.biases:
                overlay.set_bias(name, plan.biases[name])
        return overlay

    def set(self, choice: Choice) -> None:
        """Let the readers of a site read the choice's numbers from now on."""
        site = self.graph.site(choice.site)
        tensor = self.nodes[site.tensor]
        if choice.codes is not None:
            self.give(choice.site, values(choice.codes.to(torch.int32), choice.qparams, choice.grid))
            return
        for reader in readers(self.graph, choice, self._integer_ops, tensor):
            self._fakes[reader, tensor] = choice

    def give(self, site: str, real: Tensor) -> None:
        """Let the readers of a weight or bias read real numbers in place of its codes'."""
        found = self.graph.site(site)
        for name, _ in found.readers:
            self._constants[self.nodes[self.graph.op(name).node], self.nodes[found.tensor]] = real

    def read(self, x: Tensor, choice: Choice) -> Tensor:
        """What the readers of an activation site get of it."""
        return fake(x, choice.qparams, choice.grid)

    def set_bias(self, op: str, bias: Tensor | None) -> None:
        """Let an op add a bias (c_out,) of its own; None: that of the graph, or of a choice."""
        node = self.nodes[self.graph.op(op).node]
        if bias is None:
            self._biases.pop(node, None)
        else:
            self._biases[node] = bias

    def run(self, nodes: Iterable[Node], env: Env) -> None:
        """Compute nodes in order; their values are added to `env`, which holds what they read from elsewhere."""
        for node in nodes:
            if node.op == "call_function":
                env[node] = self._call(node, env)

    def value(self, nodes: Sequence[Node], given: Mapping[Node, Any]) -> Any:
        """What the last of some nodes gives, from given values."""
        env = dict(given)
        with torch.no_grad():
            self.run(nodes, env)
        return env[nodes[-1]]

    def _call(self, node: Node, env: Mapping[Node, Any]) -> Any:
        def value(read: Node) -> Any:
            if is_constant(read):
                quantized = self._constants.get((node, read))
                return constant(self.graph.module, read) if quantized is None else quantized
            choice = self._fakes.get((node, read))
            return env[read] if choice is None else self.read(env[read], choice)

        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), value)
        if node in self._biases:
            args = (*args[:2], self._biases[node], *args[3:])
            kwargs = {name: v for name, v in kwargs.items() if name != "bias"}
        return cast(Callable[..., Any], node.target)(*args, **kwargs)


class Stream:
    """Batches of images on their way through a graph, all at the same node; only what is read later is kept of each.

    What is behind the place is computed with the choices that were made when it was passed. `wanted` are nodes that will be
    asked for, each as often as it is there, in an order that need not be that of the graph.
    """

    def __init__(self, overlay: Overlay, batches: Iterable[Tensor], wanted: Iterable[Node] = ()) -> None:
        self.overlay = overlay
        self._wanted = Counter(wanted)
        self._order = list(overlay.graph.module.graph.nodes)
        self._last = {read: i for i, node in enumerate(self._order) for read in node.all_input_nodes}
        self._at = 0
        source = next(node for node in self._order if node.op == "placeholder")
        self._envs: list[Env] = [{source: batch} for batch in batches]

    def at(self, tensor: Node) -> list[Any]:
        """The value of a node in each batch; the stream stands behind it then. It is wanted, or read later than the place."""
        stop = max(self._order.index(tensor) + 1, self._at)
        with torch.no_grad():
            for env in self._envs:
                for i in range(self._at, stop):
                    self.overlay.run([self._order[i]], env)
                    for read in self._order[i].all_input_nodes:
                        if self._last[read] == i and self._wanted[read] <= 0:
                            env.pop(read, None)
        self._at = stop
        found = [env[tensor] for env in self._envs]
        self._wanted[tensor] -= 1
        if self._wanted[tensor] <= 0 and self._last.get(tensor, -1) < stop:
            for env in self._envs:
                env.pop(tensor)
        return found


def between(outputs: Iterable[Node], inner: Iterable[Node]) -> tuple[list[Node], list[Node]]:
    """The nodes from `inner` on that lead to `outputs`, in order, and the nodes elsewhere whose values they read."""
    outputs, starts = list(outputs), set(inner)
    order = list(outputs[0].graph.nodes)
    after = set(starts)
    for node in order:
        if any(read in after for read in node.all_input_nodes):
            after.add(node)
    wanted = set(outputs)
    for node in reversed(order):
        if node in wanted and node in after:
            wanted |= set(node.all_input_nodes)
    nodes = [node for node in order if node in wanted and node in after]
    inside = set(nodes)
    reads = [read for node in nodes for read in node.all_input_nodes if read not in inside and not is_constant(read)]
    return nodes, list(dict.fromkeys(reads))


def walked(graph: Graph, wanted: Sequence[tuple[Sequence[str], str]], images: Tensor) -> Iterator[tuple[list[Node], Env, Any]]:
    """For groups of ops, each with the name of an output node: the nodes from the ops to the output, the float values that
    they read for images (b, c, h, w), and the float output; one group's values at a time.
    """
    nodes = {node.name: node for node in graph.module.graph.nodes}
    parts = [between([nodes[output]], [nodes[graph.op(name).node] for name in ops]) for ops, output in wanted]
    stream = Stream(Overlay(graph, ()), [images], [read for _, reads in parts for read in reads])
    for inner, reads in parts:
        given = {read: stream.at(read)[0] for read in reads}
        yield inner, given, stream.overlay.value(inner, given)
