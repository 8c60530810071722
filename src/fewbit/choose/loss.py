"""The loss of a whole quantized model: its outputs compared with the float model's, or with labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from fewbit.core.device import CPU, on
from fewbit.core.graph import Graph
from fewbit.core.inputs import Batch
from fewbit.errors import BadImages
from fewbit.execute.executor import Executor
from fewbit.execute.stream import Stream
from fewbit.task import Task, task_of

BATCH = 32


@dataclass(frozen=True)
class ModelLoss:
    """The loss of a model's outputs: their divergence from exact ones, batch by batch, in the task's terms (of a classifier the
    KL divergence), or with labels the cross-entropy; means over images.
    """

    task: Task
    exact: Sequence[Sequence[Tensor]]
    labels: Tensor | None = None

    @staticmethod
    def of(graph: Graph, batches: Sequence[Batch], labels: Tensor | None = None) -> ModelLoss:
        """Against the outputs of the float model. Raises BadImages for labels where the model is not a classifier."""
        task = task_of(graph)
        if labels is not None and task.logits is None:
            raise BadImages("--loss labels needs a model that gives a class for an image; leave it at --loss kl.")
        exact = () if labels is not None else [on(one, CPU) for one in Stream(Executor(graph), batches).outputs()]
        return ModelLoss(task, exact, labels)

    @property
    def what(self) -> str:
        """What it is, in words, with its unit."""
        return "cross-entropy with labels, nats" if self.labels is not None else f"{self.task.distance}, from the float model"

    def __call__(self, overlay: Executor, batches: Sequence[Batch]) -> float:
        """The loss of an overlay's outputs for batches of images."""
        return self.total(Stream(overlay, batches).outputs())

    def total(self, outputs: Iterable[Sequence[Tensor]]) -> float:
        """The loss of outputs, batch by batch; infinite where one is not a number."""
        loss, count = 0.0, 0
        for i, tensors in enumerate(on(one, CPU) for one in outputs):
            n = len(tensors[0])
            if self.labels is None:
                loss += float(self.task.divergence(self.exact[i], tensors))
            else:
                loss += cross_entropy(tensors[cast(int, self.task.logits)], self.labels[count : count + n])
            count += n
        return loss / count if math.isfinite(loss) else math.inf


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """That of labels (b,) by logits (b, classes), summed over the images of a batch."""
    q = logits.flatten(1).double().log_softmax(1)
    return -cast(float, q.gather(1, labels[:, None]).sum().item())
