"""A graph as an exported program: what torch.export records of every node is computed once, and nothing is traced again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental import _config as symbols
from torch.fx.node import map_arg

from fewbit.core.fx import aten, calls, constant

Shapes = tuple[dict[int, Any], ...] | None


class Recorded(Interpreter):
    """Runs a graph on fake tensors and keeps what each node gives as its `val`, as torch.export does."""

    def __init__(self, module: GraphModule, graph: Graph, mode: Any) -> None:
        super().__init__(module, graph=graph)
        self.mode = mode

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = result
        n.meta.setdefault("nn_module_stack", {})
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.mode.from_tensor(super().get_attr(target, args, kwargs), static_shapes=True)


def program_of(module: GraphModule, args: tuple[Tensor, ...], shapes: Shapes) -> ExportedProgram | None:
    """The program of a module of aten calls that takes `args`, whose sizes in `shapes` are free.

    None where torch.export has to trace it: where it calls modules, holds constants that are no tensors, or fixes a free size.
    """
    read = module.graph.find_nodes(op="get_attr")
    if module.graph.find_nodes(op="call_module") or not all(isinstance(constant(module, node), Tensor) for node in read):
        return None
    graph = copy.deepcopy(module.graph)
    graph.eliminate_dead_code()
    attributes = graph.find_nodes(op="get_attr")
    with symbols.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        unnamed = pytree.tree_map(lambda size: Dim.DYNAMIC if isinstance(size, str) else size, shapes)
        ports = torch.export.export(_ports(graph), args, dynamic_shapes=unnamed, strict=False)
        inputs = [node.meta["val"] for node in ports.graph.find_nodes(op="placeholder")]
        mode = inputs[0].fake_mode
        with mode, torch._dispatch.python.enable_python_dispatcher():  # type: ignore[attr-defined]
            Recorded(module, graph, mode).run(*inputs)
    free = [value.shape[place] for value, places in zip(inputs, shapes or (), strict=False) for place in places]
    if any(isinstance(size, int) or size.node.maybe_as_int() is not None for size in free):
        return None
    _read_at_inputs(graph)
    return _lifted(module, graph, attributes, ports)


def _read_at_inputs(graph: Graph) -> None:
    """Sizes that are those of an input are read there, and known numbers stand where they are read, in place."""
    inputs = graph.find_nodes(op="placeholder")
    places = {_number(size): (node, i) for node in inputs for i, size in enumerate(node.meta["val"].shape)}
    for node in calls(graph, aten.sym_size.int):
        node.args = places.get(_number(node.meta["val"]), node.args)
    for node in list(graph.nodes):
        if node.op == "call_function" and type(node.meta["val"]) is int:
            for user in list(node.users):
                user.args, user.kwargs = map_arg((user.args, dict(user.kwargs)), partial(_known, node))
            graph.erase_node(node)


def _known(node: Node, read: Node) -> Any:
    """The number that `node` gives where that is what is read."""
    return node.meta["val"] if read is node else read


def _number(size: int | torch.SymInt) -> Any:
    """A size, or what a free one is computed by."""
    return size if isinstance(size, int) else size.node.expr


def _ports(graph: Graph) -> GraphModule:
    """A module with the inputs of a graph and as many outputs."""
    small = Graph()
    inputs = [small.placeholder(node.name) for node in graph.find_nodes(op="placeholder")]
    results = pytree.tree_leaves(graph.output_node().args[0])
    small.output(tuple(small.call_function(aten.clone.default, (inputs[0],)) for _ in results))
    return GraphModule(nn.Module(), small)


def _lifted(module: GraphModule, graph: Graph, attributes: Sequence[Node], ports: ExportedProgram) -> ExportedProgram:
    """The program of a recorded graph: its constants, in the order of the module, become inputs."""
    readers = dict[str, list[Node]]()
    for node in attributes:
        readers.setdefault(cast(str, node.target), []).append(node)
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    names = [*dict.fromkeys([*(name for name, _ in named if name in readers), *readers])]
    users, specs, state = graph.find_nodes(op="placeholder"), list[InputSpec](), dict[str, Tensor]()
    for name in names:
        with graph.inserting_before(users[0]):
            lifted = graph.placeholder(f"c_{name.replace('.', '_')}")
        lifted.meta["val"] = readers[name][0].meta["val"]
        state[name] = constant(module, readers[name][0])
        specs.append(InputSpec(InputKind.BUFFER, TensorArgument(lifted.name), name, persistent=True))
        for node in readers[name]:
            node.replace_all_uses_with(lifted)
            graph.erase_node(node)
    specs += [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in users]
    results = pytree.tree_leaves(graph.output_node().args[0])
    graph.output_node().args = (tuple(results),)
    given = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    signature = ExportGraphSignature(specs, given)
    return ExportedProgram(nn.Module(), graph, signature, state, ports.range_constraints, ports.module_call_graph)
