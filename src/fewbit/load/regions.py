"""Parts of a program that stand under `torch.no_grad()` or `torch.autocast`, in a graph of their own, are opened."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from fewbit.core.fx import aten, is_call

WITH_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled

WITH_TYPES = torch.ops.higher_order.wrap_with_autocast


def open_regions(module: GraphModule) -> None:
    """What stands under `torch.no_grad()` or `torch.autocast` in the graph itself, where all is computed in float32."""
    while nodes := [n for n in module.graph.nodes if _is_region(n)]:
        for node in nodes:
            place = 1 if node.target is WITH_GRADIENTS else 4
            inner, *given = cast("tuple[Any, ...]", node.args[place:])
            part = cast(GraphModule, module.get_submodule(inner.target))
            if any(map(_is_region, part.graph.nodes)):  # which are named by the part
                part = GraphModule(part, copy.deepcopy(part.graph))
                open_regions(part)
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
            for check in module.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
                module.graph.erase_node(check)  # of the type that is asked for


def _is_region(node: Node) -> bool:
    return node.op == "call_function" and node.target in (WITH_GRADIENTS, WITH_TYPES)


def fewer_digits(program: ExportedProgram) -> tuple[str, ...]:
    """The types in which parts of a program are computed on a processor, under `torch.autocast`."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, GraphModule)]
    regions = [node for graph in graphs for node in graph.nodes if _is_region(node) and node.target is WITH_TYPES]
    return tuple(str(node.args[1]) for node in regions if node.args[2] and node.args[0] == "cpu")


@contextmanager
def without_autocast() -> Iterator[list[str]]:
    """Nothing is computed in fewer digits than float32; the list gets the types that modules on a processor ask for."""
    regions, enter, asked = list[torch.autocast](), torch.autocast.__enter__, list[str]()

    def entered(region: torch.autocast) -> Any:
        if region._enabled:
            region._enabled = False
            regions.append(region)
            asked.extend([str(region.fast_dtype)] if region.device == "cpu" else [])
        return enter(region)

    try:
        with patch.object(torch.autocast, "__enter__", entered):
            yield asked
    finally:
        for region in regions:
            region._enabled = True
