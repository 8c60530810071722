"""Layer by layer: the codes of each weight on what the quantized model so far gives the layer to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fewbit.capture.fx import argument, is_call, is_constant
from fewbit.capture.sites import ADDS, tensor_of
from fewbit.choose.correct import LayerOutput
from fewbit.choose.gptq import Gptq, gain
from fewbit.choose.moments import Moments
from fewbit.choose.recipe import Recipe
from fewbit.choose.weights import finite, room_of, sums_are_safe
from fewbit.core.grid import fake, in_multiples, rowwise, values
from fewbit.core.values import Choice, Fallback, Graph, Op, Site
from fewbit.execute.overlay import Overlay, Stream
from fewbit.execute.samples import op_rows
from fewbit.target.allowed import AllowedGrids

HELD = 4  # one batch of so many is kept to choose the ridge by
MEMORY = 1 << 30  # bytes of the largest tensor of all images together
Piece = tuple[Tensor, Tensor, Tensor | None]  # rows (read, exact, drift) of one batch


@dataclass(frozen=True)
class Solved:
    """The codes of a weight, the bias (c_out,) that belongs to them (None: as it was) and the ridge that was taken."""

    choice: Choice
    bias: Tensor | None
    ridge: float | None


class Layers:
    """The images on their way through the quantized model and the float one, side by side."""

    def __init__(self, graph: Graph, quantized: Stream, batches: Sequence[Tensor]) -> None:
        self.graph, self.quantized = graph, quantized
        self.exact = Stream(Overlay(graph, ()), batches)
        self.nodes = self.exact.overlay.nodes

    def solve(
        self, op: Op, choices: Mapping[str, Choice], choice: Choice, method: Gptq, correction: LayerOutput | None, w: Tensor,
        bias: Tensor | None, least: Tensor,
    ) -> Solved | None:  # fmt: skip
        """The codes of an op's weight w (c_out, ...); `choice` has the step that covers its range, and its codes."""
        pieces = self._rows(op, choices.get(op.operands["input"]), method)
        if pieces is None or choice.grid.widths:
            return None
        groups = argument(self.nodes[op.node], 6, "groups", 1) if op.kind != "linear" else 1
        rows = w.flatten(1)
        fit, outside = _moments(pieces, groups, len(w))
        whole = fit if outside is None else fit + outside
        centred = whole.centred() if correction is not None and correction.bias else replace(whole, count=1)
        real, ridge = method.ridge(rows, fit, outside)
        codes, qparams = method.solve(real, choice.qparams, choice.grid, centred, least)
        found = replace(choice, qparams=qparams, codes=codes.view_as(w).to(choice.grid.container), method=repr(method))
        if correction is None:
            return Solved(found, None, ridge)
        if correction.gain and choice.grid.axis is not None:
            factor = gain(_real(found), centred.target(rows), centred)
            scale = (qparams.scale * rowwise(factor, qparams.scale)).maximum(least)
            found = replace(found, qparams=replace(qparams, scale=in_multiples(scale, choice.grid)))
        if not correction.bias:
            return Solved(found, None, ridge)
        means = whole.centred()
        missing = _product(rows, means.exact) - _product(_real(found), means.read) + means.drift
        shift = missing if bias is None else bias.double() + missing
        return Solved(found, shift.float(), ridge)

    def _rows(self, op: Op, read: Choice | None, method: Gptq) -> Iterator[Piece] | None:
        """(read, exact, drift) of each batch, made when it is asked for; None where rows cannot be cut.

        Without a choice the op reads real numbers.
        """
        tensor = self.graph.site(op.operands["input"]).tensor
        given, float_given = (stream.at(self.nodes[tensor]) for stream in (self.quantized, self.exact))
        seen = (x if read is None else fake(x, read.qparams, read.grid) for x in given)
        rows = op_rows(self.graph, op, tensor, seen, method.places)
        exact = op_rows(self.graph, op, tensor, float_given, method.places)
        if rows is None or exact is None:
            return None
        other = joined(self.nodes[op.node]) if method.residual and op.kind == "linear" else None
        drifts: Iterator[Tensor | None] | list[None] = [None] * len(given)
        if other is not None:
            pairs = zip(self.exact.at(other), self.quantized.at(other), strict=True)
            drifts = ((x - q).reshape(-1, x.shape[-1]) for x, q in pairs)
        return zip(rows, exact, drifts, strict=True)


