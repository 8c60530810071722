"""Models that cannot be quantized for what they are made of, said before any work: those that have been quantized already,
weights without numbers, programs with graphs inside of their graph, outputs without a row for each image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fewbit.core.inputs import Input
from fewbit.errors import BadModel, BadValues
from fewbit.load.ports import image_of, output_values, without_wrapper
from fewbit.load.regions import WITH_GRADIENTS, WITH_TYPES

PREPARED = ("FakeQuantizeBase", "ObserverBase")  # classes of torch.ao, by name: releases to come are without it
QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
SUMS = ("FloatFunctional", "FXFloatFunctional")  # live among them, and compute x + y, x * y, ... in float, without weights
STRIP = (  # takes fake quantizers and observers out of `model`; the weights that were trained with them stay
    "for m in model.modules(): m._modules.update({n: torch.nn.Identity() for n, c in m.named_children() "
    "if isinstance(c, (torch.ao.quantization.FakeQuantizeBase, torch.ao.quantization.ObserverBase))})"
)
SMALLEST = 1e-30  # a model whose weights are all smaller computes nothing
INSTEAD = {
    "cond": "Write torch.where(condition, a, b) of both results, or give each branch as a model of its own",
    "flex_attention": "Call torch.nn.functional.scaled_dot_product_attention, with what changes the scores as its attn_mask",
}


def refuse_quantized(module: nn.Module, ref: str) -> None:
    """Raise BadModel where a module, or a weight of it, has been quantized before."""
    for path, part in module.named_modules():
        kind = f"{type(part).__module__}.{type(part).__name__}"
        if kind.startswith(QUANTIZED) and type(part).__name__ not in SUMS:
            raise BadModel(
                f"{ref} has been quantized by torch.ao: {path or 'all of it'} is {kind}, whose weights are rounded and packed. "
                "Give the float model that it was made from."
            )
        if any(one.__name__ in PREPARED and one.__module__.startswith("torch.ao.") for one in type(part).__mro__):
            raise BadModel(
                f"{ref} has been prepared by torch.ao: {path} is {type(part).__name__}, which rounds or observes what passes. "
                f"The float weights are there: take such modules out, and give the model then: {STRIP}"
            )
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if is_traceable_wrapper_subclass(value) or value.is_quantized:
            kind = f"{type(value).__module__.partition('.')[0]}'s {type(value).__name__}"
            raise BadModel(
                f"{ref} has been quantized, or spread over devices: weight {name} is {kind} and no plain tensor of floats. "
                "Give the float model that it was made from."
            )


def groups_of_images(program: ExportedProgram) -> bool:
    """Whether a convolution has groups for each image of a batch, which files with any batch cannot say."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and "groups" in (names := [one.name for one in schema.arguments]):
            place = names.index("groups")
            if isinstance(node.args[place] if place < len(node.args) else node.kwargs.get("groups"), Node):
                return True
    return False


def refuse_parts(program: ExportedProgram, ref: str) -> None:
    """Raise BadModel that names an operator that neither files nor the executor take: one with graphs of its own, or one that
    draws zeros and ones, though all be ones.
    """
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            if "bernoulli" in str(node.target):
                raise BadModel(
                    f"{ref}: {node.name} is torch's bernoulli, which draws at random; a runtime draws other numbers. Leave it "
                    "out in eval mode: if self.training: ..."
                )
            if not isinstance(node.target, HigherOrderOperator) or node.target in (WITH_GRADIENTS, WITH_TYPES):
                continue
            name = node.target.name()
            do = INSTEAD.get(name, "Write it with plain operators, a loop in Python for instance")
            raise BadModel(f"{ref}: {node.name} is torch's {name}, which has graphs of its own, and is not quantized. {do}.")


