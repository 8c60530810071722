"""Convolutions and average poolings in one form, which every runtime computes alike: padding in numbers, the names that
torch.export gives, windows that divide by what lies in them.
"""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any, cast

from torch.fx import Graph, GraphModule, Node

from fewbit.core.fx import argument, aten, call_like, constant, is_constant, replace, shape_of

PADDED = {  # a convolution whose padding is a word -> the one whose padding is numbers
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
AVERAGES = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}  # and their dimensions


def number_padding(module: GraphModule, node: Node) -> None:
    """padding="same" or "valid" in numbers, as many on both sides; one more behind an even kernel is a padding of its own."""
    x, weight = cast("tuple[Node, Node]", node.args[:2])
    kernel = (constant(module, weight).shape if is_constant(weight) else shape_of(weight))[2:]
    dilation = each(argument(node, 5, "dilation", 1), len(kernel))
    same = argument(node, 4, "padding", "valid") == "same"
    total = [step * (size - 1) if same else 0 for step, size in zip(dilation, kernel, strict=True)]
    if any(n % 2 for n in total):
        x = call_like(module.graph, node, aten.pad.default, x, [n for t in reversed(total) for n in (0, t % 2)])
    bias, stride, groups = (
        argument(node, 2, "bias"),
        each(argument(node, 3, "stride", 1), len(kernel)),
        argument(node, 6, "groups", 1),
    )
    node.args = (x, weight, bias, stride, [t // 2 for t in total], dilation, groups)
    node.target, node.kwargs = PADDED[cast(Any, node.target)], {}


def name_convolution(graph: Graph, node: Node) -> None:
    """aten.convolution, which is every convolution of a decomposed program, by its own name."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    convs = {3: aten.conv1d.default, 4: aten.conv2d.default}
    target = convs.get(len(shape_of(node)))
    if not transposed and target is not None:
        replace(node, call_like(graph, node, target, x, weight, bias, stride, padding, dilation, groups))


def plain_average(graph: Graph, node: Node) -> None:
    """An average pooling whose windows divide by a number of the author's, or hang over the border and count the padding.

    torch.onnx forgets the number; onnxruntime's integer kernel and openvino count what hangs over. With the padding in front of
    it a window divides by the elements in it, which all of them do.
    """
    target = cast(Any, node.target)
    dimensions = AVERAGES[target]
    x, kernel = cast(Node, node.args[0]), each(node.args[1], dimensions)
    stride, padding = argument(node, 2, "stride", None) or kernel, each(argument(node, 3, "padding", 0), dimensions)
    counted, divisor = argument(node, 5, "count_include_pad", True), argument(node, 6, "divisor_override")
    sizes = zip(shape_of(x)[-dimensions:], shape_of(node)[-dimensions:], kernel, each(stride, dimensions), padding, strict=True)
    needed = [(m - 1) * s + k - n - p for n, m, k, s, p in sizes]  # so much behind the image makes every window whole
    over = any(n > p for n, p in zip(needed, padding, strict=True))
    apart = divisor is not None or (over and counted and any(padding))
    if apart:
        behind = needed if divisor is not None else list(map(min, needed, padding))
        ends = [n for pair in zip(reversed(padding), reversed(behind), strict=True) for n in pair]
        x = call_like(graph, node, aten.pad.default, x, ends) if any(ends) else x
        padding, over, counted = [0] * dimensions, over and divisor is None, False
    pool = call_like(graph, node, target, x, kernel, stride, padding, over, counted and any(padding))
    if divisor is not None:
        pool.meta["val"] = node.meta.get("val")
        pool = call_like(graph, node, aten.mul.Tensor, pool, math.prod(kernel) / divisor)
    replace(node, pool)


def plain_maximum(graph: Graph, node: Node) -> None:
    """An adaptive maximum, of which nothing reads the places, with its windows in numbers: one pooling where all of them are of
    one size and as far apart, else the maximum of each row of windows, and of each column in it.
    """
    x, wanted = cast(Node, node.args[0]), each(node.args[1], 2)
    sizes, values = shape_of(x)[-2:], list(node.users)
    if not all(isinstance(n, int) for n in sizes) or any(
        user.target is not operator.getitem or user.args[1] for user in values
    ):
        return
    windows = [[(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in zip(sizes, wanted, strict=True)]
    lengths = [{last - first for first, last in one} for one in windows]
    steps = [{b[0] - a[0] for a, b in itertools.pairwise(one)} or {1} for one in windows]
    if all(len(found) == 1 for found in (*lengths, *steps)):
        kernel, stride = ([found.pop() for found in one] for one in (lengths, steps))
        result = call_like(graph, node, aten.max_pool2d.default, x, kernel, stride)
    else:
        result = x
        for dim, one in zip((-2, -1), windows, strict=True):
            cuts = [call_like(graph, node, aten.slice.Tensor, result, dim, *ends) for ends in one]
            result = call_like(
                graph, node, aten.cat.default, [call_like(graph, node, aten.amax.default, c, [dim], True) for c in cuts], dim
            )
    for user in values:
        replace(user, result)
    graph.erase_node(node)


def each(numbers: Any, dimensions: int) -> list[int]:
    """A number for each dimension, where one number or a list of one stands for all."""
    listed = list(numbers) if isinstance(numbers, list | tuple) else [numbers]
    return listed * dimensions if len(listed) == 1 else listed
