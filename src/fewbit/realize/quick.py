"""torch.onnx and onnxscript without work that they do in vain, with the same result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher
from torch.fx import Interpreter, Node
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion

MATCH, LIBRARY = SimplePatternMatcher.match, ONNXRegistry.from_torchlib
PROMOTING = type_promotion._TypePromotionInterpreter


@contextmanager
def quick() -> Iterator[None]:
    """Meanwhile a rule is tried only where its last operator stands, torch's operators are looked up once in a process, and a
    node that needs no cast is not run again to know what it gives.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(SimplePatternMatcher, "match", _match))
        stack.enter_context(patch.object(ONNXRegistry, "from_torchlib", staticmethod(_library)))
        stack.enter_context(patch.object(PROMOTING, "run_node", _run_node))
        yield


def _match(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
    wanted = self.pattern.output_nodes[0].op_identifier()
    if wanted is not None and wanted != node.op_identifier():
        return MatchResult().fail("another operator")
    return MATCH(self, model, graph, node, **options)


@cache
def _operators(opset: int) -> ONNXRegistry:
    return LIBRARY(opset_version=opset)


def _library(opset_version: int) -> ONNXRegistry:
    """A registry that may be added to."""
    known, fresh = _operators(opset_version), ONNXRegistry()
    fresh._opset_version = known._opset_version
    fresh.functions = {target: list(found) for target, found in known.functions.items()}
    return fresh


def _run_node(self: Any, node: Node) -> Any:
    with self._set_current_node(node):
        if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
            self._maybe_promote_node(node, rule)
    return node.meta["val"] if "val" in node.meta else Interpreter.run_node(self, node)
