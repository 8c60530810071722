"""Every way to name a model, and loading it.

demo                 the small vision transformer that fewbit ships
demo:resnet20        a small convolutional network for the same images
demo:mobilenet       one with depthwise convolutions
demo:detr            a small DETR for scenes of such images
vit_small_patch16_224    a timm name (pretrained weights from timm's hub, or `weights=` a file)
torchvision:resnet50     a torchvision name (its default weights, or `weights=` a file)
hf:google/vit-base-patch16-224    a Hugging Face name or folder
path/model.onnx      a float ONNX file
path/model.pt2       an exported program (torch.export.save)
path/model.pt        TorchScript (torch.jit.save)
path/file.py:function    a function that returns the module; INPUT_SIZE, MEAN, STD, ... of the file are its preprocessing
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx import TensorProto
from torch import nn
from torch.export import ExportedProgram

from fewbit.core.inputs import flat
from fewbit.core.record import ENTRY, read_entry
from fewbit.demo import DEMOS
from fewbit.errors import BadFile, BadModel, FewbitError, reason
from fewbit.load.archive import read_program
from fewbit.load.checkpoint import SUFFIXES, refuse_file, unwrapped
from fewbit.load.contexts import unwarned
from fewbit.load.huggingface import hugging_face
from fewbit.load.inputs import Arguments, Given, of_ports
from fewbit.load.loaded import Loaded, from_module, from_program
from fewbit.load.named import timm_model, timm_record, torchvision_model
from fewbit.load.program import graph_module
from fewbit.load.python_file import from_python
from fewbit.load.record import CONSTANTS, WHOLE, beside, checked
from fewbit.load.sizes import Sizes, about_sizes, of_one_size
from fewbit.load.torchscript import as_onnx, is_torchscript, refuse_others
from fewbit.onnx_reader import OnnxFile, read_onnx

FILES = "path.onnx, path.pt2, TorchScript (path.pt) or file.py:function"
MODEL_NAMES = f"{', '.join(DEMOS)}, a timm name, torchvision:NAME, hf:NAME, {FILES}"
MODEL = f"MODEL is {MODEL_NAMES}."
KINDS = ("torchvision:NAME", "hf:NAME", "path.onnx", "path.pt2", "file.py:function")  # what names other than timm's look like
PYTHON = re.compile(r"\.py(:[^:]*)?$")
ALONE = Given()  # the image is all that a model takes


@dataclass(frozen=True)
class _Asked:
    """What the caller of `load_model` says of a model."""

    weights: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    requantize: bool = False
    given: Given = ALONE
    sizes: Sizes = Sizes.WRITTEN

    def size(self, where: Path, fields: Mapping[str, Any]) -> Any:
        """The size of images that is given, or stands beside a file; raises BadModel where neither says it."""
        if "input_size" not in (known := {**fields, **self.overrides}):
            raise BadModel(f"{where} does not say its input size. Give it: --input-size 3,224,224 (input_size=(3, 224, 224)).")
        return known["input_size"]


@unwarned()
def load_model(
    ref: str | nn.Module | ExportedProgram,
    *,
    weights: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    requantize: bool = False,
    given: Given = ALONE,
    sizes: Sizes = Sizes.WRITTEN,
) -> Loaded:
    """The exported program behind a reference; raises BadModel with the reason, or UnknownName with near names.

    `overrides` replaces fields of the record (input_size, mean, std, interpolation, crop_pct, ...); `requantize`
    takes the quantization out of an ONNX file; `given` are the inputs beside the image. `sizes` says which images the program
    takes; with Sizes.ANY BadModel says where a model takes one size alone.
    """
    loaded = _loaded(ref, _Asked(weights, overrides or {}, requantize, given, sizes))
    if sizes is Sizes.ANY and not any(one.others for one in loaded.inputs):
        raise of_one_size(loaded.inputs, loaded.ref)
    return loaded


def _loaded(ref: str | nn.Module | ExportedProgram, asked: _Asked) -> Loaded:
    if isinstance(ref, ExportedProgram):
        return from_program(ref, "exported program", asked.overrides, asked.given, asked.sizes)
    if isinstance(ref, nn.Module):
        net = unwrapped(ref)
        return _from_module(net, type(net).__name__, timm_record(net), asked)
    if not isinstance(ref, str):
        raise BadModel(
            f"a model of type {type(ref).__name__} was given; give a torch.nn.Module, an ExportedProgram or a name. {MODEL}"
        )
    if ref in DEMOS or PYTHON.search(ref):
        return _from_file(ref, asked)
    if ref.endswith(".pt2"):
        return _from_pt2(Path(ref), asked)
    if ref.endswith(".onnx"):
        return _from_onnx(Path(ref), asked)
    if ref.startswith("hf:"):
        return _from_hf(ref, asked)
    if ref.endswith(SUFFIXES):
        if is_torchscript(Path(ref)):
            return _from_torchscript(Path(ref), asked)
        refuse_file(Path(ref))
    return _from_name(ref, asked)


def is_architecture(ref: str) -> bool:
    """Whether a name is one of timm's or torchvision's, which take weights from a file."""
    return not (ref in DEMOS or ref.endswith((".pt2", ".onnx", *SUFFIXES)) or PYTHON.search(ref) or ref.startswith("hf:"))


def _from_module(
    net: nn.Module, ref: str, record: Mapping[str, Any], asked: _Asked, notes: tuple[str, ...] = ()
) -> Loaded:  # fmt: skip
    return from_module(net, ref, {**record, **asked.overrides}, asked.given, notes=notes, free=asked.sizes.of_module)


def _from_pt2(path: Path, asked: _Asked) -> Loaded:
    if not os.path.isfile(path):
        raise BadFile(f"{path} does not exist. {MODEL}")
    program = read_program(path)
    sidecar = path.with_suffix(".json")
    fields = beside(sidecar)
    size = fields.pop("input_size", None)
    loaded = from_program(program, str(path), {**fields, **asked.overrides}, asked.given, asked.sizes)
    if size not in (None, loaded.input_shape):
        raise BadModel(f"{sidecar} has input_size {size}, {path} was exported for {loaded.input_shape}; mend or remove it.")
    checked({**fields, "input_size": loaded.input_shape}, str(sidecar))
    return loaded


def _from_onnx(path: Path, asked: _Asked) -> Loaded:
    given, requantize = asked.given, asked.requantize
    file = read_onnx(path, {*given.constants, *flat(given.each)}, each=given.brought, requantize=requantize)
    notes = (f"{path} was quantized before; its weights keep the rounding that they have.",) if requantize else ()
    size = file.input_size(asked.overrides.get("input_size"))
    inputs = of_ports(
        [replace(one, shape=size) if one.name == file.image.name else one for one in file.inputs], given, str(path)
    )
    halves = {port.name for port in file.takes if port.type == TensorProto.FLOAT16}  # what the file itself can hold
    inputs = tuple(
        one if one.value is None or one.name not in halves else replace(one, value=one.value.half().float()) for one in inputs
    )
    any_batch, called = file.look(inputs), (inputs, Arguments(tuple(one.name for one in inputs)))
    record, batches = {**_entry(file, size), **asked.overrides, "input_size": size}, (file.batch,)
    notes = (*file.notes, *notes, *(about_sizes(str(path), inputs, file.free) if asked.sizes is Sizes.ONE else ()))
    loaded = from_module(
        file.module, str(path), record, given, notes=notes, called=called,
        batches=(None, file.batch or 1) if any_batch else batches, free=asked.sizes.of(file.free),
    )  # fmt: skip
    return replace(loaded, metadata=file.metadata, batch=loaded.batch or file.batch, ports=file.ports, tail=file.tail)


def _from_torchscript(path: Path, asked: _Asked) -> Loaded:
    """TorchScript by way of an ONNX file, with what a .json beside it says."""
    sidecar = path.with_suffix(".json")
    fields = {**beside(sidecar), **asked.overrides}
    size = asked.size(path, fields)
    with as_onnx(path, size) as (written, script, batch):
        try:
            loaded = _from_onnx(written, replace(asked, overrides=fields, requantize=False))
        except (BadFile, BadModel) as error:
            raise type(error)(str(error).replace(str(written), str(path))) from error
        refuse_others(path, script, graph_module(loaded.program), batch, size)
        notes = tuple(note.replace(str(written), str(path)) for note in loaded.notes)
    checked(fields, str(sidecar))
    return replace(loaded, ref=str(path), notes=notes, ports=())


def _entry(file: OnnxFile, size: Any) -> dict[str, Any]:
    """The record that fewbit left in the metadata of a file, with the size that its input has."""
    where = f"{file.path}, metadata entry {ENTRY}"
    try:
        record = read_entry(file.metadata)
    except (ValueError, RecursionError) as error:
        raise BadModel(
            f"{where} is no record of preprocessing ({error}); remove it, and say how images are made: --mean, --std, ..."
        ) from error
    record.pop("size", None)
    return checked({**record, "input_size": size} if record else {}, where)


def _from_file(ref: str, asked: _Asked) -> Loaded:
    """A module that a Python file makes; the demos are such files."""
    path, python, function = from_python(DEMOS[ref].spec if ref in DEMOS else ref, "MODEL")
    made = getattr(python, function)
    try:
        net = made if isinstance(made, nn.Module) else made()
    except FewbitError:
        raise
    except (Exception, SystemExit) as error:
        raise BadModel(
            f"{function}() of {path} failed: {reason(error)} Mend it; it has to return a torch.nn.Module."
        ) from error
    if not isinstance(net, nn.Module):
        raise BadModel(f"{function}() of {path} returned {type(net).__name__}; a torch.nn.Module is needed.")
    net = unwrapped(net)
    constants = {field: getattr(python, constant) for field, constant in CONSTANTS.items() if hasattr(python, constant)}
    record: dict[str, Any] = timm_record(net)
    if "input_size" in constants:  # the file's own record: the whole image, bicubic, no crop
        unsaid = () if ref in DEMOS else tuple(name for name in WHOLE if name not in constants)
        record = {**WHOLE, "antialias": False, "assumed": unsaid}
    return _from_module(net, ref, {**record, **checked(constants, str(path), CONSTANTS)}, asked)


def _from_hf(ref: str, asked: _Asked) -> Loaded:
    net, record, notes = hugging_face(ref)
    size = asked.overrides.get("input_size")
    if size is not None and tuple(size) != record["input_size"]:
        raise BadModel(
            f"the image processor of {ref} gives {record['input_size']}; change its preprocessor_config.json instead."
        )
    return _from_module(net, ref, checked(record, ref), replace(asked, overrides={}), notes)


def _from_name(ref: str, asked: _Asked) -> Loaded:
    if ref.startswith("torchvision:"):
        net, record, notes = torchvision_model(ref, asked.weights, asked.overrides.get("input_size"))
    else:
        net, record, notes = timm_model(ref, asked.weights, (*DEMOS, *KINDS), MODEL)
    return _from_module(net, ref, checked(record, ref), asked, notes)
