"""What a candidate costs: bits, bytes of the file, milliseconds of one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from fewbit.core.fx import constant, is_constant
from fewbit.core.graph import Graph
from fewbit.search.budget import WIDEST
from fewbit.search.model import FLOAT, Model
from fewbit.search.space import Candidate, Dimension
from fewbit.target.allowed import Allowed
from fewbit.verify.times import Times


class Sizes:
    """Bits of a weight on average, and the bytes of the ONNX file: packed codes, scales, float tensors and nodes.

    A weight of `integer_ops` has `most` bits where no dimension says another width, any other is float. `rest` is the size of a
    file beyond its tensors, as measured on one plan.
    """

    def __init__(self, graph: Graph, integer_ops: Collection[str], most: int, rest: int = 0) -> None:
        weights = {op.name: graph.site(op.operands["weight"]) for op in graph.ops if "weight" in op.operands}
        self.counts = {name: math.prod(site.shape) for name, site in weights.items()}
        self.channels = {name: site.shape[0] for name, site in weights.items()}
        self.always = {name for name in weights if name not in integer_ops}
        weight_tensors = {site.tensor for site in weights.values()}
        nodes = [n for n in graph.module.graph.nodes if is_constant(n) and n.name not in weight_tensors]
        self.float_bytes = sum(4 * constant(graph.module, n).numel() for n in nodes)
        self.most, self.rest = most, rest

    @staticmethod
    def of(model: Model, rest: int = 0) -> Sizes:
        """Those of the candidates of a model."""
        return Sizes(model.graph, model.base.integer_ops, model.settings.most, rest)

    def widths(self, dimensions: Sequence[Dimension], candidate: Candidate) -> dict[str, int]:
        """Bits of each weight by op, 32 where it is float."""
        widths = dict.fromkeys(self.counts, self.most) | dict.fromkeys(self.always, 32)
        for dimension, k in zip(dimensions, candidate, strict=True):
            if dimension.name in widths:
                widths[dimension.name] = dimension.options[k] or 32
        return widths

    def __call__(self, dimensions: Sequence[Dimension], candidate: Candidate) -> dict[str, float]:
        return self.total(self.widths(dimensions, candidate))

    def total(self, widths: Mapping[str, int]) -> dict[str, float]:
        """The same of weights of so many bits by op, 32 where they are float."""
        total = max(sum(self.counts.values()), 1)
        packed = sum(-(-self.counts[op] * b // 8) + (4 * self.channels[op] if b < 32 else 0) for op, b in widths.items())
        bits = sum(self.counts[op] * b for op, b in widths.items()) / total
        return {"bits": bits, "bytes": float(packed + self.float_bytes + self.rest)}


def smallest(graph: Graph, allowed: Allowed, least: int) -> dict[str, float]:
    """Fewer bits and bytes than these no candidate has: each weight has `least` bits, and nothing else is in the file."""
    sizes = Sizes(graph, allowed.integer_ops, WIDEST)
    weights = {op.name: allowed.sites[op.operands["weight"]] for op in graph.ops if op.operands.get("weight") in allowed.sites}
    narrow = {name: min(least, *(grid.bits for grid in grids.grids)) for name, grids in weights.items()}
    return sizes.total({name: 32 if name in sizes.always else narrow.get(name, least) for name in sizes.counts})


def costs_of(
    sizes: Sizes, dimensions: Sequence[Dimension], times: Times | None, always: Sequence[str] = ()
) -> Callable[[Candidate], Mapping[str, float]]:
    """candidate -> its costs; `ms` only where there are times. `always` are ops that stay float whatever the candidate."""

    def costs(candidate: Candidate) -> Mapping[str, float]:
        values = sizes(dimensions, candidate)
        if times is not None:
            floats = [d.name for d, k in zip(dimensions, candidate, strict=True) if d.options[k] == FLOAT]
            values["ms"] = times((*always, *floats))
        return values

    return costs
