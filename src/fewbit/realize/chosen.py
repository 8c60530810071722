"""Names in a file for what nodes have chosen by comparing numbers, so that verify can ask a runtime for it.

torch.onnx gives nodes other names than the graph, merges those that are alike, folds constants and may write several operators
for one node. But it keeps what modules a node stands in; so each node that chooses stands in one of its own name meanwhile.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence

import onnx_ir as ir
from torch.fx import GraphModule, Node

from fewbit.capture.selections import operator_of

CHOSEN = ".chosen"  # behind the name of a node: how a file calls what it has chosen
STACK, KINDS = "nn_module_stack", "pkg.torch.onnx.class_hierarchy"
MARK = "chosen by "  # in front of the name of a node, in the place of the kind of a module
FROM = "fewbit.from"


def mark(module: GraphModule, names: Collection[str]) -> None:
    """Let the nodes of these names stand in modules of their own."""
    for node in module.graph.nodes:
        if node.name in names:
            node.meta[STACK] = {MARK: ("", MARK + node.name), **node.meta.get(STACK, {})}


def keep_mark(node: ir.Node) -> None:
    """Keep the name that a written node was marked with beside its metadata, where no file has it."""
    kinds = ast.literal_eval(node.metadata_props.get(KINDS, "[]"))
    names = [kind.removeprefix(MARK) for kind in kinds if kind.startswith(MARK)]
    if names:
        node.meta[FROM] = names[0]


def name_chosen(model: ir.Model, nodes: Sequence[Node]) -> None:
    """Name what nodes have chosen, but for what is an output of the file. A node is left out where not exactly one operator
    that chooses as it does has its mark (none where it was merged with another): verify then has nothing of it to read.
    """
    written = dict[tuple[str, str], list[ir.Value]]()
    for one in model.graph:
        if FROM in one.meta:
            written.setdefault((one.meta[FROM], one.op_type), []).append(one.outputs[-1])
    for node in nodes:
        found = written.get((node.name, operator_of(node)), [])
        if len(found) == 1 and not found[0].is_graph_output():
            found[0].name = f"{node.name}{CHOSEN}"
