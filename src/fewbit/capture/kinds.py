"""The kinds of op that can run in integers, in one table: how each is found, what it reads, which kernels it becomes.

Roles come from what a tensor is, not from what a library calls it: the left operand of a product that is a softmax is
`probs`, the two operands of the product that feeds a softmax are `query` and `key`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch.fx import GraphModule, Node

from fewbit.capture.canonicalize import LINEAR, MATMUL, SOFTMAX
from fewbit.capture.normalize import CONVS
from fewbit.core.fx import MOVES, SCALINGS, argument, aten, constant, is_call, is_constant, reached

ADDS = (aten.add.Tensor,)
POOLS = (aten.adaptive_avg_pool2d.default,)
MAX_POOLS = (aten.max_pool2d.default,)  # of codes that grow with the value: the largest is one of them
CONCATS = (aten.cat.default,)
# what a runtime folds into the product before it, so that the product's output is the tensor behind it
PADS = (aten.pad.default, aten.constant_pad_nd.default)
CLAMPS = (
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
)
# what stands between a product and the softmax of its logits
LOGIT_PATH: set[Callable[..., Any]] = {
    *ADDS,
    *SCALINGS,
    aten.sub.Tensor,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    *MOVES,
}


@dataclass(frozen=True)
class OpKind:
    """One kind of op.

    matches     whether a node of a module is one; no node is of two kinds
    operands    the names that a target may list, in the order of what is read; `input` stands for `input1`, `input2`, ... too
    reads       operand -> node, of the tensors that a node reads
    output      whether the result may be codes: those of the node, or of the clamp that alone reads it
    product     sums of products; `weighted`: of an activation and a constant weight, with a bias
    onnx        the ONNX operators that compute it, first the one that fewbit writes
    kernels     what onnxruntime's optimised graph calls its integer kernels
    attributes  numbers that decide its time beside the shapes of what it reads
    """

    name: str
    matches: Callable[[GraphModule, Node], bool]
    operands: tuple[str, ...]
    reads: Callable[[Node], Mapping[str, Node]]
    output: Literal["float", "node", "clamped"] = "node"
    product: bool = False
    weighted: bool = False
    onnx: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    attributes: Callable[[Node], tuple[tuple[int, ...], ...]] = field(default=lambda node: ())

    def tensors(self, node: Node) -> dict[str, Node]:
        """Operand -> the node whose value is read, or written for `output`."""
        result = {} if self.output == "float" else {"output": node if self.output == "node" else clamped(node)}
        return {**self.reads(node), **result}


def clamped(node: Node) -> Node:
    """The clamp behind a node that alone reads it, or the node."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], *CLAMPS) else node


def before_padding(node: Node) -> Node:
    """The tensor behind a padding with zeros: its codes are the padded codes, since zero is always a code.

    Runtimes put the padding into the convolution, so Q/DQ stand before it; one that takes places away they do not.
    """
    while is_call(node, *PADS):
        mode = argument(node, 2, "mode", "constant") if is_call(node, aten.pad.default) else "constant"
        value = argument(node, 3 if is_call(node, aten.pad.default) else 2, "value", 0) or 0
        taken = any(isinstance(places, int) and places < 0 for places in cast(list[object], node.args[1]))
        if mode != "constant" or value != 0 or taken:
            break
        node = cast(Node, node.args[0])
    return node