def refuse_outputs(program: ExportedProgram, inputs: Sequence[Input], ref: str) -> None:
    """Raise BadModel where an output has no batch or no numbers."""
    batch, outputs = str(image_of(program, inputs).shape[0]), output_values(program)
    right = [name for name, value in outputs.items() if shown_shape(value)[:1] == [batch]]
    for name, value in outputs.items():
        shape = shown_shape(value)
        if name not in right:
            shown = ", ".join(n if batch.isdecimal() else n.replace(batch, "batch") for n in shape)
            raise BadModel(
                f"{ref} gives {name} of shape ({shown}); its first dimension has to be the batch, one row per image. "
                f"{_about_rows(ref, inputs, name, right, shape, batch, alone=len(outputs) == 1)}"
            )
        if value.is_complex():
            raise BadModel(f"{ref} gives {name} in complex numbers; ONNX has none: write torch.view_as_real of it.")
        if "0" in shape:
            raise BadModel(
                f"{ref} gives {name} of shape (batch, {', '.join(shape[1:])}), without a number; does it have 0 classes?"
            )


def shown_shape(value: Tensor) -> list[str]:
    """The shape of a fake tensor as text: comparing symbols would guard on them."""
    return [str(n) for n in value.shape]


def _about_rows(
    ref: str, inputs: Sequence[Input], name: str, right: Sequence[str], shape: Sequence[str], batch: str, *, alone: bool
) -> str:  # fmt: skip
    """What to do about an output of this shape without a row for each image, where the outputs `right` have one; `alone` says
    that there is no other.
    """
    if batch in shape:
        place = shape.index(batch)
        turn = "transpose(0, 1)" if place == 1 else f"movedim({place}, 0)"
        rows = f"with the batch in front: {name}.{turn}"
        if alone and name == "output" and not ref.endswith(".onnx"):
            rows += f"; without a change to its code: model.register_forward_hook(lambda module, args, out: out.{turn})"
    elif not shape:
        rows = f"with a row for each image: {name}.mean(dim=(1, 2, 3)), say; or, where it is of one image, {name}[None]"
    else:
        rows = f"with a row for each image; where it is of one image, {name}[None]"
    if not ref.endswith(".onnx"):
        return f"Return it {rows}{', or leave it out of what the model returns' if right else ''}."
    takes = [one.name for one in inputs]
    left = (
        f"Leave it out: onnx.utils.extract_model('{ref}', 'rows.onnx', {takes}, {[*right]}), or export " if right else "Export "
    )
    return f"{left}the model {rows}."


def refuse_unloaded(parameters: Mapping[str, Tensor], buffers: Mapping[str, Any], ref: str) -> None:
    """Raise BadModel where a weight has no numbers yet, and BadValues where parameters are all zero."""
    for name, tensor in {**buffers, **parameters}.items():
        if isinstance(tensor, Tensor) and (is_lazy(tensor) or tensor.is_meta):
            raise BadModel(f"weight {name} of {ref} has no numbers yet (a lazy layer, or device meta); give it loaded.")
    largest = [float(p.detach().abs().max()) for p in parameters.values() if p.is_floating_point() and p.numel()]
    if largest and max(largest) < SMALLEST:
        raise BadValues(f"every weight of {ref} is zero or below {SMALLEST:g}: have its weights been loaded?")


def refuse_infinite(parameters: Mapping[str, Tensor], buffers: Mapping[str, Any], ref: str) -> None:
    """Raise BadValues where a parameter is not finite, or a buffer is NaN (a mask may be infinite)."""
    for name, tensor in {**buffers, **parameters}.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        wrong = ~torch.isfinite(tensor.detach()) if name in parameters else torch.isnan(tensor)
        if count := int(wrong.sum()):
            raise BadValues(
                f"weight {name} of {ref} holds NaN or infinite values ({count:,} of {tensor.numel():,}); only finite weights "
                "can be quantized. Give a checkpoint from before they became so."
            )


def refuse_infinite_read(program: ExportedProgram, ref: str) -> None:
    """The same for what nodes of a program read: what none reads may hold anything."""
    said, stored = program.graph_signature, {**program.state_dict, **program.constants}
    names = {**said.inputs_to_parameters, **said.inputs_to_buffers, **said.inputs_to_lifted_tensor_constants}
    read = [names[node.name] for node in program.graph.find_nodes(op="placeholder") if node.users and node.name in names]
    values = {without_wrapper(name): stored[name] for name in read if name in stored}
    parameters = {without_wrapper(name) for name in said.parameters}
    refuse_infinite({name: value for name, value in values.items() if name in parameters}, values, ref)
