"""Layer by layer: the inputs of each op with a weight for all images, in the model quantized so far and in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, tee
from pathlib import Path

import torch
from torch import Tensor

from fewbit.capture.residual import joined
from fewbit.choose.moments import Moments
from fewbit.core.grid import fake
from fewbit.core.inputs import Batch
from fewbit.core.values import Choice, Graph, Op
from fewbit.execute.executor import Executor
from fewbit.execute.rows import places_of
from fewbit.execute.samples import op_rows
from fewbit.execute.stream import Stream

HELD_OUT = 4  # one of so many batches is held out to select the ridge
Piece = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # rows (quantized, float, residual error) of a batch, their weights


class Layers:
    """The images on their way through the quantized model and the float one, side by side."""

    def __init__(self, graph: Graph, integer_ops: Sequence[str], batches: Sequence[Batch], folder: Path | None) -> None:
        self.graph = graph
        self.quantized, self.exact = (Stream(Executor(graph, ops), batches, folder=folder) for ops in (integer_ops, ()))
        self.nodes = self.exact.overlay.nodes

    def rows(
        self, op: Op, activation: Choice | None, places: int, *, residual: bool, positions: Tensor | None = None
    ) -> Iterator[Piece] | None:
        """(quantized, float, residual error, weights) of each batch, one batch at a time; None where rows cannot be cut.

        `activation` is the choice of the op's input (None: it reads real numbers), `places` the patches of an image that a
        convolution takes, `residual` asks for the error so far of the other branch of the addition after the layer, and
        `positions` weighs the positions of its output in an image.
        """
        tensor = self.graph.site(op.operands["input"]).tensor
        inputs, float_inputs = (stream.at(self.nodes[tensor]) for stream in (self.quantized, self.exact))
        quantized = (x if activation is None else fake(x, activation.qparams, activation.grid) for x in inputs)
        rows = op_rows(self.graph, op, tensor, quantized, places)
        exact = op_rows(self.graph, op, tensor, float_inputs, places)
        if rows is None or exact is None:
            return None
        other = joined(self.nodes[op.node]) if residual and op.kind == "linear" else None
        if other is not None and self.exact.index.get(other, -1) > self.exact.index[self.nodes[op.node]]:
            other = None  # layers on its way have no codes yet; the last of them sees the error of this one
        residuals: Iterator[Tensor | None] | list[None] = [None] * len(inputs)
        if other is not None:
            pairs = zip(self.exact.at(other), self.quantized.at(other), strict=True)
            residuals = ((x - q).reshape(-1, x.shape[-1]) for x, q in pairs)
        weights: Iterator[Tensor] | list[None] = [None] * len(inputs)
        if positions is not None:
            rows, seen = tee(rows)
            every = op.kind == "linear"  # row is taken, of windows as well
            whole = (positions.repeat(len(x) // len(positions)) for x in seen)
            weights = whole if every else _sampled(positions, seen, inputs.firsts)
        return zip(rows, exact, residuals, weights, strict=True)


def _sampled(positions: Tensor, rows: Iterable[Tensor], firsts: Iterable[int]) -> Iterator[Tensor]:
    """The weight of each row of the batches of a convolution: of the places that `op_rows` takes of an image. `firsts` are the
    numbers of the batches' first images, and that of all images.
    """
    for batch, (first, behind) in zip(rows, pairwise(firsts), strict=True):
        each = len(batch) // (behind - first)
        yield torch.cat([positions[places_of(len(positions), each, i, 0)] for i in range(first, behind)])


def moments_of(pieces: Iterable[Piece], groups: int, outputs: int) -> tuple[Moments, Moments | None]:
    """The moments of the batches that weights are fitted to, and of those held out to select the ridge."""
    fit: Moments | None = None
    outside: Moments | None = None
    for i, (read, exact, error, weight) in enumerate(pieces):
        part = Moments.of([(read, exact, error)], groups, outputs, weight)
        if i % HELD_OUT == HELD_OUT - 1:
            outside = part if outside is None else outside.add(part)
        else:
            fit = part if fit is None else fit.add(part)
        del part
    if fit is None:
        raise ValueError("no rows")
    return fit, outside
