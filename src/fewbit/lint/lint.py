"""Lint: which nodes of a Q/DQ file run in integers on a target, by which rule, and what to change."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError
from fewbit.lint.accelerator import AcceleratorRules
from fewbit.lint.graph import DEQUANTIZE, QUANTIZE, Graph, Node
from fewbit.lint.onnxruntime_cpu import OnnxRuntimeRules
from fewbit.lint.openvino_cpu import OpenVinoRules
from fewbit.lint.rules import Rules, Verdict
from fewbit.lint.tensorrt import TensorRtRules
from fewbit.lint.truth import RAN, Ran, truth
from fewbit.runtimes import RUNTIMES
from fewbit.target import Target


@dataclass(frozen=True)
class Row:
    """One node that computes. `macs`: multiply-accumulates at batch 1; `share`: of the whole file's, 0 to 1; `integer_macs`:
    those in integers, which are not all where one kernel holds a product in integers and attention in float; `reads_codes`:
    whether one of its inputs is the real numbers of codes."""

    index: int
    name: str
    op: str
    integer: bool
    rule: str
    change: str
    macs: int
    share: float
    integer_macs: int
    reads_codes: bool


@dataclass(frozen=True)
class Lint:
    """The answer for a file: rows in the file's order, and how many Q/DQ pairs and dequantized weights there are and do
    nothing (no node in integers makes or reads their codes)."""

    file: str
    target: str
    rows: tuple[Row, ...]
    pairs: int
    idle_pairs: int
    weights: int
    idle_weights: int

    @property
    def integer_share(self) -> float:
        """The share of the multiply-accumulates that run in integers, 0 to 1; 1 for a file without any."""
        total = sum(row.macs for row in self.rows)
        return sum(row.integer_macs for row in self.rows) / total if total else 1.0

    def worst(self) -> list[Row]:
        """Float rows first, those with the most multiply-accumulates and with something to change before others."""
        return sorted(self.rows, key=lambda r: (r.integer, -r.macs, not r.change, r.index))

    def summary(self) -> str:
        """One line."""
        return (
            f"{100 * self.integer_share:.1f} % of the multiply-accumulates run in integers "
            f"({sum(r.integer for r in self.rows)} of {len(self.rows)} nodes); {self.idle_pairs} of {self.pairs} Q/DQ pairs "
            f"and {self.idle_weights} of {self.weights} dequantized weights do nothing but cost time."
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file, "target": self.target, "integer_share": self.integer_share, "pairs": self.pairs,
            "idle_pairs": self.idle_pairs, "weights": self.weights, "idle_weights": self.idle_weights,
            "nodes": [asdict(row) for row in self.rows],
        }  # fmt: skip


def lint(path: Path, target: Target) -> Lint:
    """Every computing node of an ONNX file under the rules of a target. Raises BadFile, and FewbitError for a runtime
    without rules."""
    graph = Graph(path)
    rules = rules_for(target)(graph, target)
    verdicts = {node.index: _foreign(node, target) or rules.verdict(node) for node in graph.computing}
    macs = {node.index: graph.macs(node) for node in graph.computing}
    integer = {n.index: macs[n.index] - graph.float_macs(n) if verdicts[n.index].integer else 0 for n in graph.computing}
    total = sum(macs.values()) or 1
    rows = tuple(
        Row(
            n.index,
            n.name,
            n.op,
            v.integer,
            v.rule,
            v.change,
            macs[n.index],
            macs[n.index] / total,
            integer[n.index],
            any(name in graph.producer and graph.producer[name].op == DEQUANTIZE for name in n.inputs),
        )
        for n in graph.computing
        for v in (verdicts[n.index],)
    )
    used = _used(graph, {index for index, v in verdicts.items() if v.integer})
    pairs = [n for n in graph.nodes if n.op == QUANTIZE and n.outputs[0] not in graph.constants]
    weights = [n for n in graph.nodes if n.op == DEQUANTIZE and n.inputs[0] in graph.constants]
    return Lint(
        path.name, target.name, rows, len(pairs), sum(n.index not in used for n in pairs),
        len(weights), sum(n.index not in used for n in weights),
    )  # fmt: skip


FOREIGN = "cannot load the file, or loads it and answers otherwise"


def _foreign(node: Node, target: Target) -> Verdict | None:
    """The verdict on an operator of one runtime under any other."""
    owner = next((name for name, runtime in RUNTIMES.items() if runtime.domain and runtime.domain == node.domain), None)
    if owner is None or owner == target.runtime:
        return None
    change = f"write the file for {target.runtime}: fewbit quantize --target {target.name}"
    return Verdict(False, f"{node.op} is an operator of {owner}'s own: {target.runtime} {FOREIGN}", change)


def _used(graph: Graph, integer: set[int]) -> set[int]:
    """The Q and DQ nodes whose codes a node in integers makes or reads, also through nodes that only move numbers."""
    indices: set[int] = set()

    def read_in_integers(name: str) -> bool:
        used = False
        for reader in graph.consumers.get(name, ()):
            deeper = reader.moves or reader.op in (QUANTIZE, DEQUANTIZE)
            one = reader.index in integer or (deeper and reader.op != QUANTIZE and read_in_integers(reader.outputs[0]))
            if one and reader.op == DEQUANTIZE:
                indices.add(reader.index)
            used = used or one
        return used

    for node in graph.nodes:
        if node.op not in (QUANTIZE, DEQUANTIZE):
            continue
        maker = graph.producer.get(node.inputs[0])
        while maker is not None and maker.moves and maker.inputs:
            maker = graph.producer.get(maker.inputs[0])
        produces = node.op == QUANTIZE and maker is not None and maker.index in integer
        if produces or read_in_integers(node.outputs[0]):
            indices.add(node.index)
    return indices


RULES: Mapping[str, Callable[[Graph, Target], Rules]] = {  # by runtime
    "onnxruntime": lambda graph, target: OnnxRuntimeRules(graph, signed=re.fullmatch(target.machine, "x86_64") is None),
    "openvino": lambda graph, target: OpenVinoRules(graph),
    "tensorrt": lambda graph, target: TensorRtRules(graph),
    "other": AcceleratorRules,
}


def rules_for(target: Target) -> Callable[[Graph, Target], Rules]:
    """The rules of a target by its `runtime`. Raises FewbitError that names the runtimes with rules."""
    if target.runtime in RULES:
        return RULES[target.runtime]
    raise FewbitError(
        f"lint has no rules for runtime '{target.runtime}' of target {target.name}; it has them for "
        f"{', '.join(sorted(RULES))}. "
        'A machine that only its target file describes has runtime = "other".'
    )


def disagreements(path: Path, prediction: Lint, target: Target) -> list[tuple[Row, Ran]]:
    """Rows that the target's runtime runs differently here. Raises FewbitError for a runtime that cannot run here, where the
    target is for another kind of processor, and for a file of another runtime, whose answers would mean nothing."""
    if target.runtime not in RAN or not re.fullmatch(target.machine, platform.machine()):
        raise FewbitError(f"--check runs the file, and {target.name} ({target.runtime}, {target.machine}) does not run here.")
    if foreign := sorted({row.op for row in prediction.rows if FOREIGN in row.rule}):
        raise FewbitError(
            f"--check runs the file, and {path} has operators of another runtime's own ({', '.join(foreign)}), which "
            f"{target.runtime} does not compute as that one does; check it with --target ort-x86-vnni, or write one with "
            f"--target {target.name}."
        )
    kernels = truth(path, target.runtime)
    return [(row, kernels[row.index]) for row in prediction.rows if row.integer != kernels[row.index].integer]
