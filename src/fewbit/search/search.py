"""The whole of `fewbit search`: images, ranges, times, the search itself, and its best points as artefacts in the runtime."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fewbit import pipeline
from fewbit.capture import capture, load_model
from fewbit.capture.export import fingerprint
from fewbit.choose import Bits
from fewbit.choose.powell import parse_time
from fewbit.files import Journal, write_atomic, write_json
from fewbit.observe import observe
from fewbit.progress import Progress
from fewbit.realize import float_onnx, realize
from fewbit.recipes import DEFAULT, recipe_named
from fewbit.report import frontpage
from fewbit.run import Request, free_folder, processor, resume
from fewbit.search.costs import Sizes, Times, costs_of, parse_budget
from fewbit.search.judge import judge
from fewbit.search.latency import table
from fewbit.search.model import FLOAT, Loss, Model, Settings, scored
from fewbit.search.run import History, pareto, run
from fewbit.search.space import Candidate, Dimension, Problem
from fewbit.search.strategies import strategy_named
from fewbit.target import detect, load_target
from fewbit.verify.bench import paired
from fewbit.verify.runtimes import open_session

LADDER = (7.0, 6.0, 5.0)  # mean bits of the searches that make the front, down to the budget; the first has no limit on bits


@dataclass(frozen=True)
class Asked:
    """Everything that decides what a search finds, beside the machine's own times."""

    model: str
    target: str
    recipe: str = DEFAULT
    strategy: str = "greedy"
    budgets: tuple[str, ...] = ()
    edges: str = "weights"
    least: int = 4
    loss: str = "kl"
    evaluations: int = 300
    calibration: int = 64
    scored: int | None = None
    seed: int = 0
    threads: int = 2
    points: int = 8
    keep_float: tuple[str, ...] = ()


@dataclass
class Found:
    """What a search works on and with: the problem of all its searches but the limits."""

    model: Model
    loss: Loss
    dimensions: tuple[Dimension, ...]
    costs: Callable[[Candidate], Mapping[str, float]]
    limits: Mapping[str, float]
    always: tuple[str, ...]
    times: Times

    def problem(self, limits: Mapping[str, float]) -> Problem:
        return Problem(self.dimensions, self.costs, limits)

    def bits(self, candidate: Candidate, asked: str = "") -> Bits:
        found = self.model.bits(self.dimensions, candidate, asked)
        return replace(found, floats=(*self.always, *found.floats))


def found(model: Model, loss: Loss, times: Times, limits: Mapping[str, float], rest: int = 0) -> Found:
    """The problem of a model: an op that is slower in integers begins in float, and stays there where it has no weight.

    With a budget of milliseconds any op may be float; without one only those, since nothing would hold the others back.
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
    costs = costs_of(Sizes(model, rest), dimensions, times, always)
    return Found(model, loss, dimensions, costs, limits, always, times)


def stages(limits: Mapping[str, float], costs: Mapping[str, float]) -> list[dict[str, float]]:
    """Limits of the searches that make the front: what was asked for but bits and bytes, then fewer and fewer of them."""
    other = {k: v for k, v in limits.items() if k not in ("bits", "bytes")}
    least = max((limits.get("bits", 0.0), limits.get("bytes", 0.0) / costs["bytes"] * costs["bits"]))
    steps = [{**other, "bits": b} for b in LADDER if least < b < costs["bits"]]
    return [dict(other), *steps, *([dict(limits)] if least else [])]


def search(
    model: str, images: Any = None, *, score: Any = None, target: str | None = None, recipe: str = DEFAULT,
    budgets: Sequence[str] = (), strategy: str = "greedy", time: str | None = None, evaluations: int = 300,
    edges: str = "weights", least: int = 4, loss: str = "kl", calibration: int = 64, scored_images: int | None = None,
    seed: int = 0, threads: int = 2, points: int = 8, keep_float: Sequence[str] = (),
    out: Path = Path("search"), force: bool = False, command: str = "fewbit search", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Search, realize the points of the front, judge them on held-out images, and write the folder; gives report.json.

    A search that was killed goes on where it was: losses are in `<out>.part`. Ctrl-C ends the search and keeps its best.
    """
    progress = progress or Progress()
    hardware = load_target(target or detect())
    limits: dict[str, float] = {}
    for text in budgets:
        name, limit = parse_budget(text)
        limits[name] = min(limit, limits.get(name, limit))
    build, method = strategy_named(strategy), recipe_named(recipe)
    settings = Settings(edges, pipeline.default_bits(hardware), least)
    seconds = None if time is None else parse_time(time)
    asked = Asked(
        model, hardware.name, recipe, strategy, tuple(budgets), edges, least, loss, evaluations, calibration, scored_images,
        seed, threads, points, tuple(keep_float),
    )  # fmt: skip
    demos = images is None
    images, score = pipeline.given_images(model, images, score)
    free_folder(out, force=force, check_only=True, kind="search")
    with progress.stage("load"):
        loaded = load_model(model)
        preprocess = pipeline.preprocess_of(loaded, {})
        classes = loaded.classes or pipeline.class_count(loaded)
        request = Request(model, hardware.name, calibration=calibration, scored=scored_images, seed=seed, loss=loss)
        chosen, held_out = pipeline.open_both(images, score, preprocess, classes, request)
        graph = capture(loaded)
    part = out.with_name(out.name + ".part")
    identity = {
        "asked": json.loads(json.dumps(asdict(asked))),
        "model": fingerprint(loaded.program),
        "calibration": chosen.fingerprint(),
        "target": hardware.fingerprint(),
    }
    resume(part, identity)
    batches = []
    with progress.stage("observe", len(chosen)):
        for batch in chosen.batches(8):
            batches.append(batch)
            progress.advance(len(batch))
        stats = observe(graph, batches)
    with progress.stage("ranges"):
        made = Model(graph, stats, hardware, method, name=recipe, settings=settings, keep_float=keep_float)
        measure = Loss(graph, batches, chosen.labels, loss)
    with progress.stage("times"):
        float_onnx(graph, part / "float.onnx", opset=hardware.opset)
        realize(graph, made.base, part / "widest.onnx", **hardware.form)
        times = times_of(made, part, threads, lambda text: progress.advance(1, text))
        widest = made.dimensions({})
        rest = (part / "widest.onnx").stat().st_size - int(Sizes(made)(widest, (0,) * len(widest))["bytes"])
        problem = found(made, measure, times, limits, rest)
    with progress.stage("search", evaluations):
        history = climb(
            problem, build, evaluations, seed=seed, seconds=seconds, journal=Journal(part / "search.jsonl"),
            progress=lambda text: progress.advance(1, text),
        )  # fmt: skip
    picked = pick(problem, history, points)
    again = ["fewbit", "quantize", model, "--target", target or hardware.name, "--recipe", recipe, "--seed", str(seed)]
    again += ["--calibration", str(calibration), *([] if demos else ["--images", str(images)])]
    again += ["--score", str(score)] if score is not None and not demos else []
    again += [word for pattern in keep_float for word in ("--keep-float", pattern)]
    with progress.stage("judge", len(picked) + 1):
        rows = judge(problem, history, picked, held_out, part, out, again, threads, lambda: progress.advance())
    summary = {
        "schema": 1,
        **{k: v for k, v in asdict(asked).items() if k != "points"},
        "command": command,
        "images": {"calibration": len(chosen), "scored": len(held_out)},
        "measure": "KL from the float model" if loss == "kl" else "cross-entropy with labels",
        "dimensions": [{"name": d.name, "options": list(d.options)} for d in problem.dimensions],
        "left_float": list(problem.always) + [d.name for d in problem.dimensions if d.options[d.start] == FLOAT],
        "evaluated": len(history.trials),
        "stopped": history.stopped,
        "latency_table": dict(times.table.provenance),
        "points": rows,
        "trials": [{"loss": t.loss if t.loss < 1e30 else None, **t.costs} for t in history.trials],
    }
    with progress.stage("report"):
        write_json(part / "report.json", summary)
        page = frontpage.render(summary)
        write_atomic(part / "report.html", lambda file: file.write_text(page, encoding="utf-8"))
    for name in ("request.json", "search.jsonl", "widest.onnx"):
        (part / name).unlink(missing_ok=True)
    free_folder(out, force=force, kind="search")
    os.replace(part, out)
    return summary


