"""Load, images, capture: from a request to a model that was exported, images that can be read, and a graph."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from torch.export import ExportedProgram

from fewbit import __version__
from fewbit.capture import capture as graph_of
from fewbit.capture.mapped import mapped
from fewbit.capture.sites import tensor_of
from fewbit.choose import Context
from fewbit.choose.choose import check as refuse
from fewbit.choose.context import set_aside
from fewbit.choose.finetune import Finetune
from fewbit.core.bits import Bits
from fewbit.core.graph import Graph, Port
from fewbit.core.inputs import Input, advice_on_channels, image_among
from fewbit.core.record import Record
from fewbit.core.task import Task
from fewbit.data.collection import check_source, examples, is_collection
from fewbit.data.images import Images, Memory, Preprocess, apart, glance, halves, open_images, read_classes, whole_batches
from fewbit.data.preprocess import LETTERBOXES
from fewbit.data.synthesize.source import Synthesis, method_for
from fewbit.data.synthesize.teacher import Teacher, refuse_without_norms
from fewbit.demo import DEMOS
from fewbit.errors import BadFile, BadImages, BadModel, FewbitError, reason
from fewbit.fields import option
from fewbit.files import read_tensors, write_stream, write_tensors
from fewbit.load import Loaded, load_model
from fewbit.load.inputs import Given
from fewbit.load.ports import batch_of
from fewbit.load.program import fingerprint
from fewbit.load.python_file import from_python
from fewbit.load.sizes import Sizes, of_one_size
from fewbit.observe import Stats, refuse_extremes
from fewbit.progress import Progress
from fewbit.request import Options
from fewbit.stages import meaning
from fewbit.stages.limit import refuse as refuse_limit
from fewbit.stages.reading import as_it_runs
from fewbit.stages.sizes import holds_at_other_sizes
from fewbit.stages.tail import fitted, read_tail, write_tail

EXPORTED = "exported.pt2"
OTHERS = "inputs.safetensors"  # what the inputs are given that are no image, where there are any
MADE = "synthetic.safetensors"
AGAIN = "write the run again with fewbit quantize --force."
FEWEST = 3  # images to hold out for scores where there are some: an embedding is compared with two others
ASSUMED = ("mean", "std", "interpolation", "resize", "crop_pct")  # fields of the preprocessing with a default


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
        if (path := meaning.annotations_of(request)) is not None:
            identity["annotations"] = meaning.digest(path)
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
    overrides = {k: v for k, v in asked.overrides.items() if k == "input_size"}
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
    if isinstance(asked.model, str) and asked.model.endswith(".onnx"):
        loaded = as_it_runs(loaded, Path(asked.model), requantize=asked.requantize)
    loaded = fitted(loaded, asked.hardware.file_format["opset"], asked.hardware.runs_in)
    names = read_classes(asked.classes) if isinstance(asked.classes, Path) else asked.classes
    classes = names or loaded.classes or None
    whole, (task, untold) = getattr(asked, "normalize_inside", False), meaning.meant(asked.task, loaded, classes or ())
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
        pair: tuple[Images | Synthesis, Images] = _synthesis(asked, loaded, preprocess, classes, outputs)
    else:
        if any(isinstance(one, Finetune) for one in asked.method.passes):
            refuse_without_norms(Teacher(loaded.program, loaded.inputs))
            _require_classes(outputs)
        labels, others = asked.labels and outputs is not None, tuple(one for one in loaded.inputs if one.each)
        image = image_among(loaded.inputs).name
        if others and any(isinstance(one, Finetune) for one in asked.method.passes):
            raise BadImages(
                f"recipe {asked.recipe_name} trains on images alone, and {loaded.ref} takes {others[0]} with each: give the "
                f"same for all, --input {others[0].name}=VALUE, or take another recipe."
            )
        try:
            both = open_both(asked, (source, score), preprocess, classes or outputs, labels=labels, others=others, image=image)
        except BadImages as error:
            raise BadImages(f"{error}{advice_on_channels(loaded.input_shape)}") from error
        pair = whole_batches(both[0], loaded.batch), whole_batches(both[1], loaded.batch)
    pair = pair[0], meaning.annotated(pair[1], task, meaning.annotations_of(asked))
    unsaid = assumed(loaded, asked.overrides)
    notes = (*loaded.notes, *untold, *assumptions(loaded, preprocess, unsaid))
    return Inputs(loaded, preprocess, classes, task, *pair, notes, unsaid)


def open_both(
    request: Options,
    sources: tuple[Any, Any],
    preprocess: Preprocess,
    known: Any,
    labels: bool,
    others: Sequence[Input] = (),
    image: str = "images",
) -> tuple[Images, Images]:
    """Calibration images and scored images, never the same: without `score` a part of the images is held out, and of a loader
    a third more are read for it.

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
    limit = request.calibration + -(-request.calibration // 3) if is_collection(source) else None
    whole = open_images(source, preprocess, classes=known, labels=labels, limit=limit, **options)
    if len(whole) < 2:
        raise BadImages(f"{whole.source} holds {len(whole)} image; at least 2 are needed, one to calibrate and one to score.")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(request.seed)).tolist()
    count = min(max(len(whole) // 4, min(FEWEST, len(whole) // 3), 1), 1000, request.scored or len(whole))
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
    try:
        made = getattr(python, function)
        source = made() if callable(made) else made
        check_source(source)
    except (Exception, SystemExit) as error:
        raise BadImages(f"{function}() of {path} failed: {reason(error)} It has to return images.") from error
    return source


def _synthesis(
    request: Options, loaded: Loaded, preprocess: Preprocess, names: Sequence[str] | None, outputs: int | None
) -> tuple[Synthesis, Images]:
    """The images to synthesize from the model, optionally with real ones, and the real ones to score on."""
    _require_classes(outputs)
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


def _require_classes(outputs: int | None) -> None:
    if outputs is None:
        raise BadImages("images are synthesized for classes, but the model's output is no list of classes; give --images DIR.")


def images(inputs: Inputs, asked: Options, folder: Path, progress: Progress) -> tuple[Images, Images, Images]:
    """The calibration images (synthesized if requested), each decoded once; those that files are chosen by, where a drop has a
    limit; and the scored images, which are others then.
    """
    calibration = inputs.calibration
    if isinstance(calibration, Synthesis):
        progress.begin("synthesize", calibration.total)
        teacher = Teacher(inputs.loaded.program, inputs.loaded.inputs, asked.place)
        made = calibration(teacher, folder / MADE, lambda text: progress.advance(1, text))
        calibration = whole_batches(made, inputs.loaded.batch)
    judged, scored = halves(inputs.scored, inputs.loaded.batch or 1) if asked.drops else (inputs.scored, inputs.scored)
    return calibration.remembered(Memory(folder)), judged, scored


def capture(inputs: Inputs, asked: Options, folder: Path) -> tuple[Inputs, Graph, ExportedProgram, Container[str]]:
    """The inputs, with the model's weights in its file; the graph of the model as it was loaded, the model, and the names of
    the sites that the target may quantize.

    Raises FewbitError for what is known to fail now: a name in `keep_float` or `bits` that the model lacks, a pass that cannot
    work on the target. The exported program is written for whoever opens the run.
    """
    if not (folder / EXPORTED).exists():
        write_stream(folder / EXPORTED, lambda file: torch.export.save(inputs.loaded.program, file))
    inputs = replace(inputs, loaded=replace(inputs.loaded, program=mapped(inputs.loaded.program, folder / EXPORTED)))
    graph, images = replace(graph_of(inputs.loaded), task=inputs.task), inputs.calibration
    if isinstance(images, Images):
        count, labels = len(images), images.labels
    else:
        count, labels = images.count, torch.zeros(images.count)
    refuse_limit(getattr(asked, "memory", None), inputs.loaded.program, graph, asked.method)
    bits = getattr(asked, "widths", None)
    apart = set_aside(count)
    context = Context(
        graph, Stats({}, 0), asked.hardware, bits if isinstance(bits, Bits) else Bits(), images=[torch.empty(count, 0)],
        labels=labels, aside=[torch.empty(apart, 0)] if apart else (), keep_float=tuple(asked.keep_float),
        everything=getattr(asked, "everything", False), name=asked.recipe_name,
    )  # fmt: skip
    quantized = frozenset(context.allowed.sites)
    if asked.keep_float and not context.allowed.integer_ops:
        raise FewbitError(
            f"--keep-float {' '.join(asked.keep_float)} leaves nothing to quantize: all {len(graph.ops)} ops would stay "
            "float. Name fewer, as in --keep-float 'head*'."
        )
    if not context.allowed.integer_ops:
        reasons = "; ".join([*dict.fromkeys(f"{one.site}: {one.why}" for one in context.allowed.fallbacks)][:3])
        raise FewbitError(
            f"{asked.hardware.name} would leave all {len(graph.ops)} ops of {inputs.loaded.ref} float, so there is nothing to "
            f"quantize{f' ({reasons})' if reasons else ''}. Choose another target: fewbit targets."
        )
    weights = [site for site in graph.sites if site.role == "weight" and site.name in quantized]
    refuse_extremes({site.name: float(tensor_of(graph, site).abs().amax()) for site in weights})
    for one_pass in asked.method.passes:
        refuse(one_pass, context)
    values = {one.name: one.value for one in graph.inputs if one.value is not None}
    if values:
        write_tensors(folder / OTHERS, values)
    write_tail(graph.tail, folder)
    return inputs, graph, inputs.loaded.program, quantized


def reopened(folder: Path, record: Mapping[str, Any]) -> tuple[Graph, ExportedProgram]:
    """The same of a finished run. Raises BadFile where its record does not say what its files take and give."""
    values = read_tensors(folder / OTHERS) if (folder / OTHERS).exists() else {}
    try:
        each = {one["name"] for one in record["inputs"] if one["kind"] == "each image"}
        given = Given({n: v for n, v in values.items() if n not in each}, {n: values[n][0] for n in each})
        ports = tuple(Port(str(name), int(kind), tuple(dims)) for name, kind, dims in record["ports"])
        batch = record["batch"]
        others = {one["name"]: tuple(map(tuple, one["others"])) for one in record["inputs"] if "others" in one}
        size = {"input_size": tuple(record["preprocess"]["size"])}
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{folder / 'run.json'}: its ports cannot be read ({error}); {AGAIN}") from error
    loaded = load_model(str(folder / EXPORTED), given=given, overrides=size, sizes=Sizes.ONE)
    loaded = replace(loaded, program=mapped(loaded.program, folder / EXPORTED))
    inputs = tuple(replace(one, others=others.get(one.name, ())) for one in loaded.inputs)
    loaded = replace(loaded, batch=batch, ports=ports, inputs=inputs, tail=read_tail(folder))
    return replace(graph_of(loaded), task=meaning.reopened(record, loaded)), loaded.program


def preprocess_of(loaded: Loaded, overrides: Mapping[str, Any]) -> Preprocess:
    """The model's own record, with some fields replaced. Raises BadModel where its own image processor decides."""
    record = dict(loaded.record)
    kept = ("resize", "antialias", "processor", "channel_order", "fill")  # which timm's records lack
    own: dict[str, Any] = {k: record[k] for k in kept if k in record}
    if "processor" in own and (given := [option(name) for name in overrides if name != "input_size"]):
        raise BadModel(
            f"{', '.join(given)}: the image processor of {loaded.ref} makes its images; leave the option out, or change "
            "preprocessor_config.json in its folder."
        )
    own |= {name: value for name, value in overrides.items() if name != "input_size"}  # which the record has
    if own.get("resize") in LETTERBOXES and record.get("crop_pct") is None:  # which hold the whole picture
        own = {"crop_pct": 1.0, **own}
    return Preprocess.from_timm({**record, **overrides}).replace(**own)


def assumed(loaded: Loaded, overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of the preprocessing that neither the model nor the request gives."""
    record = loaded.record
    given = {"resize"} if record.get("crop_mode") else set[str]()
    given |= {"crop_pct"} if overrides.get("resize", record.get("resize")) in LETTERBOXES else set()
    given |= {*overrides, *(name for name, value in record.items() if value is not None)} - {*record.get("assumed", ())}
    return () if "processor" in record else tuple(name for name in ASSUMED if name not in given | set(overrides))


def assumptions(loaded: Loaded, preprocess: Preprocess, unsaid: Sequence[str]) -> tuple[str, ...]:
    """A sentence that names what is assumed of the preprocessing, if there is any."""
    if not unsaid:
        return ()
    values = [getattr(preprocess, name) for name in unsaid]
    shown = [_shown(value) if isinstance(value, tuple) else f"{value}" for value in values]
    said = ", ".join(f"{option(name)} {value}" for name, value in zip(unsaid, shown, strict=True))
    return (f"{loaded.ref} does not say how its images were made; assumed is {said}. Set what was different in training.",)


def _shown(values: Sequence[float]) -> str:
    """Numbers of channels as they are typed: one where all are equal."""
    return ",".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))
