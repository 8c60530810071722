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

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from fewbit.capture.archive import read_program
from fewbit.capture.checkpoint import SUFFIXES, refuse_file, unwrapped
from fewbit.capture.export import (
    ADVICE,
    as_alone,
    batch_of,
    graph_module,
    image_of,
    input_values,
    output_values,
    outputs_of,
    reason,
    refuse_random,
    renamed,
    unwarned,
)
from fewbit.capture.huggingface import hugging_face
from fewbit.capture.inputs import Arguments, Given, of_module, of_ports
from fewbit.capture.named import timm_model, timm_record, torchvision_model
from fewbit.capture.purpose import purpose
from fewbit.capture.python_file import from_python
from fewbit.capture.record import CONSTANTS, WHOLE, beside, checked
from fewbit.capture.refused import groups_of_images, refuse_parts, refuse_quantized
from fewbit.capture.repeats import fewer_digits, without_autocast
from fewbit.capture.sizes import OTHERS, Sizes, about_sizes, by_guards, exported, free_sizes, size_of, with_other_sizes
from fewbit.capture.torchscript import as_onnx, is_torchscript, refuse_others
from fewbit.core.inputs import Input, flat, image_among
from fewbit.core.record import ENTRY, read_entry
from fewbit.core.values import Output, Port, Tail
from fewbit.demo import DEMOS
from fewbit.errors import BadFile, BadModel, BadValues, FewbitError
from fewbit.onnx_reader import OnnxFile, read_onnx

FILES = "path.onnx, path.pt2, TorchScript (path.pt) or file.py:function"
MODEL_NAMES = f"{', '.join(DEMOS)}, a timm name, torchvision:NAME, hf:NAME, {FILES}"
MODEL = f"MODEL is {MODEL_NAMES}."
KINDS = ("torchvision:NAME", "hf:NAME", "path.onnx", "path.pt2", "file.py:function")  # what names other than timm's look like
ALONE = Given()  # the image is all that a model takes
SMALLEST = 1e-30  # a model whose weights are all smaller computes nothing


