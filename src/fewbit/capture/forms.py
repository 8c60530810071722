"""One spelling per kind of work: whatever a model's author typed, the rewrites after these see a single form of it.

relu_(x) -> relu(x); mm, bmm, addmm, baddbmm, einsum -> matmul or linear; view -> reshape; the ops of a program that was
decomposed to core ATen -> those that torch.export records.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fewbit.capture.rewrite import (
    MOVES,
    VIEWS,
    add_constant,
    argument,
    aten,
    back_through,
    call_like,
    calls,
    constant,
    is_call,
    is_constant,
    replace,
    shape_of,
)

LINEAR = aten.linear.default
MATMUL = aten.matmul.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
CHECKS = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default)
COPIES = (
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.clone.default,
)
CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
)
CREATORS = (
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.eye.default,
    aten.full.default,
    aten.linspace.default,
    aten.ones.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
)


def writes_through_views(graph: Graph) -> bool:
    """Whether an op writes into a tensor that is later read under another name (y[:, 0] = 0), so that order matters."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not is_write(node):
            continue
        family = _aliases(cast(Node, node.args[0])) - _aliases_after(node)
        others = family - {node.args[0]}
        if any(position[user] > position[node] for other in others for user in other.users if user is not node):
            return True
    return False


def is_write(node: Node) -> bool:
    """A call that changes its first argument: relu_, add_, copy_."""
    schema = getattr(node.target, "_schema", None)
    return bool(node.op == "call_function" and schema is not None and schema.is_mutable and node.args)


def drop_writes(module: GraphModule) -> None:
    """relu_(x) becomes relu(x); who reads x later reads the result, which is what x holds by then."""
    for node in list(module.graph.nodes):
        if not is_write(node):
            continue
        name, _, overload = cast(Any, node.target)._schema.name.partition("::")[2], None, cast(Any, node.target)._overloadname
        pure = getattr(getattr(aten, name.removesuffix("_"), None), overload, None) if name.endswith("_") else None
        if pure is None:
            continue
        x, result = cast(Node, node.args[0]), call_like(module.graph, node, pure, *node.args, **node.kwargs)
        seen = set(module.graph.nodes) and _before(module.graph, node)
        for user in [u for u in x.users if u not in seen and u is not node and u is not result]:
            user.replace_input_with(x, result)
        replace(node, result)
