"""Rewrites that leave the float function unchanged and make a graph easy to read.

Each is one function from graph to graph; `normalize` lists them in order. A rewrite recognises structure, never names.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fewbit.capture.rewrite import (
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
)

LINEAR = aten.linear.default
CONVS = (aten.conv2d.default, aten.conv1d.default, aten.conv2d.padding, aten.conv1d.padding)
SDPA = aten.scaled_dot_product_attention.default
BATCH_NORM = aten.batch_norm.default


def normalize(module: GraphModule) -> GraphModule:
    """All rewrites, in place, in the order that lets one see what the one before has uncovered."""
    drop_identities(module)
    fold_constants(module)
    products_to_linear(module)
    open_attention(module)
    fold_batch_norm(module)
    fold_channel_scale(module)
    return finish(module)


def drop_identities(module: GraphModule) -> None:
    """Dropout outside of training, guards, detach and alias compute nothing."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)
        elif is_call(node, aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default):
            if not node.args[2]:
                replace(node, cast(Node, node.args[0]))
        elif is_call(node, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default):
            replace(node, cast(Node, node.args[0]))


def fold_constants(module: GraphModule) -> None:
    """A call that reads only constants becomes a constant: relative position bias, concatenated qkv bias, W.t()."""
    for node in list(module.graph.nodes):
        reads = node.all_input_nodes
        if node.op != "call_function" or not reads or not all(is_constant(n) for n in reads):
            continue
        if is_call(node, aten.expand.default, aten.unbind.int, aten.split.Tensor, aten.chunk.default):
            continue  # a view of many elements, or several tensors: cheaper to leave
        read = {n: constant(module, n) for n in reads}
        args = torch.fx.node.map_arg(node.args, lambda n: read[n])
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: read[n])
        value = node.target(*args, **kwargs)
        if isinstance(value, Tensor):
            replace(node, add_constant(module, f"folded_{node.name}", value, node))


def products_to_linear(module: GraphModule) -> None:
    """addmm and matmul with a constant matrix on the right become linear: one kind of op for one kind of work."""
    for node in calls(module.graph, aten.addmm.default, aten.matmul.default, aten.mm.default):
        bias, x, weight = cast("tuple[Node | None, Node, Node]", node.args if len(node.args) == 3 else (None, *node.args))
        if not is_constant(weight) or is_constant(x) or constant(module, weight).ndim != 2:
            continue
        if bias is not None and (not is_constant(bias) or constant(module, bias).ndim != 1):
            continue
        transposed = add_constant(module, f"{weight.target}_t", constant(module, weight).t(), node)
        replace(node, call_like(module.graph, node, LINEAR, x, transposed, bias))


def open_attention(module: GraphModule) -> None:
    """scaled_dot_product_attention into matmul, softmax, matmul; the scale goes on the queries, which are fewer."""
    graph = module.graph
    for node in calls(graph, SDPA):
        q, k, v = cast("tuple[Node, Node, Node]", node.args[:3])
        mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
        scale = node.kwargs.get("scale")
        if causal or node.kwargs.get("enable_gqa"):
            continue  # no vision model here needs it; it stays one float op and sites.py reports it
        if scale is None:
            scale = 1 / math.sqrt(q.meta["val"].shape[-1])
        scaled = call_like(graph, node, aten.mul.Tensor, q, float(cast(float, scale)))
        keys = call_like(graph, node, aten.transpose.int, k, -2, -1)
        logits = call_like(graph, node, aten.matmul.default, scaled, keys)
        if mask is not None:
            kind = constant(module, mask).dtype if is_constant(mask) else mask.meta["val"].dtype
            if kind == torch.bool:
                mask = call_like(graph, node, aten.logical_not.default, mask)
                logits = call_like(graph, node, aten.masked_fill.Scalar, logits, mask, float("-inf"))
            else:
                logits = call_like(graph, node, aten.add.Tensor, logits, mask)
        probs = call_like(graph, node, aten.softmax.int, logits, -1)
        replace(node, call_like(graph, node, aten.matmul.default, probs, v))


