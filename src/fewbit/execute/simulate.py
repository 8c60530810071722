"""The plan in PyTorch: the graph with every quantized tensor replaced by the real numbers of its codes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from fewbit.capture.fx import add_constant, give_bias
from fewbit.capture.sites import readers
from fewbit.core.grid import Grid, QParams, codes, fake, position, values
from fewbit.core.values import Choice, Graph, Plan, flat_name


class FakeQuant(nn.Module):
    """One activation site: fake(x) with its step and grid."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.site = choice.site
        self.grid: Grid = choice.grid
        self.register_buffer("scale", choice.qparams.scale.clone())
        self.register_buffer("zero", choice.qparams.zero.clone())

    @property
    def qparams(self) -> QParams:
        return QParams(cast(Tensor, self.scale), cast(Tensor, self.zero))

    def forward(self, x: Tensor) -> Tensor:
        return fake(x, self.qparams, self.grid)


def simulate(graph: Graph, plan: Plan) -> GraphModule:
    """A module like the float one, (b, c, h, w) to its output, that computes with the plan's numbers in float32.

    The graph's own module is left alone; tensors that are not quantized are shared with it.
    """
    module = GraphModule(graph.module, copy.deepcopy(graph.module.graph))
    nodes = {node.name: node for node in module.graph.nodes}
    for name, bias in plan.biases.items():
        read = nodes[graph.op(name).node]
        give_bias(read, add_constant(module, f"{name}_corrected", bias, read))
    for site in graph.sites:
        choice = plan.choices.get(site.name)
        if choice is None:
            continue
        flat = flat_name(site.name)
        if choice.codes is not None:
            for name, operand in site.readers:
                read = nodes[graph.op(name).node]
                position = {"weight": 1, "bias": 2}[operand]
                module.register_buffer(flat, values(choice.codes.to(torch.int32), choice.qparams, choice.grid))
                with module.graph.inserting_before(read):
                    read.update_arg(position, module.graph.get_attr(flat))
            continue
        tensor = nodes[site.tensor]
        module.add_submodule(flat, FakeQuant(choice))
        with module.graph.inserting_after(tensor):
            quantized = module.graph.call_module(flat, (tensor,))
        for reader in readers(graph, choice, plan.integer_ops, tensor):
            if reader is not quantized:
                reader.replace_input_with(tensor, quantized)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module.eval()


@dataclass(frozen=True)
class SiteTrace:
    """Codes (int32) of one activation site and where each element stood before rounding (float32), same shape."""

    codes: Tensor
    position: Tensor


class Tracer(Interpreter):
    """Runs a simulation and keeps the codes of each site.

    With `forced` (site -> codes), what follows a site computes with those codes instead of its own: a difference then
    belongs to the site where it appears, and does not spread.
    """

    def __init__(self, module: GraphModule, forced: Mapping[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.forced = forced
        self.traces: dict[str, SiteTrace] = {}

    def call_module(self, target: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        block = self.fetch_attr(cast(str, target))
        if not isinstance(block, FakeQuant):
            return super().call_module(cast(str, target), args, dict(kwargs))
        found = codes(args[0], block.qparams, block.grid)
        self.traces[block.site] = SiteTrace(found, position(args[0], block.qparams, block.grid))
        used = self.forced.get(block.site, found)
        return values(used.to(torch.int32), block.qparams, block.grid)


def trace(module: GraphModule, x: Tensor, forced: Mapping[str, Tensor] | None = None) -> tuple[Tensor, dict[str, SiteTrace]]:
    """The output of a simulation for (b, c, h, w) images, and the codes of every activation site."""
    tracer = Tracer(module, forced or {})
    with torch.no_grad():
        output = tracer.run(x)
    return cast(Tensor, output), tracer.traces
