"""A graph module as plain values, which can be pickled for another process: a row for each node, and the constants.

torch's own pickle of a graph module is its code, traced again: nodes have other names then, and no records.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class _Name:
    """A node among the arguments of another."""

    text: str


@dataclass(frozen=True)
class _Of:
    """What has a name in a library and no pickle that holds in another process: an operator, a memory format, a layout."""

    text: str


@dataclass(frozen=True)
class Shape:
    """What is recorded of the tensor that a node gives."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Row:
    """A node."""

    kind: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: Mapping[str, Any]  # what a graph that is run is asked for


@dataclass(frozen=True)
class Rows:
    """The nodes of a graph module in order, and its constants by name."""

    nodes: tuple[_Row, ...]
    constants: Mapping[str, Tensor]

    @staticmethod
    def of(module: GraphModule) -> Rows:
        """The rows of a module that holds nothing but constants and calls of functions."""
        targets = {cast(str, node.target) for node in module.graph.nodes if node.op == "get_attr"}
        return Rows(tuple(map(_row, module.graph.nodes)), {name: _constant(module, name) for name in sorted(targets)})

    def module(self) -> GraphModule:
        """The same module: the same nodes under their names, which call the same functions of the same constants."""
        root, graph, nodes = nn.Module(), Graph(), dict[str, Node]()
        for name, value in self.constants.items():
            *path, leaf = name.split(".")
            owner = root
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = cast(nn.Module, getattr(owner, part))
            owner.register_buffer(leaf, value)

        def value_of(sent: Any) -> Any:
            if isinstance(sent, _Name):
                return nodes[sent.text]
            return _found(sent.text) if isinstance(sent, _Of) else sent

        for row in self.nodes:
            args, kwargs = map_aggregate(row.args, value_of), map_aggregate(row.kwargs, value_of)
            node = graph.create_node(row.kind, value_of(row.target), cast(Any, args), cast(Any, kwargs), row.name)
            node.meta.update(row.meta)
            nodes[row.name] = node
        return GraphModule(root, graph).eval()


def _row(node: Node) -> _Row:
    args, kwargs = (map_aggregate(cast(Any, given), _sent) for given in (node.args, node.kwargs))
    meta = {"macs": node.meta["macs"]} if "macs" in node.meta else {}
    if "tensor_meta" in node.meta:
        meta["tensor_meta"] = _recorded(node.meta["tensor_meta"])
    return _Row(node.op, node.name, _sent(node.target), args, kwargs, meta)


def _sent(value: Any) -> Any:
    """A target, or a leaf of the arguments."""
    if isinstance(value, Node):
        return _Name(value.name)
    if isinstance(value, OpOverload):
        return _Of(f"torch.ops.{value}")
    return _Of(str(value)) if isinstance(value, torch.memory_format | torch.layout) else value


def _recorded(meta: Any) -> Any:
    """The record of a value that is a tensor, or of the tensors in it."""
    if hasattr(meta, "shape"):
        return Shape(tuple(meta.shape), meta.dtype)
    return tuple(map(_recorded, meta)) if isinstance(meta, tuple | list) else None


def _found(name: str) -> Any:
    """What torch calls so; the operators of another library are there when it has been imported."""
    path = name.split(".")[1:]
    try:
        return reduce(getattr, path, cast(Any, torch))
    except AttributeError:
        importlib.import_module(path[1])
        return reduce(getattr, path, cast(Any, torch))


def _constant(module: GraphModule, name: str) -> Tensor:
    value: Any = reduce(getattr, name.split("."), cast(Any, module))
    return cast(Tensor, value.detach())
