"""Where the images of a request come from: opened, and parted into those that calibrate and those that are scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fewbit.core.inputs import Input
from fewbit.data.collection import check_source, is_collection
from fewbit.data.images import Images, Preprocess, open_images
from fewbit.data.shares import apart
from fewbit.data.synthesize.source import Synthesis, method_for
from fewbit.data.synthesize.teacher import Teacher
from fewbit.demo import DEMOS
from fewbit.errors import BadImages, reason
from fewbit.load import Loaded
from fewbit.load.ports import batch_of
from fewbit.load.python_file import from_python
from fewbit.request import Options

FEWEST = 3  # images to hold out for scores where there are some: an embedding is compared with two others
MOST = 1000  # to hold out where nobody says how many


def open_both(
    request: Options,
    sources: tuple[Any, Any],
    preprocess: Preprocess,
    known: Any,
    labels: bool,
    others: Sequence[Input] = (),
    image: str = "images",
) -> tuple[Images, Images]:
    """Calibration images and scored images, never the same: without `score` a quarter of the images is held out, or as many as
    `scored` says where enough are left to calibrate on; of a loader no more are read than that takes.

    `labels`: read those of the scored images, which are checked against the classes in `known`. `others` are the inputs that
    come with each image, `image` is the name of the one that is.
    """
    source, score = sources
    options: dict[str, Any] = {"skip_bad": request.skip_bad, "seed": request.seed, "others": others, "image": image}
    if score is not None:
        labelled = request.loss == "labels" and labels
        classes = known if labelled else None
        calibration = open_images(source, preprocess, classes=classes, limit=request.calibration, labels=labelled, **options)
        held_out = open_images(score, preprocess, classes=known, limit=request.scored, labels=labels, **options)
        return apart(calibration, held_out), held_out
    more = -(-request.calibration // 3) if request.scored is None else request.scored
    limit = request.calibration + more if is_collection(source) else None
    whole = open_images(source, preprocess, classes=known, labels=labels, limit=limit, **options)
    if len(whole) < 2:
        raise BadImages(f"{whole.source} holds {len(whole)} image; at least 2 are needed, one to calibrate and one to score.")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(request.seed)).tolist()
    usual, spare = max(len(whole) // 4, min(FEWEST, len(whole) // 3), 1), len(whole) - request.calibration
    count = min(usual, MOST) if request.scored is None else min(max(usual, spare), request.scored)
    held_out = whole.subset(sorted(order[:count]))
    rest = apart(whole.subset(order[count:]), held_out, most=math.inf)
    chosen = sorted(range(min(request.calibration, len(rest))), key=lambda i: rest.rows[i])
    return rest.subset(chosen), held_out


def sources_of(request: Options) -> tuple[Any, Any]:
    """The sources of calibration and scored images; a demo has its own."""
    if request.loader is not None:
        return _called(request.loader), request.score
    if request.ref not in DEMOS or (request.images is not None and not request.synthetic[0]):
        return request.images, request.score
    demo = DEMOS[request.ref]
    images = demo.calibration if request.images is None else request.images
    return images, demo.test if request.score is None else request.score


def _called(loader: str) -> Any:
    """What the function of a file.py:function returns as the source of images. Raises BadImages that names both."""
    path, python, function = from_python(loader, "--loader")
    made = getattr(python, function)
    try:
        source = made() if callable(made) else made
    except (Exception, SystemExit) as error:
        raise BadImages(f"{function}() of {path} failed: {reason(error)} It has to return images.") from error
    check_source(source, f"--loader {loader}: images")
    return source


def synthesis(
    request: Options, loaded: Loaded, preprocess: Preprocess, names: Sequence[str] | None, outputs: int | None
) -> tuple[Synthesis, Images]:
    """The images to synthesize from the model, optionally with real ones, and the real ones to score on."""
    require_classes(outputs)
    assert outputs is not None
    if batch_of(loaded.program, loaded.inputs) is not None:
        raise BadImages(
            f"{loaded.ref} takes {loaded.batch} images at a time and no other batch, and images are synthesized in batches of "
            "many sizes; give real ones: --images DIR."
        )
    known = names or outputs
    _, beside = request.synthetic
    method = method_for(Teacher(loaded.program, loaded.inputs), real=beside is not None, steps=request.steps)
    real = None
    if beside is not None:
        labels = request.loss == "labels" and request.labels
        real = open_images(beside, preprocess, classes=known if labels else None, labels=labels, skip_bad=request.skip_bad)
    held_out = open_images(
        sources_of(request)[1], preprocess, classes=known, limit=request.scored, labels=request.labels,
        skip_bad=request.skip_bad, seed=request.seed,
    )  # fmt: skip
    if real is not None:
        real = apart(real, held_out)
    return Synthesis(method, request.calibration, outputs, preprocess, request.seed, real), held_out


def require_classes(outputs: int | None) -> None:
    if outputs is None:
        raise BadImages(
            "images are synthesized for classes, but the model's output is not a list of classes; give --images DIR."
        )
