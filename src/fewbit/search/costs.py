"""What a candidate costs: bits, bytes of the file, milliseconds of one image."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from torch.fx import Node

from fewbit.capture.fx import constant, is_call, is_constant
from fewbit.capture.kinds import PADS
from fewbit.core.values import Op
from fewbit.errors import FewbitError
from fewbit.runtimes import RUNTIMES
from fewbit.search.latency import Table, Work, quantizer, shape_of, work_of
from fewbit.search.model import FLOAT, Model
from fewbit.search.space import Candidate, Dimension
from fewbit.target.allowed import Allowed

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


class Times:
    """The milliseconds of a plan: the float model's, plus the difference of each integer op, plus quantizers.

    `float_ms` is the measured time of the whole float model, which includes what is not in the table (norms, softmax, the
    call), so the prediction for the float model is its measurement.
    """

    def __init__(self, model: Model, table: Table, float_ms: float) -> None:
        self.model, self.table, self.float_ms = model, table, float_ms
        self.nodes: dict[str, Node] = {node.name: node for node in model.graph.module.graph.nodes}
        self.work = {op.name: work_of(model.graph, model.target, op, self.nodes) for op in model.graph.ops}
        self._cache: dict[tuple[str, ...], float] = {}

    @staticmethod
    def works(model: Model) -> list[Work]:
        """Every work whose time a prediction may need."""
        nodes = {node.name: node for node in model.graph.module.graph.nodes}
        works = [work_of(model.graph, model.target, op, nodes) for op in model.graph.ops if op.name in model.base.integer_ops]
        if RUNTIMES[model.target.runtime].quantizes_inside:
            return works
        shapes = {shape_of(nodes[site.tensor]) for site in model.graph.sites if site.role not in ("weight", "bias")}
        return works + [quantizer(kind, shape) for shape in sorted(shapes) for kind in ("quantize", "dequantize")]

    def __call__(self, floats: Sequence[str]) -> float:
        key = tuple(floats)
        if key not in self._cache:
            self._cache[key] = self.of(self.model.with_floats(key))
        return self._cache[key]

    def of(self, answer: Allowed) -> float:
        """Predicted milliseconds of one image."""
        total = self.float_ms
        for name in answer.integer_ops:
            before, after = self.table[self.work[name]]
            total += after - before
        return total + sum(self.table[work][1] for work in self.boundary(answer))

    def boundary(self, answer: Allowed) -> list[Work]:
        """A quantizer for each tensor whose codes no kernel writes, a dequantizer for each that float ops read.

        Empty where the measured times of ops include them.
        """
        if RUNTIMES[self.model.target.runtime].quantizes_inside:
            return []
        graph, integer = self.model.graph, set(answer.integer_ops)
        code_sites = {op.operands["output"] for op in graph.ops if op.name in integer and self._gives_codes(op)}
        reads = {graph.op(name).node for name in integer}
        quantizers = []
        for name, slot in answer.sites.items():
            site = graph.site(name)
            if site.role in ("weight", "bias") or self.model.moved.get(name) in answer.sites:
                continue
            tensor = self.nodes[site.tensor]
            if name not in code_sites:
                quantizers.append(quantizer("quantize", shape_of(tensor)))
            if slot.all_readers and any(user.name not in reads and not self._carries(user, reads) for user in tensor.users):
                quantizers.append(quantizer("dequantize", shape_of(tensor)))
        return quantizers

    def _carries(self, user: Node, reads: Collection[str]) -> bool:
        """Whether a node only passes codes on, unchanged or padded, into integer ops."""
        tensors = {self.model.graph.site(site).tensor for site in self.model.moved}
        return user.name in tensors or (is_call(user, *PADS) and all(reader.name in reads for reader in user.users))

    def _gives_codes(self, op: Op) -> bool:
        return "output" in op.operands and self.work[op.name].codes

    def slower(self) -> list[str]:
        """The integer ops that make the whole model slower; a search leaves them float.

        Chosen greedily: the op with the largest gain first, then those that still gain without it.
        """
        floats: list[str] = []
        now = self(())
        while True:
            gains = {
                op: now - self((*floats, op))
                for op in self.model.with_floats(tuple(floats)).integer_ops
                if self.model.graph.op(op).macs
            }
            best = max(gains, key=gains.__getitem__, default=None)
            if best is None or gains[best] <= NOISE * now:
                return floats
            floats.append(best)
            now = self(tuple(floats))


NOISE = 0.002  # share of the whole: a smaller gain is below measurement noise


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
