"""The milliseconds of a plan, predicted from a table of single ops: which ops are worth their integers on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from fewbit.capture.kinds import PADS
from fewbit.core.fx import is_call
from fewbit.core.graph import Graph, Op
from fewbit.core.inputs import arrays_of, example, image_among
from fewbit.core.plan import Plan, SameAs
from fewbit.runtimes import RUNTIMES, open_session
from fewbit.target.allowed import Allowed
from fewbit.target.load import processor
from fewbit.target.spec import Target
from fewbit.verify.bench import paired
from fewbit.verify.latency import Table, Work, quantizer, shape_of, table, work_of

WHOLE = 2.0  # seconds to measure the whole float model
NOISE = 0.002  # share of the whole: a smaller gain is below measurement noise


class Times:
    """The milliseconds of a plan with some ops in float: the float model's, plus the difference of each integer op, plus
    quantizers.

    `allow` says what runs in integers with some ops in float. `float_ms` is the measured time of the whole float model, which
    includes what is not in the table (norms, softmax, the call), so the prediction for the float model is its measurement.
    """

    def __init__(
        self, graph: Graph, target: Target, plan: Plan, allow: Callable[[tuple[str, ...]], Allowed], table: Table,
        float_ms: float,
    ) -> None:  # fmt: skip
        self.graph, self.target, self.allow, self.table, self.float_ms = graph, target, allow, table, float_ms
        self.moved = {c.site: c.source.site for c in plan.choices.values() if isinstance(c.source, SameAs)}
        self.nodes: dict[str, Node] = {node.name: node for node in graph.module.graph.nodes}
        self.work = {op.name: work_of(graph, target, op, self.nodes) for op in graph.ops}
        self._cache: dict[tuple[str, ...], float] = {}

    @staticmethod
    def works(graph: Graph, target: Target, plan: Plan) -> list[Work]:
        """Every work whose time a prediction may need."""
        nodes = {node.name: node for node in graph.module.graph.nodes}
        works = [work_of(graph, target, op, nodes) for op in graph.ops if op.name in plan.integer_ops]
        if RUNTIMES[target.runtime].quantizes_inside:
            return works
        shapes = {shape_of(nodes[site.tensor]) for site in graph.sites if site.role not in ("weight", "bias")}
        return works + [quantizer(kind, shape) for shape in sorted(shapes) for kind in ("quantize", "dequantize")]

    def __call__(self, floats: Sequence[str]) -> float:
        key = tuple(floats)
        if key not in self._cache:
            self._cache[key] = self.of(self.allow(key))
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
        if RUNTIMES[self.target.runtime].quantizes_inside:
            return []
        graph, integer = self.graph, set(answer.integer_ops)
        code_sites = {op.operands["output"] for op in graph.ops if op.name in integer and self._gives_codes(op)}
        reads = {graph.op(name).node for name in integer}
        quantizers = []
        for name, slot in answer.sites.items():
            site = graph.site(name)
            if site.role in ("weight", "bias") or self.moved.get(name) in answer.sites:
                continue
            tensor = self.nodes[site.tensor]
            if name not in code_sites:
                quantizers.append(quantizer("quantize", shape_of(tensor)))
            if slot.all_readers and any(user.name not in reads and not self._carries(user, reads) for user in tensor.users):
                quantizers.append(quantizer("dequantize", shape_of(tensor)))
        return quantizers

    def _carries(self, user: Node, reads: Collection[str]) -> bool:
        """Whether a node only passes codes on, unchanged or padded, into integer ops."""
        tensors = {self.graph.site(site).tensor for site in self.moved}
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
            ops = [op for op in self.allow(tuple(floats)).integer_ops if self.graph.op(op).macs]
            gains = {op: now - self((*floats, op)) for op in ops}
            best = max(gains, key=gains.__getitem__, default=None)
            if best is None or gains[best] <= NOISE * now:
                return floats
            floats.append(best)
            now = self(tuple(floats))


def times_of(
    graph: Graph, target: Target, plan: Plan, allow: Callable[[tuple[str, ...]], Allowed], whole: float, threads: int,
    **options: Any,
) -> Times:  # fmt: skip
    """The times of this machine for what a plan has in integers; `whole` is what the float model takes.

    `options` are those of `latency.table`: where it is stored, how an op is measured, what is told of the progress.
    """
    latencies = table(Times.works(graph, target, plan), target.runtime, processor(), threads, **options)
    return Times(graph, target, plan, allow, latencies, whole)


def whole_of(graph: Graph, runtime: str, path: Path, threads: int) -> float:
    """The milliseconds of one call of a graph's float model, the median of `WHOLE` seconds."""
    session = open_session(runtime, path, threads=threads)
    arrays = arrays_of(graph.inputs, example(graph.inputs, torch.zeros(graph.at_a_time(1), *image_among(graph.inputs).shape)))
    return 1e3 * statistics.median(row[0] for row in paired([partial(session.run, *arrays)], WHOLE))
