"""A module or an exported program becomes a model that fewbit can work with, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fewbit.core.fx import is_write
from fewbit.core.graph import Port, Tail
from fewbit.core.inputs import Input, flat, image_among
from fewbit.core.task import Output
from fewbit.errors import BadModel
from fewbit.load.advice import about_inputs
from fewbit.load.contexts import outside_inference, tensors_kept
from fewbit.load.export import ADVICE
from fewbit.load.inputs import Arguments, Given, about_clips, of_module, of_ports
from fewbit.load.ports import batch_of, input_values, no_tensors, output_values, outputs_of, renamed, result_of
from fewbit.load.purpose import purpose
from fewbit.load.refused import (
    groups_of_images,
    refuse_infinite,
    refuse_infinite_read,
    refuse_outputs,
    refuse_parts,
    refuse_quantized,
    refuse_unloaded,
    shown_shape,
)
from fewbit.load.regions import fewer_digits, without_autocast
from fewbit.load.sizes import Sizes, about_sizes, by_guards, exported, free_sizes, size_of, with_other_sizes, without_size
from fewbit.load.trials import as_alone, left_out, refuse_random


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


def from_module(
    module: nn.Module,
    ref: str,
    record: Mapping[str, Any],
    given: Given,
    *,
    notes: tuple[str, ...] = (),
    called: tuple[tuple[Input, ...], Arguments] | None = None,
    batches: tuple[int | None, ...] = (None, 1),
    free: tuple[int, ...] = (),
) -> Loaded:
    """A module with its record; `ref` is how it was named. `called` are its inputs and arguments, where they are known already,
    `batches` those that it may be exported with, the first that can be (None: any), `free` the sizes that are to stay free.

    Raises BadModel or BadValues where it cannot be exported, or not be quantized.
    """
    fields = dict(record)
    if "input_size" not in fields:
        raise without_size(ref, about_clips(module))
    inputs, arguments = called or of_module(module, fields["input_size"], given, ref)
    refuse_quantized(module, ref)
    weights = dict(module.named_parameters()), dict(module.named_buffers())
    refuse_unloaded(*weights, ref)
    module, types = _in_float32(module)
    classes = tuple(fields.pop("classes", ()))
    if said := purpose(module):
        fields.setdefault("task", said)
    with without_autocast() as asked, outside_inference(module), tensors_kept(module):
        try:
            program, inputs = _program(module, ref, inputs, arguments, batches, free)
        except BadModel:
            refuse_infinite(*weights, ref)  # the outputs may be wrong for that
            raise
        refuse_infinite_read(program, ref)
        others = left_out(module, program, inputs, arguments) if called is None else {}  # a file gives tensors alone
    _with_own_buffers(program)
    _with_plain_strides(program)
    if types:
        notes = (*notes, f"{ref} has weights in {' and '.join(types)}; it is computed in float32.")
    about = (*_about_types(ref, asked), *_about_names(ref, program), *_about_others(ref, others))
    about = (*about, *_about_batch(ref, program, inputs))
    notes = (*notes, *about, *about_sizes(ref, inputs, free))
    return Loaded(ref, program, fields, classes, notes, batch=batch_of(program, inputs), inputs=inputs)


def _with_own_buffers(program: ExportedProgram) -> None:
    """Where a program writes into tensors, give it buffers of its own: those of the module that it was made from are the
    caller's.
    """
    if not any(map(is_write, program.graph.nodes)):
        return
    for tensors in (program.state_dict, program.constants):
        for name in program.graph_signature.buffers:
            if isinstance(value := tensors.get(name), Tensor):
                tensors[name] = value.clone()


def _with_plain_strides(program: ExportedProgram) -> None:
    """Lay tensors without numbers out as torch does: with numpy's strides of 0 torch.export.save stores none of them."""
    for tensors in (program.state_dict, program.constants):
        for name, value in tensors.items():
            if isinstance(value, Tensor) and not value.numel():
                plain = torch.empty(value.shape, dtype=value.dtype)
                tensors[name] = nn.Parameter(plain, requires_grad=False) if isinstance(value, nn.Parameter) else plain


