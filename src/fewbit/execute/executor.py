"""One executor: a captured graph, node by node, with some of its tensors quantized, replaced or handed to a function.

It is the only code that runs a graph. The float model is an executor without choices, a simulation one with those of a plan;
what learns passes a rounding with a gradient, what compares with a runtime passes codes, what observes passes taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fewbit.capture.sites import readers
from fewbit.core.device import CPU, exact_products, on
from fewbit.core.fx import constant, is_constant
from fewbit.core.graph import Graph
from fewbit.core.grid import fake
from fewbit.core.inputs import ALONE, Batch, Input, fed
from fewbit.core.plan import Choice, Plan

Env = dict[Node, Any]
Tap = Callable[[Any], object]
Read = Callable[[Tensor, Choice], Tensor]
NOTHING: Mapping[Any, Any] = MappingProxyType({})
LARGE = 1 << 18  # numbers of a weight that are made of its codes again in each run: they take four times the bytes of codes


def faked(x: Tensor, choice: Choice) -> Tensor:
    """An activation quantized and dequantized, as its readers see it."""
    return fake(x, choice.qparams, choice.grid)


def last_reads(order: Sequence[Node]) -> dict[Node, list[Node]]:
    """By node, the nodes whose values nothing behind it in `order` reads."""
    last = {read: node for node in order for read in node.all_input_nodes if not is_constant(read)}
    spent: dict[Node, list[Node]] = {}
    for read, node in last.items():
        spent.setdefault(node, []).append(read)
    return spent


class Executor:
    """Runs nodes of a graph. A node reads constants as they are in the module, detached, and activations as they come, except:

    - the readers of an activation site with a choice read `read(x, choice)`, computed once a run for all of them;
    - the readers of a weight or bias site read the real numbers of its codes, or the tensor of `give`;
    - an op adds the bias of `set_bias`.

    Gradients flow where the caller has not turned them off. Of `choices` those count whose sites an op of `integer_ops` reads.
    It runs on the graph's device, where batches and choices are moved. A bare module (a model as it was exported) has no sites:
    it only runs, on `device`, with its `inputs` where they are more than images.
    """

    def __init__(
        self, graph: Graph | GraphModule, integer_ops: Sequence[str] = (), choices: Mapping[str, Choice] = NOTHING, *,
        read: Read = faked, inputs: Sequence[Input] = ALONE, device: torch.device = CPU,
    ) -> None:  # fmt: skip
        self._graph = graph if isinstance(graph, Graph) else None
        self.module = graph.module if isinstance(graph, Graph) else graph
        self.device = graph.device if isinstance(graph, Graph) else device
        self.order: list[Node] = list(self.module.graph.nodes)
        self.nodes = {node.name: node for node in self.order}
        results = self.order[-1].args[0]
        self.results = cast("tuple[Node, ...]", results if isinstance(results, tuple) else (results,))
        self.inputs = graph.inputs if isinstance(graph, Graph) else inputs
        self.sources = [node for node in self.order if node.op == "placeholder"]
        self._integer_ops, self._read = integer_ops, read
        self.instead: dict[Node, dict[Node, Any]] = {}  # by reader and tensor, the choice or the tensor that it reads
        self.biases: dict[Node, Tensor] = {}
        self.constants: dict[Node, Tensor] = {}
        self._compiled: dict[Node, tuple[Callable[..., Any], Any, Any, bool]] = {}
        self._spent: dict[Node, list[Node]] | None = None
        integer = {site for name in integer_ops for site in self.graph.op(name).operands.values()}
        for choice in choices.values():
            if choice.site in integer:
                self.set(choice)

    @staticmethod
    def of(graph: Graph, plan: Plan, ops: Sequence[str] | None = None, *, read: Read = faked) -> Executor:
        """The numbers of a plan, or of those of its ops that are named."""
        names = plan.integer_ops if ops is None else [op for op in ops if op in plan.integer_ops]
        executor = Executor(graph, names, plan.choices, read=read)
        for name in names:
            if name in plan.biases:
                executor.set_bias(name, plan.biases[name].values)
        return executor

    @property
    def graph(self) -> Graph:
        """The captured graph. Raises ValueError where the executor runs a bare module."""
        if self._graph is None:
            raise ValueError("a bare module has no ops and sites to quantize; capture() finds them")
        return self._graph

    def set(self, choice: Choice) -> None:
        """Let the readers of a site read the choice's numbers from now on."""
        choice = on(choice, self.device)
        if choice.codes is not None:
            large = choice.role == "weight" and choice.codes.numel() >= LARGE
            self.give(choice.site, choice if large else choice.real)
            return
        tensor = self.nodes[self.graph.site(choice.site).tensor]
        for reader in readers(self.graph, choice, self._integer_ops, tensor):
            self.instead.setdefault(reader, {})[tensor] = choice

    def give(self, site: str, real: Tensor | Choice) -> None:
        """Let the readers of a weight or bias read real numbers, or a weight's readers those of its codes."""
        place = self.graph.site(site)
        for name, _ in place.readers:
            self.instead.setdefault(self.nodes[self.graph.op(name).node], {})[self.nodes[place.tensor]] = on(real, self.device)

    def replace(self, constants: Mapping[str, Tensor]) -> None:
        """Let all nodes read other values of some of the module's constants, by name."""
        for node in self.order:
            if is_constant(node) and node.target in constants:
                self.constants[node] = on(constants[cast(str, node.target)], self.device)

    def set_bias(self, op: str, bias: Tensor | None) -> None:
        """Let an op add a bias (c_out,) of its own; None: that of the graph, or of a choice."""
        node = self.nodes[self.graph.op(op).node]
        if bias is None:
            self.biases.pop(node, None)
        else:
            self.biases[node] = on(bias, self.device)

    def bias(self, op: str) -> Tensor | None:
        """What an op with a weight adds now, (c_out,); None where it adds nothing."""
        node = self.nodes[self.graph.op(op).node]
        stored = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if node in self.biases or not is_constant(stored):
            return self.biases.get(node)
        return cast(Tensor, self.instead.get(node, {}).get(cast(Node, stored), constant(self.module, cast(Node, stored))))

    def fed(self, batch: Batch) -> tuple[Tensor, ...]:
        """What each input takes of a batch, on the device."""
        return on(fed(self.inputs, batch), self.device)

    def compiled(self, node: Node) -> tuple[Callable[..., Any], Any, Any, bool]:
        """What a node calls, its arguments, and whether nodes stand elsewhere among them than side by side."""
        if node not in self._compiled:
            new = [read for read in node.all_input_nodes if is_constant(read) and read not in self.constants]
            self.constants |= {read: constant(self.module, read) for read in new}
            side_by_side = sum(isinstance(arg, Node) for arg in node.args)
            reads: list[Node] = []
            torch.fx.node.map_arg((node.args, node.kwargs), reads.append)
            target = cast(Callable[..., Any], node.target)
            self._compiled[node] = (target, node.args, dict(node.kwargs), len(reads) != side_by_side)
        return self._compiled[node]

    def __call__(
        self, images: Batch, taps: Mapping[str, Tap] = NOTHING, *, read: Read | None = None,
        calls: Mapping[str, Callable[..., Any]] = NOTHING,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The outputs for a batch of images; values are freed after their last use.

        `taps` are called with the values of nodes by name, before anything is quantized, in graph order. `read` and `calls`
        (node name -> function of the node's arguments) stand for the executor's own reading and for the nodes' functions.
        """
        if self._spent is None:
            self._spent = last_reads(self.order)
        env: Env = dict(zip(self.sources, self.fed(images), strict=True))
        run = _Run(self, env, self._spent, read or self._read, taps, calls, whole=True)
        run.nodes(self.order[:-1])
        return run.outputs()

    def run(self, nodes: Iterable[Node], env: Env, spent: Mapping[Node, Sequence[Node]] = NOTHING) -> None:
        """Compute nodes in order; their values are added to `env`, which holds what they read from elsewhere.

        `spent`: by node, whose values leave `env` after it (`last_reads`).
        """
        _Run(self, env, spent, self._read).nodes(nodes)

    def outputs(self, env: Env) -> tuple[Tensor, ...]:
        """The outputs, from the values of the nodes that they are."""
        return _Run(self, env, NOTHING, self._read).outputs()

    def values(self, wanted: Sequence[Node], nodes: Sequence[Node], inputs: Mapping[Node, Any]) -> tuple[Any, ...]:
        """The values of some of `nodes` or `inputs`, computed without a gradient."""
        env, kept = dict(inputs), set(wanted)
        spent = {node: [read for read in reads if read not in kept] for node, reads in last_reads(nodes).items()}
        with torch.no_grad():
            self.run(nodes, env, spent)
        return tuple(env[node] for node in wanted)

    def value(self, nodes: Sequence[Node], inputs: Mapping[Node, Any]) -> Any:
        """The value of the last of `nodes`, computed from `inputs` without a gradient."""
        return self.values(nodes[-1:], nodes, inputs)[0]


class _Run:
    """One run of some nodes over the values of `env`; `whole`: nothing but this run reads them."""

    def __init__(
        self, executor: Executor, env: Env, spent: Mapping[Node, Sequence[Node]], read: Read, taps: Mapping[str, Tap] = NOTHING,
        calls: Mapping[str, Callable[..., Any]] = NOTHING, whole: bool = False,
    ) -> None:  # fmt: skip
        self.executor, self.env, self.spent, self.read, self.whole = executor, env, spent, read, whole
        self.taps = {executor.nodes[name]: tap for name, tap in taps.items()}
        self.calls = {executor.nodes[name]: call for name, call in calls.items()}
        self.quantized: dict[Node, dict[int, Tensor]] = {}  # of a tensor, by choice

    def nodes(self, nodes: Iterable[Node]) -> None:
        env, quantized, taps, spent = self.env, self.quantized, self.taps, self.spent
        with exact_products(self.executor.device):
            for node in nodes:
                if node.op == "call_function":
                    env[node] = self.call(node)
                    for read in spent.get(node, ()):
                        env.pop(read, None)
                        quantized.pop(read, None)
                if node in taps:
                    taps[node](constant(self.executor.module, node) if is_constant(node) else env[node])

    def outputs(self) -> tuple[Tensor, ...]:
        """What the last node reads: values, codes' numbers where it reads codes, and constants."""
        executor, env = self.executor, self.env
        instead = executor.instead.get(executor.order[-1], NOTHING)

        def value(node: Node) -> Tensor:
            if node in instead:
                return self.of_codes(node, instead[node])
            return constant(executor.module, node) if is_constant(node) else cast(Tensor, env[node])

        return tuple(map(value, executor.results))

    def call(self, node: Node) -> Any:
        executor, env = self.executor, self.env
        target, args, kwargs, is_nested = executor.compiled(node)
        constants, instead = executor.constants, executor.instead.get(node, NOTHING)

        def value(read: Node) -> Any:
            other = instead.get(read)
            if other is None:
                return constants[read] if read in constants else env[read]
            return self.of_codes(read, other) if other.__class__ is Choice else other

        if is_nested:
            args, kwargs = torch.fx.node.map_arg((args, kwargs), value)
        else:
            args = [value(arg) if isinstance(arg, Node) else arg for arg in args]
        if node in executor.biases:
            args = (*args[:2], executor.biases[node], *args[3:])
            kwargs = {name: v for name, v in kwargs.items() if name != "bias"}
        return self.calls.get(node, target)(*args, **kwargs)

    def of_codes(self, tensor: Node, choice: Choice) -> Tensor:
        """The quantized tensor, computed for the first reader; a tensor that nobody reads otherwise is freed then. The numbers
        of a weight's codes are kept for nobody.
        """
        if choice.codes is not None:
            return choice.real
        by_choice = self.quantized.setdefault(tensor, {})
        if id(choice) not in by_choice:
            by_choice[id(choice)] = self.read(self.env[tensor], choice)
            instead = self.executor.instead
            if self.whole and all(instead.get(user, NOTHING).get(tensor) is choice for user in tensor.users):
                self.env[tensor] = None
        return by_choice[id(choice)]
