"""Fused operators that a runtime has kernels for and does not make of a Q/DQ graph by itself; a target lists its own (`fuse`).

Each computes what the standard nodes compute; verify compares the codes behind them as it does all others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx_ir as ir

from fewbit.realize.fuse import onnxruntime, openvino, steps
from fewbit.realize.fuse.nodes import remove_dead

FUSIONS: Mapping[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "matmul_bias": onnxruntime.product_bias,
    "multi_head_attention": onnxruntime.attention,
    "joint_qkv": onnxruntime.joint_products,
    "qattention": onnxruntime.projected_attention,
    "quick_gelu": onnxruntime.quick_gelu,
    "factors_in_rows": onnxruntime.factors_in_rows,
    "scale_by_channel": steps.by_channel,
    "quantize_before_reshape": openvino.early_codes,
    "quantize_rows": openvino.codes_by_rows,
    "quantize_before_concat": openvino.codes_of_parts,
    "clip_before_quantize": openvino.cut_numbers,
    "scale_before_norm": openvino.kept_scale,
    "reduce_keeping_axes": openvino.kept_axes,
}


def fuse(model: ir.Model, names: Collection[str]) -> None:
    """Rewrite the model in place with the named fused operators. Raises KeyError for a name that is none of `FUSIONS`."""
    for name in names:
        if sum(FUSIONS[name](model.graph, node) for node in list(model.graph)):
            remove_dead(model.graph)
    if any(node.domain == onnxruntime.DOMAIN for node in model.graph):
        model.opset_imports[onnxruntime.DOMAIN] = 1


__all__ = ["FUSIONS", "fuse"]
