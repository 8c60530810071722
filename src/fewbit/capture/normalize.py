"""Rewrites that leave the float function unchanged and make a graph easy to read.

Each is one function from graph to graph; `normalize` lists them in order. A rewrite recognises structure, never names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fewbit.capture.canonicalize import (
    BATCH_NORM,
    LINEAR,
    drop_identities,
    drop_writes,
    fold_constants,
    one_form,
)
from fewbit.capture.patches import patches_to_linear
from fewbit.capture.qkv import split_joint_linear
from fewbit.capture.repeats import compute_once
from fewbit.capture.spelling import name_what_is_written_out
from fewbit.capture.unchanged import drop_neutral, drop_round_trips
from fewbit.core.fx import (
    SCALINGS,
    VIEWS,
    add_constant,
    argument,
    aten,
    back_through,
    call_like,
    calls,
    constant,
    finish,
    is_call,
    is_constant,
    replace,
    shape_of,
)

CONVS = (aten.conv2d.default, aten.conv1d.default)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
ARITHMETIC = (
    *SCALINGS,
    aten.neg.default,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.rsub.Tensor,
)
SDPA = aten.scaled_dot_product_attention.default
TURNS = (aten.transpose.int, aten.permute.default)
# what passes truth on: true everywhere where its operands are
TRUTH: set[Callable[..., Any]] = {aten.expand.default, aten.bitwise_and.Tensor, aten.logical_and.default, *VIEWS}


def normalize(module: GraphModule) -> GraphModule:
    """All rewrites, in place, in the order that lets one see what the one before has uncovered."""
    opened(module)
    fold_batch_norm(module)
    fold_channel_constants(module)
    patches_to_linear(module)
    split_joint_linear(module)
    drop_round_trips(module)
    compute_once(module)
    return finish(module)


def opened(module: GraphModule) -> None:
    """The rewrites that open what is written as one call, in place; batch norms still stand, with their statistics."""
    drop_writes(module)
    drop_identities(module)
    fold_constants(module)
    drop_neutral(module)
    drop_round_trips(module)
    one_form(module)
    name_what_is_written_out(module)
    open_attention(module)


def open_attention(module: GraphModule) -> None:
    """scaled_dot_product_attention into matmul, softmax, matmul; the scale goes on the queries, which are fewer.

    A query that a mask leaves no key has zeros, as torch gives them.
    """
    graph = module.graph
    for node in calls(graph, SDPA):
        q, k, v = cast("tuple[Node, Node, Node]", node.args[:3])
        mask, seeing, blind = argument(node, 3, "attn_mask"), None, None
        if mask is not None:  # an addition broadcasts anyway
            mask = list(back_through(mask, {aten.expand.default}))[-1]
        if argument(node, 5, "is_causal", False):
            mask = _causal_mask(module, node, q, k)
        elif is_constant(mask):
            mask, seeing = _additive(module, node, mask)
        if mask is node:
            continue
        if node.kwargs.get("enable_gqa"):
            repeats = shape_of(q)[-3] // shape_of(k)[-3]
            k, v = (_repeated(module, node, x, repeats) for x in (k, v))
        scale = node.kwargs.get("scale")
        scale = 1 / math.sqrt(shape_of(q)[-1]) if scale is None else float(cast(float, scale))
        scaled = call_like(graph, node, aten.mul.Tensor, q, scale)
        keys = call_like(graph, node, aten.transpose.int, k, -2, -1)
        logits = call_like(graph, node, aten.matmul.default, scaled, keys)
        if mask is not None and not is_constant(mask) and mask.meta["val"].dtype == torch.bool:
            if not _always_true(module, mask):
                hidden, blind = _hidden(module, node, mask)
                logits = call_like(graph, node, aten.masked_fill.Scalar, logits, hidden, float("-inf"))
        elif mask is not None:
            if not is_constant(mask) and _reads_minus_infinity(module, mask):
                shown = call_like(graph, node, aten.gt.Scalar, mask, float("-inf"))
                _, blind = _hidden(module, node, shown)
                mask = call_like(graph, node, aten.masked_fill.Scalar, mask, blind, 0.0)
            logits = call_like(graph, node, aten.add.Tensor, logits, mask)
        probs = call_like(graph, node, aten.softmax.int, logits, -1)
        mixed = call_like(graph, node, aten.matmul.default, probs, v)
        if blind is not None:
            mixed = call_like(graph, node, aten.masked_fill.Scalar, mixed, blind, 0.0)
        replace(node, mixed if seeing is None else call_like(graph, node, aten.mul.Tensor, mixed, seeing))


def fold_batch_norm(module: GraphModule) -> None:
    """Batch norm into the convolution or linear before it; alone, it becomes a multiplication and an addition."""
    for node in calls(module.graph, BATCH_NORM):
        x = cast(Node, node.args[0])
        tensors = node.args[1:5]
        if node.args[5] or not all(n is None or is_constant(n) for n in tensors) or None in tensors[2:]:
            continue  # statistics of the batch itself: not a fixed function
        weight, bias, mean, var = (None if n is None else constant(module, cast(Node, n)).double() for n in tensors)
        assert mean is not None
        assert var is not None
        scale = torch.rsqrt(var + cast(float, node.args[7])) * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        product = _product_before(module, x, channels=len(scale), axis=1)
        if product is not None:
            _scale_product(module, product, scale, shift)
            replace(node, x)
            continue
        shape = [1, -1] + [1] * (len(shape_of(node)) - 2)
        factor = add_constant(module, f"{node.name}_scale", scale.float().view(shape), node)
        offset = add_constant(module, f"{node.name}_shift", shift.float().view(shape), node)
        scaled = call_like(module.graph, node, aten.mul.Tensor, x, factor)
        replace(node, call_like(module.graph, node, aten.add.Tensor, scaled, offset))


def fold_channel_constants(module: GraphModule) -> None:
    """What constants alone do to each channel of a product goes into its weights and bias: LayerScale (DINOv2, CaiT), and a
    batch norm written as arithmetic (torchvision's detectors, DETR). Per-channel weight scales absorb a factor, so nothing is
    lost. One number for all channels goes into a convolution; behind a linear it is the scale of attention, and stays.
    """
    _drop_spreading(module)
    for node in calls(module.graph, *ARITHMETIC):
        x, scale, shift = _affine(module, node)
        if x is None or not all(bool(torch.isfinite(n).all()) for n in (scale, shift)):
            continue
        dimensions, c = len(shape_of(x)), scale if scale.numel() > 1 else shift
        along = [dimensions - c.ndim + i for i, n in enumerate(c.shape) if n > 1]
        if c.ndim > dimensions or len(along) > 1:
            continue
        product = _product_before(module, x, channels=c.numel(), axis=along[0] if along else None)
        if product is not None:
            _scale_product(module, product, scale.flatten(), shift.flatten())
            replace(node, x)


def _affine(module: GraphModule, node: Node) -> tuple[Node | None, Tensor, Tensor]:
    """x, factor and summand (float64) of a multiplication, division, addition or subtraction of x and a constant; no x where
    it is of anything else.
    """
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    alpha: Any = node.kwargs.get("alpha", 1)
    if is_call(node, aten.neg.default):
        return cast(Node, node.args[0]), -one, zero
    a, b = (*node.args, None)[:2]
    x, other = (b, a) if is_constant(a) else (a, b)
    known = isinstance(other, int | float) or is_constant(other)
    numbers = isinstance(alpha, int | float) and not set(node.kwargs) - {"alpha"} and len(node.args) == 2
    if not isinstance(x, Node) or is_constant(x) or not known or not numbers:
        return None, one, zero
    c = constant(module, other).double() if isinstance(other, Node) else torch.tensor(other, dtype=torch.float64)
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        return x, c, zero
    if is_call(node, aten.div.Tensor, aten.div.Scalar):
        return (x, 1 / c, zero) if x is a else (None, one, zero)
    left, right = 1 * one, alpha * one  # how often each operand is added
    if is_call(node, aten.sub.Tensor, aten.sub.Scalar):
        right = -alpha * one
    elif is_call(node, aten.rsub.Scalar, aten.rsub.Tensor):
        left, right = -alpha * one, one
    return (x, left, right * c) if x is a else (x, right, left * c)


def _drop_spreading(module: GraphModule) -> None:
    """x * c.expand_as(x) as x * c: arithmetic with a tensor of the whole shape spreads a constant by itself."""
    for node in calls(module.graph, *ARITHMETIC):
        shape = list(map(str, shape_of(node)))  # as text: comparing symbols would guard on them
        for operand in node.all_input_nodes:
            behind = list(back_through(operand, {aten.expand.default, aten.expand_as.default}))[-1]
            whole = [n for n in node.all_input_nodes if n is not operand and list(map(str, shape_of(n))) == shape]
            if behind is not operand and is_constant(behind) and whole:
                node.replace_input_with(operand, behind)
    module.graph.eliminate_dead_code()


def _causal_mask(module: GraphModule, node: Node, q: Node, k: Node) -> Node:
    """-inf above the diagonal, as a constant; the node itself where the number of tokens is not fixed."""
    sizes = shape_of(q)[-2], shape_of(k)[-2]
    if not all(isinstance(size, int) for size in sizes):
        return node
    return add_constant(module, f"{node.name}_mask", torch.full(sizes, float("-inf")).triu(1), node)


def _additive(module: GraphModule, node: Node, mask: Node) -> tuple[Node | None, Node | None]:
    """A constant mask as numbers to add, None for one that hides nothing; and what the results of queries are multiplied with
    where some see no key (torch gives 0 for these, a softmax NaN): (..., queries, 1), of ones and zeros.
    """
    value, seeing = constant(module, mask), None
    if new := value.dtype == torch.bool:
        value = torch.zeros(value.shape).masked_fill(~value, float("-inf"))
    blind = (value == float("-inf")).all(-1, keepdim=True)
    if bool(blind.any()):
        new, value = True, value.masked_fill(blind, 0.0)
        seeing = add_constant(module, f"{node.name}_seeing", torch.logical_not(blind).float(), node)
    if new:
        mask = add_constant(module, f"{mask.target}_to_add", value, node)
    return mask if bool(value.any()) else None, seeing


def _hidden(module: GraphModule, node: Node, mask: Node) -> tuple[Node, Node]:
    """Of a mask that the image decides, true where a key is seen: which keys are hidden from queries that see one, and which
    queries see none: (..., queries, 1).
    """
    graph = module.graph
    sees = call_like(graph, node, aten.any.dim, mask, -1, True)
    hidden = call_like(graph, node, aten.logical_and.default, call_like(graph, node, aten.logical_not.default, mask), sees)
    return hidden, call_like(graph, node, aten.logical_not.default, sees)


def _reads_minus_infinity(module: GraphModule, mask: Node) -> bool:
    """Whether minus infinity stands somewhere in what a mask is computed from, so that it may hide a key."""
    seen, waiting = set[Node](), [mask]
    while waiting:
        node = waiting.pop()
        seen.add(node)
        if any(isinstance(one, float) and one == float("-inf") for one in (*node.args, *node.kwargs.values())):
            return True
        if is_constant(node) and bool((constant(module, node) == float("-inf")).any()):
            return True
        waiting.extend(one for one in node.all_input_nodes if one not in seen)
    return False


def _always_true(module: GraphModule, mask: Node) -> bool:
    """A comparison that holds for every image: a counter from 0 on (the batch's or the tokens') is at least 0."""
    if is_constant(mask):
        return bool(constant(module, mask).all())
    if is_call(mask, *TRUTH):
        return all(_always_true(module, n) for n in mask.args if isinstance(n, Node) and n is not mask)
    if not is_call(mask, aten.ge.Scalar):
        return False
    counter = list(back_through(cast(Node, mask.args[0]), {*VIEWS, aten.expand.default}))[-1]
    least = cast(float, mask.args[1])
    if is_constant(counter):
        return bool((constant(module, counter) >= least).all())
    return is_call(counter, aten.arange.default) and least <= 0


def _repeated(module: GraphModule, origin: Node, x: Node, repeats: int) -> Node:
    """(..., heads, tokens, width) with each head `repeats` times in a row."""
    axis = len(shape_of(x)) - 3
    x = call_like(module.graph, origin, aten.unsqueeze.default, x, axis + 1)
    sizes = [-1] * (axis + 1) + [repeats, -1, -1]
    x = call_like(module.graph, origin, aten.expand.default, x, sizes)
    return call_like(module.graph, origin, aten.flatten.using_ints, x, axis, axis + 1)


def _product_before(module: GraphModule, x: Node, *, channels: int, axis: int | None) -> Node | None:
    """The linear or convolution whose output channels are dimension `axis` of x, with nothing but x made of its result; for
    an axis of None a convolution, whatever has become of its channels.
    """
    place = axis
    while len(x.users) == 1 and is_call(x, *VIEWS, *TURNS) and (axis is None or place is not None):
        behind = cast(Node, x.args[0])
        place = None if place is None else _axis_behind(x, behind, place)
        x = behind
    if len(x.users) != 1 or not is_call(x, LINEAR, *CONVS, *TRANSPOSED) or not is_constant(x.args[1]):
        return None
    if axis is None:
        return None if is_call(x, LINEAR) else x
    weight = constant(module, cast(Node, x.args[1]))
    own = weight.shape[1] * argument(x, 6, "groups", 1) if is_call(x, *TRANSPOSED) else weight.shape[0]
    return x if own == channels and place == (len(shape_of(x)) - 1 if is_call(x, LINEAR) else 1) else None


def _axis_behind(view: Node, behind: Node, axis: int) -> int | None:
    """Which dimension of `behind` is dimension `axis` of a view; None where it was cut or merged, or its shape is unknown."""
    after, before = shape_of(view), shape_of(behind)
    if not after:
        return None
    if is_call(view, *TURNS):  # which keep the number of dimensions, also of what a rewrite left no shape
        order = list(range(len(after)))
        if is_call(view, aten.permute.default):
            order = [d % len(after) for d in cast("list[int]", view.args[1])]
        else:
            a, b = (cast(int, d) % len(after) for d in view.args[1:3])
            order[a], order[b] = order[b], order[a]
        return order[axis]
    for place in range(len(before)):  # the same size, and as many elements between two steps along it
        ahead = (*before[place + 1 :], *after[axis + 1 :])
        if not all(isinstance(n, int) for n in (before[place], after[axis], *ahead)):
            continue
        if before[place] == after[axis] and math.prod(before[place + 1 :]) == math.prod(after[axis + 1 :]):
            return place
    return None


def _scale_product(module: GraphModule, product: Node, scale: Tensor, shift: Tensor) -> None:
    """Replace W, b by scale W, scale b + shift, (channels,) or (1,) in float64; the old tensors may have other readers."""
    weight = constant(module, cast(Node, product.args[1]))
    old = argument(product, 2, "bias")
    if is_call(product, *TRANSPOSED):  # (inputs, channels of a group, ...), the groups one behind the other
        groups = argument(product, 6, "groups", 1)
        channels = weight.shape[1] * groups
        rows = weight.double().unflatten(0, (groups, -1)) * scale.expand(channels).view(groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = rows.flatten(0, 1)
    else:
        channels, scaled = len(weight), weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
    shifted = shift.expand(channels) if old is None else constant(module, old).double() * scale + shift
    name = cast(Node, product.args[1]).target
    arguments = list(product.args) + [None] * (3 - len(product.args))
    arguments[1] = add_constant(module, f"{name}_folded", scaled.to(weight.dtype), product)
    if old is not None or bool(shifted.any()):
        arguments[2] = add_constant(module, f"{name}_folded_bias", shifted.to(weight.dtype), product)
    product.args = tuple(arguments)
    product.kwargs = {key: value for key, value in product.kwargs.items() if key != "bias"}