@dataclass(frozen=True)
class Loaded:
    """A model and its record: `ref` is how it was named, `record` has input_size, mean, std, the rest of its data config.

    `inputs` are in the order of the program. `notes` are sentences about the model that its user has to know; `assumed` in the
    record names fields that nobody gave. `metadata` is what an ONNX file says besides, `ports` are its inputs and outputs;
    `batch` is written in the model or in that file (None: in neither), and `tail` stands behind it there.
    """

    ref: str
    program: ExportedProgram
    record: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    batch: int | None = None
    ports: tuple[Port, ...] = ()
    inputs: tuple[Input, ...] = ()
    tail: Tail | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return tuple(self.record["input_size"])

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The tensors that the model returns."""
        return outputs_of(self.program)


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
    loaded = _loaded(ref, weights, overrides, requantize, given, sizes)
    if sizes is Sizes.ANY and not any(one.others for one in loaded.inputs):
        raise of_one_size(loaded)
    return loaded


def of_one_size(loaded: Loaded) -> BadModel:
    """The error where images of any size were wished for, and the model takes one alone."""
    size = " x ".join(map(str, image_among(loaded.inputs).shape[1:]))
    return BadModel(f"{loaded.ref} takes images of {size} alone: others {OTHERS}. Leave --dynamic-size out.")


def _loaded(
    ref: str | nn.Module | ExportedProgram, weights: Path | None, overrides: Mapping[str, Any] | None, requantize: bool,
    given: Given, sizes: Sizes,
) -> Loaded:  # fmt: skip
    free = sizes.of_module
    if isinstance(ref, ExportedProgram):
        return _from_program(ref, "exported program", overrides, given, sizes)
    if isinstance(ref, nn.Module):
        net = unwrapped(ref)
        return _from_module(net, type(net).__name__, overrides, given, free=free)
    if not isinstance(ref, str):
        raise BadModel(
            f"a model of type {type(ref).__name__} was given; give a torch.nn.Module, an ExportedProgram or a name. {MODEL}"
        )
    if ref in DEMOS:
        return _from_file(DEMOS[ref].spec, overrides, given, ref=ref, free=free)
    if ref.endswith(".pt2"):
        return _from_pt2(Path(ref), overrides, given, sizes)
    if ref.endswith(".onnx"):
        return _from_onnx(Path(ref), overrides, given, requantize, sizes)
    if re.search(r"\.py(:[^:]*)?$", ref):
        return _from_file(ref, overrides, given, ref=ref, free=free)
    if ref.startswith("hf:"):
        return _from_hf(ref, overrides, given, free)
    if ref.endswith(SUFFIXES):
        if is_torchscript(Path(ref)):
            return _from_torchscript(Path(ref), overrides, given, sizes)
        refuse_file(Path(ref))
    return _from_name(ref, weights, overrides, given, free)


def is_architecture(ref: str) -> bool:
    """Whether a name is one of timm's or torchvision's, which take weights from a file."""
    return not (
        ref in DEMOS or ref.endswith((".pt2", ".onnx", *SUFFIXES)) or re.search(r"\.py(:[^:]*)?$", ref) or ref.startswith("hf:")
    )


def _from_module(
    module: nn.Module,
    ref: str,
    overrides: Mapping[str, Any] | None,
    given: Given,
    record: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    called: tuple[tuple[Input, ...], Arguments] | None = None,
    batches: tuple[int | None, ...] = (None, 1),
    free: tuple[int, ...] = (),
) -> Loaded:
    """`called`: its inputs and arguments, where they are known already; `free`: the sizes that are to stay free."""
    fields = {**(timm_record(module) if record is None else record), **(overrides or {})}
    if "input_size" not in fields:
        raise BadModel(f"{ref} does not say its input size. Give it: --input-size 3,224,224 (input_size=(3, 224, 224)).")
    inputs, arguments = called or of_module(module, fields["input_size"], given, ref)
    refuse_quantized(module, ref)
    _check_values(ref, dict(module.named_parameters()), dict(module.named_buffers()))
    if any(t.device.type != "cpu" for t in _numbers(module)):
        module = copy.deepcopy(module).cpu()
    other = {str(t.dtype).removeprefix("torch.") for t in _numbers(module) if t.dtype != torch.float32}
    if other:
        module = copy.deepcopy(module).float()
        notes = (*notes, f"{ref} has weights in {' and '.join(sorted(other))}; it is computed in float32.")
    classes = tuple(fields.pop("classes", ()))
    if said := purpose(module):
        fields.setdefault("task", said)
    with without_autocast() as asked:
        try:
            program, inputs = exported(module, inputs, arguments, batches, free)
        except BadModel as error:
            if better := _about_numbers(error, inputs):
                raise better from error
            raise
        one_row = any(_sizes(value)[:1] == ["1"] for value in output_values(program).values())  # of an output, always
        of_one = one_row or groups_of_images(program)
        if batch_of(program, inputs) is None and (of_one or not as_alone(module, program, inputs, arguments)):
            program, inputs = exported(module, inputs, arguments, (1,), free)
        refuse_parts(program, ref)
        _check_outputs(ref, program, inputs)
        if not refuse_random(program, inputs, ref):
            program, inputs = exported(module, inputs, arguments, (1,), free)
        if batch_of(program, inputs) == 1 and not as_alone(module, program, inputs, arguments):
            raise BadModel(f"{ref} gives other outputs for one image than its exported program. {ADVICE}")
    about = (*_about_types(ref, asked), *_about_names(ref, program), *_about_batch(ref, program, inputs))
    notes = (*notes, *about, *about_sizes(ref, inputs, free))
    return Loaded(ref, program, fields, classes, notes, batch=batch_of(program, inputs), inputs=inputs)


def _about_numbers(error: BadModel, inputs: Sequence[Input]) -> BadModel | None:
    """The error of a model that cannot be run, with what may be wrong with inputs that are given one number."""
    names = [one.name for one in inputs if one.value is not None and not one.has_batch and not one.shape]
    if not names or "cannot be exported" not in str(error):
        return None
    number = f"--input {names[0]}=[NUMBER] (in Python inputs={{'{names[0]}': [NUMBER]}})"
    return BadModel(
        f"{error} Input {' and '.join(names)} is given a number without a batch; give one for each image: {number}."
    )


def _about_types(ref: str, asked: Sequence[str]) -> tuple[str, ...]:
    """A sentence about `torch.autocast` in a model, which asks for these types."""
    kinds = " and ".join(sorted({one.removeprefix("torch.") for one in asked}))
    return (f"{ref} has parts under torch.autocast in {kinds}; it is computed in float32.",) if asked else ()


def _about_names(ref: str, program: ExportedProgram) -> tuple[str, ...]:
    """A sentence about outputs that cannot keep their names."""
    said = (f"'{name}' of {ref} is '{other}' in the files that come out" for name, other in renamed(program).items())
    return tuple(f"output {one}: an input has that name, and a file has each name once." for one in said)


def _about_batch(ref: str, program: ExportedProgram, inputs: Sequence[Input]) -> tuple[str, ...]:
    """A sentence about a batch that is written in a model."""
    batch = batch_of(program, inputs)
    if batch is None:
        return ()
    many = "one image" if batch == 1 else f"{batch} images"
    return (f"{ref} takes {many} at a time and no other batch: it is written in the model, and so in the files that come out.",)


def _numbers(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers that are floating-point."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            yield tensor


def _from_program(
    program: ExportedProgram, ref: str, overrides: Mapping[str, Any] | None, given: Given, sizes: Sizes
) -> Loaded:  # fmt: skip
    values = input_values(program)
    if other := [name for name, value in values.items() if not isinstance(value, Tensor)]:
        raise BadModel(f"{ref} takes {', '.join(other)}, which is no tensor; export it with a fixed number there.")
    known = {*given.constants, *flat(given.each)}
    maps = {name: value for name, value in values.items() if value.ndim == 4 and value.is_floating_point()}
    batch = next((str(maps[name].shape[0]) for name in sorted(maps, key=known.__contains__)), "batch")  # of the image, if any
    inputs = of_ports([_port(name, value, batch) for name, value in values.items()], given, ref)
    image = values[image_among(inputs).name]
    parameters = {name: program.state_dict[name] for name in program.graph_signature.parameters}
    _check_values(ref, parameters, {**program.state_dict, **program.constants})
    refuse_parts(program, ref)
    kinds = {str(t.dtype).removeprefix("torch.") for t in (image, *parameters.values())} - {"float32"}
    if kinds:
        raise BadModel(f"{ref} was exported in {' and '.join(sorted(kinds))}; export it in float32: model.float().")
    shape, free = size_of(image, (overrides or {}).get("input_size"), ref), free_sizes(image)
    inputs = tuple(replace(one, shape=shape) if one.is_image else one for one in inputs)
    if sizes.of(free):
        inputs = with_other_sizes(by_guards(program, inputs), program, inputs) or inputs
    _check_outputs(ref, program, inputs)
    if not refuse_random(program, inputs, ref):
        raise BadModel(
            f"{ref} gives one image alone other outputs than in a batch of two: they depend on how many images there are. "
            "Export it for one image."
        )
    record = {**(overrides or {}), "input_size": shape}
    said = (*_about_types(ref, fewer_digits(program)), *_about_names(ref, program), *_about_batch(ref, program, inputs))
    notes = (*said, *about_sizes(ref, inputs, free))
    classes = tuple(record.pop("classes", ()))
    return Loaded(ref, program, record, classes, notes, batch=batch_of(program, inputs), inputs=inputs)


def _port(name: str, value: Tensor, batch: str) -> Input:
    """An input of a program, without a value; `batch` is what its batch is called."""
    has_batch = value.ndim > 0 and str(value.shape[0]) == batch
    sizes = value.shape[1:] if has_batch else value.shape
    return Input(name, tuple(n if isinstance(n, int) else -1 for n in sizes), value.dtype, has_batch)


def _check_outputs(ref: str, program: ExportedProgram, inputs: Sequence[Input]) -> None:
    """Raise BadModel where an output has no batch or no numbers."""
    batch, outputs = str(image_of(program, inputs).shape[0]), output_values(program)
    right = [name for name, value in outputs.items() if _sizes(value)[:1] == [batch]]
    for name, value in outputs.items():
        shape = _sizes(value)
        if name not in right:
            shown = ", ".join(n if batch.isdecimal() else n.replace(batch, "batch") for n in shape)
            raise BadModel(
                f"{ref} gives {name} of shape ({shown}); its first dimension has to be the batch, one row per image. "
                f"{_about_rows(ref, inputs, name, right)}"
            )
        if value.is_complex():
            raise BadModel(f"{ref} gives {name} in complex numbers; ONNX has none: write torch.view_as_real of it.")
        if "0" in shape:
            raise BadModel(f"{ref} gives {name} of shape (batch, {', '.join(shape[1:])}), without a number; has it 0 classes?")


def _sizes(value: Tensor) -> list[str]:
    """The shape of a fake tensor as text: comparing symbols would guard on them."""
    return [str(n) for n in value.shape]


def _about_rows(ref: str, inputs: Sequence[Input], name: str, right: Sequence[str]) -> str:
    """What to do about an output without a row for each image, where the outputs `right` have one."""
    rows = f"with a row for each image: {name}.mean(dim=(1, 2, 3)), say; or, where it is of one image, {name}[None]"
    if not ref.endswith(".onnx"):
        return f"Return it {rows}{', or leave it out of what the model returns' if right else ''}."
    takes = [one.name for one in inputs]
    left = (
        f"Leave it out: onnx.utils.extract_model('{ref}', 'rows.onnx', {takes}, {[*right]}), or export " if right else "Export "
    )
    return f"{left}the model {rows}."


def _check_values(ref: str, parameters: Mapping[str, Tensor], buffers: Mapping[str, Any]) -> None:
    """Parameters are finite and not all zero, buffers are no NaN; a mask may be infinite."""
    for name, tensor in {**buffers, **parameters}.items():
        if isinstance(tensor, Tensor) and (is_lazy(tensor) or tensor.is_meta):
            raise BadModel(f"weight {name} of {ref} has no numbers yet (a lazy layer, or device meta); give it loaded.")
    largest = [float(p.detach().abs().max()) for p in parameters.values() if p.is_floating_point() and p.numel()]
    if largest and max(largest) < SMALLEST:
        raise BadValues(f"every weight of {ref} is zero or below {SMALLEST:g}: have its weights been loaded?")
    for name, tensor in {**buffers, **parameters}.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if bool(torch.isnan(tensor).any()) or (name in parameters and bool(torch.isinf(tensor).any())):
            raise BadValues(
                f"weight {name} of {ref} holds NaN or infinite values; only finite weights can be quantized. Mend it."
            )


def _from_pt2(path: Path, overrides: Mapping[str, Any] | None, given: Given, sizes: Sizes) -> Loaded:
    if not os.path.isfile(path):
        raise BadFile(f"{path} does not exist. {MODEL}")
    program = read_program(path)
    sidecar = path.with_suffix(".json")
    fields = beside(sidecar)
    size = fields.pop("input_size", None)
    loaded = _from_program(program, str(path), {**fields, **(overrides or {})}, given, sizes)
    if size not in (None, loaded.input_shape):
        raise BadModel(f"{sidecar} has input_size {size}, {path} was exported for {loaded.input_shape}; mend or remove it.")
    checked({**fields, "input_size": loaded.input_shape}, str(sidecar))
    return loaded


def _from_onnx(
    path: Path, overrides: Mapping[str, Any] | None, given: Given, requantize: bool, sizes: Sizes
) -> Loaded:  # fmt: skip
    file = read_onnx(path, {*given.constants, *flat(given.each)}, each=given.brought, requantize=requantize)
    notes = (f"{path} was quantized before; its weights keep the rounding that they have.",) if requantize else ()
    size = file.input_size((overrides or {}).get("input_size"))
    inputs = of_ports(
        [replace(one, shape=size) if one.name == file.image.name else one for one in file.inputs], given, str(path)
    )
    halves = {port.name for port in file.takes if port.type == TensorProto.FLOAT16}  # what the file itself can hold
    inputs = tuple(
        one if one.value is None or one.name not in halves else replace(one, value=one.value.half().float()) for one in inputs
    )
    any_batch, called = file.look(inputs), (inputs, Arguments(tuple(one.name for one in inputs)))
    fields, batches = {**(overrides or {}), "input_size": size}, (None, file.batch or 1) if any_batch else (file.batch,)
    record, notes = _entry(file, size), (*file.notes, *notes)
    if sizes is Sizes.ONE:
        notes = (*notes, *about_sizes(str(path), inputs, file.free))
    loaded = _from_module(file.module, str(path), fields, given, record, notes, called, batches, sizes.of(file.free))
    return replace(loaded, metadata=file.metadata, batch=loaded.batch or file.batch, ports=file.ports, tail=file.tail)


def _from_torchscript(path: Path, overrides: Mapping[str, Any] | None, given: Given, sizes: Sizes) -> Loaded:
    """TorchScript by way of an ONNX file, with what a .json beside it says."""
    fields = {**beside(path.with_suffix(".json")), **(overrides or {})}
    if "input_size" not in fields:
        raise BadModel(f"{path} does not say its input size. Give it: --input-size 3,224,224 (input_size=(3, 224, 224)).")
    size = fields["input_size"]
    with as_onnx(path, size) as (written, script, batch):
        try:
            loaded = _from_onnx(written, fields, given, False, sizes)
        except (BadFile, BadModel) as error:
            raise type(error)(str(error).replace(str(written), str(path))) from error
        refuse_others(path, script, graph_module(loaded.program), batch, size)
        notes = tuple(note.replace(str(written), str(path)) for note in loaded.notes)
    checked(fields, str(path.with_suffix(".json")))
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


def _from_file(spec: str, overrides: Mapping[str, Any] | None, given: Given, *, ref: str, free: tuple[int, ...]) -> Loaded:
    path, python, function = from_python(spec, "MODEL")
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
    return _from_module(net, ref, overrides, given, {**record, **checked(constants, str(path), CONSTANTS)}, free=free)


def _from_hf(ref: str, overrides: Mapping[str, Any] | None, given: Given, free: tuple[int, ...]) -> Loaded:
    net, record, notes = hugging_face(ref)
    size = (overrides or {}).get("input_size")
    if size is not None and tuple(size) != record["input_size"]:
        raise BadModel(
            f"the image processor of {ref} gives {record['input_size']}; change its preprocessor_config.json instead."
        )
    return _from_module(net, ref, None, given, checked(record, ref), notes, free=free)


def _from_name(
    ref: str, weights: Path | None, overrides: Mapping[str, Any] | None, given: Given, free: tuple[int, ...]
) -> Loaded:  # fmt: skip
    if ref.startswith("torchvision:"):
        net, record, notes = torchvision_model(ref, weights, (overrides or {}).get("input_size"))
    else:
        net, record, notes = timm_model(ref, weights, (*DEMOS, *KINDS), MODEL)
    return _from_module(net, ref, overrides, given, checked(record, ref), notes, free=free)
