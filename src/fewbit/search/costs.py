"""What a candidate costs: bits, bytes of the file, milliseconds of one image."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from fewbit.core.fx import constant, is_constant
from fewbit.errors import FewbitError
from fewbit.search.model import FLOAT, Model
from fewbit.search.space import Candidate, Dimension
from fewbit.verify.times import Times

WIDEST = 16  # bits
UNITS = {"bit": ("bits", 1.0), "kb": ("bytes", 1e3), "mb": ("bytes", 1e6), "b": ("bytes", 1.0), "ms": ("ms", 1.0)}


def parse_budget(text: str) -> tuple[str, float]:
    """(cost, limit) of `6bit` (per weight on average), `3MB`, `900KB` or `20ms`. Raises FewbitError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*(bits?|[km]?b|ms)\s*", str(text).lower(), re.ASCII)
    if match is None or float(match[1]) <= 0 or (match[2].startswith("bit") and float(match[1]) > WIDEST):
        raise FewbitError(
            f"--budget {text} is not understood; allowed are 6bit (a weight has 6 bits on average, at most 16), 3MB or "
            "900KB (the file) and 20ms (one image in the target's runtime)."
        )
    name, factor = UNITS[match[2].rstrip("s") if match[2] != "ms" else "ms"]
    return name, float(match[1]) * factor


class Sizes:
    """Bits of a weight on average, and the bytes of the ONNX file: packed codes, scales, float tensors and nodes.

    `rest` is the size of a file beyond its tensors, as measured on one plan.
    """

    def __init__(self, model: Model, rest: int = 0) -> None:
        graph = model.graph
        weights = {op.name: graph.site(op.operands["weight"]) for op in graph.ops if "weight" in op.operands}
        self.counts = {name: math.prod(site.shape) for name, site in weights.items()}
        self.channels = {name: site.shape[0] for name, site in weights.items()}
        self.always = {name for name in weights if name not in model.base.integer_ops}
        weight_tensors = {site.tensor for site in weights.values()}
        nodes = [n for n in graph.module.graph.nodes if is_constant(n) and n.name not in weight_tensors]
        self.float_bytes = sum(4 * constant(graph.module, n).numel() for n in nodes)
        self.most, self.rest = model.settings.most, rest

    def widths(self, dimensions: Sequence[Dimension], candidate: Candidate) -> dict[str, int]:
        """Bits of each weight by op, 32 where it is float."""
        widths = dict.fromkeys(self.counts, self.most) | dict.fromkeys(self.always, 32)
        for dimension, k in zip(dimensions, candidate, strict=True):
            if dimension.name in widths:
                widths[dimension.name] = dimension.options[k] or 32
        return widths

    def __call__(self, dimensions: Sequence[Dimension], candidate: Candidate) -> dict[str, float]:
        widths = self.widths(dimensions, candidate)
        total = max(sum(self.counts.values()), 1)
        packed = sum(-(-self.counts[op] * b // 8) + (4 * self.channels[op] if b < 32 else 0) for op, b in widths.items())
        bits = sum(self.counts[op] * b for op, b in widths.items()) / total
        return {"bits": bits, "bytes": float(packed + self.float_bytes + self.rest)}


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
