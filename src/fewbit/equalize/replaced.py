"""A graph with other constants, and whether its function is still the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from fewbit.core.device import with_constants
from fewbit.core.graph import Graph
from fewbit.core.inputs import example
from fewbit.equalize.attention_rows import with_maxima
from fewbit.equalize.channels import with_factors
from fewbit.execute.executor import Executor


def replaced(graph: Graph, constants: Mapping[str, Tensor]) -> Graph:
    """A graph with other values of some constants, factors of sites and rows divided by their maxima (`Equalized` says how they
    are named); nodes, ops and sites keep their names. The first graph is left alone.
    """
    if not constants:
        return graph
    module = GraphModule(graph.module, copy.deepcopy(graph.module.graph))
    sites = {site.name: site for site in graph.sites}
    rows = {name for name in constants if name in sites and sites[name].role == "probs"}
    graph = with_maxima(replace(graph, module=module), rows)
    graph = with_factors(graph, {name: constants[name] for name in constants if name in sites and name not in rows})
    with_constants(module, {name: value for name, value in constants.items() if name not in sites})
    return graph


def same_function(a: Graph, b: Graph, seed: int = 0) -> float:
    """The largest difference of two graphs' outputs on a random image, as a share of the largest output."""
    return difference_of(output_of(Executor(a), seed), output_of(Executor(b), seed))


def output_of(executor: Executor, seed: int = 0) -> tuple[Tensor, ...]:
    """What a graph gives for a random image."""
    graph = executor.graph
    x = torch.randn(graph.at_a_time(1), *graph.input_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return executor(example(graph.inputs, x))


def difference_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference of an output of real numbers, as a share of its largest number."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.is_floating_point()]
    return max((float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs), default=0.0)
