"""torch.export, with a dynamic batch where there can be one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from fewbit.core.inputs import Input, image_among
from fewbit.errors import BadModel, place, reason, stopped
from fewbit.load.contexts import evaluating, quiet
from fewbit.load.inputs import IMAGES, Arguments, about_clips, about_image
from fewbit.load.ports import NamedPorts, key_of, named_tensors
from fewbit.load.trials import noise_of, same_again, tensors_of

ADVICE = "Check --input-size, or make the model exportable: torch.export.export(model, (x,)) must work."
CHOOSES = (
    "It chooses boxes, masks or parts by their values, which no fixed graph does. Give what stands before that, such as the "
    "backbone with its heads, as a module of its own: file.py:function."
)


def export(
    module: nn.Module,
    inputs: Sequence[Input],
    arguments: Arguments | None = None,
    batches: Sequence[int | None] = (None, 1),
    free: Sequence[int] = (),
) -> ExportedProgram:
    """The exported program of a module with these inputs, and with the first of `batches` that it can be exported with; None is
    a dynamic one. `arguments` say how it is called (None: with the image alone); `free` are places of (channels, height, width)
    that stay dynamic where the module allows it.

    Raises BadModel with torch.export's own reason where the model cannot be exported.
    """
    for batch in batches:
        try:
            return _exported(module, inputs, arguments, batch, free)
        except BadModel:
            raise
        except (Exception, SystemExit) as error:
            if halt := stopped(error):
                raise halt from error
            failed = error
    takes = f"input (batch, {', '.join(map(str, inputs[0].shape))})" if len(inputs) == 1 else ", ".join(map(str, inputs))
    depends = "data-dependent" in str(failed)
    why = f"what it does next depends on numbers that it has computed{place(failed)}." if depends else reason(failed)
    advice = CHOOSES if depends else ADVICE
    advice += about_clips(module) or about_image(module, inputs, arguments)
    raise BadModel(f"{type(module).__name__} cannot be exported for {takes}: {why} {advice}") from failed


def _exported(
    module: nn.Module, inputs: Sequence[Input], arguments: Arguments | None, batch: int | None, free: Sequence[int]
) -> ExportedProgram:  # fmt: skip
    called = NamedPorts(module, arguments or Arguments((inputs[0].name,)))
    rows = {} if batch else {0: Dim("batch", min=1, max=65536)}
    with quiet(), evaluating(called), torch.no_grad():
        noise = noise_of(batch, image_among(inputs).shape)
        buffers = {name: value.clone() for name, value in module.named_buffers()}
        try:
            out = same_again(lambda: called.result(tensors_of(inputs, noise)), type(module).__name__)
        except BadModel as error:
            if better := _about_state(module, buffers):
                raise better from error
            raise
        named_tensors(out)  # refused before it is exported
        values = tensors_of(inputs, torch.zeros_like(noise))
        sizes = {1 + place: Dim.AUTO for place in free}  # type: ignore[attr-defined]
        shapes = {key_of(one.name): {**(rows if one.has_batch else {}), **(sizes if one.is_image else {})} for one in inputs}
        if arguments is None and inputs[0].name == IMAGES and isinstance(out, Tensor):
            program = torch.export.export(module, tuple(values.values()), dynamic_shapes=tuple(shapes.values()))
        else:
            program = torch.export.export(called, (values,), dynamic_shapes=(shapes,))
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # folders of this machine
    return program


def _about_state(module: nn.Module, before: Mapping[str, Tensor]) -> BadModel | None:
    """The error about buffers that a module changes when it is called; None where it changes none."""
    changed = [name for name, value in module.named_buffers() if name in before and not torch.equal(value, before[name])]
    if not changed:
        return None
    return BadModel(
        f"{type(module).__name__} gives two answers for one image: it changes {' and '.join(changed)} when it is called, and a "
        "file keeps nothing from one image to the next. Leave that out in eval mode: if self.training: ..."
    )
