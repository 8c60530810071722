"""What changes no number is left out. torch.onnx leaves it out as well, so a tensor and its copy, each with a site of its own,
would have one quantizer in the file.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

from torch import Tensor
from torch.fx import GraphModule, Node

from fewbit.core.fx import VIEWS, aten, back_through, calls, constant, is_call, is_constant, kind_of_numbers, replace, shape_of

TURNS = (aten.permute.default, aten.transpose.int, aten.t.default)
# the number that changes nothing, as the second operand; also as the first of those that commute
NEUTRAL: dict[Any, int] = {
    aten.add.Tensor: 0,
    aten.add.Scalar: 0,
    aten.sub.Tensor: 0,
    aten.sub.Scalar: 0,
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
}
COMMUTES = (aten.add.Tensor, aten.mul.Tensor)


def drop_neutral(module: GraphModule) -> None:
    """x + 0, x - 0, x * 1 and x / 1 are x (D-FINE adds 0 to what its first decoder layer reads)."""
    for node in calls(module.graph, *NEUTRAL):
        x, other = node.args[:2]
        if not _is_number(module, other, NEUTRAL[node.target]):
            x, other = other, x if node.target in COMMUTES else None
        if not isinstance(x, Node) or not _is_number(module, other, NEUTRAL[node.target]):
            continue
        alike = tuple(map(str, shape_of(node))) == tuple(map(str, shape_of(x)))  # as text, as in drop_round_trips
        if alike and kind_of_numbers(node) == kind_of_numbers(x):
            replace(node, x)


def _is_number(module: GraphModule, value: object, number: int) -> bool:
    """Whether an argument is this number, or a constant that holds it alone."""
    if isinstance(value, Node) and is_constant(value):
        held = constant(module, value)
        return isinstance(held, Tensor) and held.numel() == 1 and held.item() == number
    return isinstance(value, int | float) and value == number


def drop_round_trips(module: GraphModule) -> None:
    """Views that end in the shape they began with: LeViT flattens its tokens for a batch norm and back. Dimensions that are
    brought back in order, and a concatenation of one tensor.
    """
    for node in calls(module.graph, aten.expand.default, *VIEWS):
        shape = tuple(map(str, shape_of(node)))  # as text: comparing symbols would guard on them
        chain = list(back_through(node, VIEWS | {aten.expand.default}))
        same = [n for n in chain[1:] if shape and tuple(map(str, shape_of(n))) == shape]
        if same:
            replace(node, same[-1])
    for node in calls(module.graph, *TURNS):
        order, same = list(range(len(shape_of(node)))), []
        for turn, x in pairwise(back_through(node, TURNS)):
            places = _places(turn)
            if not places or len(places) != len(order):
                break  # of a node that a rewrite has put there, whose shape is not known
            order = [places[i] for i in order]
            if order == sorted(order):
                same.append(x)
        if same:
            replace(node, same[-1])
    for node in calls(module.graph, aten.cat.default):
        parts = cast("list[Node]", node.args[0])
        if len(parts) == 1:
            replace(node, parts[0])
    module.graph.eliminate_dead_code()  # the way there and back must not count as a reader


def _places(turn: Node) -> list[int]:
    """Which dimension of what it reads each dimension of a permuted tensor is; none where its shape is not known."""
    places = list(range(len(shape_of(turn))))
    if not places:
        return []
    if is_call(turn, aten.permute.default):
        return [places[int(i)] for i in cast("list[int]", turn.args[1])]
    one, other = cast("tuple[int, int]", turn.args[1:]) if is_call(turn, aten.transpose.int) else (0, -1)
    places[one], places[other] = places[other], places[one]
    return places
