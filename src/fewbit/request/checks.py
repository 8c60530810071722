"""What of a request is known to fail before a model is loaded or an image is read. Each function raises FewbitError."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from fewbit.errors import BadImages, FewbitError
from fewbit.models import ONNX, form_of

if TYPE_CHECKING:
    from pathlib import Path

    from fewbit.request import Options


def check_request(request: Options) -> None:
    """Raise what the model, the images, their preparation or their task would raise later."""
    check_device(request)
    check_runtime(request)
    check_preprocess(request)
    check_images(request)
    check_task(request)
    check_weights(request)


def check_device(request: Options) -> None:
    """Raises FewbitError for no device, and for one that is not here."""
    _ = request.place


def check_runtime(request: Options) -> None:
    """Raises FewbitError where the target's runtime can run here and is not installed."""
    from fewbit.runtimes import RUNNABLE, runtime_names

    name = request.hardware.runtime
    if name in RUNNABLE and name not in runtime_names():
        raise FewbitError(
            f"target {request.hardware.name} runs in {name}, which is not installed: pip install 'fewbit[{name}]', or give "
            "another --target; `fewbit targets` lists them."
        )


def check_preprocess(request: Options) -> None:
    """Raises UnknownName or BadImages as Preprocess does, before a model is loaded."""
    from fewbit.data.preprocess import Preprocess

    fields = {("size" if name == "input_size" else name): value for name, value in request.overrides.items()}
    if request.fill is not None:
        fields = {"resize": "letterbox", **fields}  # which the model may say
    channels = max(len(request.mean or ()), len(request.std or ()))
    Preprocess(request.input_size or (channels if channels > 1 else 3, 1, 1)).replace(**fields)


def check_images(request: Options) -> None:
    """Raises BadImages where calibration or scored images are missing."""
    from fewbit.data.collection import check_files, check_source
    from fewbit.demo import DEMOS  # models that have images of their own

    synthetic, real = request.synthetic
    if request.loader is not None:
        check_loader(request, request.loader)
    elif request.images is None and request.ref not in DEMOS:
        raise BadImages("no images; a few dozen of the kind that the model will see are needed: --images DIR.")
    if synthetic and request.score is None and request.ref not in DEMOS:
        raise BadImages("synthetic images calibrate; real ones are needed to score on: --score DIR.")
    for source, name in ((real if synthetic else request.images, "images"), (request.score, "score")):
        if source is not None:
            own = request.ref in DEMOS and (name == "images" or request.images is None)
            check_source(source, name, f" Or leave --{name} out: {request.ref} has its own." if own else "")
            check_files(source, name, skip_bad=request.skip_bad)


def check_loader(request: Options, loader: str) -> None:
    spec = re.fullmatch(r"(.+\.py):(\w+)", loader)
    if spec is None or not os.path.isfile(spec[1]):
        raise BadImages(f"--loader {loader} is not a function of a Python file that exists; type --loader file.py:function.")
    if request.images is not None:
        raise BadImages(f"--loader {loader} takes the place of --images; leave one of them out.")


def check_task(request: Options) -> None:
    """Raises UnknownName for no task, BadImages for annotations that are not there or are not to be read."""
    from fewbit.core.task import Task
    from fewbit.task import check_name

    if isinstance(request.task, str):
        check_name(request.task)
    elif request.task is not None and not isinstance(request.task, Task):
        raise FewbitError(f"--task {request.task!r:.80} is neither a name nor a fewbit.Task; give one, as in --task segment.")
    check_annotations(request.annotations, request.labels)


def check_annotations(path: Path | None, labels: bool) -> None:
    """Raises BadImages for annotations that are not there, or beside a wish to read nothing of what is known."""
    if path is not None and not labels:
        raise BadImages(f"--annotations {path} says what is known of the images, and --no-labels ignores it; leave one out.")
    if path is not None and not os.path.exists(path):
        raise BadImages(f"--annotations {path} does not exist; give the file or folder that says what is known.")


def check_weights(request: Options) -> None:
    """Raises FewbitError where `weights` is given for a model that has its own, or `requantize` for no ONNX file."""
    if request.weights is not None and not (isinstance(request.model, str) and form_of(request.model).takes_weights):
        raise FewbitError(
            f"--weights {request.weights} is for a timm or torchvision model, and {request.ref} has its own; leave it out."
        )
    if request.requantize and form_of(request.ref) is not ONNX:
        raise FewbitError(f"--requantize is for an ONNX file, and {request.ref} is none; leave it out.")
