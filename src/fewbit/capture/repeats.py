"""What is computed twice is computed once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fewbit.core.fx import constant, is_constant


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
