"""Parts of a program that stand in a graph of their own are opened; what is computed twice is computed once."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fewbit.capture.fx import constant, is_call, is_constant

WITH_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
WITH_TYPES = torch.ops.higher_order.wrap_with_autocast


def open_regions(module: GraphModule) -> None:
    """What stands under `torch.no_grad()` or `torch.autocast(enabled=False)` in the graph itself; autocast that is on stays."""
    while nodes := [node for node in module.graph.nodes if _is_region(node)]:
        for node in nodes:
            place = 1 if node.target is WITH_GRADIENTS else 4
            inner, *given = cast("tuple[Any, ...]", node.args[place:])
            part = cast(GraphModule, module.get_submodule(inner.target))
            placeholders = [n for n in part.graph.nodes if n.op == "placeholder"]
            with module.graph.inserting_before(node):
                results = module.graph.graph_copy(part.graph, dict(zip(placeholders, given, strict=True)))
            for user in list(node.users):
                if is_call(user, operator.getitem):
                    user.replace_all_uses_with(cast(Any, results)[cast(int, user.args[1])])
                    module.graph.erase_node(user)
            module.graph.erase_node(node)
            if not inner.users:
                module.graph.erase_node(inner)


def compute_once(module: GraphModule) -> None:
    """The first of equal calls on equal tensors stands for the others: two position embeddings added to one tensor, one norm
    called for keys and values. torch.onnx merges them, and a site that stands twice would be written once.
    """
    graph = module.graph
    if any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in graph.nodes):
        return  # what lies in memory depends on when it is read
    names, first = _contents(module), dict[str, Node]()
    for node in list(graph.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        known = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: names.get(n, n))
        same = first.setdefault(f"{node.target} {known}", node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _contents(module: GraphModule) -> dict[Node, Node]:
    """Each constant -> the first one that holds the same."""
    alike: dict[str, list[Node]] = {}
    same: dict[Node, Node] = {}
    for node in filter(is_constant, module.graph.nodes):
        value = constant(module, node)
        if isinstance(value, Tensor):
            others = alike.setdefault(f"{value.dtype} {tuple(value.shape)} {value.flatten()[:8].tolist()}", [])
            same[node] = next((other for other in others if torch.equal(constant(module, other), value)), node)
            if same[node] is node:
                others.append(node)
    return same


def _is_region(node: Node) -> bool:
    if node.op != "call_function" or node.target not in (WITH_GRADIENTS, WITH_TYPES):
        return False
    return bool(node.target is WITH_GRADIENTS or not node.args[2] or node.args[0] != "cpu")
