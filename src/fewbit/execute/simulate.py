"""The plan in PyTorch: the graph with every quantized tensor replaced by the real numbers of its codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.core.graph import Graph
from fewbit.core.grid import codes, position, values
from fewbit.core.inputs import Batch
from fewbit.core.plan import Choice, Plan
from fewbit.execute.executor import NOTHING, Executor


class Simulation(nn.Module):
    """A plan as a module: a batch of images to the outputs of the quantized model, one alone, several as a tuple."""

    def __init__(self, executor: Executor) -> None:
        super().__init__()
        self.executor = executor

    def forward(self, images: Batch) -> Tensor | tuple[Tensor, ...]:
        outputs = self.executor(images)
        return outputs[0] if len(outputs) == 1 else outputs


def simulate(graph: Graph, plan: Plan) -> Simulation:
    """A module like the float one that computes with the plan's numbers.

    The graph's own module is left alone; its constants are shared, and have no gradient.
    """
    return Simulation(Executor.of(graph, plan)).eval()


@dataclass(frozen=True)
class SiteTrace:
    """Codes (int32) of one activation site and where each element stood before rounding (float32), same shape."""

    codes: Tensor
    position: Tensor


Traced = tuple[tuple[Tensor, ...], dict[str, SiteTrace]]


def trace(
    module: Simulation, x: Batch, forced: Mapping[str, Tensor] | None = None,
    calls: Mapping[str, Callable[..., Any]] = NOTHING, seen: Callable[[str, SiteTrace], object] | None = None,
) -> Traced:  # fmt: skip
    """The outputs of a simulation for a batch of images, and the codes of every activation site.

    With `forced` (site -> codes), what follows a site computes with those codes instead of its own: a difference then
    belongs to the site where it appears, and does not spread. `calls` stand for the nodes' functions, as in the executor.
    With `seen` each site's trace goes to that function, and none is kept.
    """
    forced_codes, traces = forced or {}, dict[str, SiteTrace]()
    keep = traces.__setitem__ if seen is None else seen

    def read(x: Tensor, choice: Choice) -> Tensor:
        own = codes(x, choice.qparams, choice.grid)
        keep(choice.site, SiteTrace(own, position(x, choice.qparams, choice.grid)))
        return values(forced_codes.get(choice.site, own).to(torch.int32), choice.qparams, choice.grid)

    with torch.no_grad():
        return module.executor(x, read=read, calls=calls), traces
