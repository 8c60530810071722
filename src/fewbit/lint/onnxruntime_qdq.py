"""Where Q/DQ are after onnxruntime's CPU provider has moved them, and the readers of a result then.

From onnxruntime/core/optimizer/qdq_transformer: qdq_propagation.cc (Q/DQ move through nodes that only move numbers),
qdq_s8_to_u8.cc, relu_quantizelinear.cc and clip_quantizelinear.cc.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fewbit.lint.graph import BITS, DEQUANTIZE, INT8, QUANTIZE, UINT8, Graph, Node, Quantizer

# Operators that Q/DQ pass through, with the versions that qdq_propagation.cc names.
PASSES = {
    "MaxPool": {12},
    "Reshape": {5, 13, 14, 19, 21, 23, 24, 25},
    "Transpose": {1, 13, 21, 23, 24, 25},
    "Squeeze": {1, 11, 13, 21, 23, 24, 25},
    "Unsqueeze": {1, 11, 13, 21, 23, 24, 25},
    "Slice": {1, 10, 11, 13},
}


@dataclass(frozen=True)
class Behind:
    """Who reads a result: the distinct QuantizeLinear nodes, how many others, and a Relu or Clip that they make redundant."""

    quantizers: tuple[Node, ...]
    others: tuple[Node, ...]
    output: bool = False
    clip: Node | None = None

    @property
    def only(self) -> Node | None:
        """The one QuantizeLinear where there is no other reader."""
        return self.quantizers[0] if len(self.quantizers) == 1 and not self.others and not self.output else None


@dataclass(frozen=True)
class Propagated:
    """The Q/DQ of one graph after propagation; `signed` as in `OnnxRuntimeRules`."""

    graph: Graph
    signed: bool = False

    def front(self, name: str) -> Quantizer | None:
        """The DequantizeLinear that the reader of a tensor has in front of it, after propagation and with its type there."""
        node, moved = self.graph.producer.get(name), False
        readers = len(self.graph.consumers.get(name, ()))
        while node is not None and node.version in PASSES.get(node.op, ()):
            node, moved = self.graph.producer.get(node.inputs[0]), True
        if node is None or node.op != DEQUANTIZE:
            return None
        qparams = self.graph.quantizer(node)
        if moved and not qparams.per_tensor:
            return None
        if node.inputs[0] in self.graph.constants:
            return qparams
        return self._unsigned(qparams, readers if moved else self._uses(node.inputs[0]))

    def back(self, node: Node) -> Quantizer:
        """The parameters of a QuantizeLinear, with its type after optimisation."""
        return self._unsigned(self.graph.quantizer(node), self._uses(node.outputs[0]))

    def _uses(self, codes: str) -> int:
        """How many readers codes have once every reader of a DequantizeLinear has one of its own."""
        readers = self.graph.consumers.get(codes, ())
        return sum(len(self.graph.consumers.get(r.outputs[0], ())) or 1 if r.op == DEQUANTIZE else 1 for r in readers)

    def _unsigned(self, qparams: Quantizer, uses: int) -> Quantizer:
        """On x86 onnxruntime makes u8 of s8 codes with one reader (qdq_s8_to_u8.cc); others stay s8 and stop all fusion."""
        if self.signed or qparams.dtype != INT8 or not qparams.per_tensor or qparams.zero is None or uses != 1:
            return qparams
        return replace(qparams, dtype=UINT8, zero=qparams.zero.astype(np.int64) + 128)

    def behind(self, node: Node) -> Behind:
        """Who reads the result of a node, after propagation."""
        result = self.readers(node.outputs[0])
        if len(result.others) == 1 and not result.quantizers and not result.output and result.others[0].op in ("Relu", "Clip"):
            clip = result.others[0]
            later = self.readers(clip.outputs[0])
            if later.only is not None and self.redundant(clip, later.only):
                return replace(later, clip=clip)
        return result

    def readers(self, name: str) -> Behind:
        quantizers: list[Node] = []
        others: list[Node] = []
        for reader in self.graph.consumers.get(name, ()):
            if reader.op != QUANTIZE:
                others.append(reader)
            elif not any(self.graph.quantizer(reader).same(self.graph.quantizer(q)) for q in quantizers):
                quantizers.append(reader)
        output = name in self.graph.outputs
        if len(others) == 1 and not quantizers and not output and others[0].version in PASSES.get(others[0].op, ()):
            later = self.readers(others[0].outputs[0])
            if later.only is not None and self.graph.quantizer(later.only).per_tensor and others[0].inputs[0] == name:
                return later
        return Behind(tuple(quantizers), tuple(others), output)

    def redundant(self, clip: Node, quantize: Node) -> bool:
        qparams = self.graph.quantizer(quantize)
        if not qparams.per_tensor or BITS.get(qparams.dtype, 0) not in (8, 16):
            return False
        low, high = qparams.range()
        bounds = self._bounds(clip)
        if bounds is None or qparams.scale is None:
            return False
        half = float(qparams.scale.flat[0]) / 2
        return bounds[0] <= low + half and bounds[1] >= high - half

    def _bounds(self, clip: Node) -> tuple[float, float] | None:
        if clip.op == "Relu":
            return 0.0, float("inf")
        ends = [float("-inf"), float("inf")]
        for i, key in enumerate(("min", "max")):
            if key in clip.attributes:
                ends[i] = clip.attributes[key]
            elif len(clip.inputs) > i + 1 and clip.inputs[i + 1]:
                value = self.graph.value(clip.inputs[i + 1])
                if value is None:
                    return None
                ends[i] = float(value)
        return ends[0], ends[1]
