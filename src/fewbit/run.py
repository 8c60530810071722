"""A run: its folder, the values that its stages have computed, the loop that runs the stages, and `quantize`.

A run works in `<out>.part` and is renamed to `<out>` when it is done. A killed run leaves `<out>.part`; the same request
resumes it after the last stage whose files are complete. A finished run is opened from its folder, and any stage may be
run on it again. Nothing here imports torch before a stage does.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.core.call import one_call
from fewbit.core.limit import begin, check
from fewbit.core.pages import give_back
from fewbit.errors import BadImages
from fewbit.folder import Workplace, checked, copy_file
from fewbit.progress import Lines, Progress
from fewbit.report.goals import fail_on_missed
from fewbit.request import Request
from fewbit.unfinished import Unfinished
from fewbit.workers import LOCAL, Workers, opened
from fewbit.workers.machines import file_of, refuse_missing

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from fewbit.core.checks import Checks
    from fewbit.core.graph import Graph
    from fewbit.core.plan import Plan
    from fewbit.data.images import Images, Preprocess
    from fewbit.request import Options, SensitivityRequest
    from fewbit.stages import Stage
    from fewbit.verify import Latency, Score

OF_MODEL = ("inputs", "scored", "exact", "given", "quantized", "twin", "sample", "trusted")  # the same for any images
SHARED = (*OF_MODEL, "calibration", "observed", "verdict")  # the same for any recipe


@dataclass(frozen=True)
class Result:
    """The result of `quantize`. `folder` holds every file; `module` is the simulation."""

    folder: Path
    graph: Graph
    plan: Plan
    checks: Checks
    score: Score
    latency: Sequence[Latency]
    report: Mapping[str, Any]
    _keep: object = None

    @property
    def module(self) -> nn.Module:
        """The simulation: (b, c, h, w) images to the integer model's outputs."""
        from fewbit.execute.simulate import simulate

        with one_call():
            return simulate(self.graph, self.plan)

    def export(self, folder: str | Path, *, force: bool = False) -> Path:
        """Copy the run's files to a folder that does not exist yet. Raises BadFile where it does, Stopped on a full disk."""
        with Workplace(Path(folder), force=force) as place:
            shutil.copytree(self.folder, place.part, dirs_exist_ok=True, copy_function=copy_file)
            return place.publish()


def quantize(
    model: str | nn.Module | ExportedProgram, images: Any = None, *, progress: Progress | None = None, **options: Any
) -> Result:
    """Quantize a model with a few images, write it as ONNX, and verify it in the runtime.

    `images` calibrate; `score` are other images to score on. Without `score` a quarter of the images (at most 1,000) is
    held out for it. Every option is a field of `fewbit.request.Request`, with its limits, default and help, as in
    `fewbit quantize --help`. Raises FewbitError for whatever the caller can fix, before any work where possible, and
    FewbitFailed where accuracy drops by more than `max_drop`, or the file is not faster where it `must_pay` (the run is
    still written).
    """
    if progress is None and hasattr(sys, "ps1"):  # a notebook, or Python's prompt
        progress = Lines()
    result = execute(Request(model=model, images=images, **options), progress)
    fail_on_missed(result.report)
    return result


def execute(request: Request, progress: Progress | None = None) -> Result:
    """Run every stage of a request, in order."""
    from fewbit.stages import STAGES

    with one_call(progress), helped(request) as workers, Run.start(request, STAGES, progress, workers=workers) as run:
        if workers is not LOCAL:  # the file is evaluated by all of them
            named = [str(path) for path in (request.images, request.score) if isinstance(path, str | Path)]
            refuse_missing(workers, [str(run.folder), *(path for path in named if os.path.exists(file_of(path)))])
        for stage in STAGES:
            run.do(stage.name)
        run.finish()
    values = (run[name] for name in ("folder", "graph", "noted", "checks", "score", "timings", "summary", "keep"))
    return Result(*values)


def sensitivity(request: SensitivityRequest, progress: Progress | None = None) -> Mapping[str, Any]:
    """What is in sensitivity.json; its folder has that and the page."""
    from fewbit.stages import SENSITIVITY

    with (
        one_call(progress),
        helped(request) as workers,
        Run.start(request, SENSITIVITY, progress, "sensitivity", workers) as run,
    ):
        summary: Mapping[str, Any] = run["summary"]
        run.finish(*(file for stage in SENSITIVITY[:-1] for file in stage.files))
    return summary


