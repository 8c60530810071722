"""onnxruntime's CPU provider: which nodes it fuses with the Q/DQ around them.

From onnxruntime/core/optimizer: qdq_transformer/selectors_actions/qdq_selectors.cc and
qdq_selector_action_transformer.cc (what fuses), qdq_transformer/weight_bias_quantization.cc, matmul_add_fusion.cc; where Q/DQ
stand before that is onnxruntime_qdq.py. `fewbit lint --check` compares with a session.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from fewbit.lint.graph import BITS, DEQUANTIZE, INT8, Graph, Node, Quantizer
from fewbit.lint.onnxruntime_qdq import PASSES, Behind, Propagated
from fewbit.lint.rules import Verdict, listed, origin

UNARY = {"Softmax": "QLinearSoftmax", "Sigmoid": "QLinearSigmoid", "LeakyRelu": "QLinearLeakyRelu",
         "AveragePool": "QLinearAveragePool", "GlobalAveragePool": "QLinearGlobalAveragePool"}  # fmt: skip
JOINING = {"Add": "QLinearAdd", "Mul": "QLinearMul", "Concat": "QLinearConcat", "Where": "QLinearWhere"}
OWN = re.compile(r"QLinear|QGemm|QAttention|MatMulInteger|ConvInteger|DynamicQuantizeMatMul")
SAME = frozenset(("MaxPool", "ReduceMax", "ReduceMin", "Resize"))
PRODUCTS = frozenset(("Conv", "MatMul", "Gemm"))


@dataclass(frozen=True)
class OnnxRuntimeRules:
    """`signed`: the provider runs signed activations as they are (ARM); otherwise it converts them to unsigned (x86)."""

    graph: Graph
    signed: bool = False

    def verdict(self, node: Node) -> Verdict:
        """The rule for one node that computes."""
        if node.op == "QAttention":
            return Verdict(True, "QAttention of onnxruntime itself: queries, keys and values in integers, attention in float")
        if OWN.match(node.op):
            return Verdict(True, f"{node.op} is an integer operator of onnxruntime itself")
        if node.op in ("Relu", "Clip"):
            return self._clip(node)
        if node.op in PRODUCTS:
            return self._product(node)
        if node.op in UNARY or node.op in JOINING:
            return self._elementwise(node)
        if node.op in SAME:
            return self._same(node)
        pairs = sum(self.around.front(name) is not None for name in node.inputs if name not in self.graph.constants)
        change = f"take the Q/DQ in front of it out: {pairs} of them only cost time" if pairs else ""
        return Verdict(False, f"{node.op} has no integer kernel in the CPU provider", change)

    def _clip(self, node: Node) -> Verdict:
        later = self.around.readers(node.outputs[0])
        if later.only is None:
            return Verdict(False, f"{node.op} has no integer kernel; its result is {self._readers(later)}")
        if self.around.redundant(node, later.only):
            return Verdict(True, f"removed: the QuantizeLinear behind it cuts at the same place ({later.only.name})")
        return Verdict(
            False,
            f"the QuantizeLinear behind it reaches further than {node.op} lets through, so {node.op} stays, in float",
            f"give {later.only.name} a range that {node.op} does not cut (for a Relu: zero point at the lowest code)",
        )

    def _readers(self, behind: Behind) -> str:
        names = [f"{n.op} {n.name}" for n in behind.others[:2]] + [f"QuantizeLinear {q.name}" for q in behind.quantizers[:2]]
        if behind.output:
            names.append("the model's caller")
        return "read by " + listed(names) if names else "read by nobody"

    def _missing(self, node: Node, slots: list[int]) -> Verdict | None:
        """A verdict where an input has no DequantizeLinear in front of it."""
        without = [node.inputs[i] for i in slots if self.around.front(node.inputs[i]) is None]
        if not without:
            return None
        return Verdict(
            False,
            f"no DequantizeLinear in front of {listed([self._called(node, name) for name in without])}",
            "quantize that input too" if len(without) < len(slots) else "leave it float, or quantize its inputs",
        )

    def _called(self, node: Node, name: str) -> str:
        roles = ("the input", "the weight" if node.inputs[1:2] and node.inputs[1] in self.graph.constants else "the right")
        at = node.inputs.index(name)
        role = (*roles, "the bias")[at] if node.op in PRODUCTS and at < 3 else f"input {at}"
        return f"{role} ({origin(self.graph, name)})"

    def _types(self, activation: Quantizer, weight: Quantizer) -> Verdict | None:
        """A verdict where the types of a product's operands are not those of its integer kernels."""
        for what, qparams in (("activations", activation), ("weights", weight)):
            if BITS.get(qparams.dtype, 0) != 8:
                change = f"store them in 8-bit containers instead of {qparams.name}"
                return Verdict(False, f"{qparams.name} {what} are not taken by the CPU provider's integer kernels", change)
        if activation.dtype == INT8 and not self.signed:
            change = "store activations as uint8: zero point + 128, same scale"
            return Verdict(False, "int8 codes with more than one reader are not taken on x86", change)
        if activation.dtype == INT8 and weight.dtype != INT8:
            return Verdict(False, "int8 activations need int8 weights", f"quantize the weights to int8, not {weight.name}")
        if not activation.per_tensor:
            return Verdict(False, "the activation has a scale for each channel", "give it one scale for the whole tensor")
        return None

    def _product(self, node: Node) -> Verdict:
        gemm, add = node.op == "Gemm", self.added.get(node.index)
        behind = self.around.behind(node if add is None else add)
        bias = len(node.inputs) > 2 and node.inputs[2] != ""
        activation, weight = self.around.front(node.inputs[0]), self.around.front(node.inputs[1])
        becomes_codes = activation is not None and weight is None and self._float_weight_becomes_codes(node, behind)
        if (
            node.op == "MatMul"
            and add is None
            and activation is None
            and weight is not None
            and not behind.quantizers
            and self._weight_only(node)
        ):
            return Verdict(True, "weights only: runs as MatMulNBits, which quantizes its input as it runs")
        missing = self._missing(node, [0] if becomes_codes else [0, 1])
        if missing is not None:
            return missing
        assert activation is not None
        wrong = None if weight is None else self._types(activation, weight)
        if BITS.get(activation.dtype, 0) == 16 and node.op != "Conv" and weight is not None and self._weight_only(node):
            return Verdict(
                True, f"{activation.name} activations stay float: runs as MatMulNBits, which quantizes its input as it runs"
            )
        if wrong is not None:
            return wrong
        has_float_bias = add is not None or (bias and self.around.front(node.inputs[2]) is None)
        if has_float_bias and not self._bias_becomes_integer(node, add, behind, weight):
            return self._float_bias(node, add, behind)
        if bias and not has_float_bias:
            qparams = self.around.front(node.inputs[2])
            if qparams is not None and BITS.get(qparams.dtype) != 32:
                return Verdict(False, f"the bias is {qparams.name}, not int32", "store it as int32, scale = input x weight")
        if gemm and bias and float(node.attributes.get("beta", 1.0)) != 1.0:
            return Verdict(False, "beta of the Gemm is not 1", "multiply the bias with beta and set beta to 1")
        return self._result(node, "Gemm" if add is not None else node.op, behind, activation)

    def _result(self, node: Node, op: str, behind: Behind, activation: Quantizer) -> Verdict:
        """The verdict on a product whose operands are right, from who reads its result."""
        kernel = {"Conv": "QLinearConv", "MatMul": "QLinearMatMul", "Gemm": "QGemm"}[op]
        if behind.only is not None:
            back = self.around.back(behind.only)
            if back.dtype != activation.dtype:
                change = f"use {activation.name} for both"
                return Verdict(False, f"the input is {activation.name}, the result {back.name}: they must be alike", change)
            if not back.per_tensor:
                return Verdict(False, "the result has a scale for each channel", "give it one scale for the whole tensor")
            absorbed = f", {behind.clip.op} included" if behind.clip is not None else ""
            return Verdict(True, f"fused with its Q/DQ: runs as {kernel}{absorbed}")
        if behind.quantizers:
            return Verdict(
                False,
                f"its result is {self._readers(behind)}: {kernel} gives codes to one QuantizeLinear and nobody else",
                "let every reader read the codes of one QuantizeLinear, or none",
            )
        if op == "Conv":
            return self._open_conv(behind)
        name = "MatMulIntegerToFloat" if op == "MatMul" else kernel
        return Verdict(True, f"no QuantizeLinear behind it: runs as {name} with a float result")

    def _open_conv(self, behind: Behind) -> Verdict:
        """The verdict on a convolution without QuantizeLinear right behind it."""
        later = behind.others[0] if len(behind.others) == 1 else None
        if later is not None and later.op in ("Relu", "Clip"):
            beyond = self.around.readers(later.outputs[0])
            if beyond.only is not None:
                why = f"{later.op} {later.name} stands between it and its QuantizeLinear and is not redundant there"
                return Verdict(False, why, f"give {beyond.only.name} a range that {later.op} does not cut")
        return Verdict(
            False,
            f"no QuantizeLinear right behind it (its result is {self._readers(behind)}): QLinearConv has no float result",
            "quantize its result at once, bias inside as int32; realize for an onnxruntime target",
        )

    def _float_bias(self, node: Node, add: Node | None, behind: Behind) -> Verdict:
        if add is not None:
            return Verdict(
                False,
                f"onnxruntime makes a Gemm of it and {add.name} before it looks for Q/DQ, and the Gemm's bias is float",
                "keep the batch dynamic and the product of rank 3, or store the bias as int32 codes in a Gemm",
            )
        return Verdict(False, "the bias is float", "store it as int32 behind a DequantizeLinear, scale = input x weight")

    def _elementwise(self, node: Node) -> Verdict:
        kernel = (UNARY | JOINING)[node.op]
        slots = list(range(1 if node.op == "Where" else 0, 1 if node.op in UNARY else len(node.inputs)))
        behind = self.around.behind(node)
        fronts = [self.around.front(node.inputs[i]) for i in slots]
        present = [qparams for qparams in fronts if qparams is not None]
        if behind.only is None and not present:
            return Verdict(False, f"its inputs are float and its result is {self._readers(behind)}")
        missing = self._missing(node, slots)
        if missing is not None:
            return missing
        if behind.only is None:
            change = "quantize its result, or take the Q/DQ in front of it out"
            return Verdict(False, f"{kernel} needs one QuantizeLinear behind it; its result is {self._readers(behind)}", change)
        types = {qparams.dtype for qparams in (*present, self.around.back(behind.only))}
        if len(types) > 1:
            names = sorted({qparams.name for qparams in (*present, self.around.back(behind.only))})
            return Verdict(False, f"{kernel} needs one type for inputs and result, not {listed(names)}", f"use {names[-1]}")
        if BITS.get(present[0].dtype, 0) != 8:
            return Verdict(False, f"{kernel} takes 8-bit codes, not {present[0].name}", "leave it float")
        absorbed = f", {behind.clip.op} included" if behind.clip is not None else ""
        return Verdict(True, f"fused with its Q/DQ: runs as {kernel}{absorbed}")

    def _same(self, node: Node) -> Verdict:
        """Ops that pick or compare numbers: integer where codes go in and come out with the same scale and zero point."""
        qparams, behind = self.around.front(node.inputs[0]), self.around.behind(node)
        if qparams is None:
            return Verdict(False, f"its input is float ({origin(self.graph, node.inputs[0])})")
        if BITS.get(qparams.dtype, 0) != 8:
            return Verdict(False, f"{node.op} takes 8-bit codes, not {qparams.name}", "leave it float")
        passes = node.version in PASSES.get(node.op, ()) and not behind.quantizers
        if passes and qparams.per_tensor:
            return Verdict(True, f"the codes pass through: {node.op} runs on {qparams.name}")
        if behind.only is None or not qparams.same(self.around.back(behind.only)):
            change = "give the QuantizeLinear behind it the scale and zero point of its input"
            return Verdict(False, f"{node.op} needs Q/DQ with the same scale and zero point on both sides", change)
        return Verdict(True, f"{node.op} runs on {qparams.name}: same scale and zero point on both sides")

    @cached_property
    def around(self) -> Propagated:
        return Propagated(self.graph, self.signed)

    @cached_property
    def added(self) -> dict[int, Node]:
        """MatMul (by index) to the Add that onnxruntime makes one Gemm of with it (matmul_add_fusion.cc)."""
        pairs = {}
        for node in self.graph.nodes:
            if node.op != "MatMul" or node.outputs[0] in self.graph.outputs:
                continue
            readers = self.graph.consumers.get(node.outputs[0], [])
            if len(readers) != 1 or readers[0].op != "Add":
                continue
            left, right = (self.graph.shapes.get(name) for name in node.inputs[:2])
            other = next((n for n in readers[0].inputs if n != node.outputs[0]), "")
            shape = self.graph.shapes.get(other)
            if left is None or right is None or shape is None or len(right) != 2:
                continue
            flat = len(left) == 2
            if not flat and node.inputs[0] in self.graph.dynamic:
                continue
            row = (right[1],)
            fits = tuple(shape) == row or (flat and len(shape) == 2 and tuple(shape) in {(1, *row), (left[0], *row)})
            if fits and (flat or not self._after_attention(node)):
                pairs[node.index] = readers[0]
        return pairs

    def _after_attention(self, node: Node) -> bool:
        producer = self.graph.producer.get(node.inputs[0])
        return producer is not None and producer.op in ("Attention", "MultiHeadAttention")

    def _bias_becomes_integer(self, node: Node, add: Node | None, behind: Behind, weight: Quantizer | None) -> bool:
        """Whether onnxruntime makes an int32 bias of a float one (weight_bias_quantization.cc: a QuantizeLinear follows)."""
        if node.op == "MatMul" and add is None:
            return False
        name = node.inputs[2] if add is None else next(n for n in add.inputs if n != node.outputs[0])
        shape = self.graph.shapes.get(name, ())
        if name not in self.graph.initializers or len(shape) != 1 or not self._leads_to_quantize(node if add is None else add):
            return False
        if weight is None or weight.per_tensor:
            return True
        axis = 0 if node.op == "Conv" or node.attributes.get("transB") else 1
        return weight.scale is not None and weight.scale.size == shape[0] and weight.axis == axis and not weight.block

    def _float_weight_becomes_codes(self, node: Node, behind: Behind) -> bool:
        """Whether onnxruntime quantizes a float weight itself, to int8 with one scale (weight_bias_quantization.cc)."""
        if node.op not in ("Conv", "Gemm") or node.inputs[1] not in self.graph.initializers:
            return False
        bias = len(node.inputs) > 2 and node.inputs[2] != ""
        return self._leads_to_quantize(node) and (not bias or node.inputs[2] in self.graph.initializers)

    def _leads_to_quantize(self, node: Node) -> bool:
        while True:
            readers = self.graph.consumers.get(node.outputs[0], [])
            if self.around.readers(node.outputs[0]).only is not None:
                return True
            if len(readers) != 1 or readers[0].op not in ("Relu", "Clip"):
                return False
            node = readers[0]

    def _weight_only(self, node: Node) -> bool:
        """Whether a product of a float input and dequantized weights becomes MatMulNBits."""
        dequantize = self.graph.producer[node.inputs[1]]
        if dequantize.op != DEQUANTIZE or len(self.graph.consumers[dequantize.outputs[0]]) != 1:
            return False
        qparams, shape = self.graph.quantizer(dequantize), self.graph.shapes.get(node.inputs[1], ())
        if len(shape) != 2 or qparams.scale is None or BITS.get(qparams.dtype, 99) > 8:
            return False
        if qparams.block:
            return qparams.axis == 0 and qparams.block >= 16 and not qparams.block & (qparams.block - 1)
        return qparams.scale.ndim == 0 or (qparams.axis == 1 and qparams.scale.size == shape[1])