def climb(
    problem: Found, build: Any, evaluations: int, *, seed: int = 0, seconds: float | None = None,
    journal: Journal | None = None, progress: Callable[[str], None] = lambda text: None,
) -> History:  # fmt: skip
    """One search for each stage, with an equal share of the evaluations, each from the start; all trials together."""
    journal, history = journal or Journal(), History()
    cost = problem.costs(problem.problem({}).start)
    ladder = stages(problem.limits, cost)
    score = scored(problem.model, problem.loss, problem.dimensions, problem.always)
    for k, limits in enumerate(ladder):
        each = problem.problem(limits)
        left = (evaluations - len(history.trials)) // (len(ladder) - k)
        if left < 1 or history.stopped:
            break
        run(
            each, build(each, left, seed), score, evaluations=left, history=history, seconds=seconds, journal=journal,
            progress=progress,
        )  # fmt: skip
    return history


def pick(problem: Found, history: History, points: int) -> list[int]:
    """The trials to realize: those within the budget that no other beats, the best and evenly over their bytes."""
    allowed = [i for i, t in enumerate(history.trials) if problem.problem(problem.limits).excess(t.candidate) == 0]
    if not allowed:
        allowed = list(range(len(history.trials)))
    names = [name for name in ("bytes", "ms") if name in history.trials[0].costs]
    rows = [[history.trials[i].loss, *(round(history.trials[i].costs[n], 4) for n in names)] for i in allowed]
    front = [allowed[k] for k in pareto(rows)]
    front.sort(key=lambda i: (history.trials[i].costs["bytes"], history.trials[i].loss))
    if len(front) <= points:
        return front
    low, high = (history.trials[front[k]].costs["bytes"] for k in (0, -1))
    kept = {min(front, key=lambda i: history.trials[i].loss)}
    for k in range(points):
        goal = low + (high - low) * k / max(points - 1, 1)
        kept.add(min(front, key=lambda i: (abs(history.trials[i].costs["bytes"] - goal), history.trials[i].loss)))
    return sorted(kept, key=lambda i: history.trials[i].costs["bytes"])[:points]


def times_of(model: Model, folder: Path, threads: int, progress: Callable[[str], None]) -> Times:
    """The table of the machine for the ops of a model, and the float model's own milliseconds."""
    runtime = model.target.runtime
    found = table(Times.works(model), runtime, processor(), threads, progress=progress)
    session = open_session(runtime, folder / "float.onnx", threads=threads)
    x = np.zeros((1, *model.graph.input_shape), np.float32)
    rounds = paired([partial(session.run, x)], 2.0)
    return Times(model, found, 1e3 * statistics.median(row[0] for row in rounds))
