"""`fewbit export`: the file of a run in a folder of its own, with everything that a program needs, in a format of a runtime.

Each format is looked at before the folder is there: on the images that the run compared codes on it has to give the outputs
that the run's own file gives in that runtime.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.core.record import pixels_of
from fewbit.deploy.folder import FOLDER
from fewbit.deploy.python.session import Run, session
from fewbit.errors import BadFile, FewbitError, FewbitFailed, Stopped, UnknownName, full, reason
from fewbit.files import read_json, write_json
from fewbit.folder import MODEL, SAMPLE, check_utf8, checked, copy_file
from fewbit.onnx_file import DATA, is_external
from fewbit.runtimes import RUNTIMES, runtime_names, runtimes_for

Arrays = Mapping[str, NDArray[Any]]
MEASURED = (f"is in the file: `fewbit show {MODEL}`", "is in the run: `fewbit show RUN`")  # other forms cannot be shown
LOADS = 5  # times that a file is loaded to time it


@dataclass(frozen=True)
class Format:
    """A form of the file: the runtime that reads it (none: the run's own), the names of its files, and what makes them of
    model.onnx, in a folder.
    """

    runtime: str
    files: tuple[str, ...]
    make: Callable[[Path, Path], object]


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, on how many images it was compared, and seconds to load it and the run's own file."""

    folder: Path
    images: int
    seconds: float
    own_seconds: float


def export(run: Path, to: Path, name: str = "onnx") -> Exported:
    """Write a folder. Raises UnknownName for no format, BadFile for a run or a folder that cannot be used, FewbitFailed where
    the format gives other answers, Stopped where the disk is full.
    """
    if name not in FORMATS:
        raise UnknownName("format", name, FORMATS)
    checked(run)
    form, task = FORMATS[name], read_json(run / FOLDER / "task.json")
    runtime = form.runtime or task["runtime"]
    _refuse(run, to, runtime, name)
    try:
        holder = Path(tempfile.mkdtemp(prefix=f".{to.name[:200]}.", dir=to.parent))  # which nobody else may read
    except OSError as error:
        raise BadFile(f"--to {to} cannot be written: {error.strerror}; give another folder: --to DIR.") from error
    try:
        part = holder / "part"
        with _to(to):
            shutil.copytree(run / FOLDER, part, dirs_exist_ok=True, copy_function=copy_file)
            form.make(run / MODEL, part)
            task = {**task, "file": form.files[0], "runtime": runtime}
            write_json(part / "task.json", task)
            _tell(part, task)
        feeds = _feeds(run, task)
        exported = Exported(to, len(feeds), *_compared(run, part, task, feeds))
        os.replace(part, to)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
    return exported


@contextmanager
def _to(to: Path) -> Iterator[None]:
    """What cannot be written is told under the folder that was asked for. Raises Stopped, also where a
    runtime that writes fails with an error of its own, which does not say what is wrong.
    """
    try:
        yield
    except Exception as error:
        why = full(error)
        if why is None and isinstance(error, FewbitError | OSError | MemoryError):
            raise
        found = why or f"the runtime says {reason(error)}".rstrip(".")
        raise Stopped(f"--to {to} cannot be written: {found}. Free some space, or give another folder: --to DIR.") from error


def _refuse(run: Path, to: Path, runtime: str, name: str) -> None:
    for path in (run, to):
        check_utf8(path)
    if to.name in ("", "..") or to.is_symlink() or (to.exists() and not (to.is_dir() and not any(to.iterdir()))):
        raise BadFile(f"--to {to} is there and not an empty folder; give another one: --to DIR.")
    if to.resolve().is_relative_to(run.resolve()):
        raise BadFile(f"--to {to} is in the run {run}, which holds its own files alone; give a folder outside it: --to DIR.")
    if not to.parent.is_dir():
        raise BadFile(f"--to {to}: {to.parent} is not a folder; make it, or give another one: --to DIR.")
    if runtime not in runtime_names():
        raise BadFile(f"format {name} is of {runtime}, which is not installed: pip install 'fewbit[{runtime}]'.")
    if runtime not in runtimes_for(run / MODEL):
        raise BadFile(
            f"{run / MODEL} has operators of another runtime and does not load in {runtime}; make a run for it, as in "
            "--target openvino-x86, or take --format onnx."
        )


def _tell(part: Path, task: Mapping[str, Any]) -> None:
    """Name the file in what stands about it, and leave out examples that do not load it."""
    readme = (part / "README.md").read_text(encoding="utf-8")
    if not RUNTIMES[task["runtime"]].examples:
        readme = "".join(line for line in readme.splitlines(keepends=True) if "example.cpp" not in line)
        for path in part.glob("example.*"):
            path.unlink()
    readme = readme.replace("pillow onnxruntime", f"pillow {task['runtime']}")
    if task["file"] != MODEL:
        readme = readme.replace(*MEASURED)
    (part / "README.md").write_text(readme, encoding="utf-8")
    for path in (part / "README.md", part / "predict.py", *part.glob("example.*")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        named = (line if _is_title(i, line) else line.replace(MODEL, task["file"]) for i, line in enumerate(lines))
        path.write_text("".join(named), encoding="utf-8")


def _is_title(place: int, line: str) -> bool:
    """Whether a line of a text names the model that was quantized, which may be called as the file of a run is."""
    return place == 0 or line.startswith(("<title>", "<h1>"))


def _compared(run: Path, part: Path, task: Mapping[str, Any], feeds: list[Arrays]) -> tuple[float, float]:
    """Seconds to load the new file and the run's own. Raises FewbitFailed where their outputs differ."""
    (own, own_seconds), (new, seconds) = (_loaded(path, task) for path in (run / MODEL, part / task["file"]))
    for i, one in enumerate(feeds):
        for name, wanted, found in zip(task["outputs"], own(one), new(one), strict=True):
            if not np.array_equal(wanted, found, equal_nan=wanted.dtype.kind == "f"):
                apart = np.abs(wanted.astype(np.float64) - found).max() if wanted.shape == found.shape else np.inf
                raise FewbitFailed(
                    f"{task['file']} gives another {name} than {MODEL} in {task['runtime']} on image {i} of the run's own "
                    f"(largest difference {apart:.3g}), so nothing was written; take --format onnx."
                )
    return seconds, own_seconds


def _loaded(path: Path, task: Mapping[str, Any]) -> tuple[Run, float]:
    """A session, and the median of the seconds that loading took."""
    seconds, made = [], None
    for _ in range(LOADS):
        start = time.perf_counter()
        made = session(path, task["outputs"], task["runtime"])
        seconds.append(time.perf_counter() - start)
    assert made is not None
    return made, statistics.median(seconds)


def _feeds(run: Path, task: Mapping[str, Any]) -> list[Arrays]:
    """What the file takes of the run's own images, a batch of the file at a time."""
    from safetensors.numpy import load_file

    how, batch = read_json(run / FOLDER / "preprocess.json"), task["batch"]
    sample = load_file(run / SAMPLE)
    images = sample.pop("images")
    images = pixels_of(images, how["mean"], how["std"]) if how["normalize"] == "inside" else images.astype(how["dtype"])
    others: dict[str, NDArray[Any]] = {}
    with suppress(FileNotFoundError):
        others = dict(np.load(run / FOLDER / "inputs.npz"))
    feeds: list[Arrays] = []
    for first in range(0, len(images) - batch + 1, batch):
        each = {name.removeprefix("with."): rows[first : first + batch] for name, rows in sample.items()}
        typed = {name: rows.astype(others[name].dtype) for name, rows in each.items()}
        feeds.append({task["input"]: images[first : first + batch], **others, **typed})
    return feeds


def _copy(model: Path, folder: Path) -> None:
    copy_file(model, folder / MODEL)
    if is_external(model):
        copy_file(model.with_name(model.name + DATA), folder / (MODEL + DATA))


def _to_openvino(model: Path, folder: Path) -> None:
    """openvino's own form, with every number as it is."""
    import openvino

    openvino.save_model(openvino.Core().read_model(str(model)), str(folder / "model.xml"), compress_to_fp16=False)


def _to_ort(model: Path, folder: Path) -> None:
    """onnxruntime's own form: the graph as it optimises it on this machine, which is not done again when the file is loaded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


FORMATS: Mapping[str, Format] = {
    "onnx": Format("", (MODEL,), _copy),
    "openvino": Format("openvino", ("model.xml", "model.bin"), _to_openvino),
    "ort": Format("onnxruntime", ("model.ort",), _to_ort),
}
