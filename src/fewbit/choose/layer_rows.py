"""Layer by layer: the inputs of each op with a weight for all images, in the model quantized so far and in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, tee
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.residual import joined
from fewbit.choose.moments import Moments
from fewbit.core.fx import argument
from fewbit.core.graph import Graph, Op
from fewbit.core.grid import fake
from fewbit.core.inputs import Batch, count
from fewbit.core.plan import Choice
from fewbit.execute.executor import Executor
from fewbit.execute.rows import places_of
from fewbit.execute.samples import op_rows
from fewbit.execute.stream import Stream

HELD_OUT = 4  # one of so many batches is held out to select the ridge
Fit = tuple[Moments, Moments | None]  # of the batches that weights are fitted to, and of those held out
Piece = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # rows (quantized, float, residual error) of a batch, their weights


class Layers:
    """The images on their way through the quantized model and the float one, side by side."""

    def __init__(self, graph: Graph, integer_ops: Sequence[str], batches: Sequence[Batch], folder: Path | None) -> None:
        self.graph, self.images = graph, count(batches[0]) if batches else 0  # of a batch; the last may have fewer
        self.quantized, self.exact = (Stream(Executor(graph, ops), batches, folder=folder) for ops in (integer_ops, ()))
        self.nodes = self.exact.overlay.nodes
        self._last: _Read | None = None  # where more layers read it

    def moments(
        self, op: Op, activation: Choice | None, places: int, outputs: int, *, residual: bool, tokens: int | None = None,
        positions: Tensor | None = None, target: bool = True, columns: slice | None = None,
    ) -> Fit | None:  # fmt: skip
        """The moments of what an op reads (`rows`), of `tokens` rows an image of a linear layer (None: of all), with those that
        the layer's `target` needs or without; of some of the `columns` of each group alone (None: of all).

        Layers that read the same, such as those of queries, keys and values, share them.
        """
        groups = argument(self.nodes[op.node], 6, "groups", 1) if op.kind != "linear" else 1
        tensor = self.graph.site(op.operands["input"]).tensor
        alone = op.kind != "linear" or positions is not None or (residual and self._other(op) is not None)
        alone = alone or columns is not None
        if not alone and self._last is not None and self._last.is_of(tensor, activation, tokens, target):
            return self._last.of_outputs(outputs)
        self._last = None
        pieces = self.rows(op, activation, places, residual=residual, positions=positions)
        if pieces is None:
            return None
        if tokens is not None and op.kind == "linear":
            pieces = (_drawn(piece, tokens * self.images, i) for i, piece in enumerate(pieces))
        if columns is not None:
            pieces = (_cut(piece, groups, columns) for piece in pieces)
        found = fit, outside = moments_of(pieces, groups, outputs, target=target)
        if not alone and sum(user.target == self.nodes[op.node].target for user in self.nodes[tensor].users) > 1:
            self._last = _Read(tensor, activation, tokens, target, fit.copied(), None if outside is None else outside.copied())
        return found

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
        other = self._other(op) if residual else None
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

    def _other(self, op: Op) -> Node | None:
        """The other branch of the addition behind a linear layer; None while layers on its way have no codes: the last of them
        sees the error of this one.
        """
        other = joined(self.nodes[op.node]) if op.kind == "linear" else None
        ready = other is not None and self.exact.index.get(other, -1) <= self.exact.index[self.nodes[op.node]]
        return other if ready else None


@dataclass(frozen=True)
class _Read:
    """The moments of a tensor that was read as one choice, of so many rows an image, for a layer's target or not."""

    tensor: str
    activation: Choice | None
    tokens: int | None
    target: bool
    fit: Moments
    outside: Moments | None

    def is_of(self, tensor: str, activation: Choice | None, tokens: int | None, target: bool) -> bool:
        return (self.tensor, self.tokens, self.target) == (tensor, tokens, target) and self.activation is activation

    def of_outputs(self, outputs: int) -> Fit:
        """For another layer that reads the same."""
        return self.fit.of_outputs(outputs), None if self.outside is None else self.outside.of_outputs(outputs)


def _drawn(piece: Piece, most: int, number: int) -> Piece:
    """At most so many of the rows of the batch with a number, the same of each part."""
    rows = len(piece[0])
    if rows <= most:
        return piece
    some = places_of(rows, most, number, 0)
    read, exact, *others = piece
    error, weight = (None if one is None else one[some] for one in others)
    return read[some], exact[some], error, weight


def _cut(piece: Piece, groups: int, columns: slice) -> Piece:
    """The same rows, of which each group has some of its columns."""
    read, exact, *others = piece
    read, exact = (rows.unflatten(1, (groups, -1))[:, :, columns].flatten(1) for rows in (read, exact))
    return read, exact, *others


def _sampled(positions: Tensor, rows: Iterable[Tensor], firsts: Iterable[int]) -> Iterator[Tensor]:
    """The weight of each row of the batches of a convolution: of the places that `op_rows` takes of an image. `firsts` are the
    numbers of the batches' first images, and that of all images.
    """
    for batch, (first, behind) in zip(rows, pairwise(firsts), strict=True):
        each = len(batch) // (behind - first)
        yield torch.cat([positions[places_of(len(positions), each, i, 0)] for i in range(first, behind)])


def moments_of(pieces: Iterable[Piece], groups: int, outputs: int, *, target: bool = True) -> Fit:
    """The moments of the batches that weights are fitted to, and of those held out to select the ridge; without `target` there
    is no ridge, and none is held out.
    """
    fit: Moments | None = None
    outside: Moments | None = None
    for i, (read, exact, error, weight) in enumerate(pieces):
        if target and i % HELD_OUT == HELD_OUT - 1:
            outside = Moments.of([(read, exact, error)], groups, outputs, weight, outside, target=target)
        else:
            fit = Moments.of([(read, exact, error)], groups, outputs, weight, fit, target=target)
    if fit is None:
        raise ValueError("no rows")
    return fit, outside
