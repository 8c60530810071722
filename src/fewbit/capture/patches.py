"""A convolution over patches that do not overlap is a linear layer on each patch: the stem of a vision transformer.

As a linear layer its result may stay float. As a convolution it would have to be quantized in runtimes whose integer
convolution gives codes only (onnxruntime), and that one tensor is the start of the residual stream: on a ViT-S/14 of the
DINOv2 kind it made a third of the whole divergence at 8 bits.
"""

from __future__ import annotations

from typing import cast

from torch.fx import GraphModule, Node

from fewbit.core.fx import add_constant, argument, aten, call_like, calls, constant, is_call, is_constant, replace, shape_of


def patches_to_linear(module: GraphModule) -> None:
    """conv(stride = kernel) behind which channels go last -> reshape, permute, linear; the values are the same."""
    for conv in calls(module.graph, aten.conv2d.default):
        tokens = _channels_last(conv)
        if tokens is None or not _tiles(module, conv):
            continue
        x, weight = cast("tuple[Node, Node]", conv.args[:2])
        bias = argument(conv, 2, "bias")
        w = constant(module, weight)
        ph, pw = w.shape[2:]
        channels, height, width = (int(s) for s in x.meta["val"].shape[1:])  # int() of the batch would fix it

        rows, columns = height // ph, width // pw
        shape = [rows * columns] if is_call(tokens, aten.transpose.int) else [rows, columns]
        graph = module.graph
        tiles = call_like(graph, conv, aten.reshape.default, x, [-1, channels, rows, ph, columns, pw])
        turned = call_like(graph, conv, aten.permute.default, tiles, [0, 2, 4, 1, 3, 5])
        flat = call_like(graph, conv, aten.reshape.default, turned, [-1, *shape, channels * ph * pw])
        matrix = add_constant(module, f"{weight.target}_matrix", w.flatten(1), conv)
        replace(tokens, call_like(graph, conv, aten.linear.default, flat, matrix, bias))


def _channels_last(conv: Node) -> Node | None:
    """The node that puts channels last, a transposition behind flat maps or permute(0, 2, 3, 1); no one else may read."""
    users = list(conv.users)
    if len(users) != 1:
        return None
    if is_call(users[0], aten.permute.default) and list(cast("list[int]", users[0].args[1])) == [0, 2, 3, 1]:
        return users[0]
    flat = users[0]
    if _is_flat(flat, conv) and len(flat.users) == 1:
        turned = next(iter(flat.users))
        if is_call(turned, aten.transpose.int) and set(turned.args[1:]) in ({1, 2}, {-1, -2}, {1, -1}):
            return turned
    return None


def _is_flat(node: Node, conv: Node) -> bool:
    """Whether a node joins the two places of a convolution's maps: flatten(2), or a reshape that does the same."""
    if not is_call(node, aten.flatten.using_ints, aten.reshape.default, aten.view.default):
        return False
    maps, joined = shape_of(conv), shape_of(node)
    return len(maps) == 4 and len(joined) == 3 and joined[1:] == (maps[1], maps[2] * maps[3])


def _tiles(module: GraphModule, conv: Node) -> bool:
    """Kernel = stride, no padding, no dilation, one group, and the image is a whole number of patches."""
    x, weight = cast("tuple[Node, Node]", conv.args[:2])
    if not is_constant(weight) or "val" not in x.meta:
        return False
    kernel = tuple(constant(module, weight).shape[2:])
    stride, padding = (tuple(argument(conv, *where)) for where in ((3, "stride", (1, 1)), (4, "padding", (0, 0))))
    dilation, groups = argument(conv, 5, "dilation", (1, 1)), argument(conv, 6, "groups", 1)
    height, width = x.meta["val"].shape[-2:]
    if not isinstance(height, int) or not isinstance(width, int):
        return False
    stride, padding = (v * 2 if len(v) == 1 else v for v in (stride, padding))
    plain = set(padding) == {0} and set(dilation) == {1} and groups == 1
    return plain and stride == kernel and kernel != (1, 1) and height % kernel[0] == 0 and width % kernel[1] == 0
