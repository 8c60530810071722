"""What a model does behind its last layers: decoding of boxes, sigmoid of scores, enlarged maps. What stays float there, why,
and what it costs to quantize the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from fewbit.core.fx import MOVES, is_call
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, count
from fewbit.core.plan import Plan
from fewbit.core.task import mean_divergence
from fewbit.execute.executor import Executor
from fewbit.task import task_of

NO_KIND = "it has no weights, and integers would gain nothing"
MOVED = "it only moves numbers"


def nodes_behind(graph: Graph) -> list[Node]:
    """The nodes between the last ops with weights and the outputs, in order: what no op with a weight reads any more."""
    weighted = {op.node for op in graph.ops if "weight" in op.operands}
    computed, before = set[Node](), set[Node]()
    nodes = list(graph.module.graph.nodes)
    for node in nodes:
        if node.name in weighted or any(read in computed for read in node.all_input_nodes):
            computed.add(node)
    for node in reversed(nodes):
        if node.name in weighted or node in before:
            before |= {node, *node.all_input_nodes}
    return [node for node in nodes if node in computed and node not in before and node.op == "call_function"]


def postprocessing(graph: Graph, plan: Plan, sample: Batch) -> dict[str, list[Mapping[str, Any]]]:
    """Rows for the report: `behind`, for each function how many nodes are float and why; `behind_cost`, the loss on `sample`
    with the integer ops there and with these in float, in the terms of the task.
    """
    behind = nodes_behind(graph)
    ops = {op.node: op for op in graph.ops}
    integer = {name for name in plan.integer_ops if graph.op(name).node in {node.name for node in behind}}
    whys = {fallback.site: fallback.why for fallback in plan.fallbacks if fallback.actual == "float"}
    rows: dict[tuple[str, str, str], int] = {}
    for node in behind:
        op = ops.get(node.name)
        if op is not None and op.name in integer:
            how, why = "integers", ""
        else:
            how, why = "float", MOVED if is_call(node, *MOVES) else NO_KIND
            why = why if op is None else whys.get(op.name, "the target has no integers for it, or it was left out")
        key = str(node.target).removeprefix("aten.").partition(".")[0], how, why
        rows[key] = rows.get(key, 0) + 1
    table: list[Mapping[str, Any]] = [{"function": f, "how": how, "why": why, "nodes": n} for (f, how, why), n in rows.items()]
    return {"behind": table, "behind_cost": [_cost(graph, plan, integer, sample)] if integer else []}


def _cost(graph: Graph, plan: Plan, integer: set[str], sample: Batch) -> Mapping[str, Any]:
    """The loss of the plan, and of the plan without these ops; and their share of the work."""
    task, images = task_of(graph), count(sample)
    exact = Executor(graph)(sample)
    others = [name for name in plan.integer_ops if name not in integer]
    whole, without = (
        mean_divergence(task, exact, Executor.of(graph, plan, names)(sample), what)
        for names, what in ((plan.integer_ops, "all ops of the plan"), (others, "all but those behind the last layers"))
    )
    share = graph.share(sum(graph.op(name).macs for name in integer))
    return {"ops": len(integer), "macs_share": share, "loss": whole, "without": without, "images": images}
