"""Headroom of the accumulator: which codes of a weight are safe, and how small its scale may be with its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewbit.capture.sites import tensor_of
from fewbit.core.device import wide
from fewbit.core.graph import Graph, Site
from fewbit.core.grid import Grid, QParams, codes, in_multiples, rowwise
from fewbit.core.plan import Choice, Fallback, Plan
from fewbit.errors import BadValues
from fewbit.target.allowed import Allowed
from fewbit.target.grids import AllowedGrids
from fewbit.target.sums import largest_sum

BIAS_CODE = 2**30  # the largest code of a bias: half of int32 is left for the products
ROUNDS = 64  # of making scales larger until sums fit; each takes at least a thousandth of the excess away


@dataclass(frozen=True)
class Headroom:
    """Limits of a weight so that no sum overflows: the smallest scale of each channel, () or (channels,), and the largest sum.

    `max_sum` is None where no sum can leave the accumulator. `largest_code` is that of the op's input, and `bias`
    the magnitude of the bias in units of the input's scale, () or (channels,).
    """

    min_scale: Tensor
    max_sum: int | None = None
    largest_code: int = 0
    bias: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    def excess(self, q: Tensor, scale: Tensor) -> Tensor:
        """How many times too large the largest sum of each channel is, (channels,), for codes (channels, ...)."""
        assert self.max_sum is not None
        return (wide(q.flatten(1)).abs().sum(1) * self.largest_code + (self.bias / scale).ceil()) / self.max_sum

    def rows(self, qparams: QParams, grid: Grid) -> Tensor:
        """The smallest scales in the shape of a weight's, (), (channels, 1) or (channels,)."""
        return rowwise(self.min_scale * max(grid.multiples, 1), qparams.scale)


def headroom(
    graph: Graph, site: Site, choices: Mapping[str, Choice], grids: AllowedGrids, corrected: Tensor | None = None
) -> Headroom:
    """The headroom of a weight in its accumulator. The smallest scale is the one with which the bias, in units of input scale
    times weight scale, leaves half of it; `corrected` (c_out,) is a bias in place of the graph's.

    A dead channel has weights near 0 and a bias that is not: its code would fill the accumulator and the sum wrap around.
    Where the plan leaves the bias float a runtime may still quantize it so when it loads the file (onnxruntime does).
    """
    op = graph.op(site.readers[0][0])
    bias, inputs = op.operands.get("bias", ""), choices.get(op.operands["input"])
    if inputs is None:  # a float activation: the sum is float
        return Headroom(torch.tensor(0.0))
    if not bias and corrected is None:
        unit = torch.tensor(0.0)
    else:
        real = tensor_of(graph, graph.site(bias)) if corrected is None else corrected
        unit = real.abs() / inputs.qparams.scale.max()
    accumulator, first = grids.accumulator, grids.grids[0]
    min_scale = unit / min(BIAS_CODE, 2 ** (accumulator.bits - 2))
    narrow = torch.iinfo(inputs.grid.container).bits <= accumulator.operand_bits
    max_sum = largest_sum(accumulator)
    if not narrow or first.group_size or (op.reduction_size or 0) * inputs.grid.largest * first.largest < max_sum - BIAS_CODE:
        return Headroom(min_scale)
    return Headroom(min_scale, max_sum, inputs.grid.largest, unit)


def coded(choice: Choice, w: Tensor, room: Headroom) -> Choice:
    """The choice of a weight with the nearest codes; channels whose sums could leave the accumulator get larger scales."""
    grid = choice.grid
    min_scale = room.rows(choice.qparams, grid) if grid.axis is not None else room.min_scale.max()
    scale = in_multiples(choice.qparams.scale.maximum(min_scale), grid)
    result = _nearest_codes(choice, w, scale)
    for _ in range(ROUNDS if room.max_sum is not None else 0):
        assert result.codes is not None
        excess = room.excess(result.codes, scale)
        excess = excess if grid.axis is not None else excess.max()
        if bool((excess <= 1).all()):
            break
        scale = torch.where(excess > 1, scale * (excess * 1.001).float(), scale)
        result = _nearest_codes(choice, w, scale)
    return result


def _nearest_codes(choice: Choice, w: Tensor, scale: Tensor) -> Choice:
    qparams = QParams(scale, choice.qparams.zero)
    return replace(choice, qparams=qparams, codes=codes(w, qparams, choice.grid).to(choice.grid.container))


