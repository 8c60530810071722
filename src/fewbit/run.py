"""A run's folder: what a run was asked for, what it leaves behind, and how both are read back.

A run works in `<out>.part` and is renamed to `<out>` when it is done. A killed run leaves `<out>.part`; the same request
finds it and goes on behind the last stage that was written.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fewbit.capture import capture, load_model
from fewbit.core.values import Checks, Graph, Plan
from fewbit.data.images import Images, Preprocess, open_images
from fewbit.equalize import replaced
from fewbit.errors import BadFile
from fewbit.files import read_json, write_json
from fewbit.progress import Progress
from fewbit.realize import load_plan
from fewbit.recipes import DEFAULT
from fewbit.verify import compare

EQUALIZED = "equalized.safetensors"  # the constants of the graph that equalize has changed; there where it did
CHECKED = 8  # images on which codes are compared
THIS_MACHINE = "this machine"  # the site of the fallback of a plan for another processor
STANDS_IN = "the runtime"  # the site of the fallback of a plan whose runtime is not here
MARKS = {"run": ("plan.json",), "search": ("points", "report.json")}  # by which a finished folder is known
FILES = ("exported.pt2", "plan.json", "plan.safetensors", "model.onnx", "float.onnx", "images.safetensors")


@dataclass(frozen=True)
class Request:
    """Everything that decides what a run computes. The same request gives the same files."""

    model: str
    target: str
    recipe: str = DEFAULT
    bits: str = "8"
    calibration: int = 128
    scored: int | None = None
    seed: int = 0
    keep_float: tuple[str, ...] = ()
    everything: bool = False
    skip_bad: bool = False
    labels: bool = True
    time: str | None = None
    loss: str | None = None
    steps: int | None = None
    curve: bool = False


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


@dataclass(frozen=True)
class Run:
    """A run folder, read back."""

    folder: Path
    record: Mapping[str, Any]

    @staticmethod
    def open(folder: str | Path) -> Run:
        """Raises BadFile where the folder is no finished run."""
        path = Path(folder)
        if not path.is_dir():
            raise BadFile(f"{path} is not a folder; give one that `fewbit quantize` wrote.")
        missing = [name for name in FILES if not (path / name).is_file()]
        record = read_json(path / "run.json")
        if missing:
            raise BadFile(f"{path} has no {', '.join(missing)}; write the run again with fewbit quantize --force.")
        return Run(path, record)

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.from_json(self.record["preprocess"])

    def graph(self) -> Graph:
        """The graph that the plan is for, equalized where the run's was."""
        graph, changed = capture(load_model(str(self.folder / "exported.pt2"))), self.folder / EQUALIZED
        return replaced(graph, load_file(changed)) if changed.exists() else graph

    def images(self, source: Any, *, skip_bad: bool = False, labels: bool = True, limit: int | None = None) -> Images:
        known = self.record["classes"] or self.record["outputs"]
        return open_images(source, self.preprocess, classes=known, skip_bad=skip_bad, labels=labels, limit=limit)

    def verify(self, images: Any = None, progress: Progress | None = None) -> Checks:
        """Codes of the run's plan against its model.onnx, on the run's own images or others."""
        progress = progress or Progress()
        graph = self.graph()
        plan = load_plan(graph, self.folder)
        if images is None:
            sample = load_file(self.folder / "images.safetensors")["images"]
        else:
            sample = next(self.images(images, labels=False).batches(CHECKED))
        with progress.stage("verify", 3):
            found = self.record["runtime"] == "onnxruntime" and not stands_in(plan)
            return check_codes(graph, plan, self.folder, sample, found, progress)


def stands_in(plan: Plan) -> bool:
    """Whether the plan is for a runtime that cannot run here, and another one computes its file as written."""
    return any(fallback.site == STANDS_IN for fallback in plan.fallbacks)


def check_codes(graph: Graph, plan: Plan, folder: Path, sample: Tensor, optimised: bool, progress: Progress) -> Checks:
    """Codes and outputs of a folder's model.onnx on a few images; optimised too where onnxruntime is what it is made for."""
    return compare(
        graph, plan, folder / "model.onnx", sample.split(4), optimised=optimised,
        progress=lambda text: progress.advance(1, text),
    )  # fmt: skip


def run_record(
    command: str, request: Request, identity: Mapping[str, Any], preprocess: Preprocess, names: Sequence[str] | None,
    outputs: int | None, runtime: str, threads: int,
) -> dict[str, Any]:  # fmt: skip
    """run.json: what was asked for, of what, with which versions, on which machine."""
    packages = ("fewbit", "torch", "onnx", "onnxruntime", "openvino", "timm")
    return {
        "command": command,
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "seed": request.seed,
        "hashes": {k: identity[k] for k in ("model", "calibration", "scored", "target")},
        "machine": {"processor": processor(), "threads": threads, "system": platform.system()},
        "request": identity["request"],
        "runtime": runtime,
        "preprocess": preprocess.to_json(),
        "classes": list(names) if names else None,
        "outputs": outputs,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
