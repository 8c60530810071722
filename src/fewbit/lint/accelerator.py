"""A machine known only by its target file: a node runs in integers where its operands have the types that
the file lists for its kind (docs/targets.md). Predicted only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fewbit.capture.kinds import KINDS
from fewbit.lint.graph import BITS, QUANTIZE, Graph, Node, Quantizer
from fewbit.lint.rules import Verdict, front, listed, origin
from fewbit.target.spec import OpRule, Target, Type

LEFT, RIGHT = ("query", "probs", "left"), ("key", "value", "right")


@dataclass(frozen=True)
class AcceleratorRules:
    """The rules of a target file for one graph."""

    graph: Graph
    target: Target

    def verdict(self, node: Node) -> Verdict:
        """The rule for one node that computes."""
        kind = self._kind(node)
        rule = None if kind is None else self.target.rule(kind)
        if rule is None:
            what = f"no [[op]] of kind {kind}" if kind is not None else f"no kind of op for {node.op}"
            return Verdict(False, f"target {self.target.name} has {what}: it runs in float")
        for name, operands in self._operands(node, rule):
            if not operands:
                continue
            qparams = front(self.graph, name)
            if qparams is None:
                return Verdict(False, f"no DequantizeLinear in front of {origin(self.graph, name)}", "quantize it")
            allowed = [t for operand in operands for t in rule.operands[operand]]
            wrong = [_differs(qparams, self.target.types[t]) for t in allowed]
            if all(wrong):
                types = listed(list(dict.fromkeys(allowed)))
                return Verdict(False, f"{operands[0]} is not of type {types}: {wrong[0]}", f"quantize it as {types}")
        readers = self.graph.consumers.get(node.outputs[0], ())
        if rule.output == "integer" and not any(r.op == QUANTIZE for r in readers):
            change = "put a QuantizeLinear right behind it"
            return Verdict(False, "its result must be quantized at once, and no QuantizeLinear reads it", change)
        return Verdict(True, f"its operands have the types that the target lists for {rule.kind}")

    def _kind(self, node: Node) -> str | None:
        weighted = len(node.inputs) > 1 and node.inputs[1] in self.graph.constants
        named = [kind.name for kind in KINDS.values() if node.op in kind.onnx and kind.weighted in (weighted, False)]
        if node.op == "Conv":
            shape = self.graph.shapes.get(node.inputs[1], (0, 0))
            return "depthwise" if shape[1] == 1 and node.attributes.get("group", 1) > 1 else "conv"
        return next(iter(named), None)

    def _operands(self, node: Node, rule: OpRule) -> Iterable[tuple[str, list[str]]]:
        """Each input with its possible operand names in the target file."""
        kind = KINDS[rule.kind]
        if kind.weighted:
            names: tuple[tuple[str, ...], ...] = (("input",), ("weight",), ("bias",))
        elif kind.product:
            names = (LEFT, RIGHT)
        else:
            names = (("left", "input"), ("right", "input"), *((("input",),) * len(node.inputs)))
        for name, allowed in zip(node.inputs, names, strict=False):
            if name:
                yield name, [operand for operand in allowed if operand in rule.operands]


def _differs(qparams: Quantizer, kind: Type) -> str:
    """How codes differ from a type; empty where they are of it."""
    container = kind.container or next(b for b in (8, 16, 32) if b >= kind.bits)
    if BITS.get(qparams.dtype, 0) > container:
        return f"{qparams.name} codes"
    if qparams.name.startswith("u") == kind.signed:
        return f"{qparams.name} codes, not {'signed' if kind.signed else 'unsigned'}"
    if kind.symmetric and kind.signed and not qparams.no_zero:
        return "a zero point that is not 0"
    if kind.granularity == "tensor" and not qparams.per_tensor:
        return "a scale for each channel"
    return ""