def weight_of(graph: Graph, site: Site) -> Tensor:
    """A weight (c_out, ...). Raises BadValues where it holds NaN or infinities."""
    w = tensor_of(graph, site)
    if not bool(torch.isfinite(w).all()):
        raise BadValues(f"{site.name} holds NaN or infinite values; only finite weights can be quantized.")
    return w


def real_weight(choice: Choice) -> Tensor:
    """The real numbers of a weight's codes, (channels, ...) flattened to rows."""
    return choice.real.flatten(1)


def pairs_are_safe(q: Tensor, activation: Grid, bits: int) -> bool:
    """No two products of one output channel can leave a signed sum of `bits`, whatever the activation codes are.

    Any two products, not only neighbours: how a kernel packs them is its own business. `q` is (channels, ...).
    """
    rows = q.flatten(1).to(torch.int64)
    if rows.shape[1] == 1:
        rows = torch.cat([rows, torch.zeros_like(rows)], 1)
    ends = torch.stack([rows * activation.low, rows * activation.high])
    highest = ends.amax(0).topk(2, 1).values.sum(1).max()
    lowest = ends.amin(0).topk(2, 1, largest=False).values.sum(1).min()
    return bool(highest <= 2 ** (bits - 1) - 1) and bool(lowest >= -(2 ** (bits - 1)))


def codes_are_safe(graph: Graph, choice: Choice, choices: Mapping[str, Choice], grids: AllowedGrids) -> bool:
    """Whether no two products of a weight's codes leave the target's sum of pairs; codes on the last grid that it allows always
    count as safe.
    """
    if grids.pair_bits is None or choice.grid == grids.grids[-1]:
        return True
    assert choice.codes is not None
    input_site = graph.op(graph.site(choice.site).readers[0][0]).operands["input"]
    return pairs_are_safe(choice.codes, choices[input_site].grid, grids.pair_bits)


def sums_are_safe(
    graph: Graph, choice: Choice, choices: Mapping[str, Choice], grids: AllowedGrids, bias: Tensor | None = None
) -> bool:
    """Whether no sum of a weight's codes, with the scale of its input and its bias (None: the graph's), can leave the target's
    accumulator, nor any two of its products their own.
    """
    assert choice.codes is not None
    room = headroom(graph, graph.site(choice.site), choices, grids, bias)
    if bool((choice.qparams.scale < rowwise(room.min_scale, choice.qparams.scale)).any()):
        return False
    if room.max_sum is not None and bool((room.excess(choice.codes, choice.qparams.scale) > 1).any()):
        return False
    return codes_are_safe(graph, choice, choices, grids)


def unsafe_codes(graph: Graph, choice: Choice, choices: Mapping[str, Choice], grids: AllowedGrids, what: str) -> Fallback:
    """The fallback for a weight that keeps its codes, since new ones, `choice` of `choices`, are not safe; `what` made them."""
    bits = grids.accumulator.bits if codes_are_safe(graph, choice, choices, grids) else grids.pair_bits
    share = graph.share(graph.op(graph.site(choice.site).readers[0][0]).macs)
    return Fallback(choice.site, f"{what} weights", "those before", f"{what} codes can saturate {bits} bits", share)


def overflowing(graph: Graph, plan: Plan, allowed: Allowed) -> list[Fallback]:
    """A fallback for each op with a weight whose sums can leave its accumulator after all: a correction has moved its bias."""
    fallbacks = []
    for op in graph.ops:
        if op.name not in allowed.integer_ops or "weight" not in op.operands:
            continue
        weight, grids = plan.choices[op.operands["weight"]], allowed.sites[op.operands["weight"]]
        bias = plan.biases.get(op.name)
        room = headroom(graph, graph.site(weight.site), plan.choices, grids, None if bias is None else bias.values)
        assert weight.codes is not None
        if room.max_sum is not None and bool((room.excess(weight.codes, weight.qparams.scale) > 1).any()):
            requested, why = f"sums within {grids.accumulator.bits} bits", "the bias was moved after the weights"
            share = graph.share(op.macs)
            fallbacks.append(Fallback(op.name, requested, "sums that may leave them", why, share, "accumulator"))
    return fallbacks
