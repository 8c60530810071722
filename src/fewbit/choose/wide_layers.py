"""GPTQ for a layer with very many inputs, such as the first one behind a flattened map: its columns in parts.

Each part has the second moments of its own inputs, is fitted to its own share of the output, W x over its columns, and is
solved on its own: of all products of inputs with each other only the blocks on the diagonal are ever summed, one block at a
time. A row keeps one scale (or those of its groups) over all parts, the best by the sum of their errors; gain and bias are of
the sums over all parts as well. The error that the other branch of an addition has so far goes into the bias alone, as no part
knows what the others have taken of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.choose.layer_rows import Fit
from fewbit.core.device import wide
from fewbit.core.grid import Grid, QParams
from fewbit.core.plan import Choice
from fewbit.workers import Workers

if TYPE_CHECKING:
    from fewbit.choose.gptq import Gptq, Solved


def columns_of(inputs: int, part: int, unit: int = 1) -> list[slice]:
    """The columns of a weight in as few parts of about the same size as have at most `part` columns each, cut between units of
    so many columns: a group of scales, or the window of one channel.
    """
    if unit > part or inputs % unit:
        unit = 1
    units = inputs // unit
    count = -(-units // (part // unit))
    ends = [units * i // count * unit for i in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(ends)]


def solved_in_parts(
    method: Gptq, choice: Choice, w: Tensor, bias: Tensor | None, see: Callable[..., Fit | None],
    power: Float[Tensor, "m"] | None, min_scale: Tensor, workers: Workers,
) -> Solved:  # fmt: skip
    """What `Gptq.layer` gives, with the ridge of each part. `see` gives the moments of some `columns`, and with `residual` the
    error of the branch before; `power` is the variance of each input, where rows have groups.
    """
    rows, grid = w.flatten(1), choice.grid
    parts = columns_of(rows.shape[1], method.part, grid.group_size or math.prod(w.shape[2:]))
    scales = method.rounding.scales(rows, choice.qparams, grid, power, min_scale)
    real, chosen, ridges = rows.clone(), scales[0], []
    if len(scales) > 1 or method.ridges:
        lost = torch.zeros(scales.shape[:2], device=rows.device)
        for part in parts:
            fit, outside = _found(see(columns=part, residual=False))
            whole = fit if outside is None else fit + outside
            ridge = None
            if outside is not None and method.ridges:
                ridge = method.ridge(rows[:, part], fit.centre(), outside.centre(), workers)
            del fit, outside
            ridges.append(ridge)
            real[:, part], fitted = method.fitted(rows[:, part], whole, ridge)
            if len(scales) > 1:
                lost += method.rounding.lost(real[:, part], _of(scales, part, grid), grid, fitted)
            del whole, fitted
        chosen = scales[lost.argmin(0), torch.arange(len(rows), device=rows.device)]
    qparams = replace(choice.qparams, scale=chosen.float().contiguous() if grid.axis is not None else choice.qparams.scale)
    codes = torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
    means: list[tuple[Tensor, Tensor, Tensor]] = []
    agreed: list[Any] = [0, 0] if method.gain and grid.axis is not None else []
    for part in parts:
        fit, outside = _found(see(columns=part, residual=method.residual and part is parts[0]))
        whole = fit if outside is None else fit + outside
        del fit, outside
        means.append(whole.means())
        residual, behind = torch.zeros_like(whole.residual), torch.zeros_like(whole.residual_read)
        whole = replace(whole, residual=residual, residual_read=behind)
        _, fitted = method.fitted(rows[:, part], whole, None)
        codes[:, part] = method.rounding.codes(real[:, part], _of(chosen, part, grid), grid, fitted).to(torch.int32)
        if agreed:
            own = QParams(*(_of(v, part, grid) for v in (qparams.scale, qparams.zero)))
            one = replace(choice, qparams=own, codes=codes[:, part])
            agreed = [sum(pair) for pair in zip(agreed, method.agreement(one, rows[:, part], fitted), strict=True)]
        del whole, fitted
    read, exact = (torch.cat([each[k] for each in means], 1) for k in range(2))
    result = replace(choice, qparams=qparams, codes=codes)
    together = (agreed[0], agreed[1]) if agreed else None
    return method.ended(result, w, bias, together, (read, exact, means[0][2]), tuple(ridges), min_scale)


def variances(batches: Iterable[Float[Tensor, "n m"]]) -> Float[Tensor, "m"]:
    """The variance of each column of the rows of all batches."""
    count, sums, origin = 0, None, None
    for x in batches:
        origin = wide(x[0]) if origin is None else origin  # near the mean: no large numbers cancel
        rows = wide(x) - origin
        new = torch.stack([rows.sum(0), rows.square().sum(0)])
        count, sums = count + len(rows), new if sums is None else sums + new
    if sums is None:
        raise ValueError("no rows")
    mean, square = sums / count
    return square - mean.square()


def _found(fit: Fit | None) -> Fit:
    """The moments of a layer whose rows can be cut, which is known."""
    assert fit is not None
    return fit


def _of(scales: Tensor, part: slice, grid: Grid) -> Tensor:
    """The scales of some columns: those of their groups, or of the whole row."""
    size = grid.group_size
    return scales[..., part.start // size : part.stop // size] if size and scales.ndim > 1 else scales
