"""The tensors that a model or an exported program takes and gives, by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from fewbit.core.inputs import Input, image_among
from fewbit.core.task import Output
from fewbit.errors import BadModel
from fewbit.load.inputs import IMAGES, Arguments

WRAPPER = "_fewbit_model"  # where NamedPorts keeps the module; `without_wrapper` takes it out of the names again


class NamedPorts(nn.Module):
    """A model that takes its tensors by name, in a dict, and returns those of a record, a tuple or anything nested by name."""

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.add_module(WRAPPER, module)
        self.arguments = arguments

    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return named_tensors(self.result(tensors))

    def result(self, tensors: dict[str, Tensor]) -> Any:
        """What the model itself gives."""
        given = self.arguments.args, dict(self.arguments.kwargs)
        args, kwargs = pytree.tree_map(lambda name: tensors[key_of(name)], given)
        return self.get_submodule(WRAPPER)(*args, **kwargs)


def without_wrapper(path: str) -> str:
    """A path in a module that NamedPorts may hold, as it is in that module."""
    return path.removeprefix(WRAPPER).removeprefix(".")


def key_of(name: str) -> str:
    """Any text as an identifier."""
    return f"_{name.encode().hex()}"


def named_tensors(out: Any) -> dict[str, Tensor]:
    """The tensors of a model's result, by name and in order: keys and fields joined by dots, places in tuples counted.

    What is not a tensor (None, numbers, text) is left out. A single tensor without a name is `logits` where it may be a list of
    classes (batch, n), else `output`. Raises BadModel where there is no tensor.
    """
    leaves = [(name, leaf) for name, leaf in _named(out) if isinstance(leaf, Tensor)]
    if not leaves:
        raise BadModel(f"the model returns {type(out).__name__} without a tensor; at least one is needed.")
    if out is leaves[0][1]:
        return {"logits" if out.ndim == 2 else "output": out}
    found = dict[str, Tensor]()
    for name, tensor in leaves:
        if not name or name in found:
            wrong = f"two tensors under the name '{name}'" if name else "a tensor under the name '', which no file can have"
            raise BadModel(f"the model returns {wrong}. Give each a key, or a field, of its own: return {{'logits': x}}.")
        found[name] = tensor
    return found


def tensors_in(out: Any) -> list[Tensor]:
    """The tensors of a model's result, in the order of `named_tensors`."""
    return [leaf for _, leaf in _leaves(out) if isinstance(leaf, Tensor)]


def no_tensors(out: Any) -> dict[str, Any]:
    """What a model's result holds beside tensors and None, by name: numbers, text, objects."""
    return {name: leaf for name, leaf in _named(out) if leaf is not None and not isinstance(leaf, Tensor)}


def _named(out: Any) -> Iterator[tuple[str, Any]]:
    counted = isinstance(out, tuple | list) and not hasattr(out, "_fields")
    return ((".".join(("output", *path) if counted else path), leaf) for path, leaf in _leaves(out))


def _leaves(out: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of nested mappings, records, named tuples, tuples, lists and whatever else torch opens."""
    if isinstance(out, Mapping):
        items: Iterable[tuple[Any, Any]] = out.items()
    elif dataclasses.is_dataclass(out):
        items = ((field.name, getattr(out, field.name)) for field in dataclasses.fields(out))
    elif isinstance(out, tuple | list):
        items = zip(getattr(out, "_fields", range(len(out))), out, strict=True)
    elif isinstance(out, Tensor) or pytree.tree_is_leaf(out):
        yield path, out
        return
    else:
        inner, _ = pytree.tree_flatten_with_path(out, is_leaf=lambda one: one is not out)
        items = ((re.sub(r"^[.\['\"]+|['\"\]]+$", "", pytree.keystr(where)), value) for where, value in inner)
    for name, value in items:
        yield from _leaves(value, (*path, str(name)))


def input_values(program: ExportedProgram) -> dict[str, Any]:
    """The fake tensors that stand for a program's inputs, by name and in order: the keys of NamedPorts, torch.export's names
    for those of any other program, and `images` for one alone.
    """
    taken = program.graph_signature.user_inputs
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in taken}
    spec = program.call_spec.in_spec
    ports = spec.child(0).children() if spec is not None and spec.num_children else []
    keys = [str(key) for key in ports[0].context] if len(ports) == 1 and ports[0].type is dict else []
    if keys and all(re.fullmatch(r"_([0-9a-f]{2})+", key) for key in keys):
        names = [bytes.fromhex(key[1:]).decode("utf-8", "replace") for key in keys]
    else:
        names = [IMAGES] if len(values) == 1 else list(values)
    return dict(zip(names, values.values(), strict=True))


def batch_of(program: ExportedProgram, inputs: Sequence[Input]) -> int | None:
    """The batch that is written in a program with these inputs; None where it is dynamic."""
    batch = image_of(program, inputs).shape[0]
    return batch if isinstance(batch, int) else None


def image_of(program: ExportedProgram, inputs: Sequence[Input]) -> Tensor:
    """The fake tensor that stands for the image, which is the one of the inputs without a value."""
    image: Tensor = input_values(program)[image_among(inputs).name]
    return image


def output_values(program: ExportedProgram) -> dict[str, Tensor]:
    """The fake tensors that stand for a program's outputs, by name and in order; `renamed` ones under their new names."""
    others = renamed(program)
    return {others.get(name, name): value for name, value in _results(program).items()}


def renamed(program: ExportedProgram) -> dict[str, str]:
    """Outputs that are called as an input is, which no ONNX file may have, and the names that they get."""
    inputs, outputs = input_values(program), _results(program)
    others: dict[str, str] = {}
    for name in outputs:
        if name in inputs:
            other = f"{name}_output"
            while other in {*inputs, *outputs, *others.values()}:
                other += "_"
            others[name] = other
    return others


def _results(program: ExportedProgram) -> dict[str, Tensor]:
    return named_tensors(result_of(program))


def result_of(program: ExportedProgram) -> Any:
    """What a program gives, nested as it gives it, with fake tensors."""
    results = pytree.tree_leaves(program.graph.output_node().args[0])[-len(program.graph_signature.user_outputs) :]
    values = [r.meta.get("val") if isinstance(r, Node) else r for r in results]
    spec = program.call_spec.out_spec
    return values[0] if spec is None else pytree.tree_unflatten(values, spec)


def outputs_of(program: ExportedProgram) -> tuple[Output, ...]:
    """The tensors that a program returns, in order."""
    return tuple(
        Output(name, tuple(n if isinstance(n, int) else -1 for n in value.shape[1:]), value.is_floating_point())
        for name, value in output_values(program).items()
    )