def shape_for_one(node: Node) -> tuple[int, ...]:
    """The shape for one image, as shape propagation has set it; empty for what is not a tensor."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def softmax_behind(node: object) -> Node | None:
    """The softmax that a value is, or is a view or a move of; its rows may be divided by their maxima."""
    while is_call(node, *MOVES) or by_rows(node):
        node = cast(Node, node).args[0]
    return cast(Node, node) if is_call(node, *SOFTMAX) else None


def by_rows(node: object) -> bool:
    """A tensor divided by the largest number of each row, or a product multiplied by it again (equalize/attention_rows.py)."""
    return is_call(node, aten.div.Tensor, aten.mul.Tensor) and is_call(cast(Node, node).args[1], aten.amax.default)


def feeds_softmax(node: Node) -> bool:
    """The value reaches a softmax through additions, scalings, masks and views only."""
    return any(is_call(user, *SOFTMAX) for user in reached(node, lambda user: is_call(user, *LOGIT_PATH)))


def _is_linear(module: GraphModule, node: Node) -> bool:
    return is_call(node, LINEAR) and is_constant(node.args[1])


def _is_conv(module: GraphModule, node: Node) -> bool:
    return is_call(node, *CONVS) and is_constant(node.args[1]) and not _is_depthwise(module, node)


def _is_depthwise(module: GraphModule, node: Node) -> bool:
    if not is_call(node, *CONVS) or not is_constant(node.args[1]):
        return False
    return argument(node, 6, "groups", 1) > 1 and constant(module, cast(Node, node.args[1])).shape[1] == 1


def _is_matmul(module: GraphModule, node: Node) -> bool:
    return is_call(node, MATMUL) and not any(is_constant(a) for a in node.args)


def _is_add(module: GraphModule, node: Node) -> bool:
    """Of two tensors of the same shape that depend on the image."""
    if not is_call(node, *ADDS) or node.kwargs.get("alpha"):
        return False
    a, b = node.args[:2]
    if not isinstance(a, Node) or not isinstance(b, Node) or is_constant(a) or is_constant(b):
        return False
    return shape_for_one(a) == shape_for_one(b) and len(shape_for_one(a)) >= 2


def _is_concat(module: GraphModule, node: Node) -> bool:
    """Of maps that depend on the image, one behind the other along their channels."""
    if not is_call(node, *CONCATS):
        return False
    read, axis = cast("list[Node]", node.args[0]), argument(node, 1, "dim", 0)
    return axis in (1, -3) and all(not is_constant(a) and len(shape_for_one(a)) == 4 for a in read)


def _weighted(node: Node) -> dict[str, Node]:
    bias = argument(node, 2, "bias")
    read = {"input": before_padding(cast(Node, node.args[0])), "weight": cast(Node, node.args[1])}
    return {**read, "bias": bias} if is_constant(bias) else read


def _pair(*names: str) -> Callable[[Node], Mapping[str, Node]]:
    return lambda node: dict(zip(names, cast("Sequence[Node]", node.args), strict=False))


def _matmul(node: Node) -> Mapping[str, Node]:
    names = ("query", "key") if feeds_softmax(node) else ("left", "right")
    return _pair(*(("probs", "value") if softmax_behind(node.args[0]) else names))(node)


def _inputs(node: Node) -> dict[str, Node]:
    return {f"input{i}": read for i, read in enumerate(cast("list[Node]", node.args[0]), 1)}


def _convolution(node: Node) -> tuple[tuple[int, ...], ...]:
    """Strides, paddings, dilations and groups."""
    values = (argument(node, 3, "stride", 1), argument(node, 4, "padding", 0), argument(node, 5, "dilation", 1))
    pairs = [tuple(v) if isinstance(v, list | tuple) else (v, v) for v in values]
    return (*pairs, (argument(node, 6, "groups", 1),))


def _pooling(node: Node) -> tuple[tuple[int, ...], ...]:
    """Kernel, strides, paddings, dilations of a max pooling, and whether its sizes are rounded up."""
    kernel = argument(node, 1, "kernel_size")
    stride = argument(node, 2, "stride", None) or kernel
    values = (kernel, stride, argument(node, 3, "padding", 0), argument(node, 4, "dilation", 1))
    pairs = [tuple(v) * (2 if len(v) == 1 else 1) if isinstance(v, list | tuple) else (v, v) for v in values]
    return (*pairs, (int(argument(node, 5, "ceil_mode", False)),))


WEIGHTS = ("input", "weight", "bias")
KINDS: Mapping[str, OpKind] = {
    kind.name: kind
    for kind in (
        OpKind(
            "linear", _is_linear, WEIGHTS, _weighted, "float", product=True, weighted=True,
            onnx=("MatMul", "Gemm"), kernels=("MatMulIntegerToFloat", "QAttention", "QGemm", "MatMulNBits"),
        ),
        OpKind(
            "conv", _is_conv, (*WEIGHTS, "output"), _weighted, "clamped", product=True, weighted=True,
            onnx=("Conv",), kernels=("QLinearConv",), attributes=_convolution,
        ),
        OpKind(
            "depthwise", _is_depthwise, (*WEIGHTS, "output"), _weighted, "clamped", product=True, weighted=True,
            onnx=("Conv",), kernels=("QLinearConv",), attributes=_convolution,
        ),
        OpKind(
            "matmul", _is_matmul, ("query", "key", "probs", "value", "left", "right"), _matmul, "float", product=True,
            onnx=("MatMul", "Gemm"), kernels=("MatMulIntegerToFloat", "QLinearMatMul"),
        ),
        OpKind(
            "add", _is_add, ("left", "right", "output"), _pair("left", "right"), "clamped",
            onnx=("Add",), kernels=("QLinearAdd",),
        ),
        OpKind(
            "concat", _is_concat, ("input", "output"), _inputs, "clamped",
            onnx=("Concat",), kernels=("QLinearConcat",),
        ),
        OpKind(
            "maxpool", lambda module, node: is_call(node, *MAX_POOLS), ("input", "output"), _pair("input"),
            onnx=("MaxPool",), kernels=("NhwcMaxPool",), attributes=_pooling,
        ),
        OpKind(
            "avgpool", lambda module, node: is_call(node, *POOLS) and shape_for_one(node)[-2:] == (1, 1),
            ("input", "output"), _pair("input"),
            onnx=("GlobalAveragePool", "AveragePool"), kernels=("QLinearGlobalAveragePool",),
        ),
    )
}  # fmt: skip


def kind_of(module: GraphModule, node: Node) -> OpKind | None:
    """The kind of op that a node is; None where it is none."""
    return next((kind for kind in KINDS.values() if kind.matches(module, node)), None)
