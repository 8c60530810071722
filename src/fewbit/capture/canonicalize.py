"""One spelling per kind of work: whatever a model's author typed, the rewrites after these see a single form of it.

relu_(x) -> relu(x); view -> reshape; mm, bmm, addmm, baddbmm, einsum -> matmul or linear; padding="same" -> numbers; what a
program consists of that was decomposed to core ATen -> what torch.export records.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fewbit.capture.windows import AVERAGES, PADDED, name_convolution, number_padding, plain_average, plain_maximum
from fewbit.core.fx import (
    DROPOUTS,
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
    is_write,
    kind_of_numbers,
    replace,
    shape_of,
)

LINEAR = aten.linear.default
MATMUL = aten.matmul.default
BATCH_NORM = aten.batch_norm.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
CHECKS = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default)
COPIES = (
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.positive.default,
)
# what only brings dimensions in another order, under other names than permute and transpose
TURNS = (
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.adjoint.default,
    aten.mT.default,
    aten.mH.default,
    aten.matrix_H.default,
    aten.numpy_T.default,
)
SHAPED = (aten.reshape_as.default, aten.view_as.default, *(getattr(aten, f"atleast_{n}d").default for n in (1, 2, 3)))
CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
    aten.real.default,
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


def drop_writes(module: GraphModule) -> None:
    """relu_(x) becomes relu(x); who reads x later reads the result, which is what x holds by then."""
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in list(position):
        packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
        pure = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
        if not is_write(node) or not packet.endswith("_") or pure is None:
            continue
        x, result = cast(Node, node.args[0]), call_like(module.graph, node, pure, *node.args, **node.kwargs)
        for user in list(x.users):
            if position.get(user, -1) > position[node]:
                user.replace_input_with(x, result)
        replace(node, result)


def drop_identities(module: GraphModule) -> None:
    """Dropout outside of training, checks, copies and casts to the type that is there compute nothing; shapes have one name."""
    graph = module.graph
    for node in list(graph.nodes):
        if (node.op == "call_module" and not node.users) or is_call(node, *CHECKS):
            graph.erase_node(node)
            continue
        x = node.args[0] if node.args else None
        if not isinstance(x, Node):
            continue
        off = is_call(node, *DROPOUTS) and (not node.args[2] or node.args[1] == 0)
        same = is_call(node, *CASTS) and kind_of_numbers(node) == kind_of_numbers(x) is not None
        if off or same or is_call(node, *COPIES):
            replace(node, x)
        elif is_call(node, aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # strides are no part of the function
        elif is_call(node, *TURNS):
            sized = torch.empty([*range(1, len(shape_of(x)) + 1)], device="meta")
            order = [size - 1 for size in node.target(sized, *node.args[1:], **node.kwargs).shape]
            replace(node, call_like(graph, node, aten.permute.default, x, order))
        elif is_call(node, *SHAPED):
            sizes = [size if isinstance(size, int) else -1 for size in shape_of(node)]
            if sizes.count(-1) <= 1:
                replace(node, call_like(graph, node, aten.reshape.default, x, sizes))


def fold_constants(module: GraphModule) -> None:
    """A call that reads only constants becomes a constant: relative position bias, chunks of a packed weight, W.t()."""
    tuples: dict[Node, Any] = {}  # calls that return a tuple, whose elements become constants
    for node in list(module.graph.nodes):
        reads = node.all_input_nodes
        is_known = all(is_constant(n) or n in tuples for n in reads)
        if node.op != "call_function" or not is_known or not (reads or is_call(node, *CREATORS)):
            continue
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags or is_call(node, aten.expand.default):
            continue  # drawn anew each time; a view of many elements that would have to be stored
        values = {n: tuples[n] if n in tuples else constant(module, n) for n in reads}
        value = node.target(*_filled(node.args, values), **_filled(node.kwargs, values))
        if isinstance(value, Tensor):
            replace(node, add_constant(module, f"folded_{node.name}", value, node))
        else:
            tuples[node] = value


def one_form(module: GraphModule) -> None:
    """Products as matmul, or as linear where the right operand is a constant matrix; core ATen's names undone."""
    for node in list(module.graph.nodes):
        if is_call(node, aten.einsum.default):
            _open_einsum(module, node)
        elif is_call(node, aten.addmm.default, aten.baddbmm.default):
            _open_addmm(module.graph, node)
        elif is_call(node, aten.addcmul.default):
            _open_addcmul(module.graph, node)
        elif is_call(node, aten.mm.default, aten.bmm.default):
            node.target = MATMUL
        elif is_call(node, LINEAR) and (not is_constant(node.args[1]) or _is_vector(module, node.args[1])):
            _open_linear(module, node)
        elif is_call(node, *PADDED):
            number_padding(module, node)
        elif is_call(node, *AVERAGES):
            plain_average(module.graph, node)
        elif is_call(node, aten.convolution.default):
            name_convolution(module.graph, node)
        elif is_call(node, aten._native_batch_norm_legit_no_training.default):
            _name_batch_norm(module.graph, node)
        elif is_call(node, aten.adaptive_max_pool2d.default):
            plain_maximum(module.graph, node)
        elif is_call(node, aten.rrelu.default) and not argument(node, 3, "training", False):  # whose slope is the mean of both
            slope = (argument(node, 1, "lower", 1 / 8) + argument(node, 2, "upper", 1 / 3)) / 2
            replace(node, call_like(module.graph, node, aten.leaky_relu.default, node.args[0], slope))
        elif is_call(node, aten.where.self):
            _drop_safety(node)
    fold_constants(module)
    for node in calls(module.graph, MATMUL):
        _matmul_to_linear(module, node)


