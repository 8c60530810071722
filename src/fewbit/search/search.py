"""The whole of `fewbit search`: images, ranges, times, the search itself, and its best points in the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fewbit.choose import Bits, Context
from fewbit.core.call import one_call
from fewbit.core.device import CPU, on
from fewbit.core.duration import parse_time
from fewbit.core.graph import Graph
from fewbit.core.record import Record
from fewbit.errors import FewbitError
from fewbit.files import Journal, write_atomic, write_json
from fewbit.folder import PAGE, REPORT, TWIN
from fewbit.observe import Stats
from fewbit.onnx_file import bytes_of
from fewbit.progress import Progress
from fewbit.realize import float_onnx
from fewbit.report import frontpage
from fewbit.request import SearchRequest
from fewbit.request.command import quantize_command
from fewbit.request.recipe_options import default_bits
from fewbit.run import Run, helped
from fewbit.search.budget import parse_budget, shown, too_small, typed
from fewbit.search.costs import Sizes, costs_of, smallest
from fewbit.search.judge import Judge
from fewbit.search.model import FLOAT, Loss, Model, Scored, Settings
from fewbit.search.run import History, pareto
from fewbit.search.run import run as trials_of
from fewbit.search.space import Candidate, Dimension, Problem
from fewbit.search.strategies import strategy_named
from fewbit.stages import PREPARE
from fewbit.stages.realize import write_model
from fewbit.verify.times import Times, times_of, whole_of
from fewbit.workers import LOCAL, Workers

JOURNAL, WIDEST, NARROW = "search.jsonl", "widest.onnx", "narrow.onnx"
LADDER = (7.0, 6.0, 5.0)  # mean bits of the searches that make the front, down to the budget; the first has no limit on bits


@dataclass
class SearchProblem:
    """Model, loss, dimensions and costs of a search; `problem` adds the limits of one of its stages."""

    model: Model
    loss: Loss
    dimensions: tuple[Dimension, ...]
    costs: Callable[[Candidate], Mapping[str, float]]
    limits: Mapping[str, float]
    always: tuple[str, ...]
    times: Times

    def problem(self, limits: Mapping[str, float]) -> Problem:
        return Problem(self.dimensions, self.costs, limits)

    def bits(self, candidate: Candidate, spec: str = "") -> Bits:
        bits = self.model.bits(self.dimensions, candidate, spec)
        return replace(bits, floats=(*self.always, *bits.floats))


def problem_of(
    model: Model, loss: Loss, times: Times, limits: Mapping[str, float], rest: int = 0, clip: int = 0
) -> SearchProblem:
    """The problem of a model: an op that is slower in integers starts in float, and stays float where it has no weight.

    With a budget of milliseconds any op may be float; without one only those, as nothing would limit the others.
    """
    slower = times.slower()
    graph = model.graph
    floats = dict.fromkeys(slower, True)
    if "ms" in limits:
        floats |= {
            op.name: False for op in graph.ops if op.name in model.base.integer_ops and op.macs and op.name not in floats
        }
    else:
        floats = {name: True for name in slower if "weight" in graph.op(name).operands}
    always = tuple(name for name in slower if name not in floats)
    dimensions = model.dimensions(floats)
    costs = costs_of(Sizes.of(model, rest, clip), dimensions, times, always)
    return SearchProblem(model, loss, dimensions, costs, limits, always, times)


def stages(limits: Mapping[str, float], costs: Mapping[str, float]) -> list[dict[str, float]]:
    """Limits of the searches that make the front: the budget without bits and bytes, then fewer and fewer bits."""
    other = {k: v for k, v in limits.items() if k not in ("bits", "bytes")}
    least = max((limits.get("bits", 0.0), limits.get("bytes", 0.0) / costs["bytes"] * costs["bits"]))
    rungs = [{**other, "bits": b} for b in LADDER if least < b < costs["bits"]]
    return [dict(other), *rungs, *([dict(limits)] if least else [])]


def search(model: Any, images: Any = None, *, progress: Progress | None = None, **options: Any) -> dict[str, Any]:
    """Search, export the points of the front, measure them on held-out images, and write the folder; returns report.json.

    Every option is a field of `fewbit.request.SearchRequest`. A killed search resumes from the losses in
    `<out>.part`. Ctrl-C ends the search and keeps its best.
    """
    return execute(SearchRequest(model=model, images=images, **options), progress)


def execute(request: SearchRequest, progress: Progress | None = None) -> dict[str, Any]:
    """The stages of a run up to equalize, then ranges, times, the search itself, and its points as ONNX files."""
    limits: dict[str, float] = {}
    for text in request.budget:
        name, limit = parse_budget(text)
        limits[name] = min(limit, limits.get(name, limit))
    build, settings = strategy_named(request.strategy), Settings(request.edges, default_bits(request.hardware), request.least)
    with (
        one_call(progress),
        helped(request) as workers,
        Run.start(request, PREPARE, progress, "search", workers) as run,
    ):
        return _searched(run, request, limits, build, settings)


def _searched(run: Run, request: SearchRequest, limits: Mapping[str, float], build: Any, settings: Settings) -> dict[str, Any]:
    """The search of a run that has been started."""
    assert request.out is not None
    _refuse_small(run["exact"], request, limits)
    part, progress, calibration, held_out = run.folder, run.progress, run["calibration"], run["scored"]
    graph, stats, record = run["graph"], run["stats"], run["inputs"].record
    placed = on(graph, request.place)
    with progress.stage("ranges"):
        context = Context(
            placed, stats, request.hardware, name=request.recipe_name, keep_float=tuple(request.keep_float), seed=request.seed
        )
        model = Model(context, request.method, settings)
        measure = Loss(placed, calibration.batches(graph.at_a_time(8)), calibration.labels, request.loss or "kl")
    with progress.stage("times"):
        problem = _timed_problem(model, measure, limits, part, request, record, progress)
    judge = Judge(problem, held_out, record, part, request.threads, partial(quantize_command, request))
    with progress.stage("judge"):
        began = progress.spent
        first = judge.uniform()
        reserve = request.points * (progress.spent - began)  # each point takes as long
    with progress.stage("search"):
        progress.expect(request.evaluations)
        history = climb(
            problem, build, request.evaluations, seed=request.seed,
            seconds=None if request.time is None else max(parse_time(request.time) - reserve, 0.0),
            journal=Journal(part / JOURNAL, spent=progress.spent), progress=lambda text: progress.advance(1, text),
            workers=run["workers"],
        )  # fmt: skip
    places = pick(problem, history, request.points)
    with progress.stage("judge"):
        progress.expect(len(places))
        rows = judge.points(first, [history.trials[place] for place in places], request.out, progress.advance)
    summary = _summary(request, problem, history, rows, {"calibration": len(calibration), "scored": len(held_out)})
    with progress.stage("report"):
        write_json(part / REPORT, summary)
        page = frontpage.render(summary)
        write_atomic(part / PAGE, lambda file: file.write_text(page, encoding="utf-8"))
    run.finish(JOURNAL, WIDEST, NARROW, *(name for stage in PREPARE for name in stage.files))
    return summary


def _refuse_small(graph: Graph, request: SearchRequest, limits: Mapping[str, float]) -> None:
    """Raise FewbitError for fewer bits or bytes than any weights have: that is known without images."""
    context = Context(graph, Stats({}, 0), request.hardware, request.widths, keep_float=tuple(request.keep_float))
    least = smallest(graph, context.allowed, request.least)
    if limits.get("bits", least["bits"]) < least["bits"]:
        raise too_small(limits, least)
    if limits.get("bytes", least["bytes"]) < least["bytes"]:
        raise FewbitError(
            f"no setting keeps the budget {shown('bytes', limits['bytes'])}: the weights alone at their narrowest "
            f"are {typed('bytes', least['bytes'])}, and a file has more than these. Give a larger one with --budget."
        )


def _timed_problem(
    model: Model,
    measure: Loss,
    limits: Mapping[str, float],
    part: Path,
    request: SearchRequest,
    record: Record,
    progress: Progress,
) -> SearchProblem:
    """The problem, with the machine's times of its ops and the bytes of its widest file."""
    twin, graph, base = part / TWIN, on(model.graph, CPU), on(model.base, CPU)
    float_onnx(graph, twin, opset=request.hardware.opset)
    write_model(graph, base, part / WIDEST, request.hardware.file_format, record)
    whole = whole_of(graph, model.target.runtime, twin, request.threads)
    times = times_of(
        graph, model.target, base, model.with_floats, whole, request.threads,
        progress=lambda text: progress.advance(1, text),
    )  # fmt: skip
    return problem_of(model, measure, times, limits, *measured(model, part / WIDEST, request.hardware.file_format, record))


