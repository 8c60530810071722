"""The loss of a whole quantized model: what its answers are worth beside the float model's, or beside labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.capture.fx import is_constant
from fewbit.core.values import Graph
from fewbit.execute.overlay import Env, Overlay

BATCH = 32
KEPT_BYTES = 1 << 30  # of values before the place where a walk begins


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
        outputs = _answers(Overlay(graph, ()), batches) if labels is None else ()
        return Measure([y.flatten(1).double().log_softmax(1) for y in outputs], labels)

    def __call__(self, overlay: Overlay, batches: Sequence[Tensor]) -> float:
        """The loss of what an overlay gives for batches of images."""
        return self.total(_answers(overlay, batches))

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


def _answers(overlay: Overlay, batches: Sequence[Tensor]) -> Iterable[Tensor]:
    walk = Walk(overlay, batches)
    return walk.answers()


class Walk:
    """Batches of images on their way through an overlay's graph, all before the same node.

    `answers` goes on from there to the end as often as it is asked, with whatever the overlay has by then.
    """

    def __init__(self, overlay: Overlay, batches: Sequence[Tensor]) -> None:
        self.overlay = overlay
        self.order = [node for node in overlay.graph.module.graph.nodes if not is_constant(node)]
        self.index = {node: i for i, node in enumerate(self.order)}
        self._last = {read: i for i, node in enumerate(self.order) for read in node.all_input_nodes}
        self._source = next(node for node in self.order if node.op == "placeholder")
        self._answer = next(node for node in self.order if node.op == "output").all_input_nodes[0]
        self._batches = batches
        self._held = self._bytes() * sum(map(len, batches))
        self.back()

    def back(self) -> None:
        """To the images."""
        self.place = 0
        self._envs: list[Env] = [{self._source: batch} for batch in self._batches]

    def to(self, place: int) -> None:
        """Forward to the last node, at most the one at `place`, before which no more than KEPT_BYTES are held."""
        allowed = np.flatnonzero(self._held[self.place : place + 1] <= KEPT_BYTES)
        stop = self.place + int(allowed[-1]) if len(allowed) else self.place
        for env in self._envs:
            self._run(env, self.place, stop)
        self.place = stop

    def answers(self) -> Iterable[Tensor]:
        """What the model gives for each batch (b, classes)."""
        for held in self._envs:
            env = dict(held)
            self._run(env, self.place, len(self.order))
            yield env[self._answer]

    def _run(self, env: Env, start: int, stop: int) -> None:
        with torch.no_grad():
            for i in range(start, stop):
                self.overlay.run([self.order[i]], env)
                for read in self.order[i].all_input_nodes:
                    if self._last.get(read) == i and read is not self._answer:
                        env.pop(read, None)

    def _bytes(self) -> NDArrayInt:
        """For each place the bytes that one image takes of values that are read from there on."""
        held = np.zeros(len(self.order) + 1, np.int64)
        for node, last in self._last.items():
            if node in self.index and node is not self._source:
                held[self.index[node] + 1 : last + 1] += _size(node.meta.get("tensor_meta"))
        return held


NDArrayInt = np.ndarray[Any, np.dtype[np.int64]]


def _size(meta: Any) -> int:
    """The bytes of a value from what shape propagation has found."""
    if hasattr(meta, "shape"):
        return 4 * int(torch.Size(meta.shape).numel())
    return sum(map(_size, meta)) if isinstance(meta, tuple | list) else 0
