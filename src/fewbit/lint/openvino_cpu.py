"""openvino's CPU plugin on x86-64: which nodes its low precision transformations turn into integer kernels.

From openvino's documentation of LPT and low_precision/src/mat_mul.cpp, convolution.cpp and network_helper.cpp,
intel_cpu's transformation_pipeline.cpp (`reference: docs/lint.md`). `fewbit lint --check` compares with the compiled model.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.lint.graph import BITS, DEQUANTIZE, INT8, QUANTIZE, Graph, Node, Quantizer
from fewbit.lint.rules import Verdict, listed, origin

PRODUCTS = frozenset(("Conv", "MatMul", "Gemm"))
THROUGH = frozenset(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Relu", "Slice", "Split"))
FUSED = frozenset(("Relu", "Clip", "Sigmoid", "Gelu", "Tanh", "Elu", "LeakyRelu", "HardSwish", "HardSigmoid", "Mul", "Add"))


@dataclass(frozen=True)
class OpenVinoRules:
    """The rules of openvino's CPU plugin for one graph."""

    graph: Graph

    def verdict(self, node: Node) -> Verdict:
        """The rule for one node that computes."""
        if node.op in PRODUCTS:
            return self._product(node)
        if node.op == "Mul" and (reader := self._scaled(node)) is not None:
            return Verdict(True, f"its constant becomes part of a scale of {reader.op} {reader.name}")
        kernel = self._absorbed_by(node)
        if kernel is not None:
            return Verdict(True, f"fused into the integer kernel of {kernel.op} {kernel.name}")
        if node.op == "Clip" and (maker := self._cutting(node)) is not None:
            return Verdict(True, f"its limits become those of the codes that {maker.op} {maker.name} writes")
        if node.op in ("MaxPool", "AveragePool", "GlobalAveragePool") and self.front(node.inputs[0]) is not None:
            return Verdict(True, f"{node.op} reads the codes")
        return Verdict(False, f"{node.op} is not behind an integer product that could take it in: it runs in float")

    def front(self, name: str) -> Quantizer | None:
        """The DequantizeLinear in front of a reader, looking through nodes that LPT moves it behind."""
        node, moved = self.graph.producer.get(name), False
        while node is not None and node.op in THROUGH:
            node, moved = self.graph.producer.get(node.inputs[0]), True
        if node is None or node.op != DEQUANTIZE:
            return None
        qparams = self.graph.quantizer(node)
        return qparams if qparams.per_tensor or not moved else None

    def _product(self, node: Node) -> Verdict:
        activation, weight = self.front(node.inputs[0]), self.front(node.inputs[1])
        missing = [n for n, s in zip(node.inputs[:2], (activation, weight), strict=True) if s is None]
        if activation is None or weight is None:
            change = "quantize that operand too" if len(missing) == 1 else "leave it float, or quantize its operands"
            return Verdict(False, f"no DequantizeLinear in front of {listed([origin(self.graph, m) for m in missing])}", change)
        for what, qparams in (("activations", activation), ("right operands", weight)):
            if BITS.get(qparams.dtype, 0) != 8:
                change = "use 8-bit codes"
                return Verdict(False, f"{qparams.name} {what} have no integer kernel in openvino's CPU plugin", change)
        if not activation.per_tensor:
            return Verdict(False, "the activation has a scale for each channel", "give it one scale for the whole tensor")
        constant = node.inputs[1] in self.graph.constants
        if constant and (weight.dtype != INT8 or not weight.no_zero):
            change = "store the weight as int8 with zero point 0"
            return Verdict(False, f"the weight is {weight.name} with zero points: openvino needs int8 and none", change)
        if not constant and not _symmetric(weight):
            change = "make the right operand symmetric: int8 with zero point 0"
            return Verdict(False, "the right operand of two activations has a zero point", change)
        if not constant and not _symmetric(activation) and not activation.no_zero:
            change = "make the left operand symmetric: zero point 0 (int8, or uint8 for values that are never negative)"
            return Verdict(False, "the left operand of two activations has a zero point", change)
        kind = "Convolution" if node.op == "Conv" else "FullyConnected" if constant else "MatMul"
        return Verdict(True, f"both operands are codes: runs as {kind} on {activation.name} x {weight.name}")

    def _absorbed_by(self, node: Node) -> Node | None:
        """The integer product whose kernel absorbs a node: every tensor between them has one reader."""
        if node.op not in FUSED:
            return None
        for name in node.inputs:
            if name in self.graph.constants or len(self.graph.consumers.get(name, ())) != 1:
                continue
            maker = self._producer(name)
            if maker is None:
                continue
            other = [n for n in node.inputs if n and n != name and n not in self.graph.constants]
            if maker.op in PRODUCTS and self._product(maker).integer and (not other or maker.op == "Conv"):
                return maker
            above = self._absorbed_by(maker)
            if above is not None and (not other or above.op == "Conv"):
                return above
        return None

    def _scaled(self, node: Node) -> Node | None:
        """The integer product that reads the codes of a multiplication by one constant number."""
        constants = [name for name in node.inputs if name in self.graph.constants]
        if len(constants) != 1 or self.graph.size(constants[0]) != 1:
            return None
        at = node
        while at.op in ("Mul", "Clip", QUANTIZE, DEQUANTIZE) or at.moves:
            readers = self.graph.consumers.get(at.outputs[0], ())
            if len(readers) != 1 or (at is node and readers[0].op not in (QUANTIZE, "Clip")):
                return None
            at = readers[0]
        return at if at.op in PRODUCTS and self._product(at).integer else None

    def _cutting(self, node: Node) -> Node | None:
        """The integer product whose codes a Clip cuts: one quantizer behind it, nothing but views and constants before."""
        behind = self.graph.consumers.get(node.outputs[0], ())
        maker = self.graph.producer.get(node.inputs[0])
        if len(behind) != 1 or behind[0].op != QUANTIZE:
            return None
        while maker is not None and (maker.moves or maker.op in ("Mul", "Add")):
            inputs = [name for name in maker.inputs if name not in self.graph.constants]
            if len(inputs) != 1 or len(self.graph.consumers.get(maker.outputs[0], ())) != 1:
                return None
            maker = self.graph.producer.get(inputs[0])
        return maker if maker is not None and maker.op in PRODUCTS and self._product(maker).integer else None

    def _producer(self, name: str) -> Node | None:
        """The node that computes a tensor, skipping Q and DQ with one reader."""
        node = self.graph.producer.get(name)
        while node is not None and node.op in (QUANTIZE, DEQUANTIZE):
            if len(self.graph.consumers.get(node.inputs[0], ())) != 1:
                return None
            node = self.graph.producer.get(node.inputs[0])
        return node


def _symmetric(qparams: Quantizer) -> bool:
    """Codes around zero: int8 with zero point 0, or uint8 with 128, which openvino stores as the former."""
    zero = 0 if qparams.dtype == INT8 else 128
    return qparams.zero is not None and bool((qparams.zero == zero).all())
