"""A run: its folder, the values that its stages have made so far, the one loop that makes them, and `quantize` on it.

A run works in `<out>.part` and is renamed to `<out>` when it is done. A killed run leaves `<out>.part`; the same request
finds it and goes on behind the last stage whose files are there. A finished run is opened from its folder, and any stage may
be run on it again. Nothing here imports torch before a stage does.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.errors import BadFile, FewbitFailed
from fewbit.files import read_json, write_json
from fewbit.progress import Progress
from fewbit.request import Request

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from fewbit.core.values import Checks, Graph, Plan
    from fewbit.data.images import Images, Preprocess
    from fewbit.request import Options
    from fewbit.stages import Stage
    from fewbit.verify import Latency, Score

MARKS = {"run": ("plan.json",), "search": ("points", "report.json")}  # by which a finished folder is known
FILES = ("exported.pt2", "plan.json", "plan.safetensors", "model.onnx", "float.onnx", "images.safetensors")
SHARED = ("inputs", "calibration", "scored", "exact", "observed", "verdict")  # what does not depend on recipe, bits or target


@dataclass(frozen=True)
class Result:
    """What quantize returns. `folder` holds every file; `module` is the simulation."""

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
        """The simulation: (b, c, h, w) images to what the integer model answers."""
        from fewbit.execute.simulate import simulate

        return simulate(self.graph, self.plan)

    def export(self, folder: str | Path, *, force: bool = False) -> Path:
        """Copy the run's files to a folder that does not exist yet. Raises BadFile where it does."""
        target = Path(folder)
        free_folder(target, force=force)
        shutil.copytree(self.folder, target)
        return target


def quantize(
    model: str | nn.Module | ExportedProgram, images: Any = None, *, progress: Progress | None = None, **options: Any
) -> Result:
    """Quantize a model with a few images, realize it, and prove it in the runtime.

    `images` calibrate; `score` are other images to score on. Without `score` a quarter of the images (at most 1,000) is
    held out for it. Every option is a field of `fewbit.request.Request`, with its limits, its default and what it means; they
    are those of `fewbit quantize --help`. Raises FewbitError for whatever the caller can mend, before any work where that can
    be known, and FewbitFailed where more than `max_drop` was lost (the run is there then).
    """
    result = execute(Request(model=model, images=images, **options), progress)
    fail_on_drop(result.report["accuracy"], options.get("max_drop"))
    return result


def execute(request: Request, progress: Progress | None = None) -> Result:
    """Every stage of a request, in order."""
    from fewbit.stages import STAGES

    run = Run.start(request, STAGES, progress)
    for stage in STAGES:
        run.do(stage.name)
    run.finish()
    values = (run[name] for name in ("folder", "graph", "noted", "checks", "score", "timings", "summary", "keep"))
    return Result(*values)


def fail_on_drop(accuracy: Mapping[str, Any], allowed: float | None) -> None:
    """Raise FewbitFailed where more points were lost than allowed; without labels, where agreement is further from 100 %."""
    labelled = accuracy["quantized"] is not None
    drop = accuracy["float"] - accuracy["quantized"] if labelled else 100 - accuracy["agreement"]
    if allowed is not None and drop > allowed:
        what = "accuracy fell by" if labelled else "answers differ for"
        raise FewbitFailed(f"{what} {drop:.2f} {'points' if labelled else '% of the images'}; --max-drop allows {allowed:g}.")


