"""The points of a search as ONNX files: scored on held-out images in the runtime, and timed beside the float model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewbit.choose import Bits, choose
from fewbit.core.device import CPU, on
from fewbit.core.inputs import arrays_of, example, image_among
from fewbit.core.record import Record
from fewbit.data.images import Images
from fewbit.files import write_json
from fewbit.folder import TWIN
from fewbit.onnx_file import DATA, bytes_of
from fewbit.report.frontpage import goodness
from fewbit.report.tables import average_weight_bits
from fewbit.runtimes import open_session
from fewbit.search.run import History, pareto
from fewbit.stages.realize import write_model
from fewbit.task import task_of
from fewbit.verify import evaluate
from fewbit.verify.bench import paired

if TYPE_CHECKING:
    from fewbit.search.search import SearchProblem

SECONDS = 2.0  # of timing a point beside the float model
Row = dict[str, Any]


def uniform(
    problem: SearchProblem, images: Images, record: Record, folder: Path, again: Callable[..., str], threads: int
) -> Row:
    """The row of the uniform plan of the most bits."""
    most = problem.model.settings.most
    return {
        **artefact(problem, Bits(most, most), images, record, folder, threads),
        "point": f"uniform {most}", "loss": None, "predicted_ms": problem.times(()), "predicted_bytes": None,
        "command": again("--bits", str(most), "--out", f"run-{most}"), "file": None, "searched": False,
    }  # fmt: skip


def judge(
    first: Row, problem: SearchProblem, history: History, places: Sequence[int], images: Images, record: Record, folder: Path,
    final: Path, again: Callable[..., str], threads: int, progress: Callable[[], None],
) -> list[Row]:  # fmt: skip
    """A row for each point, the smallest first, behind that of the uniform plan.

    Accuracy is measured on held-out images, which the search does not use; `front`: no other point is as good in
    accuracy, milliseconds and bytes. `ms` is measured, `predicted_ms` predicted. `command` makes the run.
    """
    rows = [first]
    for number, place in enumerate(places, 1):
        trial, name = history.trials[place], f"{number:02d}"
        path, final_path = folder / "points" / f"{name}.json", final / "points" / f"{name}.json"
        bits = problem.bits(trial.candidate, str(final_path))
        command = again("--bits", str(final_path), "--out", f"run-{name}")
        row = artefact(problem, bits, images, record, folder, threads)
        row |= {"point": name, "loss": trial.loss, "predicted_ms": trial.costs.get("ms")}
        row |= {"predicted_bytes": trial.costs["bytes"], "command": command, "file": f"points/{name}.json", "searched": True}
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"schema": 1, **bits.to_json(), "found": row})
        rows.append(row)
        progress()
    columns = [[-goodness(row), round(row["ms"] / row["float_ms"], 2), row["bytes"]] for row in rows]
    front = set(pareto(columns))
    return [{**row, "front": i in front} for i, row in enumerate(rows)]


def artefact(problem: SearchProblem, bits: Bits, images: Images, record: Record, folder: Path, threads: int) -> Row:
    """Measure an exported plan, in the file that a run would write: accuracy in percent, milliseconds of one image, bytes."""
    model = problem.model
    runtime = model.target.runtime
    path, twin = folder / "point.onnx", folder / TWIN
    plan = choose(replace(model.context, bits=bits), model.recipe)
    write_model(on(model.graph, CPU), plan, path, model.target.file_format, record)
    inputs, outputs, one = on(model.graph.inputs, CPU), model.graph.outputs, model.graph.at_a_time(1)
    score = evaluate(
        twin, path, images, outputs, task_of(model.graph), inputs=inputs, inside=model.graph.inside,
        behind=model.graph.behind, runtime=runtime, batch=model.graph.in_a_file(16), threads=threads,
    )  # fmt: skip
    sessions = [open_session(runtime, file, threads=threads) for file in (twin, path)]
    noise = torch.randn(one, *image_among(inputs).shape, generator=torch.Generator().manual_seed(0))
    arrays = arrays_of(inputs, example(inputs, noise))
    times = paired([partial(session.run, *arrays) for session in sessions], SECONDS)
    float_ms, ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    size, float_size = bytes_of(path), bytes_of(twin)
    path.unlink()
    path.with_name(path.name + DATA).unlink(missing_ok=True)
    return {
        **score.to_json(),
        "ms": ms,
        "float_ms": float_ms,
        "faster": statistics.median(a / b for a, b in times),
        "bytes": size,
        "float_bytes": float_size,
        "integer_ops": len(plan.integer_ops),
        "weight_bits": average_weight_bits(model.graph, plan),
    }
