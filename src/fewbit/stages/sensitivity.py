"""Sensitivity: what the task loses with each module in integers, what that gains in time, and which to leave float first.

A module is an attention module, an MLP or a single op, with those of its ops that a plan has in integers. Losses are those of
the simulation, in the terms of the task; milliseconds are sums over the measured table of single ops, and only those of the
target's own runtime and processor. Without them the work that is saved is counted in multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewbit.capture.structure import Module, modules
from fewbit.choose.sensitivity import Losses, OutputKL
from fewbit.core.device import on
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch, count
from fewbit.core.plan import Plan
from fewbit.data.images import Images
from fewbit.files import write_atomic, write_json
from fewbit.folder import MARKS, RECORDS
from fewbit.observe import Stats
from fewbit.progress import Progress
from fewbit.report.sensitivity import draw
from fewbit.request import Planned, SensitivityRequest
from fewbit.request.command import quantize_command
from fewbit.stages.times import context_of, times_here
from fewbit.target import absent
from fewbit.target.allowed import matches
from fewbit.task import task_of
from fewbit.verify.times import NOISE, Times
from fewbit.workers import LOCAL, Workers

FILE, PAGE = RECORDS["sensitivity"], MARKS["sensitivity"]
FEW = 0.01  # of the loss of all modules, below which one is left float last
FASTER = "loss for each millisecond gained"
LIGHTER = "loss for each multiply-accumulate"
LOOKED = 1e11  # multiply-accumulates that the short form may simulate


@dataclass(frozen=True)
class Worth:
    """What one module loses and gains in integers.

    `loss` is the task's with it alone in integers and `ms_alone` what the model gains in time then; `regained` is how much of
    the loss goes where all but it are in integers, and `ms` by how much the file is slower then. None: not measured.
    """

    position: int  # in the graph
    module: str
    kind: str
    ops: tuple[str, ...]
    loss: float
    macs: int
    macs_share: float
    regained: float | None = None
    ms_alone: float | None = None
    ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ops": list(self.ops)}


def units(graph: Graph, plan: Plan) -> list[Module]:
    """The modules of a graph with those of their ops that are in integers, without the modules that have none."""
    integer = set(plan.integer_ops)
    mine = (replace(unit, ops=tuple(op for op in unit.ops if op in integer)) for unit in modules(graph))
    return [unit for unit in mine if unit.ops]


def every_op(graph: Graph, plan: Plan) -> list[Module]:
    """The same, and each op in integers that belongs to no module (an addition, a pooling) by itself, in graph order."""
    mine, place = units(graph, plan), {op.name: i for i, op in enumerate(graph.ops)}
    left = set(plan.integer_ops).difference(*(unit.ops for unit in mine))
    mine += [Module(op.name, "op", (op.name,), op.node) for op in graph.ops if op.name in left]
    return sorted(mine, key=lambda unit: place[unit.ops[0]])


def worths(
    graph: Graph, plan: Plan, batches: Sequence[Batch], times: Times | None, progress: Progress, workers: Workers = LOCAL,
    mine: Sequence[Module] | None = None,
) -> list[Worth]:  # fmt: skip
    """What each module (or each of `mine`) is worth alone in integers, in graph order; by how much the file is slower without
    it.
    """
    mine, rows = units(graph, plan) if mine is None else mine, list[Worth]()
    progress.begin("each module alone in integers", len(mine))
    losses = Losses(graph, plan, batches).of_each([(unit.ops, unit.ops) for unit in mine], workers)
    for k, (unit, loss) in enumerate(zip(mine, losses, strict=True)):
        macs = sum(graph.op(op).macs for op in unit.ops)
        row = Worth(k, unit.name, unit.kind, unit.ops, loss, macs, graph.share(macs))
        rows.append(row if times is None else _timed(row, plan, times))
        progress.advance(1, unit.name)
    return rows


def with_regained(
    rows: Sequence[Worth], graph: Graph, plan: Plan, batches: Sequence[Batch], progress: Progress, workers: Workers = LOCAL
) -> tuple[list[Worth], float]:  # fmt: skip
    """The rows with what is regained where all but the module are in integers, and the loss of the whole plan."""
    progress.begin("all but each module in integers", len(rows))
    sets: list[tuple[Sequence[str], Sequence[str]]] = [(plan.integer_ops, plan.integer_ops)]
    sets += [([op for op in plan.integer_ops if op not in row.ops], row.ops) for row in rows]
    losses, more = Losses(graph, plan, batches).of_each(sets, workers), list[Worth]()
    whole = next(losses)
    for row, loss in zip(rows, losses, strict=True):
        more.append(replace(row, regained=whole - loss))
        progress.advance(1, row.module)
    return more, whole


def _timed(row: Worth, plan: Plan, times: Times) -> Worth:
    """A row with its milliseconds; what is below the noise of the table is 0."""
    others = tuple(op for op in plan.integer_ops if op not in row.ops)
    gains = times(row.ops) - times(()), times.float_ms - times(others)
    ms, alone = (gain if abs(gain) > NOISE * times.float_ms else 0.0 for gain in gains)
    return replace(row, ms=ms, ms_alone=alone)


def ordered(rows: Sequence[Worth]) -> list[Worth]:
    """As they are best left float: first those that lose time, then those that gain none, then by loss for each millisecond
    that they gain (where there are no times, for each multiply-accumulate); last those that lose next to nothing.
    """
    least = FEW * sum(row.loss for row in rows)

    def place(row: Worth) -> tuple[int, float]:
        if row.ms is not None and row.ms < 0:
            return 0, row.ms
        if row.loss < least:
            return 3, -row.loss
        return (1, -row.loss) if row.ms == 0 else (2, -row.loss / (max(row.macs, 1) if row.ms is None else row.ms))

    return sorted(rows, key=place)


def some(images: Images, graph: Graph, most: int) -> list[Batch]:
    """At most so many images, in whole batches of a model that has one."""
    taken = images.subset(range(min(graph.at_a_time(most), len(images))))
    return list(taken.batches(graph.at_a_time(8)))


def measured(
    graph: Graph, stats: Stats, plan: Plan, calibration: Images, scored: Images, request: SensitivityRequest, folder: Path,
    progress: Progress, workers: Workers,
) -> dict[str, Any]:  # fmt: skip
    """sensitivity.json, and the page that is drawn of it: every module on images that did not calibrate."""
    times = times_here(context_of(graph, stats, request), plan, request.threads, folder, progress)
    batches = some(scored, graph, len(scored))
    placed = on(graph, request.place)
    alone = worths(placed, plan, batches, times, progress, workers)
    rows, whole = with_regained(alone, placed, plan, batches, progress, workers)
    summary = {
        "schema": 1,
        **{name: getattr(plan, name) for name in ("model", "target", "recipe", "bits")},
        "command": request.command,
        "images": {"calibration": len(calibration), "measured": sum(map(count, batches))},
        "loss": whole,
        "distance": task_of(graph).distance,
        "by": LIGHTER if times is None else FASTER,
        "why": absent(request.hardware),
        "milliseconds": None if times is None else {"float": times.float_ms, "integers": times(())},
        "latency_table": None if times is None else dict(times.table.provenance),
        "rows": [
            {"place": k, **row.to_json(), "command": command}
            for k, (row, command) in enumerate(with_commands(graph, plan, request, ordered(rows)), 1)
        ],
    }
    write_json(folder / FILE, summary)
    page = draw(summary)
    write_atomic(folder / PAGE, lambda file: file.write_text(page, encoding="utf-8"))
    return summary


def with_commands(
    graph: Graph, plan: Plan, request: SensitivityRequest, rows: Sequence[Worth]
) -> Iterator[tuple[Worth, str]]:  # fmt: skip
    """Each module with the command that leaves it float with all before it; none for the last, as nothing would be left."""
    words: list[str] = []
    for k, row in enumerate(rows, 1):
        words += [word for name in _named(graph, plan, row) for word in ("--keep-float", name)]
        yield row, quantize_command(request, *words, "--out", f"run-without-{k}") if k < len(rows) else ""


def _named(graph: Graph, plan: Plan, row: Worth) -> Sequence[str]:
    """The pattern of a module where it means its ops and no others of the plan, else their names."""
    pattern = f"{row.module}.*"
    fits = {op.name for op in graph.ops if matches(op, (pattern,))}
    return (pattern,) if len(row.ops) > 1 and fits.intersection(plan.integer_ops) == set(row.ops) else row.ops


def short(
    graph: Graph, plan: Plan, calibration: Images, request: Planned, progress: Progress, workers: Workers
) -> list[dict[str, Any]]:  # fmt: skip
    """Every module, and every op of none, alone in integers, on a few calibration images, fewer of a large model; those that
    lose most come first.
    """
    mine = every_op(graph, plan)
    work = max(graph.macs * len(mine) // 2, 1)  # of one image: a module is simulated from its place on
    batches = some(calibration, graph, int(min(OutputKL.images, max(LOOKED // work, 1))))
    rows = worths(on(graph, request.place), plan, batches, None, progress, workers, mine)
    total, looked = sum(row.loss for row in rows), sum(map(count, batches))
    worst = sorted(rows, key=lambda row: -row.loss)
    return [
        {**row.to_json(), "loss_share": row.loss / total if total else 0.0, "of": len(rows), "images": looked} for row in worst
    ]
