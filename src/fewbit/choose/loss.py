"""The loss of a whole quantized model: its answers compared with the float model's, or with labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewbit.core.values import Graph
from fewbit.execute.executor import Executor
from fewbit.execute.stream import Stream

BATCH = 32


@dataclass(frozen=True)
class Measure:
    """The loss of a model's answers: their mean KL divergence from exact ones (log probabilities (b, classes), batch by batch),
    or with labels their mean cross-entropy.
    """

    exact: Sequence[Tensor]
    labels: Tensor | None = None

    @staticmethod
    def of(graph: Graph, batches: Sequence[Tensor], labels: Tensor | None = None) -> Measure:
        """Against the answers of the float model."""
        outputs = Stream(Executor(graph), batches).answers() if labels is None else ()
        return Measure([y.flatten(1).double().log_softmax(1) for y in outputs], labels)

    def __call__(self, overlay: Executor, batches: Sequence[Tensor]) -> float:
        """The loss of an overlay's answers for batches of images."""
        return self.total(Stream(overlay, batches).answers())

    def total(self, outputs: Iterable[Tensor]) -> float:
        """The loss of answers (b, classes), batch by batch; infinite where an answer is no number."""
        loss, count = 0.0, 0
        for i, y in enumerate(outputs):
            q = y.flatten(1).double().log_softmax(1)
            if self.labels is None:
                p = self.exact[i]
                loss += (p.exp() * (p - q)).sum().item()
            else:
                loss -= q.gather(1, self.labels[count : count + len(q), None]).sum().item()
            count += len(q)
        return loss / count if math.isfinite(loss) else math.inf
