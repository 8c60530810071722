"""The points of a search as ONNX files: scored on held-out images in the runtime, and timed beside the float model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.choose import Bits, choose
from fewbit.core.device import CPU, on
from fewbit.core.record import Record
from fewbit.data.images import Images
from fewbit.files import write_json
from fewbit.folder import TWIN
from fewbit.onnx_file import DATA, bytes_of
from fewbit.report.frontpage import goodness
from fewbit.report.tables import average_weight_bits
from fewbit.report.words import as_shown
from fewbit.search.budget import shown, typed
from fewbit.search.run import Trial, pareto
from fewbit.stages.realize import write_model
from fewbit.task import task_of
from fewbit.verify import bench, evaluate

if TYPE_CHECKING:
    from fewbit.search.search import SearchProblem

SECONDS = 2.0  # of timing a point beside the float model
Row = dict[str, Any]


@dataclass(frozen=True)
class Judge:
    """What measures plans as files, in `folder`, on held-out `images`, which the search does not use; `record` is what the
    files say of theirs. `command` is what makes the run of a point, from the options that are its own.
    """

    problem: SearchProblem
    images: Images
    record: Record
    folder: Path
    threads: int
    command: Callable[..., str] = field(default=lambda *options: " ".join(options), repr=False)

    def uniform(self) -> Row:
        """The row of the uniform plan of the most bits."""
        most = self.problem.model.settings.most
        return {
            **self.artefact(Bits(most, most)),
            "point": f"uniform {most}", "loss": None, "predicted_ms": self.problem.times(()), "predicted_bytes": None,
            "command": self.command("--bits", str(most), "--out", f"run-{most}"), "file": None, "searched": False,
        }  # fmt: skip

    def points(self, first: Row, trials: Sequence[Trial], final: Path, progress: Callable[[], None]) -> list[Row]:
        """A row for each point, the smallest first, behind that of the uniform plan; `final` is where the folder will be.

        `over`: in words, which limits the file is over as measured. `front`: it is over none, and no other such point is as
        good in accuracy, time and bytes. `ms` is measured, `predicted_ms` predicted; times are compared by `faster`, the ratio
        to the float model in paired rounds, as it is shown.
        """
        rows = [first]
        for number, trial in enumerate(trials, 1):
            name = f"{number:02d}"
            path, final_path = self.folder / "points" / f"{name}.json", final / "points" / f"{name}.json"
            bits = self.problem.bits(trial.candidate, str(final_path))
            command = self.command("--bits", str(final_path), "--out", f"run-{name}")
            row = self.artefact(bits)
            row |= {"point": name, "loss": trial.loss, "predicted_ms": trial.costs.get("ms")}
            row |= {
                "predicted_bytes": trial.costs["bytes"],
                "command": command,
                "file": f"points/{name}.json",
                "searched": True,
            }
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"schema": 1, **bits.to_json(), "found": row})
            rows.append(row)
            progress()
        rows = [{**row, "over": over(row, self.problem.limits)} for row in rows]
        within = [i for i, row in enumerate(rows) if not row["over"]]
        columns = [[-goodness(row), -as_shown(row["faster"]), row["bytes"]] for row in (rows[i] for i in within)]
        front = {within[k] for k in pareto(columns)}
        return [{**row, "front": i in front} for i, row in enumerate(rows)]

    def artefact(self, bits: Bits) -> Row:
        """Measure the plan of some widths, in the file that a run would write: accuracy in percent, milliseconds of one image,
        bytes; the float model's beside each.
        """
        model = self.problem.model
        runtime, graph = model.target.runtime, model.graph
        path, twin = self.folder / "point.onnx", self.folder / TWIN
        plan = choose(replace(model.context, bits=bits), model.recipe)
        write_model(on(graph, CPU), plan, path, model.target.file_format, self.record)
        inputs = on(graph.inputs, CPU)
        score = evaluate(
            twin, path, self.images, graph.outputs, task_of(graph), inputs=inputs, inside=graph.inside, behind=graph.behind,
            turned=graph.turned, runtime=runtime, batch=graph.in_a_file(16), threads=self.threads,
        )  # fmt: skip
        (timed,) = bench(
            twin, path, inputs, runtimes=[runtime], batches=[graph.at_a_time(1)], threads=self.threads, seconds=SECONDS
        )
        size, float_size = bytes_of(path), bytes_of(twin)
        path.unlink()
        path.with_name(path.name + DATA).unlink(missing_ok=True)
        return {
            **score.to_json(),
            "ms": timed.quantized_ms,
            "float_ms": timed.float_ms,
            "faster": timed.ratio,
            "bytes": size,
            "float_bytes": float_size,
            "integer_ops": len(plan.integer_ops),
            "weight_bits": average_weight_bits(graph, plan),
        }


def over(row: Row, limits: Mapping[str, float]) -> str:
    """In words, which limits a file is over: what it measured beside each; empty where it keeps them."""
    found = {"bits": row["weight_bits"], "bytes": row["bytes"], "ms": row["ms"]}
    return " and ".join(
        f"{typed(name, found[name])} over {shown(name, limit)}"
        for name, limit in limits.items()
        if found[name] > limit * (1 + 1e-9)
    )