def _moments(pieces: Iterable[Piece], groups: int, outputs: int) -> tuple[Moments, Moments | None]:
    """The moments of the batches that weights are fitted to, and of those that are kept to choose the ridge by."""
    fit: Moments | None = None
    outside: Moments | None = None
    for i, piece in enumerate(pieces):
        part = Moments.of([piece], groups, outputs)
        if i % HELD == HELD - 1:
            outside = part if outside is None else outside + part
        else:
            fit = part if fit is None else fit + part
    if fit is None:
        raise ValueError("no rows")
    return fit, outside


def solve(layers: Layers, site: Site, slot: AllowedGrids, recipe: Recipe, choices: Mapping[str, Choice]) -> Solved | None:
    """The codes of a weight whose range has been chosen; None where the op's rows cannot be cut, or where no codes are safe."""
    op, choice = layers.graph.op(site.readers[0][0]), choices[site.name]
    correction = recipe.correction if isinstance(recipe.correction, LayerOutput) else None
    assert isinstance(recipe.rounding, Gptq)
    w = finite(layers.graph, site)
    bias = tensor_of(layers.graph, layers.graph.site(op.operands["bias"])) if "bias" in op.operands else None
    room = room_of(layers.graph, site, choices, slot)
    least = rowwise(room.least * max(choice.grid.multiples, 1), choice.qparams.scale)
    found = layers.solve(op, choices, choice, recipe.rounding, correction, w, bias, least)
    if found is None:
        return None
    return found if sums_are_safe(layers.graph, site, found.choice, choices, slot) else None


def joined(linear: Node) -> Node | None:
    """The other side of the addition that alone reads a layer's output: the residual stream before it."""
    users = list(linear.users)
    if len(users) != 1 or not is_call(users[0], *ADDS) or users[0].kwargs.get("alpha"):
        return None
    sides = [side for side in users[0].args[:2] if side is not linear]
    if len(sides) != 1 or not isinstance(sides[0], Node) or is_constant(sides[0]):
        return None
    shapes = [tuple(getattr(node.meta.get("tensor_meta"), "shape", ())) for node in (linear, sides[0])]
    return sides[0] if shapes[0] == shapes[1] else None


def few_enough(graph: Graph, batches: Sequence[Tensor]) -> list[Tensor]:
    """As many of the batches as keep the largest tensor of all images within `MEMORY`; four batches at least."""
    metas = [node.meta.get("tensor_meta") for node in graph.module.graph.nodes if node.op == "call_function"]
    largest = max((torch.Size(meta.shape).numel() for meta in metas if hasattr(meta, "shape")), default=1)
    kept: list[Tensor] = []
    images = 0
    for batch in batches:
        if len(kept) >= HELD and (images + len(batch)) * largest * 4 > MEMORY:
            break
        kept.append(batch)
        images += len(batch)
    return kept


def too_many(given: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Fallback, ...]:
    """What says that `few_enough` has kept fewer images than were given."""
    asked, read = (sum(map(len, batches)) for batches in (given, kept))
    if read == asked:
        return ()
    why = f"the largest tensor of more would take over {MEMORY >> 20} MB; ranges are those of all images"
    return (Fallback("calibration images", f"{asked} for the codes of weights", f"{read}", why),)


def _real(choice: Choice) -> Tensor:
    assert choice.codes is not None
    return values(choice.codes.to(torch.int32), choice.qparams, choice.grid).flatten(1)


def _product(w: Tensor, mean: Tensor) -> Tensor:
    """W times a mean row (groups, m) -> (c_out,)."""
    return torch.einsum("gom,gm->go", w.double().unflatten(0, (len(mean), -1)), mean).flatten()
