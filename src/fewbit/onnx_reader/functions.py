"""The local functions of a file, put in the place of the nodes that call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import onnx
import onnx.inliner
from onnx import FunctionProto, ModelProto, NodeProto

from fewbit.errors import BadModel
from fewbit.onnx_reader.operators import OPERATORS

Key = tuple[str, str, str]
STANDARD_NAMES = ("", "ai.onnx")


def without_functions(model: ModelProto, path: Path) -> ModelProto:
    """The model with the nodes of its functions in place of those that call them; attributes that a call leaves out have the
    function's default, which onnx.inliner (1.23) drops. Raises BadModel for a function that calls itself, and for one that
    is called like an operator.
    """
    if not model.functions:
        return model
    functions = {_key(one.domain, one.name, one.overload): one for one in model.functions}
    calls = {key: [*_calls(one.node, functions)] for key, one in functions.items()}
    outer = [*_calls(model.graph.node, functions)]
    _refuse_circles(calls, path)
    for node in (*outer, *(node for nodes in calls.values() for node in nodes)):
        domain, name, _ = key = _key(node.domain, node.op_type, node.overload)
        if name in OPERATORS.get(domain, {}) or onnx.defs.has(name, domain):
            at = node.name or next(iter(node.output), "")
            raise BadModel(
                f"{path} calls a function '{name}' that has the name of an operator of domain '{domain or 'ai.onnx'}', in node "
                f"'{at}': onnx takes the function, onnxruntime the operator. Give the function another name, where it is "
                "defined and where it is called."
            )
        given = {one.name for one in node.attribute}
        node.attribute.extend(one for one in functions[key].attribute_proto if one.name not in given)
    return onnx.inliner.inline_local_functions(model)


def _key(domain: str, name: str, overload: str) -> Key:
    return "" if domain in STANDARD_NAMES else domain, name, overload


def _calls(nodes: Iterable[NodeProto], functions: Mapping[Key, FunctionProto]) -> Iterable[NodeProto]:
    """The nodes that call a function, those of the graphs in nodes included."""
    for node in nodes:
        if _key(node.domain, node.op_type, node.overload) in functions:
            yield node
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _calls(graph.node, functions)


def _refuse_circles(calls: Mapping[Key, Iterable[NodeProto]], path: Path) -> None:
    order = TopologicalSorter({key: {_key(n.domain, n.op_type, n.overload) for n in nodes} for key, nodes in calls.items()})
    try:
        order.prepare()
    except CycleError as error:
        names = " calls ".join(f"'{domain + '.' if domain else ''}{name}'" for domain, name, _ in reversed(error.args[1]))
        raise BadModel(
            f"a function of {path} calls itself: {names}; no runtime ends it. Export the file again, and write such a part as "
            "a Loop or layer by layer."
        ) from error