def _in_float32(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module on the processor in float32, a copy where it is not, and the other types that its numbers have."""
    if any(t.device.type != "cpu" for t in _numbers(module)):
        module = copy.deepcopy(module).cpu()
    others = {str(t.dtype).removeprefix("torch.") for t in _numbers(module) if t.dtype != torch.float32}
    return (copy.deepcopy(module).float() if others else module), sorted(others)


def _program(
    module: nn.Module, ref: str, inputs: Sequence[Input], arguments: Arguments | None, batches: Sequence[int | None],
    free: Sequence[int],
) -> tuple[ExportedProgram, tuple[Input, ...]]:  # fmt: skip
    """The program of a module, for any number of images where it gives one image alone what the module gives; else for one."""

    def of_one() -> tuple[ExportedProgram, tuple[Input, ...]]:
        return exported(module, inputs, arguments, (1,), free)

    try:
        program, inputs = exported(module, inputs, arguments, batches, free)
    except BadModel as error:
        if better := about_inputs(error, module, inputs):
            raise better from error
        raise
    one_row = any(shown_shape(value)[:1] == ["1"] for value in output_values(program).values())  # of an output, always
    one_alone = one_row or groups_of_images(program)
    if batch_of(program, inputs) is None and (one_alone or not as_alone(module, program, inputs, arguments)):
        program, inputs = of_one()
    refuse_parts(program, ref)
    refuse_outputs(program, inputs, ref)
    if not refuse_random(program, inputs, ref):
        program, inputs = of_one()
    if batch_of(program, inputs) == 1 and not as_alone(module, program, inputs, arguments):
        raise BadModel(f"{ref} gives other outputs for one image than its exported program. {ADVICE}")
    return program, tuple(inputs)


def _about_types(ref: str, asked: Sequence[str]) -> tuple[str, ...]:
    """A sentence about `torch.autocast` in a model, which asks for these types."""
    kinds = " and ".join(sorted({one.removeprefix("torch.") for one in asked}))
    return (f"{ref} has parts under torch.autocast in {kinds}; it is computed in float32.",) if asked else ()


def _about_names(ref: str, program: ExportedProgram) -> tuple[str, ...]:
    """A sentence about outputs that cannot keep their names."""
    said = (f"'{name}' of {ref} is '{other}' in the files that come out" for name, other in renamed(program).items())
    return tuple(f"output {one}: an input has that name, and a file has each name once." for one in said)


def _about_others(ref: str, others: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence about what a model returns beside tensors."""
    said = ", ".join(f"{name or 'a result'} ({type(value).__name__})" for name, value in others.items())
    return (f"{ref} returns {said} beside its tensors: the files that come out give tensors alone.",) if others else ()


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


def from_program(program: ExportedProgram, ref: str, record: Mapping[str, Any], given: Given, sizes: Sizes) -> Loaded:
    """An exported program with its record; `ref` is how it was named.

    Raises BadModel or BadValues where it cannot be quantized.
    """
    values = input_values(program)
    if other := [name for name, value in values.items() if not isinstance(value, Tensor)]:
        raise BadModel(f"{ref} takes {', '.join(other)}, which is not a tensor; export it with a fixed number there.")
    known = {*given.constants, *flat(given.each)}
    maps = {name: value for name, value in values.items() if value.ndim == 4 and value.is_floating_point()}
    batch = next((str(maps[name].shape[0]) for name in sorted(maps, key=known.__contains__)), "batch")  # of the image, if any
    inputs = of_ports([_port(name, value, batch) for name, value in values.items()], given, ref)
    image = values[image_among(inputs).name]
    parameters = {name: program.state_dict[name] for name in program.graph_signature.parameters}
    refuse_unloaded(parameters, {**program.state_dict, **program.constants}, ref)
    refuse_infinite_read(program, ref)
    _with_plain_strides(program)
    refuse_parts(program, ref)
    kinds = {str(t.dtype).removeprefix("torch.") for t in (image, *parameters.values())} - {"float32"}
    if kinds:
        raise BadModel(f"{ref} was exported in {' and '.join(sorted(kinds))}; export it in float32: model.float().")
    shape, free = size_of(image, record.get("input_size"), ref), free_sizes(image)
    inputs = tuple(replace(one, shape=shape) if one.is_image else one for one in inputs)
    if sizes.of(free):
        inputs = with_other_sizes(by_guards(program, inputs), program, inputs) or inputs
    refuse_outputs(program, inputs, ref)
    if not refuse_random(program, inputs, ref):
        raise BadModel(
            f"{ref} gives one image alone other outputs than in a batch of two: they depend on how many images there are. "
            "Export it for one image."
        )
    fields = {**record, "input_size": shape}
    said = (*_about_types(ref, fewer_digits(program)), *_about_names(ref, program))
    others = no_tensors(result_of(program))
    notes = (*said, *_about_others(ref, others), *_about_batch(ref, program, inputs), *about_sizes(ref, inputs, free))
    classes = tuple(fields.pop("classes", ()))
    return Loaded(ref, program, fields, classes, notes, batch=batch_of(program, inputs), inputs=inputs)


def _port(name: str, value: Tensor, batch: str) -> Input:
    """An input of a program, without a value; `batch` is what its batch is called."""
    has_batch = value.ndim > 0 and str(value.shape[0]) == batch
    sizes = value.shape[1:] if has_batch else value.shape
    return Input(name, tuple(n if isinstance(n, int) else -1 for n in sizes), value.dtype, has_batch)
