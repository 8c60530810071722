"""Small tools for editing fx graphs: constants, replacements, the chain of views behind a node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

# ops that keep the elements in order and only write their shape differently
VIEWS: set[Callable[..., Any]] = {
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
    aten._unsafe_view.default,
}
MOVES: set[Callable[..., Any]] = VIEWS | {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unbind.int,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.expand.default,
    operator.getitem,
}
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
SCALINGS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


def is_constant(node: object) -> bool:
    """A parameter or buffer."""
    return isinstance(node, Node) and node.op == "get_attr"


def is_call(node: object, *targets: Callable[..., Any]) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def kind_of_numbers(node: Node) -> tuple[object, object] | None:
    """The type and the device of a node's numbers; None where it gives no tensor."""
    value = node.meta.get("val")
    return (value.dtype, value.device) if isinstance(value, Tensor) else None


def is_scaling(node: object) -> bool:
    """A product with a number, or a division by one."""
    return isinstance(node, Node) and is_call(node, *SCALINGS) and isinstance(node.args[1], int | float)


def calls(graph: Graph, *targets: Callable[..., Any]) -> list[Node]:
    """Nodes that call one of the targets, in graph order; a list, so that the graph may be edited meanwhile."""
    return [node for node in graph.nodes if is_call(node, *targets)]


def argument(node: Node, position: int, name: str, default: object = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def constant(module: GraphModule, node: Node) -> Tensor:
    """The tensor behind a get_attr node."""
    value: Any = module
    for part in cast(str, node.target).split("."):
        value = getattr(value, part)
    return cast(Tensor, value.detach() if isinstance(value, Tensor) else value)


def add_constant(module: GraphModule, name: str, value: Tensor, before: Node) -> Node:
    """Register a buffer under a fresh flat name and read it just before a node. It may be a view of another constant: nothing
    writes to them.
    """
    stem = name.replace(".", "_").replace(":", "_")
    fresh, count = stem, 0
    while hasattr(module, fresh):
        count += 1
        fresh = f"{stem}_{count}"
    module.register_buffer(fresh, value.detach().contiguous())
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(fresh)
    return node


def shape_of(node: Node) -> tuple[Any, ...]:
    """The shape that torch.export recorded, its batch symbolic; empty where a rewrite left none."""
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def call_like(graph: Graph, origin: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A new call just before `origin` that inherits the module path of it."""
    with graph.inserting_before(origin):
        node = graph.call_function(target, args, kwargs)
    node.meta["nn_module_stack"] = origin.meta.get("nn_module_stack", {})
    return node


def give_bias(node: Node, bias: Node | None) -> None:
    """Let a linear or a convolution read another bias, or one at all, or none."""
    node.args = (*node.args[:2], bias, *node.args[3:])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "bias"}


def replace(node: Node, by: Node) -> None:
    """Let every reader of `node` read `by`, which takes over the recorded shape, and remove `node`."""
    if "val" in node.meta:
        by.meta.setdefault("val", node.meta["val"])
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def back_through(node: Node, through: Collection[Callable[..., Any]]) -> Iterator[Node]:
    """The node, then what stands behind it as long as ops of `through` are passed."""
    yield node
    while is_call(node, *through) and isinstance(node.args[0], Node):
        node = node.args[0]
        yield node


def reached(start: Node, goes_on: Callable[[Node], bool]) -> Iterator[Node]:
    """The readers of a node, each once, and those of every reader that `goes_on` says yes to."""
    pending, visited = list(start.users), set[Node]()
    while pending:
        node = pending.pop()
        if node not in visited:
            visited.add(node)
            yield node
            if goes_on(node):
                pending.extend(node.users)


def between(outputs: Iterable[Node], inner: Iterable[Node]) -> tuple[list[Node], list[Node]]:
    """The nodes from `inner` on that lead to `outputs`, in order, and the nodes elsewhere whose values they read."""
    outputs, starts = list(outputs), set(inner)
    order = list(outputs[0].graph.nodes)
    after = set(starts)
    for node in order:
        if any(read in after for read in node.all_input_nodes):
            after.add(node)
    before = set(outputs)
    for node in reversed(order):
        if node in before and node in after:
            before |= set(node.all_input_nodes)
    nodes = [node for node in order if node in before and node in after]
    inside = set(nodes)
    reads = [read for node in nodes for read in node.all_input_nodes if read not in inside and not is_constant(read)]
    return nodes, list(dict.fromkeys(reads))


def finish(module: GraphModule) -> GraphModule:
    """Drop dead nodes and constants that nobody reads any more, check the graph, compile it."""
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {cast(str, node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in module.named_parameters()] + [n for n, _ in module.named_buffers()]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.graph.lint()
    module.recompile()
    return module


def is_write(node: Node) -> bool:
    """A call that changes its first argument: relu_, add_, copy_."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable and len(node.all_input_nodes) > 0
