"""Forms that a runtime has a kernel for and does not make of a Q/DQ graph by itself. A target asks for its own (`fuse`).

Each computes what the standard nodes compute; verify compares the codes behind them as it does all others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx_ir as ir

from fewbit.realize.fuse import onnxruntime, openvino
from fewbit.realize.fuse.nodes import remove_dead

FORMS: Mapping[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "bias": onnxruntime.product_bias,
    "attention": onnxruntime.attention,
    "joint": onnxruntime.joint_products,
    "projected": onnxruntime.projected_attention,
    "early": openvino.early_codes,
    "numbers": openvino.cut_numbers,
}


def fuse(model: ir.Model, forms: Collection[str]) -> None:
    """Rewrite the model in place with the named forms. Raises KeyError for a name that is none of `FORMS`."""
    for name in forms:
        if sum(FORMS[name](model.graph, node) for node in list(model.graph)):
            remove_dead(model.graph)
    if any(node.domain == onnxruntime.DOMAIN for node in model.graph):
        model.opset_imports[onnxruntime.DOMAIN] = 1


__all__ = ["FORMS", "fuse"]
