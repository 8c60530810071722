"""What is written out as several calls and is one: ONNX files hold gelu and layer norm as arithmetic, unbind as slices.

The passes behind these know the one call, whoever wrote the model.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from fewbit.core.fx import add_constant, argument, aten, call_like, calls, constant, is_call, is_constant, replace, shape_of

CUTS = (aten.slice.Tensor, aten.split_with_sizes.default, aten.split.Tensor, operator.getitem)
ADD, MUL, DIV = aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor


def name_what_is_written_out(module: GraphModule) -> None:
    join_selections(module)
    name_gates(module)
    name_gelu(module)
    name_layer_norm(module)


def join_selections(module: GraphModule) -> None:
    """Every entry of one dimension, each taken by itself, is an unbind."""
    found: dict[tuple[Node, int], dict[int, Node]] = defaultdict(dict)
    for node in module.graph.nodes:
        taken = _selection(node)
        if taken is not None:
            source, dim, place = taken
            found[source, dim][place] = node
    for (source, dim), parts in found.items():
        if set(parts) != set(range(_size(source, dim))) or len(parts) < 2 or not _read_by(source, set(parts.values())):
            continue
        with module.graph.inserting_after(source):
            unbind = module.graph.call_function(aten.unbind.int, (source, dim))
        unbind.meta["nn_module_stack"] = source.meta.get("nn_module_stack", {})
        for place, part in parts.items():
            with module.graph.inserting_after(unbind):
                one = module.graph.call_function(operator.getitem, (unbind, place))
            one.meta["nn_module_stack"] = part.meta.get("nn_module_stack", {})
            replace(part, one)
    module.graph.eliminate_dead_code()


def _size(node: Node, dim: int) -> int:
    size = shape_of(node)[dim] if shape_of(node) else None
    return size if isinstance(size, int) else 0


def _selection(node: Node) -> tuple[Node, int, int] | None:
    """(source, dimension, place) of a node that is one entry of a dimension: a select, or a slice or split of one, squeezed."""
    if is_call(node, aten.select.int):
        source, dim, place = cast("tuple[Node, int, int]", node.args)
        return source, dim % len(shape_of(source)), place
    if not is_call(node, aten.squeeze.dim):
        return None
    cut, dim = cast("tuple[Node, int]", node.args)
    if is_call(cut, aten.slice.Tensor):
        source = cast(Node, cut.args[0])
        first, last = argument(cut, 2, "start", 0), argument(cut, 3, "end", None)
        along = cast(int, argument(cut, 1, "dim", 0)) % len(shape_of(source))
        one = isinstance(first, int) and isinstance(last, int) and min(last, _size(source, along)) == first + 1
    elif is_call(cut, operator.getitem) and is_call(cut.args[0], aten.split_with_sizes.default, aten.split.Tensor):
        split, first = cast("tuple[Node, int]", cut.args)
        source = cast(Node, split.args[0])
        along = cast(int, argument(split, 2, "dim", 0)) % len(shape_of(source))
        sizes = split.args[1]
        one = bool(sizes == 1) or (isinstance(sizes, list | tuple) and set(sizes) == {1})
    else:
        return None
    return (source, along, first) if one and along == dim % len(shape_of(source)) else None


def _read_by(source: Node, ends: set[Node]) -> bool:
    """Every reader of the source is one of the ends, or a cut whose readers are."""
    return all(user in ends or (is_call(user, *CUTS) and _read_by(user, ends)) for user in source.users)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _with_number(node: object, *targets: Any) -> tuple[Node, float] | None:
    """The operand and the number of a call of a node and a number."""
    if not is_call(node, *targets):
        return None
    a, b = cast(Node, node).args[:2]
    for one, other in ((a, b), (b, a)) if not is_call(node, DIV) else ((a, b),):
        number = _number(other)
        if isinstance(one, Node) and number is not None:
            return one, number
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _scaled(node: object) -> tuple[Node, float] | None:
    """x and f where a node is f x."""
    product, quotient = _with_number(node, MUL, aten.mul.Scalar), _with_number(node, DIV, aten.div.Scalar)
    if product:
        return product
    return (quotient[0], 1 / quotient[1]) if quotient and quotient[1] else None


GATES = {aten.sigmoid.default: aten.silu.default, aten.hardsigmoid.default: aten.hardswish.default}


def name_gates(module: GraphModule) -> None:
    """x sigmoid(x), and the same with straight lines."""
    for gate in calls(module.graph, *GATES):
        x, product = gate.args[0], _only_user(gate)
        if product is not None and is_call(product, MUL) and set(product.args) == {x, gate}:
            replace(product, call_like(module.graph, product, GATES[cast(Any, gate.target)], x))
    module.graph.eliminate_dead_code()


def name_gelu(module: GraphModule) -> None:
    """0.5 x (1 + erf(x / sqrt 2)), whichever factor comes first."""
    for erf in calls(module.graph, aten.erf.default):
        inner, plus = _scaled(erf.args[0]), _only_user(erf)
        if inner is None or not math.isclose(inner[1], math.sqrt(0.5), rel_tol=1e-5) or plus is None:
            continue
        x, one, product = inner[0], _with_number(plus, ADD, aten.add.Scalar), _only_user(plus)
        if one is None or one[1] != 1 or not is_call(product, MUL):
            continue
        assert product is not None
        other = next((a for a in product.args if a is not plus), None)
        halved, last = _scaled(other), _only_user(product)
        if halved == (x, 0.5):
            replace(product, call_like(module.graph, product, aten.gelu.default, x))
        elif other is x and last is not None and _scaled(last) == (product, 0.5):
            replace(last, call_like(module.graph, last, aten.gelu.default, x))
    module.graph.eliminate_dead_code()


def name_layer_norm(module: GraphModule) -> None:
    """(x - mean) / sqrt(mean of squares + eps), times a weight, plus a bias, over the last dimension."""
    for root in calls(module.graph, aten.sqrt.default):
        summed = _with_number(root.args[0], ADD, aten.add.Scalar)
        centred = _squares_mean(summed[0]) if summed else None
        x = _centred(centred) if centred is not None else None
        quotient = _only_user(root)
        if x is None or not is_call(quotient, DIV) or quotient is None or quotient.args[1] is not root:
            continue
        if _centred(quotient.args[0]) is not x or not isinstance(shape_of(x)[-1], int):
            continue
        last, weight = _times_constant(module, quotient, shape_of(x)[-1], MUL)
        last, bias = _times_constant(module, last, shape_of(x)[-1], ADD)
        assert summed is not None
        if weight is None and bias is not None:
            weight = add_constant(module, f"{root.name}_ones", torch.ones(shape_of(x)[-1]), last)
        replace(last, call_like(module.graph, last, aten.layer_norm.default, x, [shape_of(x)[-1]], weight, bias, summed[1]))
    module.graph.eliminate_dead_code()


def _is_last_mean(node: object) -> bool:
    return is_call(node, aten.mean.dim) and list(cast(Any, node).args[1]) in ([-1], [len(shape_of(cast(Node, node))) - 1])


def _squares_mean(node: Node) -> Node | None:
    """d where a node is the mean of d squared."""
    if not _is_last_mean(node) or not argument(node, 2, "keepdim", False):
        return None
    square = node.args[0]
    if is_call(square, aten.pow.Tensor_Scalar) and cast(Node, square).args[1] == 2:
        return cast(Node, cast(Node, square).args[0])
    if is_call(square, MUL) and cast(Node, square).args[0] is cast(Node, square).args[1]:
        return cast(Node, cast(Node, square).args[0])
    return None


def _centred(node: object) -> Node | None:
    """x where a node is x minus its mean."""
    if not is_call(node, aten.sub.Tensor):
        return None
    x, mean = cast(Node, node).args[:2]
    same = _is_last_mean(mean) and cast(Node, mean).args[0] is x and argument(cast(Node, mean), 2, "keepdim", False)
    return cast(Node, x) if same else None


def _times_constant(module: GraphModule, node: Node, width: int, target: Any) -> tuple[Node, Node | None]:
    """The node behind, and the constant, where a node is alone multiplied by (or added to) one number for each channel."""
    user = _only_user(node)
    if user is None or not is_call(user, target):
        return node, None
    other = next((a for a in user.args if a is not node), None)
    if not is_constant(other) or tuple(constant(module, cast(Node, other)).shape) != (width,):
        return node, None
    return user, cast(Node, other)