def _matmul_to_linear(module: GraphModule, node: Node) -> None:
    """x @ W, with or without a constant added to it alone, and W @ x."""
    graph = module.graph
    x, weight = (list(back_through(cast(Node, a), {aten.expand.default}))[-1] for a in node.args[:2])
    left = is_constant(x)
    if left:
        x, weight = weight, x
    if is_constant(x) or not is_constant(weight) or constant(module, weight).ndim != 2 or len(shape_of(x)) == 1:
        return
    matrix = constant(module, weight) if left else constant(module, weight).t()
    weight = add_constant(module, f"{weight.target}_matrix", matrix, node)
    if left:
        turned = call_like(graph, node, LINEAR, call_like(graph, node, aten.transpose.int, x, -2, -1), weight)
        replace(node, call_like(graph, node, aten.transpose.int, turned, -2, -1))
        return
    after = next(iter(node.users)) if len(node.users) == 1 else node
    others = [a for a in after.args if a is not node] if is_call(after, aten.add.Tensor) and not after.kwargs else []
    bias = others[0] if others and is_constant(others[0]) else None
    if bias is not None and constant(module, cast(Node, bias)).shape == matrix.shape[:1]:
        linear = call_like(graph, after, LINEAR, x, weight, bias)
        linear.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        replace(after, linear)
        graph.erase_node(node)
    else:
        replace(node, call_like(graph, node, LINEAR, x, weight))


def _open_addmm(graph: Graph, node: Node) -> None:
    """beta * bias + alpha * (a @ b)."""
    bias, a, b = cast("tuple[Node, Node, Node]", node.args[:3])
    result = call_like(graph, node, MATMUL, a, b)
    result.meta["val"] = node.meta.get("val")
    if (alpha := node.kwargs.get("alpha", 1)) != 1:
        result = call_like(graph, node, aten.mul.Tensor, result, alpha)
    if (beta := node.kwargs.get("beta", 1)) != 1:
        bias = call_like(graph, node, aten.mul.Tensor, bias, beta)
    replace(node, call_like(graph, node, aten.add.Tensor, result, bias))


def _open_addcmul(graph: Graph, node: Node) -> None:
    """a + value * (b * c)."""
    a, b, c = cast("tuple[Node, Node, Node]", node.args[:3])
    result = call_like(graph, node, aten.mul.Tensor, b, c)
    result.meta["val"] = node.meta.get("val")
    alpha = {"alpha": node.kwargs["value"]} if node.kwargs.get("value", 1) != 1 else {}
    replace(node, call_like(graph, node, aten.add.Tensor, a, result, **alpha))


def _is_vector(module: GraphModule, node: Any) -> bool:
    return len(constant(module, node).shape if is_constant(node) else shape_of(node)) == 1


def _open_linear(module: GraphModule, node: Node) -> None:
    """A linear whose weight depends on the image is a product of two activations; one whose weight is a vector has no axis of
    outputs, and is the product with it.
    """
    graph, x, weight, bias = module.graph, node.args[0], node.args[1], argument(node, 2, "bias")
    columns = weight if _is_vector(module, weight) else call_like(graph, node, aten.transpose.int, weight, -2, -1)
    result = call_like(graph, node, MATMUL, x, columns)
    replace(node, result if bias is None else call_like(graph, node, aten.add.Tensor, result, bias))


