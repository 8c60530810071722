"""The float model as it was exported, watched: what its batch norms read, and what its attention gives.

Capture folds batch norm into convolutions. Its statistics still stand in the exported program, whichever way the model was
named, so they are read there and a .pt2 file serves as well as a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from fewbit.capture.canonicalize import BATCH_NORM, MATMUL
from fewbit.capture.export import graph_module
from fewbit.capture.fx import calls, constant, is_call, is_constant
from fewbit.capture.kinds import softmax_behind
from fewbit.capture.normalize import SDPA, opened
from fewbit.errors import BadModel
from fewbit.execute.executor import Executor


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance of what each batch norm reads, in graph order: (channels,) each, or (classes, channels)."""

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
    """What the model has done with a batch: its answers (b, classes), what its batch norms have read, and the outputs
    (..., heads, tokens, width) of its attention, probabilities times values.
    """

    logits: Tensor
    moments: Moments
    attention: tuple[Tensor, ...]


class Teacher:
    """The float model, differentiable in its input and never trained. `running` are the statistics of its batch norms, `eps`
    what each adds to a variance.
    """

    def __init__(self, program: ExportedProgram) -> None:
        module = graph_module(program)
        opened(module)
        module.graph.eliminate_dead_code()
        self._executor = Executor(module)
        norms = [node for node in calls(module.graph, BATCH_NORM) if _is_fixed(node)]
        self._inputs = [cast(Node, node.args[0]) for node in norms]
        self._mixes = [n for n in calls(module.graph, MATMUL, SDPA) if is_call(n, SDPA) or softmax_behind(n.args[0])]
        tensors = [[constant(module, cast(Node, node.args[i])) for node in norms] for i in (3, 4)]
        self.running = Moments(tuple(tensors[0]), tuple(tensors[1]))
        self.eps = tuple(float(cast(float, node.args[7])) for node in norms)

    @property
    def has_attention(self) -> bool:
        return bool(self._mixes)

    def __call__(self, images: Tensor) -> Seen:
        """Run normalized images (b, c, h, w)."""
        attention, measured = dict[str, Tensor](), dict[str, tuple[Tensor, Tensor]]()
        mixes, read = ([node.name for node in nodes] for nodes in (self._mixes, self._inputs))

        def see(name: str, value: Tensor) -> None:
            if name in mixes:
                attention[name] = value
            if name in read:
                measured[name] = moments_of(value)

        logits = self._executor(images, {name: partial(see, name) for name in {*mixes, *read}})
        pairs = [measured[name] for name in read]
        moments = Moments(tuple(mean for mean, _ in pairs), tuple(variance for _, variance in pairs))
        return Seen(logits.flatten(1), moments, tuple(attention[name] for name in mixes))


def refuse_without_norms(teacher: Teacher) -> None:
    """Raise BadModel, which says what works, for a model whose batch norms cannot be held to anything."""
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