@contextmanager
def helped(request: Options) -> Iterator[Workers]:
    """The workers that a request asks for; a task has as many processors as torch or the runtime has threads here, so that its
    sums are the same. Raises FewbitError where there are none, or with another fewbit.
    """
    if request.workers is None and request.ray is None:
        yield LOCAL
        return
    import torch

    with opened(request.workers, request.ray, max(torch.get_num_threads(), request.threads)) as workers:
        refuse_missing(workers, [])
        yield workers


class Run:
    """A folder and its values. `run["plan"]` is a value by name, computed by its stage on first access.

    `record` is run.json of a finished run, and empty before; `place` is where it works, until it is finished.
    """

    place: Workplace | None = None

    def __init__(
        self, folder: Path, stages: Iterable[Stage], values: Mapping[str, Any], progress: Progress | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.progress, self.record = folder, progress or Progress(), record or {}
        self.unfinished = Unfinished(folder) if record is None else None
        self.stages = {stage.name: stage for stage in stages}
        self.values: dict[str, Any] = {"folder": folder, "progress": self.progress, "run": self, "workers": LOCAL, **values}

    @classmethod
    def start(
        cls, request: Options, stages: Iterable[Stage], progress: Progress | None = None, kind: str = "run",
        workers: Workers = LOCAL,
    ) -> Run:  # fmt: skip
        """A run that works in `<out>.part` (in a temporary folder where the request has no `out`), best in a `with` block.

        A killed run of the same request is resumed, any other is deleted, which is said. Raises BadFile where `out` cannot be
        replaced.
        """
        keep = tempfile.TemporaryDirectory(prefix="fewbit-") if request.out is None else None
        final = Path(keep.name) / "run" if keep is not None else request.out
        assert final is not None
        place = Workplace(final, kind, force=request.force, by=request.command, lasting=keep is None)
        run = cls(place.part, stages, {**_options(request), "keep": keep, "workers": workers}, progress)
        run.place = place
        if run._limit is not None:
            begin()
        with ExitStack() as failing:
            failing.push(run)
            run.values["identity"] = run["inputs"].identity(request)
            place.resume(run["identity"], run.progress.say)
            failing.pop_all()
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.place is not None:
            self.place.__exit__(*error)

    @classmethod
    def open(cls, folder: str | Path, progress: Progress | None = None) -> Run:
        """Open a finished run. Raises BadFile where the folder is not one, or a file in it is not as the run wrote it."""
        path = Path(folder)
        record = checked(path)
        return cls(path, (), {"runtime": record["runtime"], "record": record, "drawn": False}, progress, record)

    def fork(self, folder: Path, request: Options | None = None, **values: Any) -> Run:
        """A second run with another request or other images; values that do not depend on them are shared.

        It works in `folder`, without a progress bar, and is never finished.
        """
        request = request or self["request"]
        shared = {name: self[name] for name in ("workers", *(OF_MODEL if values else SHARED))}
        return Run(folder, self.stages.values(), {**_options(request), **shared, **values})

    def __getitem__(self, name: str) -> Any:
        """A value by name. Raises KeyError for one that no stage computes."""
        if name not in self.values:
            self.do(next((s.name for s in self._stages().values() if name in s.gives), name))
        return self.values[name]

    def do(self, name: str, **overrides: Any) -> Any:
        """Run a stage, or load its files where a killed run left them; the results are stored. Returns its value (or values).

        `overrides` replace inputs of the stage, which then always runs. Raises Stopped where such a file has changed.
        """
        with one_call(self.progress):
            return self._done(name, overrides)

    def _done(self, name: str, overrides: Mapping[str, Any]) -> Any:
        stage = self._stages()[name]
        if not overrides and all(value in self.values for value in stage.gives):
            return self._value_of(stage)
        wanted = stage.when is None or stage.when(self.values)
        if stage.instead is not None and not wanted:
            self.values.update(zip(stage.gives, stage.instead, strict=True))
            return self._value_of(stage)
        function = stage.load if stage.load is not None and not overrides and self._ready(stage) else stage.run
        inputs = {key: overrides[key] if key in overrides else self[key] for key in stage.takes(function, overrides)}
        kept = () if self.unfinished is None or function is not stage.run else self.unfinished.begin(stage)
        if function is stage.run and wanted:
            with self.progress.stage(stage.name):
                result = function(**inputs)
        else:
            result = function(**inputs)
        del inputs
        if self.unfinished is not None and function is stage.run:
            self.unfinished.add(kept)
        self.values.update({stage.gives[0]: result} if len(stage.gives) == 1 else zip(stage.gives, result, strict=True))
        give_back()
        if (limit := self._limit) is not None:
            check(limit, name)
        return self._value_of(stage)

    def finish(self, *scratch: str) -> Run:
        """Rename the folder to `out`, without scratch files. Raises Stopped where `out` has appeared meanwhile."""
        assert self.place is not None
        names = [file for stage in self.stages.values() for file in stage.scratch]
        self.folder = self.values["folder"] = self.place.publish([*names, *scratch])
        return self

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of a finished run."""
        from fewbit.data.images import Preprocess

        return Preprocess.from_json(self.record["preprocess"])

    def images(self, source: Any, *, skip_bad: bool = False, labels: bool = True, limit: int | None = None) -> Images:
        """Images for a finished run's model, with its preprocessing and classes."""
        from fewbit.data.images import open_images

        if isinstance(source, str) and not source:
            raise BadImages("--images '' is empty; give a folder of images, or a .parquet, .npy or .npz file: --images DIR.")
        count = self.record["class_count"]
        labels, classes = labels and count is not None, self.record["classes"] or count
        each = any(one["kind"] == "each image" for one in self.record["inputs"])
        others = tuple(one for one in self["exact"].inputs if one.each) if each else ()
        image = next((one["name"] for one in self.record["inputs"] if one["kind"] == "image"), "images")
        options = {
            "classes": classes, "skip_bad": skip_bad, "labels": labels, "limit": limit, "others": others, "image": image,
        }  # fmt: skip
        with one_call(self.progress):
            return open_images(source, self.preprocess, **options)

    def annotated(self, images: Images, path: Path | None) -> Images:
        """Those images with what a file or a folder says of them, in the terms of the run's task. Raises BadImages."""
        from fewbit.stages.task import annotated, written
        from fewbit.task import task_of

        if path is None:
            return images
        return annotated(images, written(self.record, self.folder) or task_of(self["exact"]), path)

    def unseen(self, images: Images) -> Images:
        """Those images that a finished run was not calibrated on, in whole batches where the model has one. Raises BadImages
        where it was calibrated on half of them.
        """
        from fewbit.data.shares import unseen, whole_batches

        return whole_batches(unseen(images, set(self.record.get("calibrated_on", ()))), self.record["batch"])

    def verify(self, images: Any = None) -> Checks:
        """Run the verify stage again, on the run's own images or others; the files are compared with the plan as well."""
        from fewbit.stages.twin import sample_of

        with one_call(self.progress):
            sample = self["sample"] if images is None else sample_of(self["exact"], self.images(images, labels=False))
            return self.do("verify", sample=sample, deviations=self["deviations"])  # type: ignore[no-any-return]

    def _ready(self, stage: Stage) -> bool:
        """Whether all files of a stage are there, as it wrote them. Raises Stopped for one that has changed."""
        if self.unfinished is None:  # a finished run's files were compared when it was opened
            return all((self.folder / file).exists() for file in stage.files)
        return self.unfinished.is_whole(stage.files)

    @property
    def _limit(self) -> str | None:
        """What was asked for with `--memory`."""
        return getattr(self.values.get("asked"), "memory", None)

    def _stages(self) -> Mapping[str, Stage]:
        """The stages; those of a finished run (and torch) are imported on first use."""
        if not self.stages:
            from fewbit.stages import REOPENED

            self.stages = {stage.name: stage for stage in REOPENED}
        return self.stages

    def _value_of(self, stage: Stage) -> Any:
        values = tuple(self.values[name] for name in stage.gives)
        return values[0] if len(values) == 1 else values


def _options(request: Options) -> dict[str, Any]:
    """What was asked, and those of its fields that are values of a finished run as well; `request` is what is carried out,
    which stage `settle` finds where a drop has a limit.
    """
    seconds = getattr(request, "seconds", None)
    values = {
        "asked": request, "threads": request.threads, "seconds": seconds, "runtime": request.hardware.runs_in,
        "drawn": not getattr(request, "quick", False),
    }  # fmt: skip
    return values if request.drops else {**values, "request": request}