def fold_batch_norm(module: GraphModule) -> None:
    """Batch norm into the convolution or linear before it; alone, it becomes a multiplication and an addition."""
    for node in calls(module.graph, BATCH_NORM):
        x = cast(Node, node.args[0])
        weight, bias, mean, var = (constant(module, n) if n is not None else None for n in node.args[1:5])
        if node.args[5] or mean is None or var is None:
            continue  # statistics of the batch itself: not a fixed function
        scale = torch.rsqrt(var.double() + cast(float, node.args[7])) * (1 if weight is None else weight.double())
        shift = (0 if bias is None else bias.double()) - mean.double() * scale
        product = _product_before(module, x, channels=len(scale), axis=1)
        if product is not None:
            _scale_product(module, product, scale, shift)
            replace(node, x)
            continue
        shape = [1, -1] + [1] * (node.meta["val"].ndim - 2)
        factor = add_constant(module, f"{node.name}_scale", scale.float().view(shape), node)
        offset = add_constant(module, f"{node.name}_shift", shift.float().view(shape), node)
        scaled = call_like(module.graph, node, aten.mul.Tensor, x, factor)
        replace(node, call_like(module.graph, node, aten.add.Tensor, scaled, offset))


def fold_channel_scale(module: GraphModule) -> None:
    """A multiplication by one constant per output channel right after a product (LayerScale) goes into its weights.

    Per-channel weight steps absorb the factor, so nothing is lost; DINOv2, CaiT and DeiT-3 have it.
    """
    for node in calls(module.graph, aten.mul.Tensor):
        if len(node.args) != 2 or not all(isinstance(a, Node) for a in node.args):
            continue
        x, factor = cast("tuple[Node, Node]", node.args if is_constant(node.args[1]) else node.args[::-1])
        if not is_constant(factor) or is_constant(x) or len(x.users) != 1:
            continue
        gamma = constant(module, factor)
        axis = 1 if is_call(x, *CONVS) else -1
        channels = gamma.numel()
        aligned = gamma.ndim == 1 if axis == -1 else gamma.shape[-2:].numel() == 1 and gamma.ndim >= 3
        product = _product_before(module, x, channels=channels, axis=axis) if aligned else None
        if product is not None:
            _scale_product(module, product, gamma.double().flatten(), torch.zeros(channels, dtype=torch.float64))
            replace(node, x)


def _product_before(module: GraphModule, x: Node, *, channels: int, axis: int) -> Node | None:
    """The linear or convolution whose output channels are dimension `axis` of x, read by x alone."""
    if len(x.users) != 1:
        return None
    behind = list(back_through(x, VIEWS))
    product = behind[-1]
    if not is_call(product, LINEAR, *CONVS):
        return None
    weight = product.args[1]
    if not is_constant(weight) or constant(module, cast(Node, weight)).shape[0] != channels:
        return None
    if len(behind) > 1:  # through views only when channels are last throughout, as in LeViT's linear + batch norm
        last = all(n.meta["val"].shape[-1] == channels for n in behind)
        channels_last = axis == -1 or x.meta["val"].ndim == 2
        return product if is_call(product, LINEAR) and last and channels_last else None
    if is_call(product, LINEAR):
        return product if axis == -1 or x.meta["val"].ndim == 2 else None
    return product if axis == 1 else None


def _scale_product(module: GraphModule, product: Node, scale: Tensor, shift: Tensor) -> None:
    """Replace W, b by scale W, scale b + shift, computed in float64; the old tensors may have other readers."""
    weight = constant(module, cast(Node, product.args[1]))
    bias = constant(module, cast(Node, product.args[2])) if len(product.args) > 2 and product.args[2] is not None else None
    scaled = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
    shifted = shift if bias is None else bias.double() * scale + shift
    name = cast(Node, product.args[1]).target
    arguments = list(product.args) + [None] * (3 - len(product.args))
    arguments[1] = add_constant(module, f"{name}_folded", scaled.to(weight.dtype), product)
    if bias is not None or bool(shifted.any()):
        arguments[2] = add_constant(module, f"{name}_folded_bias", shifted.to(weight.dtype), product)
    product.args = tuple(arguments)
