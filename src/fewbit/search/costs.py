"""What a candidate costs: bits, bytes of the file, milliseconds of one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType

from fewbit.core.fx import constant, is_constant
from fewbit.core.graph import Graph, flat_name
from fewbit.core.grid import Grid
from fewbit.realize.unpack import SHARED, part_sizes
from fewbit.search.budget import WIDEST
from fewbit.search.model import FLOAT, Model
from fewbit.search.space import Candidate, Dimension
from fewbit.target.allowed import Allowed
from fewbit.verify.times import Times

FULL = (8, 16)  # bits that fill their container


class Sizes:
    """Bits of a weight on average, and the bytes of the ONNX file: packed codes, scales, float tensors and nodes.

    A weight of `integer_ops` has `most` bits where no dimension says another width, any other is float. `grids` are those of
    weights, by op, whose codes are counted with what unpacks them. As measured on files: `rest` is the size beyond all that,
    and `clip` what saturates the codes of an activation that do not fill their container.
    """

    def __init__(
        self,
        graph: Graph,
        integer_ops: Collection[str],
        most: int,
        rest: int = 0,
        grids: Mapping[str, Grid] = MappingProxyType({}),
        clip: int = 0,
    ) -> None:
        weights = {op.name: graph.site(op.operands["weight"]) for op in graph.ops if "weight" in op.operands}
        self.counts = {name: math.prod(site.shape) for name, site in weights.items()}
        self.channels = {name: site.shape[0] for name, site in weights.items()}
        self.always = {name for name in weights if name not in integer_ops}
        weight_tensors = {site.tensor for site in weights.values()}
        nodes = [n for n in graph.module.graph.nodes if is_constant(n) and n.name not in weight_tensors]
        self.float_bytes = sum(4 * constant(graph.module, n).numel() for n in nodes)
        self.most, self.rest, self.grids, self.clip = most, rest, grids, clip
        self.activations = {site.name for site in graph.sites if site.role not in ("weight", "bias")}
        self.shapes = {
            name: site.shape[::-1] if graph.op(name).kind == "linear" else site.shape for name, site in weights.items()
        }
        self.names = {name: flat_name(site.name) for name, site in weights.items()}
        self._parts: dict[tuple[str, int], tuple[int, Mapping[str, int]]] = {}  # by op and bits

    @staticmethod
    def of(model: Model, rest: int = 0, clip: int = 0) -> Sizes:
        """Those of the candidates of a model."""
        weights = {op.name: model.base.choices.get(op.operands.get("weight", "")) for op in model.graph.ops}
        grids = {name: choice.grid for name, choice in weights.items() if choice is not None}
        return Sizes(model.graph, model.base.integer_ops, model.settings.most, rest, grids, clip)

    def widths(self, dimensions: Sequence[Dimension], candidate: Candidate) -> dict[str, int]:
        """Bits of each weight by op, 32 where it is float."""
        widths = dict.fromkeys(self.counts, self.most) | dict.fromkeys(self.always, 32)
        for dimension, k in zip(dimensions, candidate, strict=True):
            if dimension.name in widths:
                widths[dimension.name] = dimension.options[k] or 32
        return widths

    def __call__(self, dimensions: Sequence[Dimension], candidate: Candidate) -> dict[str, float]:
        total = self.total(self.widths(dimensions, candidate))
        return {**total, "bytes": total["bytes"] + self.clip * self.clipped(dimensions, candidate)}

    def clipped(self, dimensions: Sequence[Dimension], candidate: Candidate) -> int:
        """How many activations of a candidate have codes that do not fill their container."""
        chosen = ((d.name, d.options[k]) for d, k in zip(dimensions, candidate, strict=True))
        return sum(name in self.activations and bits not in FULL for name, bits in chosen)

    def total(self, widths: Mapping[str, int]) -> dict[str, float]:
        """The same of weights of so many bits by op, 32 where they are float."""
        total = max(sum(self.counts.values()), 1)
        size, shared = self.float_bytes + self.rest, dict[str, int]()
        for op, bits in widths.items():
            own, tables = self._in_file(op, bits)
            size += own + (4 * self.channels[op] if bits < 32 else 0)
            shared |= tables
        mean = sum(self.counts[op] * bits for op, bits in widths.items()) / total
        return {"bits": mean, "bytes": float(size + sum(shared.values()))}

    def _in_file(self, op: str, bits: int) -> tuple[int, Mapping[str, int]]:
        """The bytes of a weight of so many bits, and those, by name, of what is in the file once for all weights."""
        grid = self.grids.get(op)
        if grid is None or bits == 32:
            return -(-self.counts[op] * bits // 8), {}
        if (op, bits) not in self._parts:
            sizes = _sizes(len(self.names[op]), self.shapes[op], replace(grid, bits=min(bits, grid.bits)))
            shared = {name: size for name, size in sizes.items() if name.startswith(SHARED)}
            self._parts[op, bits] = sum(sizes.values()) - sum(shared.values()), shared
        return self._parts[op, bits]


@cache
def _sizes(letters: int, shape: tuple[int, ...], grid: Grid) -> Mapping[str, int]:
    """The parts of a weight whose name has so many letters."""
    return part_sizes("w" * letters, shape, grid)


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