def _open_einsum(module: GraphModule, node: Node) -> None:
    """An einsum of two tensors as a matmul of both, their letters brought in order; others stay as they are."""
    graph, operands = module.graph, list(cast("list[Node]", node.args[1]))
    terms, arrow, out = str(node.args[0]).replace(" ", "").partition("->")
    letters = terms.split(",")
    plain = len(operands) == 2 and arrow and "." not in terms and all(len(set(t)) == len(t) for t in letters)
    if not plain:
        return
    if is_constant(operands[0]) or any(is_call(n, *SOFTMAX) for n in back_through(operands[1], MOVES)):
        letters.reverse()  # weights stand on the right, attention maps on the left
        operands.reverse()
    a, b = letters
    shared = [x for x in a if x in b and x in out]
    inner = [x for x in a if x in b and x not in out]
    rows, columns = [x for x in a if x not in b], [x for x in b if x not in a]
    if not inner or not rows or not columns or set(rows + columns) - set(out):
        return
    size = {x: n if isinstance(n, int) else -1 for t, o in zip(letters, operands, strict=True) for x, n in _sizes(module, t, o)}
    left = _permuted(graph, node, operands[0], a, [*shared, *rows, *inner])
    left = _joined(graph, node, left, len(shared + rows), len(inner))
    right = _permuted(graph, node, operands[1], b, [*shared, *inner, *columns])
    right = _joined(graph, node, _joined(graph, node, right, len(shared), len(inner)), len(shared) + 1, len(columns))
    if shared:
        left = _joined(graph, node, left, len(shared), len(rows))
    product = call_like(graph, node, MATMUL, left, right)
    if len(columns) > 1:
        product = call_like(graph, node, aten.unflatten.int, product, -1, [size[x] for x in columns])
    if shared and len(rows) > 1:
        product = call_like(graph, node, aten.unflatten.int, product, len(shared), [size[x] for x in rows])
    replace(node, _permuted(graph, node, product, "".join([*shared, *rows, *columns]), list(out)))


def _sizes(module: GraphModule, letters: str, x: Node) -> list[tuple[str, Any]]:
    return list(zip(letters, constant(module, x).shape if is_constant(x) else shape_of(x), strict=True))


def _permuted(graph: Graph, origin: Node, x: Node, letters: str, target: list[str]) -> Node:
    order = [letters.index(letter) for letter in target]
    return x if order == sorted(order) else call_like(graph, origin, aten.permute.default, x, order)


def _joined(graph: Graph, origin: Node, x: Node, start: int, count: int) -> Node:
    """x with `count` dimensions from `start` on as one."""
    return x if count < 2 else call_like(graph, origin, aten.flatten.using_ints, x, start, start + count - 1)


def _name_batch_norm(graph: Graph, node: Node) -> None:
    first = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    if first and len(node.users) == 1:
        x, weight, bias, mean, var, momentum, eps = node.args
        whole = (x, weight, bias, mean, var, False, momentum, eps, False)
        replace(first[0], call_like(graph, node, BATCH_NORM, *whole))
        graph.erase_node(node)


def _drop_safety(node: Node) -> None:
    """where(all logits are -inf, 0, softmax) is the softmax when nothing has masked the logits."""
    condition, safe, probs = cast("tuple[Node, Node, Node]", node.args)
    if not is_call(probs, *SOFTMAX) or not is_call(safe, aten.full_like.default) or safe.args[1] != 0:
        return
    logits = cast(Node, probs.args[0])
    tests = {n for n in logits.users if is_call(n, aten.eq.Scalar) and n.args[1] == float("-inf")}
    product = list(back_through(logits, VIEWS))[-1]
    if is_call(product, MATMUL) and any(n in tests for n in _behind(condition)):
        replace(node, probs)


def _behind(node: Node) -> list[Node]:
    """The chain of first operands behind a condition."""
    chain = [node]
    while chain[-1].all_input_nodes and len(chain) < 8:
        chain.append(chain[-1].all_input_nodes[0])
    return chain


def _filled(arguments: Any, values: Mapping[Node, Any]) -> Any:
    return torch.fx.node.map_arg(arguments, lambda n: values[n])
