"""Models that cannot be quantized for what they are made of, said before any work: those that have been quantized already, and
programs with graphs inside of their graph.
"""

from __future__ import annotations

from torch import nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fewbit.capture.repeats import WITH_GRADIENTS, WITH_TYPES
from fewbit.errors import BadModel

PREPARED = ("FakeQuantizeBase", "ObserverBase")  # classes of torch.ao, by name: releases to come are without it
QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.quantizable")
STRIP = (  # takes fake quantizers and observers out of `model`; the weights that were trained with them stay
    "for m in model.modules(): m._modules.update({n: torch.nn.Identity() for n, c in m.named_children() "
    "if isinstance(c, (torch.ao.quantization.FakeQuantizeBase, torch.ao.quantization.ObserverBase))})"
)
INSTEAD = {
    "cond": "Write torch.where(condition, a, b) of both results, or give each branch as a model of its own",
    "flex_attention": "Call torch.nn.functional.scaled_dot_product_attention, with what changes the scores as its attn_mask",
}


def refuse_quantized(module: nn.Module, ref: str) -> None:
    """Raise BadModel where a module, or a weight of it, has been quantized before."""
    for path, part in module.named_modules():
        kind = f"{type(part).__module__}.{type(part).__name__}"
        if kind.startswith(QUANTIZED):
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
