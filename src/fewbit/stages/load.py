"""Load: from a request to a model that was exported, and images that can be read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto

from fewbit import __version__
from fewbit.choose.recipe import Synthesizes
from fewbit.core.inputs import Input, advice_on_channels, image_among
from fewbit.core.record import Record
from fewbit.core.task import Task
from fewbit.data.collection import examples
from fewbit.data.images import Images, Preprocess, glance, read_classes
from fewbit.data.shares import whole_batches
from fewbit.data.synthesize.source import Synthesis
from fewbit.data.synthesize.teacher import Teacher
from fewbit.errors import BadImages
from fewbit.load import Loaded, load_model
from fewbit.load.inputs import Given
from fewbit.load.program import fingerprint
from fewbit.load.sizes import Sizes, of_one_size
from fewbit.models import HUGGING_FACE, ONNX, form_of
from fewbit.request import Options
from fewbit.stages.compare_onnx import as_it_runs, refuse_images
from fewbit.stages.preprocessing import assumed, assumptions, preprocess_of
from fewbit.stages.sizes import holds_at_other_sizes
from fewbit.stages.sources import open_both, require_classes, sources_of, synthesis
from fewbit.stages.tail import fitted
from fewbit.stages.task import annotated, annotations_of, digest, meant


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a request: model, preprocessing, classes, and images that are not decoded yet.

    `task` is what the model's outputs mean; `classes` are the names of a classifier's classes, if known; `notes` are sentences
    that the user has to read; `assumed` names the fields of the preprocessing that nobody gave.
    """

    loaded: Loaded
    preprocess: Preprocess
    classes: Sequence[str] | None
    task: Task
    calibration: Images | Synthesis
    scored: Images
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def record(self) -> Record:
        """What the files say of their images."""
        return Record(self.preprocess.to_json(), self.assumed, self.loaded.metadata)

    def identity(self, request: Options) -> dict[str, Any]:
        """Everything that decides the result of a run; equal identities give equal files."""
        model, images = fingerprint(self.loaded.program), self.calibration
        identity: dict[str, Any] = {
            "versions": [__version__, torch.__version__],
            "request": request.key(),
            "model": model,
            "calibration": images.fingerprint() if isinstance(images, Images) else images.key(model),
            "scored": self.scored.fingerprint(),
            **self.record.to_json(),
            "target": request.hardware.fingerprint(),
            "classes": list(self.classes) if self.classes else None,
            "inputs": [described(one) for one in self.loaded.inputs],
        }
        if self.loaded.ports:
            identity["ports"] = [[port.name, port.type, list(port.dims)] for port in self.loaded.ports]
        if (path := annotations_of(request)) is not None:
            identity["annotations"] = digest(path)
        if self.loaded.tail is not None:
            identity["tail"] = hashlib.sha256(self.loaded.tail.model).hexdigest()
        if request.loss == "labels" and isinstance(images, Images) and images.labels is not None:
            identity["labels"] = hashlib.sha256(images.labels.numpy().tobytes()).hexdigest()
        return identity


def described(one: Input) -> dict[str, Any]:
    """An input for run.json; of a constant the SHA-256 of its numbers."""
    kind = "image" if one.is_image else "each image" if one.each else "constant"
    record = {"name": one.name, "shape": list(one.shape), "batch": one.has_batch, "kind": kind}
    digest = {"sha256": hashlib.sha256(one.value.numpy().tobytes()).hexdigest()} if kind == "constant" else {}  # type: ignore[union-attr]
    others: dict[str, Any] = {"others": [list(other) for other in one.others]} if one.others else {}  # where sizes are free
    others |= {"limits": list(one.limits)} if one.limits else {}
    return {**record, "type": str(one.dtype).removeprefix("torch."), **digest, **others}


def load(asked: Options) -> Inputs:
    """The model, exported, and the images, opened. Raises BadModel or BadImages where they cannot be used."""
    by_processor = isinstance(asked.model, str) and form_of(asked.model) is HUGGING_FACE  # unless the options say it all
    overrides = {k: v for k, v in asked.overrides.items() if by_processor or k == "input_size"}
    source, score = sources_of(asked)
    for one in (source, score):
        glance(one, skip_bad=asked.skip_bad)
    each, source = ({}, source) if asked.synthetic[0] else examples(source)
    given = Given(asked.inputs, each)
    options: dict[str, Any] = {
        "weights": asked.weights, "overrides": overrides, "requantize": asked.requantize, "given": given,
    }  # fmt: skip
    loaded = load_model(asked.model, sizes=Sizes.ANY if asked.dynamic_size else Sizes.WRITTEN, **options)
    if not holds_at_other_sizes(loaded, asked.hardware.file_format):
        if asked.dynamic_size:
            raise of_one_size(loaded.inputs, loaded.ref)
        loaded = load_model(asked.model, sizes=Sizes.ONE, **options)
    as_read, loaded = loaded, fitted(loaded, asked.hardware.file_format["opset"], asked.hardware.runs_in)
    names = read_classes(asked.classes) if isinstance(asked.classes, Path) else asked.classes
    classes = names or loaded.classes or None
    whole, (task, untold) = getattr(asked, "normalize_inside", False), meant(asked.task, loaded, classes or ())
    preprocess = preprocess_of(loaded, asked.overrides).replace(whole=whole)
    if whole:  # the integer file takes pixels, and the float one what is computed from them
        name = image_among(loaded.inputs).name
        ports = (replace(port, type=TensorProto.FLOAT) if port.name == name else port for port in loaded.ports)
        loaded = replace(loaded, ports=tuple(ports))
    outputs = task.classes
    if asked.loss == "labels" and outputs is None:
        raise BadImages("--loss labels needs a model that gives a class for an image; leave it at --loss kl.")
    if classes and outputs and len(classes) != outputs:
        raise BadImages(
            f"{len(classes)} class names for a model with {outputs} outputs; give one name per output: --classes FILE."
        )
    if asked.synthetic[0]:
        pair: tuple[Images | Synthesis, Images] = synthesis(asked, loaded, preprocess, classes, outputs)
    else:
        training = [one for one in asked.method.passes if isinstance(one, Synthesizes)]
        for one_pass in training:
            one_pass.check_model(Teacher(loaded.program, loaded.inputs))
            require_classes(outputs)
        labels, others = asked.labels and outputs is not None, tuple(one for one in loaded.inputs if one.each)
        image = image_among(loaded.inputs).name
        if others and training:
            raise BadImages(
                f"recipe {asked.recipe_name} trains on images alone, and {loaded.ref} takes {others[0]} with each: give the "
                f"same for all, --input {others[0].name}=VALUE, or take another recipe."
            )
        try:
            both = open_both(asked, (source, score), preprocess, classes or outputs, labels=labels, others=others, image=image)
        except BadImages as error:
            raise BadImages(f"{error}{advice_on_channels(loaded.input_shape)}") from error
        pair = whole_batches(both[0], loaded.batch), whole_batches(both[1], loaded.batch)
    pair = pair[0], annotated(pair[1], task, annotations_of(asked))
    unsaid = assumed(loaded, asked.overrides)
    notes = (*loaded.notes, *untold, *assumptions(loaded, preprocess, unsaid))
    if isinstance(asked.model, str) and form_of(asked.model) is ONNX:
        if loaded.tail is not None:
            refuse_images(as_read, Path(asked.model), pair[1], requantize=asked.requantize)
        some = next(one for one in pair if isinstance(one, Images))
        notes = (*notes, *as_it_runs(as_read, Path(asked.model), some, requantize=asked.requantize))
    return Inputs(loaded, preprocess, classes, task, *pair, notes, unsaid)
