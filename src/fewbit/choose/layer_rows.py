"""Layer by layer: the inputs of each op with a weight for all images, in the model quantized so far and in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from fewbit.capture.residual import joined
from fewbit.choose.moments import Moments
from fewbit.core.grid import fake
from fewbit.core.inputs import Batch
from fewbit.core.values import Choice, Graph, Op
from fewbit.execute.executor import Executor
from fewbit.execute.samples import op_rows
from fewbit.execute.stream import Stream

HELD_OUT = 4  # one of so many batches is held out to select the ridge
Piece = tuple[Tensor, Tensor, Tensor | None]  # rows (quantized, float, residual error) of one batch


class Layers:
    """The images on their way through the quantized model and the float one, side by side."""

    def __init__(self, graph: Graph, integer_ops: Sequence[str], batches: Sequence[Batch], folder: Path | None) -> None:
        self.graph = graph
        self.quantized, self.exact = (Stream(Executor(graph, ops), batches, folder=folder) for ops in (integer_ops, ()))
        self.nodes = self.exact.overlay.nodes

    def rows(self, op: Op, activation: Choice | None, places: int, *, residual: bool) -> Iterator[Piece] | None:
        """(quantized, float, residual error) of each batch, one batch at a time; None where rows cannot be cut.

        `activation` is the choice of the op's input (None: it reads real numbers), `places` the patches of an image that a
        convolution takes, and `residual` asks for the error so far of the other branch of the addition after the layer.
        """
        tensor = self.graph.site(op.operands["input"]).tensor
        inputs, float_inputs = (stream.at(self.nodes[tensor]) for stream in (self.quantized, self.exact))
        quantized = (x if activation is None else fake(x, activation.qparams, activation.grid) for x in inputs)
        rows = op_rows(self.graph, op, tensor, quantized, places)
        exact = op_rows(self.graph, op, tensor, float_inputs, places)
        if rows is None or exact is None:
            return None
        other = joined(self.nodes[op.node]) if residual and op.kind == "linear" else None
        residuals: Iterator[Tensor | None] | list[None] = [None] * len(inputs)
        if other is not None:
            pairs = zip(self.exact.at(other), self.quantized.at(other), strict=True)
            residuals = ((x - q).reshape(-1, x.shape[-1]) for x, q in pairs)
        return zip(rows, exact, residuals, strict=True)


def moments_of(pieces: Iterable[Piece], groups: int, outputs: int) -> tuple[Moments, Moments | None]:
    """The moments of the batches that weights are fitted to, and of those held out to select the ridge."""
    fit: Moments | None = None
    outside: Moments | None = None
    for i, piece in enumerate(pieces):
        part = Moments.of([piece], groups, outputs)
        if i % HELD_OUT == HELD_OUT - 1:
            outside = part if outside is None else outside.add(part)
        else:
            fit = part if fit is None else fit.add(part)
        del part
    if fit is None:
        raise ValueError("no rows")
    return fit, outside
