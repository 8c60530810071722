"""Loading a model that a user names: each form of name (models.py) has its reader, and what can be said of it before."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx import TensorProto
from torch import nn
from torch.export import ExportedProgram

from fewbit.core.inputs import Input, flat
from fewbit.core.record import ENTRY, read_entry
from fewbit.demo import DEMOS
from fewbit.errors import BadFile, BadModel, FewbitError, reason
from fewbit.load.archive import read_program
from fewbit.load.checkpoint import refuse_file, unwrapped
from fewbit.load.contexts import unwarned
from fewbit.load.huggingface import hugging_face, parts_of
from fewbit.load.inputs import Arguments, Given, of_module, of_ports
from fewbit.load.loaded import Loaded, from_module, from_program
from fewbit.load.named import timm_model, timm_name, timm_record, torchvision_model, torchvision_name
from fewbit.load.program import graph_module
from fewbit.load.python_file import from_python
from fewbit.load.record import CONSTANTS, WHOLE, beside, checked
from fewbit.load.sizes import Sizes, about_sizes, of_one_size, without_size
from fewbit.load.torchscript import as_onnx, is_torchscript, refuse_others
from fewbit.models import (
    DEMO,
    FUNCTION,
    HUGGING_FACE,
    MODEL,
    ONNX,
    OTHERS,
    PROGRAM,
    PYTHON,
    TIMM,
    TORCHSCRIPT,
    TORCHVISION,
    Form,
    form_of,
)
from fewbit.onnx_reader import OnnxFile, read_onnx

ALONE = Given()  # the image is all that a model takes


@dataclass(frozen=True)
class _Asked:
    """What the caller of `load_model` says of a model."""

    weights: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    requantize: bool = False
    given: Given = ALONE
    sizes: Sizes = Sizes.WRITTEN


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
    return READERS[form_of(ref)].read(ref, asked)


def look_up(ref: str) -> None:
    """Raise BadFile for a file that does not exist or is not a model, UnknownName or BadModel for a name that no library knows
    or a function that a Python file, which is imported, does not have: what can be said of a model before it is loaded.
    """
    READERS[form_of(ref)].look_up(ref)


def _from_module(
    net: nn.Module, ref: str, record: Mapping[str, Any], asked: _Asked, notes: tuple[str, ...] = ()
) -> Loaded:  # fmt: skip
    return from_module(net, ref, {**record, **asked.overrides}, asked.given, notes=notes, free=asked.sizes.of_module)


def _from_pt2(ref: str, asked: _Asked) -> Loaded:
    _exists(ref)
    path = Path(ref)
    program = read_program(path)
    sidecar = path.with_suffix(".json")
    fields = beside(sidecar)
    size = fields.pop("input_size", None)
    loaded = from_program(program, str(path), {**fields, **asked.overrides}, asked.given, asked.sizes)
    if size not in (None, loaded.input_shape):
        raise BadModel(f"{sidecar} has input_size {size}, {path} was exported for {loaded.input_shape}; fix or remove it.")
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
    record, batches = {**_entry(file, size), **asked.overrides, "input_size": size}, (file.batch or 1,)
    notes = (*file.notes, *notes, *(about_sizes(str(path), inputs, file.free) if asked.sizes is Sizes.ONE else ()))
    loaded = from_module(
        file.module, str(path), record, given, notes=notes, called=called,
        batches=(None, file.batch or 1) if any_batch else batches, free=asked.sizes.of(file.free),
    )  # fmt: skip
    return replace(loaded, metadata=file.metadata, batch=loaded.batch or file.batch, ports=file.ports, tail=file.tail)


def _from_torchscript(ref: str, asked: _Asked) -> Loaded:
    """TorchScript by way of an ONNX file, with what a .json beside it says."""
    _is_script(ref)
    path = Path(ref)
    sidecar = path.with_suffix(".json")
    fields = {**beside(sidecar), **asked.overrides}
    if "input_size" not in fields:
        raise without_size(ref)
    size = fields["input_size"]
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
            f"{where} is not a record of preprocessing ({error}); remove it, and say how images are made: --mean, --std, ..."
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
        raise BadModel(f"{function}() of {path} failed: {reason(error)} Fix it; it has to return a torch.nn.Module.") from error
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
    found = hugging_face(ref, asked.given, asked.overrides)
    record = checked(found.record, ref)
    inputs, arguments = of_module(found.net, record["input_size"], asked.given, ref)
    given = tuple(_as_given(one) if one.name in found.shared else one for one in inputs)
    called = (given, arguments) if found.shared and arguments else None
    return from_module(
        found.net, ref, record, asked.given, notes=found.notes, called=called, free=asked.sizes.of_module,
    )  # fmt: skip


def _as_given(one: Input) -> Input:
    """A constant that is the same tensor for any number of images."""
    assert one.value is not None
    return replace(one, shape=tuple(one.value.shape), has_batch=False)


def _from_torchvision(ref: str, asked: _Asked) -> Loaded:
    net, record, notes = torchvision_model(ref, asked.weights, asked.overrides.get("input_size"))
    return _from_module(net, ref, checked(record, ref), asked, notes)


def _from_timm(ref: str, asked: _Asked) -> Loaded:
    net, record, notes = timm_model(ref, asked.weights, OTHERS, MODEL)
    return _from_module(net, ref, checked(record, ref), asked, notes)


def _exists(ref: str) -> None:
    """Of a file, or file.py:function. Raises BadFile."""
    if not os.path.isfile(file := PYTHON.sub(".py", ref)):
        raise BadFile(f"{file} does not exist. {MODEL}")


def _is_script(ref: str) -> None:
    """Raises BadFile or BadModel for a file that is none, and for weights alone."""
    if not is_torchscript(Path(ref)):
        refuse_file(Path(ref))


@dataclass(frozen=True)
class _Reader:
    """What makes a model of a name of one form, and what looks the name up before."""

    read: Callable[[str, _Asked], Loaded]
    look_up: Callable[[str], object] = lambda ref: None


READERS: Mapping[Form, _Reader] = {
    DEMO: _Reader(_from_file),
    TIMM: _Reader(_from_timm, lambda ref: timm_name(ref, OTHERS, MODEL)),
    TORCHVISION: _Reader(_from_torchvision, torchvision_name),
    HUGGING_FACE: _Reader(_from_hf, parts_of),
    ONNX: _Reader(lambda ref, asked: _from_onnx(Path(ref), asked), _exists),
    PROGRAM: _Reader(_from_pt2, _exists),
    TORCHSCRIPT: _Reader(_from_torchscript, _is_script),
    FUNCTION: _Reader(_from_file, lambda ref: from_python(ref, "MODEL")),
}
