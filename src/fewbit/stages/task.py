"""What the model's outputs mean: its task, and what is known of the scored images in that task's terms."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import TensorProto

from fewbit.core.task import Output, Signature, Task
from fewbit.core.walk import below
from fewbit.data.images import Images
from fewbit.demo import DEMOS
from fewbit.deploy.program import answers
from fewbit.errors import AGAIN, BadFile, BadImages, BadModel, reason
from fewbit.folder import TWIN
from fewbit.load import Loaded
from fewbit.load.python_file import from_python
from fewbit.onnx_file import load_proto
from fewbit.request import Options
from fewbit.stages.tail import TAIL
from fewbit.task import Tensors, recognise, task_named
from fewbit.task.own import fitting
from fewbit.tasks import OWN

REAL = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
ASK = "say what they mean with --task, see `fewbit quantize --help`."


def meant(named: Any, loaded: Loaded, names: Sequence[str]) -> tuple[Task, tuple[str, ...]]:
    """The task that the request names, the model says, or the outputs show, and what a user has to know of it.

    Raises BadModel where a named task needs other outputs.
    """
    outputs, model = loaded.outputs, Signature(loaded.outputs, loaded.input_shape[1:], names)
    if isinstance(named, Task):
        return fitting(named, outputs, answers), ()
    if named is not None:
        return (fitting(_of_file(named), outputs, answers) if OWN in named else task_named(named, model)), ()
    said = loaded.record.get("task")
    if said:
        try:
            return task_named(said, model), ()
        except BadModel as error:
            return recognise(outputs), (f"{loaded.ref} is for {said}, but {error} Outputs are compared as numbers; {ASK}",)
    task = recognise(outputs)
    if not isinstance(task, Tensors):
        return task, ()
    return task, (f"Nothing says what the outputs of {loaded.ref} are, so they are compared as numbers; {ASK}",)


def _of_file(spec: str) -> Task:
    """A task of the user's own: an object, or what a class or function gives without arguments. Raises BadModel."""
    path, python, name = from_python(spec, "--task")
    made = getattr(python, name)
    try:
        task = made if isinstance(made, Task) else made()
    except (Exception, SystemExit) as error:
        raise BadModel(f"--task {spec}: {name}() of {path} failed: {reason(error)} Fix it.") from error
    if not isinstance(task, Task):
        raise BadModel(f"--task {spec}: {name} of {path} is a {type(task).__name__}; a fewbit.Task is needed.")
    return task


def written(record: Mapping[str, Any], folder: Path) -> Task | None:
    """The task of a finished run by its files, without its model, which takes seconds to open; None where they do not say the
    outputs: their sizes are free, or they come from a tail.
    """
    ports = load_proto(folder / TWIN, data=False).graph.output
    shapes = {one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim][1:] for one in ports}
    if (folder / TAIL).exists() or any(not size for shape in shapes.values() for size in shape):
        return None
    real = {one.name: one.type.tensor_type.elem_type in REAL for one in ports}
    return reopened(record, [Output(name, tuple(shape), real[name]) for name, shape in shapes.items()])


def reopened(record: Mapping[str, Any], outputs: Sequence[Output]) -> Task:
    """The task of a finished run. One of a user's own file is not run again: outputs are then compared as numbers."""
    spec = record.get("task")
    if not isinstance(spec, str):
        raise BadFile(f"run.json says the task {spec!r:.40}; {AGAIN}")
    model = Signature(outputs, tuple(record["preprocess"]["size"][1:]), record["classes"] or ())
    return Tensors.of(model) if OWN in spec else task_named(spec, model)


def annotations_of(request: Options) -> Path | None:
    """Where annotations of the scored images lie; a demo has its own, of its own test images."""
    own = request.ref in DEMOS and request.score is None and request.labels and request.task is None
    return request.annotations or (DEMOS[request.ref].annotations if own else None)


def annotated(images: Images, task: Task, path: Path | None) -> Images:
    """The scored images with what is known of them. Raises BadImages for what it cannot be."""
    return images if path is None else replace(images, truth=task.read(path, images))


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder with their names."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else [path / one for one in sorted(below(path)[0])]
    for one in files:
        try:
            content = hashlib.sha256(one.read_bytes()).hexdigest()
        except OSError as error:
            raise BadImages(f"{one} cannot be read: {error}. Fix it, or leave --annotations out.") from error
        total.update(f"{one.relative_to(path).as_posix()} {content} ".encode())
    return total.hexdigest()
