"""The exported float model with its outputs, the moments of its batch-norm inputs, and its attention outputs.

Capture folds batch norm into convolutions. The exported program still has its running statistics, so they are read from
there, and a .pt2 file serves as well as a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from fewbit.capture.canonicalize import BATCH_NORM, MATMUL
from fewbit.capture.kinds import softmax_behind
from fewbit.capture.normalize import SDPA, opened
from fewbit.core.device import CPU, on
from fewbit.core.fx import calls, constant, is_call, is_constant
from fewbit.core.inputs import ALONE, Batch, Input
from fewbit.errors import BadModel
from fewbit.execute.executor import Executor
from fewbit.load.ports import outputs_of
from fewbit.load.program import graph_module
from fewbit.task import recognise


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance of the input of each batch norm, in graph order: (channels,) each, or (classes, channels)."""

    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.means)

    def of(self, label: int) -> Moments:
        """Those of one class, from (classes, channels)."""
        return Moments(tuple(m[label] for m in self.means), tuple(v[label] for v in self.variances))

    def from_layer(self, first: int) -> Moments:
        """Those of the batch norms from index `first` on."""
        return Moments(self.means[first:], self.variances[first:])


@dataclass(frozen=True)
class Seen:
    """The model's response to a batch: its outputs, moments of the batch-norm inputs, and the outputs
    (..., heads, tokens, width) of its attention, probabilities times values.
    """

    outputs: tuple[Tensor, ...]
    moments: Moments
    attention: tuple[Tensor, ...]
    index: int = 0

    @property
    def logits(self) -> Tensor:
        """Those of a classifier (b, classes)."""
        return self.outputs[self.index].flatten(1)


class Teacher:
    """The float model, differentiable in its input and never trained. `running` are the statistics of its batch norms, `eps`
    what each adds to a variance; `classes` is None for a model that is not a classifier. It runs on `device`.
    """

    def __init__(self, program: ExportedProgram, inputs: Sequence[Input] = ALONE, device: torch.device = CPU) -> None:
        module, self.device = graph_module(program), device
        task = recognise(outputs_of(program))
        self.classes, self._index = task.classes, task.logits or 0
        opened(module)
        module.graph.eliminate_dead_code()
        module = on(module, device)
        self._executor = Executor(module, inputs=on(tuple(inputs), device), device=device)
        norms = [node for node in calls(module.graph, BATCH_NORM) if _is_fixed(node)]
        self._inputs = [cast(Node, node.args[0]) for node in norms]
        self._mixes = [n for n in calls(module.graph, MATMUL, SDPA) if is_call(n, SDPA) or softmax_behind(n.args[0])]
        tensors = [[constant(module, cast(Node, node.args[i])) for node in norms] for i in (3, 4)]
        self.running = Moments(tuple(tensors[0]), tuple(tensors[1]))
        self.eps = tuple(float(cast(float, node.args[7])) for node in norms)

    @property
    def has_attention(self) -> bool:
        return bool(self._mixes)

    def __call__(self, images: Batch, *, attention_too: bool = True) -> Seen:
        """Run a batch of normalized images; the outputs of its attention are kept where they are wanted."""
        attention, by_norm = dict[str, Tensor](), dict[str, tuple[Tensor, Tensor]]()
        mixes, inputs = ([node.name for node in nodes] for nodes in (self._mixes if attention_too else (), self._inputs))

        def record(name: str, value: Tensor) -> None:
            if name in mixes:
                attention[name] = value
            if name in inputs:
                by_norm[name] = moments_of(value)

        outputs = self._executor(images, {name: partial(record, name) for name in {*mixes, *inputs}})
        pairs = [by_norm[name] for name in inputs]
        moments = Moments(tuple(mean for mean, _ in pairs), tuple(variance for _, variance in pairs))
        return Seen(outputs, moments, tuple(attention[name] for name in mixes), self._index)


def refuse_without_norms(teacher: Teacher) -> None:
    """Raise BadModel, with an alternative, for a model without batch norms that have running statistics."""
    if len(teacher.running):
        return
    if teacher.has_attention:
        works = "it has attention, which is enough for --images synthetic with another recipe, e.g. --recipe mse"
    else:
        works = "it has no attention either, so images cannot be made from it: give real ones, --images DIR, and --recipe mse"
    raise BadModel(f"the model has no batch norm with running statistics, which FDDA makes its images from; {works}.")


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (channels,) of (b, channels, ...), over everything but the channels."""
    others = [d for d in range(x.ndim) if d != 1]
    mean = x.mean(others, keepdim=True)
    return mean.flatten(), (x - mean).square().mean(others)  # x.var takes several times as long on a processor


def _is_fixed(norm: Node) -> bool:
    """The batch norm uses running statistics that are constants."""
    return not norm.args[5] and is_constant(norm.args[3]) and is_constant(norm.args[4])
