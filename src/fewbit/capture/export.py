"""torch.export with a dynamic batch, and the exported program as a graph module: one tensor in, one tensor out."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fewbit.capture.canonicalize import writes_through_views
from fewbit.errors import BadModel

WRAPPER = "_fewbit_model"  # where FirstTensor keeps the module; sites.path_of takes it out of the names again
OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")


class FirstTensor(nn.Module):
    """A model that returns a record or a tuple, returning one tensor of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.add_module(WRAPPER, module)

    def forward(self, x: Tensor) -> Tensor:
        return one_tensor(self.get_submodule(WRAPPER)(x))


def one_tensor(out: Any) -> Tensor:
    """The logits of a record; of a tuple, or where nothing is called logits, the first tensor, however deep."""
    if isinstance(out, Tensor):
        return out
    for name in OUTPUTS:
        value = out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
        if isinstance(value, Tensor):
            return value
    tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    if not tensors:
        raise BadModel(f"the model returns {type(out).__name__} without a tensor; logits are needed.")
    return tensors[0]


def export(module: nn.Module, input_shape: tuple[int, int, int]) -> ExportedProgram:
    """The exported program of a module that takes (batch, channels, height, width), the batch dynamic.

    Raises BadModel with torch.export's own reason where the model cannot be exported.
    """
    example = torch.zeros(2, *input_shape)
    shapes = ({0: Dim("batch", min=1, max=65536)},)
    try:
        with quiet(), _evaluating(module), torch.no_grad():
            whole = module if isinstance(module(example), Tensor) else FirstTensor(module).eval()
            return torch.export.export(whole, (example,), dynamic_shapes=shapes)
    except Exception as error:
        shape = ", ".join(map(str, input_shape))
        raise BadModel(
            f"{type(module).__name__} cannot be exported for input (batch, {shape}): {reason(error)} "
            "Check --input-size, or make the model exportable: torch.export.export(model, (x,)) must work."
        ) from error


def graph_module(program: ExportedProgram) -> GraphModule:
    """The program as a graph module of aten calls whose constants are attributes; one tensor in, one tensor out.

    A fresh copy of the graph; the tensors are the program's.
    """
    with quiet():
        if writes_through_views(program.graph):
            program = program.run_decompositions({})  # nothing is decomposed, writes are made explicit
        module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    output = module.graph.output_node()
    results = pytree.tree_leaves(output.args[0])
    values = [r.meta.get("val") if isinstance(r, Node) else r for r in results]
    spec = program.call_spec.out_spec
    chosen = values[0] if spec is None else one_tensor(pytree.tree_unflatten(values, spec))
    output.args = (next(r for r, v in zip(results, values, strict=True) if v is chosen),)
    module.graph.set_codegen(CodeGen())  # plain arguments, however the model takes its images
    return GraphModule(module, module.graph)  # without the program's hooks, which check the old arguments


def fingerprint(program: ExportedProgram) -> str:
    """SHA-256 over the graphs' text, what they read and give, and every weight, buffer and constant."""
    graphs = [str(part.graph) for part in program.graph_module.modules() if isinstance(part, GraphModule)]
    digest = hashlib.sha256("\n".join([*graphs, str(program.graph_signature), str(program.call_spec)]).encode())
    for name, value in sorted({**program.state_dict, **program.constants}.items()):
        digest.update(f"{name} {getattr(value, 'dtype', type(value))} {tuple(getattr(value, 'shape', ()))}".encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """The first informative line of an exception and, where it says so, the line of the model; without its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400].rstrip(". ")
    places = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)', str(error))
    if places:
        file, line, source = places[-1]
        reason += f", at {Path(file).name}:{line}: {source.strip()}"
    return reason + "."


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch.export prints about its own internals; the MHA fast path is not exportable."""
    fast, disabled = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(disabled)
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; afterwards each of its parts is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