class Run:
    """A folder and what is known of it. `run["plan"]` is a value by name: made by its stage when it is first asked for.

    `record` is run.json of a finished run, and empty before.
    """

    def __init__(
        self, folder: Path, stages: Iterable[Stage], values: Mapping[str, Any], progress: Progress | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.progress, self.record = folder, progress or Progress(), record or {}
        self.stages = {stage.name: stage for stage in stages}
        self.values: dict[str, Any] = {"folder": folder, "progress": self.progress, "run": self, **values}

    @classmethod
    def start(cls, request: Options, stages: Iterable[Stage], progress: Progress | None = None, kind: str = "run") -> Run:
        """A run that works in `<out>.part` (in a folder that goes with it, where the request names none).

        What a killed run of the same request has left is used, any other is emptied. Raises BadFile where `out` is in the way.
        """
        keep = tempfile.TemporaryDirectory(prefix="fewbit-") if request.out is None else None
        final = Path(keep.name) / "run" if keep is not None else request.out
        assert final is not None
        free_folder(final, force=request.force, check_only=True, kind=kind)
        known = {**_options(request), "keep": keep, "out": final, "kind": kind}
        run = cls(final.with_name(final.name + ".part"), stages, known, progress)
        run.values["identity"] = run["inputs"].identity(request)
        resume(run.folder, run["identity"])
        return run

    @classmethod
    def open(cls, folder: str | Path, progress: Progress | None = None) -> Run:
        """A finished run. Raises BadFile where the folder is none."""
        path = Path(folder)
        if not path.is_dir():
            raise BadFile(f"{path} is not a folder; give one that `fewbit quantize` wrote.")
        missing = [name for name in FILES if not (path / name).is_file()]
        record = read_json(path / "run.json")
        if missing:
            raise BadFile(f"{path} has no {', '.join(missing)}; write the run again with fewbit quantize --force.")
        return cls(path, (), {"runtime": record.get("runtime")}, progress, record)

    def fork(self, folder: Path, request: Options | None = None, **values: Any) -> Run:
        """A run beside this one with another request or other images; what does not depend on them is shared.

        It works in `folder`, without a progress bar, and is never finished.
        """
        request = request or self["request"]
        shared = {name: self[name] for name in SHARED if not values or name in ("inputs", "scored", "exact")}
        return Run(folder, self.stages.values(), {**_options(request), **shared, **values})

    def __getitem__(self, name: str) -> Any:
        """A value by name. Raises KeyError for one that no stage makes."""
        if name not in self.values:
            self.do(next((s.name for s in self._stages().values() if name in s.gives), name))
        return self.values[name]

    def do(self, name: str, **given: Any) -> Any:
        """Run a stage, or read its files where a killed run has left them; the values that it makes are kept.

        `given` replaces values that the stage takes; it is run then, whatever is there. Gives the stage's value (or values).
        """
        stage = self._stages()[name]
        if not given and all(value in self.values for value in stage.gives):
            return self._made(stage)
        ready = stage.load is not None and not given and all((self.folder / file).exists() for file in stage.files)
        function = stage.load if ready and stage.load is not None else stage.run
        inputs = {key: given[key] if key in given else self[key] for key in stage.takes(function, given)}
        if stage.when is None or stage.when(self.values):
            with self.progress.stage(stage.name):
                made = function(**inputs)
        else:
            made = function(**inputs)
        self.values.update({stage.gives[0]: made} if len(stage.gives) == 1 else zip(stage.gives, made, strict=True))
        return self._made(stage)

    def finish(self, *scratch: str) -> Run:
        """Give the folder its name, without what was only there to go on from. Raises BadFile where one came in the way."""
        for name in ("request.json", *(file for stage in self.stages.values() for file in stage.scratch), *scratch):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        free_folder(self["out"], force=self["request"].force, kind=self["kind"])
        os.replace(self.folder, self["out"])
        self.folder = self.values["folder"] = self["out"]
        return self

    @property
    def preprocess(self) -> Preprocess:
        """How a finished run makes inputs of pictures."""
        from fewbit.data.images import Preprocess

        return Preprocess.from_json(self.record["preprocess"])

    def graph(self) -> Graph:
        """The graph that the plan is for, equalized where the run's was."""
        return self["graph"]  # type: ignore[no-any-return]

    def images(self, source: Any, *, skip_bad: bool = False, labels: bool = True, limit: int | None = None) -> Images:
        """Images for a finished run's model, with its preprocessing and classes."""
        from fewbit.data.images import open_images

        known = self.record["classes"] or self.record["outputs"]
        return open_images(source, self.preprocess, classes=known, skip_bad=skip_bad, labels=labels, limit=limit)

    def verify(self, images: Any = None) -> Checks:
        """Codes of a finished run's plan against its model.onnx, on the run's own images or others: the stage, again."""
        from fewbit.stages.prove import CHECKED

        sample = self["sample"] if images is None else next(self.images(images, labels=False).batches(CHECKED))
        return self.do("verify", sample=sample)  # type: ignore[no-any-return]

    def _stages(self) -> Mapping[str, Stage]:
        """The stages; those of a finished run are imported when they are first asked for, torch with them."""
        if not self.stages:
            from fewbit.stages import REOPENED

            self.stages = {stage.name: stage for stage in REOPENED}
        return self.stages

    def _made(self, stage: Stage) -> Any:
        found = tuple(self.values[name] for name in stage.gives)
        return found[0] if len(found) == 1 else found


def _options(request: Options) -> dict[str, Any]:
    """The request, and what stages take of it that a finished run has too."""
    seconds = getattr(request, "seconds", None)
    return {"request": request, "threads": request.threads, "seconds": seconds, "runtime": request.hardware.runs_in}


def resume(part: Path, identity: Mapping[str, Any]) -> None:
    """Make the working folder; one that a killed run of the same request left is kept, any other is emptied."""
    note = part / "request.json"
    if note.is_file() and read_json(note) == identity:
        return
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    write_json(note, identity)


def free_folder(folder: Path, *, force: bool, check_only: bool = False, kind: str = "run") -> None:
    """Raise BadFile where a folder is in the way; with `force`, remove it if it is a run (or a search) of ours."""
    if not folder.exists():
        return
    ours = folder.is_dir() and (not any(folder.iterdir()) or all((folder / name).exists() for name in MARKS[kind]))
    if not ours:
        raise BadFile(f"{folder} exists and is not a {kind} of fewbit; give another folder: --out DIR.")
    if not force and any(folder.iterdir()):
        raise BadFile(f"{folder} exists; replace it with --force, or give another folder: --out DIR.")
    if not check_only:
        shutil.rmtree(folder)


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
