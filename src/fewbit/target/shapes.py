"""Sizes of an op, held against those for which a target has a kernel; and operands that must share one scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from fewbit.capture.kinds import KINDS
from fewbit.capture.sites import owner_of
from fewbit.core.graph import Graph, Op, Site
from fewbit.target.spec import OpRule


def channel_axis(site: Site) -> int:
    """The channel axis of an activation: after the batch in a map (batch, channels, h, w), last in anything else."""
    return 1 if len(site.shape) == 4 else len(site.shape) - 1


def sizes(graph: Graph, op: Op) -> dict[str, int]:
    """`inputs`, `outputs` and `rows` of an op for one image, and `grouped` if it is, as a target's `shape` names them."""
    shape = {name: graph.site(site).shape for name, site in op.operands.items()}
    if KINDS[op.kind].weighted:
        outputs = shape["weight"][0]
        source = graph.site(op.operands["input"])
        inputs, read = source.shape[channel_axis(source)], shape["weight"][1]
        whole = {"inputs": inputs, "outputs": outputs, "rows": op.macs // (op.reduction_size or 1) // outputs}
        return whole if read == inputs else {**whole, "grouped": read}
    if KINDS[op.kind].product:
        left, right = list(shape.values())[:2]
        return {"inputs": left[-1], "outputs": right[-1], "rows": left[-2]}
    result = graph.site(op.operands["output"])
    channels, source = result.shape[channel_axis(result)], graph.site(next(iter(op.operands.values())))
    return {"inputs": source.shape[channel_axis(source)], "outputs": channels, "rows": math.prod(result.shape) // channels}


def misfit(graph: Graph, op: Op, rule: OpRule) -> str:
    """Why a kernel does not take the sizes of an op: `inputs is 12, a kernel needs a multiple of 8`; empty if it does."""
    for name, size in sizes(graph, op).items():
        if wrong := getattr(rule.shape, name).why_not(size):
            return f"{name} is {size}, the kernel needs {wrong}"
    return ""


def shared_groups(graph: Graph, rules: Mapping[str, OpRule], all_readers: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of two or more activation sites that must share one scale: operands that a rule names as shared.

    A tensor that holds codes of another in other places (a view, a pooling of maxima) belongs to the group of that one, which
    is among `all_readers`: those whose codes all of their readers read. Groups that meet are one.
    """
    nodes = {node.name: node for node in graph.module.graph.nodes}
    owners = {graph.site(name).tensor: name for name in all_readers}
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for op in graph.ops:
        if op.name not in rules:
            continue
        names = [site for operand, site in op.operands.items() if operand.rstrip("0123456789") in rules[op.name].shared]
        for name in names:
            leader[find(name)] = find(names[0])
            owner = owner_of(nodes[graph.site(name).tensor], owners)
            if owner is not None:
                leader[find(owner)] = find(names[0])
    groups: dict[str, list[str]] = {}
    for site in graph.sites:
        if site.name in leader:
            groups.setdefault(find(site.name), []).append(site.name)
    return [tuple(group) for group in groups.values() if len(group) > 1]
