"""TensorRT 10 and 11 with explicit Q/DQ. It cannot run here: predicted only.

From NvInfer.h (types that quantized layers accept) and ModelOpt's onnx/quantization (ops it skips because they are slow).
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.lint.graph import INT8, QUANTIZE, Graph, Node, Quantizer
from fewbit.lint.rules import Verdict, front, listed, origin

PRODUCTS = frozenset(("Conv", "ConvTranspose", "MatMul", "Gemm"))
OTHERS = frozenset(("Add", "AveragePool", "Clip", "GlobalAveragePool", "MaxPool", "Mul"))
LONGEST, SMALLEST = 512, 16  # tokens of attention in int8; channels of a product


@dataclass(frozen=True)
class TensorRtRules:
    """The rules of TensorRT's explicit quantization for one graph."""

    graph: Graph

    def verdict(self, node: Node) -> Verdict:
        """The rule for one node that computes."""
        if node.op not in PRODUCTS | OTHERS:
            around = any(front(self.graph, name) is not None for name in node.inputs if name not in self.graph.constants)
            change = "take the Q/DQ around it out: they break fusions" if around else ""
            return Verdict(False, f"{node.op} stays in floating point", change)
        slots = [name for name in node.inputs[: 2 if node.op in PRODUCTS else None] if name]
        fronts = {name: front(self.graph, name) for name in slots}
        without = [name for name, qparams in fronts.items() if qparams is None]
        if without:
            change = "quantize that operand too" if len(without) < len(slots) else ""
            return Verdict(False, f"no DequantizeLinear in front of {listed([origin(self.graph, n) for n in without])}", change)
        for qparams in fronts.values():
            if qparams is not None and (wrong := _type(qparams)) is not None:
                return wrong
        if node.op in PRODUCTS and len(node.inputs) > 2 and node.inputs[2] and front(self.graph, node.inputs[2]) is not None:
            return Verdict(False, "the bias is quantized", "keep the bias float")
        shape = self._shape(node)
        if shape is not None:
            return shape
        return Verdict(True, f"explicit Q/DQ on every operand: {node.op} runs on int8", self._behind(node))

    def _shape(self, node: Node) -> Verdict | None:
        left, right = (self.graph.shapes.get(name, ()) for name in (*node.inputs, "")[:2])
        if node.op == "Conv" and right and min(right[0], right[1]) < SMALLEST and right[1] * right[0] != right[0]:
            return Verdict(False, f"fewer than {SMALLEST} channels ({right[1]} in, {right[0]} out)", "leave it float")
        if node.op not in ("MatMul", "Gemm") or len(left) < 2 or len(right) < 2:
            return None
        k, n = (right[-1], right[-2]) if node.attributes.get("transB") else (right[-2], right[-1])
        if min(k, n) < SMALLEST:
            return Verdict(False, f"a product of {k} by {n}: both must be {SMALLEST} at least", "leave it float")
        both_computed = node.inputs[1] not in self.graph.constants
        if both_computed and max(left[-2], k, n) > LONGEST:
            return Verdict(False, f"attention over more than {LONGEST} tokens is not fused in int8", "leave it float")
        return None

    def _behind(self, node: Node) -> str:
        readers = self.graph.consumers.get(node.outputs[0], ())
        if node.op in PRODUCTS and any(r.op == QUANTIZE for r in readers):
            return "put Q/DQ on inputs only: the one on its result keeps what follows out of its kernel"
        return ""


def _type(qparams: Quantizer) -> Verdict | None:
    if qparams.dtype != INT8:
        return Verdict(False, f"{qparams.name} codes: TensorRT takes int8", "store them as int8 with zero point 0")
    if not qparams.no_zero:
        return Verdict(False, "a zero point that is not 0: TensorRT is symmetric only", "make it symmetric, zero point 0")
    if qparams.scale is None or not bool((qparams.scale > 0).all()):
        return Verdict(False, "a scale that is computed or not positive", "make every scale a positive constant")
    return None