def measured(model: Model, widest: Path, form: Mapping[str, Any], record: Record) -> tuple[int, int]:
    """What `Sizes` has from files: `rest`, of the widest one, and `clip`, of one beside it whose activations are narrower."""
    sizes, dimensions = Sizes.of(model), model.dimensions({})
    start = tuple(0 for _ in dimensions)
    narrow = tuple(int(d.name in sizes.activations and len(d.options) > 1) for d in dimensions)
    rest = bytes_of(widest) - int(sizes(dimensions, start)["bytes"])
    count = sizes.clipped(dimensions, narrow) - sizes.clipped(dimensions, start)
    if count <= 0:
        return rest, 0
    path = widest.with_name(NARROW)
    write_model(on(model.graph, CPU), on(model.plan(model.bits(dimensions, narrow)), CPU), path, form, record)
    return rest, -((bytes_of(widest) - bytes_of(path)) // count)


def _summary(
    request: SearchRequest, problem: SearchProblem, history: History, rows: Sequence[Any], images: Mapping[str, int]
) -> dict[str, Any]:
    """report.json."""
    return {
        "schema": 1,
        **{k: v for k, v in request.key().items() if k not in ("points", "budget")},
        "budgets": list(request.budget),
        "command": request.command,
        "images": dict(images),
        "measure": problem.loss.measure.what,
        "dimensions": [{"name": d.name, "options": list(d.options)} for d in problem.dimensions],
        "left_float": list(problem.always) + [d.name for d in problem.dimensions if d.options[d.start] == FLOAT],
        "evaluated": len(history.trials),
        "stopped": history.stopped,
        "latency_table": dict(problem.times.table.provenance),
        "points": list(rows),
        "trials": [{"loss": t.loss if t.loss < 1e30 else None, **t.costs} for t in history.trials],
    }


def climb(
    problem: SearchProblem, build: Any, evaluations: int, *, seed: int = 0, seconds: float | None = None,
    journal: Journal | None = None, progress: Callable[[str], None] = lambda text: None, workers: Workers = LOCAL,
) -> History:  # fmt: skip
    """One search for each stage, with an equal share of the evaluations, each from the start; all trials together.

    With fewer evaluations than stages there is one stage, under the whole budget; where a search ends before that stage, one
    candidate within the budget is evaluated after all.
    """
    journal, history = journal or Journal(), History()
    whole = problem.problem(problem.limits)
    build(whole, evaluations, seed)  # raises where nothing keeps the budget
    cost = problem.costs(problem.problem({}).start)
    ladder = [
        limits for limits in stages(problem.limits, cost)
        if limits == problem.limits or problem.problem(limits).repaired(whole.start) is not None  # nobody asked for the others
    ]  # fmt: skip
    if len(ladder) > evaluations:
        ladder = [dict(problem.limits)]
    score = Scored(problem.model, problem.loss, problem.dimensions, problem.always)
    for k, limits in enumerate(ladder):
        each = problem.problem(limits)
        share = (evaluations - len(history.trials)) // (len(ladder) - k)
        if history.stopped:
            break
        trials_of(
            each, build(each, share, seed, at_once=workers.count), score, evaluations=share, history=history, seconds=seconds,
            journal=journal, progress=progress, workers=workers,
        )  # fmt: skip
    if history.best(whole) is None:
        trials_of(whole, build(whole, 1, seed), score, evaluations=1, history=history, journal=journal, progress=progress)
    return history


def pick(problem: SearchProblem, history: History, points: int) -> list[int]:
    """The trials to realize: the Pareto front within the budget, thinned to the best and others evenly spaced in bytes."""
    allowed = [i for i, t in enumerate(history.trials) if problem.problem(problem.limits).excess(t.candidate) == 0]
    names = [name for name in ("bytes", "ms") if name in history.trials[0].costs]
    rows = [[history.trials[i].loss, *(round(history.trials[i].costs[n], 4) for n in names)] for i in allowed]
    front = [allowed[k] for k in pareto(rows)]
    front.sort(key=lambda i: (history.trials[i].costs["bytes"], history.trials[i].loss))
    if len(front) <= points:
        return front
    low, high = (history.trials[front[k]].costs["bytes"] for k in (0, -1))
    selection = {min(front, key=lambda i: history.trials[i].loss)}
    for k in range(points):
        goal = low + (high - low) * k / max(points - 1, 1)
        selection.add(min(front, key=lambda i: (abs(history.trials[i].costs["bytes"] - goal), history.trials[i].loss)))
    return sorted(selection, key=lambda i: history.trials[i].costs["bytes"])[:points]
