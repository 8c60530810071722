"""A file as a module: each node is a small module of its own that runs it as torch calls, with its name in the file as path."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbit.errors import BadModel, FewbitError
from fewbit.onnx_reader.attributes import refuse_unread
from fewbit.onnx_reader.host import HOST, MOST
from fewbit.onnx_reader.operators import OPERATORS
from fewbit.onnx_reader.values import Known, Node, Value, known, tensor

Env = dict[str, Value]
RESERVED = {*dir(nn.Module()), "constants", "inputs", "outputs", "each_node", "node", "forget_unread"}
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul", "Attention"}


@dataclass(frozen=True)
class Branch:
    """The graph of one answer of an If."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, np.ndarray]
    outputs: tuple[str, ...]


class NodeModule(nn.Module):
    """One node. Raises BadModel with its name and the reason where it cannot be run."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, values: Sequence[Value], batch: Any) -> tuple[Value, ...]:
        return computed(self.node if self.node.batch is None else replace(self.node, now=batch), values)


def computed(node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
    """What a node writes: as numbers where it reads numbers alone, else as tensors."""
    try:
        result: Any = NotImplemented
        if node.op in HOST and node.domain == "" and values and all(isinstance(v, Known) for v in values if v is not None):
            result = HOST[node.op](node, *(v.array if isinstance(v, Known) else None for v in values))
            if result is not NotImplemented:
                result = tuple(map(known, result)) if isinstance(result, tuple) else known(result)
        if result is NotImplemented:
            result = OPERATORS[node.domain][node.op](node, *values)
    except FewbitError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("torch"):  # torch.export's own, about a size or a guard
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadModel(f"node {node} cannot be run: {reason}.") from error
    refuse_unread(node)
    return result if isinstance(result, tuple) else (result,)


class OnnxModule(nn.Module):
    """The network of an ONNX file: the tensors of its inputs in, its outputs by name out; `image` is the place of the one whose
    first dimension is the batch.

    What can be computed without them is computed once.
    """

    def __init__(
        self, nodes: Sequence[Node], constants: Mapping[str, np.ndarray], inputs: Sequence[str], outputs: Sequence[str],
        image: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self._image = image
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._constants: dict[str, np.ndarray] = dict(constants)
        self._nodes = _folded(nodes, self._constants)
        self._paths = dict(zip((id(n) for n in self._nodes), paths(self._nodes, self._constants), strict=True))
        for node in self._nodes:
            _place(self, self._paths[id(node)], NodeModule(node))
        self.constants = nn.Module()
        self._stored = self._register()

    def _register(self) -> dict[str, str]:
        """Constants as parameters and buffers of the module; name in the file -> name here."""
        weights = {name for n in self._nodes if n.op in WEIGHTED for name in n.inputs[1:2]}
        read = {name for node in self._nodes for name in _reads(node)} | set(self.outputs)
        stored: dict[str, str] = {}
        taken = Counter[str]()
        for name, array in self._constants.items():
            if name not in read:
                continue
            flat = re.sub(r"\W", "_", name)
            taken[flat] += 1
            flat = flat if taken[flat] == 1 else f"{flat}__{taken[flat]}"
            value = torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
            if name in weights and value.ndim > 1 and value.is_floating_point():
                self.constants.register_parameter(flat, nn.Parameter(value, requires_grad=False))
            else:
                self.constants.register_buffer(flat, value)
            stored[name] = flat
        self._constants = {name: array for name, array in self._constants.items() if name in read}
        return stored

    def forget_unread(self, *example: Tensor) -> dict[str, Tensor]:
        """The outputs for an example; constants that no node read as a tensor are numbers from then on."""
        env = self._known()
        result = self._run(env, example)
        for name, flat in list(self._stored.items()):
            value = env[name]
            if isinstance(value, Known) and not value.asked:
                delattr(self.constants, flat)
                del self._stored[name]
        return result

    def _known(self) -> Env:
        stored = {name: getattr(self.constants, flat) for name, flat in self._stored.items()}
        return {name: Known(array, stored.get(name), written=True) for name, array in self._constants.items()}

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        return self._run(self._known(), tensors)

    def each_node(self, *tensors: Tensor) -> Iterator[tuple[Node, dict[str, Tensor]]]:
        """Each node in order with the tensors that it writes, by their names in the file."""
        for node, written in self._steps(self._known(), tensors):
            yield node, {name: value for name, value in written.items() if isinstance(value, Tensor)}

    def _run(self, env: Env, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        for _ in self._steps(env, tensors):
            pass
        return {name: tensor(env[name]) for name in self.outputs}

    def _steps(self, env: Env, tensors: Sequence[Tensor]) -> Iterator[tuple[Node, Env]]:
        """Run node after node, with what each writes; `env` has what is still read."""
        env |= dict(zip(self.inputs, tensors, strict=True))
        batch = tensors[self._image].shape[0] if tensors and tensors[self._image].ndim else None
        last = {name: i for i, node in enumerate(self._nodes) for name in _reads(node)}
        for i, node in enumerate(self._nodes):
            values = [env[name] if name else None for name in node.inputs]
            if node.op == "If":
                written: Sequence[Value] = _branch(node, values[0], env)
            else:
                written = self.get_submodule(self._paths[id(node)])(values, batch)
            given = {name: value for name, value in zip(node.outputs, written, strict=False) if name}
            env |= given
            yield node, given
            for name in node.inputs:  # what nobody reads any more
                if name and last[name] == i and name not in self.outputs and isinstance(env.get(name), Tensor):
                    del env[name]


def _branch(node: Node, condition: Value, env: Env) -> list[Value]:
    """The values of the branch that a known condition chooses."""
    if not isinstance(condition, Known):
        raise BadModel(f"node {node} decides by the image what is computed; torch cannot express that.")
    branch: Branch = node.get("then_branch" if bool(condition.array.reshape(-1)[0]) else "else_branch")
    inner: Env = {**env, **{name: Known(array, written=True) for name, array in branch.constants.items()}}
    for one in branch.nodes:
        values = [inner[name] if name else None for name in one.inputs]
        written = _branch(one, values[0], inner) if one.op == "If" else computed(one, values)
        inner |= dict(zip(one.outputs, written, strict=False))
    return [inner[name] for name in branch.outputs]


def _reads(node: Node) -> list[str]:
    """The names that a node reads, those of its branches included."""
    inner = [name for b in node.attributes.values() if isinstance(b, Branch) for n in b.nodes for name in _reads(n)]
    ends = [name for b in node.attributes.values() if isinstance(b, Branch) for name in b.outputs]
    return [name for name in (*node.inputs, *inner, *ends) if name]


def _folded(nodes: Sequence[Node], constants: dict[str, np.ndarray]) -> list[Node]:
    """The nodes that depend on the image; the results of the others are added to the constants."""
    left = []
    for node in nodes:
        if not all(name in constants or not name for name in _reads(node)):
            left.append(node)
            continue
        env: Env = {name: Known(constants[name]) for name in _reads(node)}
        values = [env[name] if name else None for name in node.inputs]
        for value in env.values():
            if isinstance(value, Known) and value.array.size > MOST:
                value.stored = torch.from_numpy(value.array if value.array.flags.writeable else value.array.copy())
        written = _branch(node, values[0], env) if node.op == "If" else computed(node, values)
        arrays = [None if v is None else v.array if isinstance(v, Known) else v.numpy() for v in written]
        if any(a is not None and a.size > MOST for a in arrays) and node.op in ("Expand", "Tile", "ConstantOfShape"):
            left.append(node)  # many copies of few numbers
            continue
        constants |= {name: a for name, a in zip(node.outputs, arrays, strict=False) if name and a is not None}
    return left


def paths(nodes: Sequence[Node], constants: Mapping[str, np.ndarray]) -> list[str]:
    """A path for each node: that of its weight where this tells it (`blocks.0.mlp.fc1.weight`), else its own name with dots
    for slashes; a layer alone in its folder is called like the folder.
    """
    taken: set[str] = set()
    whole = [_unique(_parts(node.name) or [node.op], taken) for node in nodes]
    layers = {i: path.rpartition(".") for i, (node, path) in enumerate(zip(nodes, whole, strict=True)) if node.op in WEIGHTED}
    folders = Counter(folder for folder, _, _ in layers.values())
    for i, (folder, _, leaf) in layers.items():
        weight, dot, end = nodes[i].inputs[1].rpartition(".")
        if dot and end == "weight" and nodes[i].inputs[1] in constants:
            whole[i] = _unique([_legal(part) for part in weight.split(".")], taken)
        elif folder and folders[folder] == 1 and leaf.startswith(nodes[i].op):
            whole[i] = _unique(folder.split("."), taken)
    return whole


def _parts(name: str) -> list[str]:
    """`/blocks/blocks.0/mlp/Add` is blocks, 0, mlp, Add."""
    folders = [folder for folder in name.split("/") if folder]
    inner = [f for f, after in zip(folders, [*folders[1:], ""], strict=True) if not after.startswith(f"{f}.")]
    return [_legal(part) for folder in inner for part in folder.split(".") if part]


def _unique(parts: list[str], taken: set[str]) -> str:
    path, count = ".".join(parts), 1
    while path in taken:
        count += 1
        path = ".".join([*parts[:-1], f"{parts[-1]}_{count}"])
    taken.add(path)
    return path


def _legal(part: str) -> str:
    name = re.sub(r"\W", "_", part)
    return f"{name}_" if name in RESERVED else name


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, with what lies below it there already."""
    *folders, leaf = path.split(".")
    for folder in folders:
        if folder not in root._modules:
            root.add_module(folder, nn.Module())
        root = root.get_submodule(folder)
    if leaf in root._modules:
        module._modules.update(root.get_submodule(leaf)._modules)
    root._modules[leaf] = module
