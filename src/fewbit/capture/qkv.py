"""One linear layer for queries, keys and values becomes three: no copy to take their results apart, and a scale for each.

On a ViT-S in onnxruntime the Split and the five-dimensional Transpose behind the joint layer took 7 % of the time.
"""

from __future__ import annotations

import operator
from typing import cast

from torch.fx import GraphModule, Node

from fewbit.core.fx import add_constant, argument, aten, call_like, calls, constant, is_call, is_constant, replace


def split_joint_linear(module: GraphModule) -> None:
    """linear -> reshape (b, t, parts, heads, d) -> permute (2, 0, 3, 1, 4) -> unbind: one linear per part, the same values."""
    for unbind in calls(module.graph, aten.unbind.int):
        joint = _joint(module, unbind)
        if joint is None:
            continue
        linear, reshape, parts = joint
        weight, bias = cast(Node, linear.args[1]), argument(linear, 2, "bias")
        w = constant(module, weight).chunk(parts)
        b = None if bias is None else constant(module, bias).chunk(parts)
        batch, tokens, _, heads, width = cast("list[object]", reshape.args[1])
        for part in list(unbind.users):
            i = cast(int, part.args[1])
            rows = add_constant(module, f"{weight.target}_{i}", w[i], linear)
            shift = None if b is None else add_constant(module, f"{cast(Node, bias).target}_{i}", b[i], linear)
            product = call_like(module.graph, linear, aten.linear.default, linear.args[0], rows, shift)
            spread = call_like(module.graph, reshape, aten.reshape.default, product, [batch, tokens, heads, width])
            turned = call_like(module.graph, part, aten.permute.default, spread, [0, 2, 1, 3])
            replace(part, turned)


def _joint(module: GraphModule, unbind: Node) -> tuple[Node, Node, int] | None:
    """The linear, the reshape and the number of parts behind an unbind; None where the pattern is another one."""
    permute = cast(Node, unbind.args[0])
    if argument(unbind, 1, "dim", 0) != 0 or not all(is_call(user, operator.getitem) for user in unbind.users):
        return None
    if not is_call(permute, aten.permute.default) or list(cast("list[int]", permute.args[1])) != [2, 0, 3, 1, 4]:
        return None
    reshape = cast(Node, permute.args[0])
    if not is_call(reshape, aten.reshape.default, aten.view.default) or len(cast("list[object]", reshape.args[1])) != 5:
        return None
    linear = cast(Node, reshape.args[0])
    alone = all(len(node.users) == 1 for node in (linear, reshape, permute))
    if not alone or not is_call(linear, aten.linear.default) or not is_constant(linear.args[1]):
        return None
    bias = argument(linear, 2, "bias")
    parts, heads, width = cast("list[object]", reshape.args[1])[2:]
    rows = constant(module, cast(Node, linear.args[1])).shape[0]
    if not all(isinstance(v, int) for v in (parts, heads, width)) or rows != parts * heads * width:  # type: ignore[operator]
        return None
    return (linear, reshape, cast(int, parts)) if bias is None or is_constant(bias) else None
