"""Summarize: run.json, report.json and tables.json, the data of the report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.core.checks import Checks
from fewbit.core.graph import Graph
from fewbit.core.peak import peak
from fewbit.core.plan import Plan
from fewbit.data.images import Images
from fewbit.deploy import made, stamp
from fewbit.files import write_json
from fewbit.folder import FILES, MODEL, RECORD, REPORT, TABLES
from fewbit.observe import Stats
from fewbit.observe.outliers import outliers
from fewbit.onnx_file import bytes_of
from fewbit.progress import Progress
from fewbit.report import tables
from fewbit.report.goals import missed
from fewbit.report.rows import looked_at, tables_of, thumbnails
from fewbit.request import Request
from fewbit.request.command import sensitivity_command
from fewbit.runtimes import RUNNABLE
from fewbit.stages.kernels import as_run, fused, linted
from fewbit.stages.load import Inputs
from fewbit.stages.realize import type_of
from fewbit.stages.settle import said
from fewbit.target.load import processor
from fewbit.verify import Latency, Load, Score

OUTLIER_IMAGES = 32  # calibration images to search for outlier channels and tokens
SKIPPED = ("times", "sensitivity of modules", "outliers", "attention", "pictures")  # of a quick run
PACKAGES = ("fewbit", "torch", "onnx", *RUNNABLE, "timm")


def summarize(
    exact: Graph, graph: Graph, plan: Plan, stats: Stats, verdict: Mapping[str, Any], checks: Checks, score: Score,
    timings: Sequence[Latency], loads: Sequence[Load], known: Mapping[str, Any] | None,
    curve: Sequence[Mapping[str, Any]], inputs: Inputs, calibration: Images, judged: Images, scored: Images,
    attempts: Sequence[Mapping[str, Any]], sensitive: Sequence[Mapping[str, Any]], sample: Tensor,
    identity: Mapping[str, Any], asked: Request, request: Request, folder: Path, progress: Progress,
) -> tuple[Mapping[str, Any], Plan]:  # fmt: skip
    """report.json, and the plan with fallbacks from the measurements; writes report.json, tables.json and run.json."""
    rules = linted(folder / MODEL, request.hardware)
    plan = as_run(graph, plan, rules, request.hardware)
    size = exact.at_a_time(8)
    few = islice(calibration.batches(size), max(OUTLIER_IMAGES // size, 1))
    standing = () if request.quick else outliers(exact, few)
    record = _record(request, identity, inputs)
    counts = {"calibration": len(calibration), "scored": score.images}
    proven = {"verify": tables.verify(checks), "accuracy": score.to_json(), "images": counts}
    stamp(folder / MODEL, made(plan, record, proven))  # in front of whatever counts its bytes
    rows = tables_of(graph, plan, stats, standing, checks, timings, loads, sample, folder)
    rows |= {} if request.quick else looked_at(graph, plan, scored, score, sample, inputs.classes or ())
    rows |= fused(plan, checks, rules, request.hardware)
    rows |= {
        "run": record,
        "next": {"sensitivity": sensitivity_command(request.command), "folder": str(request.out or "RUN")},
        "input": [inputs.record.images(inputs.record.inside, type_of(exact))],
        "carried": list(graph.tail.nodes) if graph.tail else [],
        "curve": list(curve),
        "goal": [dict(row) for row in attempts],
        "sensitivity": list(sensitive),
        "synthetic": thumbnails(calibration, inputs.classes or ()) if request.synthetic[0] and not request.quick else [],
    }
    summary = {
        **_summary(graph, plan, timings, request, folder),
        **proven,
        "notes": list(inputs.notes),
        "goal": said(attempts),
        "skipped": list(SKIPPED) if request.quick else [],
        "calibration": {"source": calibration.source, **verdict, "seen": known},
        "seconds": dict(progress.seconds),
    }
    summary["missed"] = missed(summary, asked.max_drop, asked.must_pay)
    chosen_by = judged.pixels if attempts else ()
    seen = {**record, "calibrated_on": [pixels.hex() for pixels in (*calibration.pixels, *chosen_by)]}
    for name, value in ((RECORD, seen), (REPORT, summary), (TABLES, rows)):
        write_json(folder / name, value)
    return summary, plan


def _summary(graph: Graph, plan: Plan, timings: Sequence[Latency], request: Request, folder: Path) -> dict[str, Any]:
    """What report.json says of the plan and its files."""
    sizes = {name: bytes_of(folder / name) for name in FILES if (folder / name).exists()}
    return {
        "schema": 1,
        "model": request.ref,
        "target": plan.target,
        "recipe": plan.recipe,
        "bits": plan.bits,
        "exemptions": [pattern for pattern in plan.exemptions if pattern not in request.float_by_limit],
        "size": tables.size(graph, plan, sizes),
        "latency": tables.latency(timings, request.hardware.runtime, plan),
        "pays": tables.pays(timings, request.hardware.runtime, plan),
        "integer_share": tables.integer_share(graph, plan),
        "fallbacks": tables.fallbacks(plan),
        "peak_memory_bytes": peak(),
    }


def _record(request: Request, identity: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """run.json: what was requested, of what, with which versions, on which machine."""
    return {
        "command": request.command,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "seed": request.seed,
        "hashes": {k: identity[k] for k in ("model", "calibration", "scored", "target")},
        "machine": {"processor": processor(), "threads": request.threads, "system": platform.system()},
        "request": identity["request"],
        "runtime": request.hardware.runs_in,
        "file_format": request.hardware.file_format,
        **inputs.record.to_json(),
        "inputs": identity["inputs"],
        "batch": inputs.loaded.batch,
        "ports": identity.get("ports", []),
        "classes": list(inputs.classes) if inputs.classes else None,
        "task": request.task if isinstance(request.task, str) else inputs.task.spec,
        "class_count": inputs.task.classes,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
