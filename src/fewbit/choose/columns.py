"""Codes of weights column by column, each group of outputs with the second moments H of its inputs; all groups at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.core.grid import Grid, QParams, fake, in_multiples

BLOCK = 32  # columns whose later ones are corrected together: what changes at once stays in a core's cache
TRIES = 12  # to make a matrix positive definite
TINY = torch.finfo(torch.float32).tiny


def column_codes(
    w: Float[Tensor, "g r m"], scale: Float[Tensor, "g r c"], grid: Grid, upper: Float[Tensor, "g m m"]
) -> Float[Tensor, "g r m"]:
    """Codes of rows, column by column; `scale` is of each row (c = 1) or of each weight, `upper` the Cholesky factor of the
    inverse of each group's H.
    """
    columns = _by_column(w)
    scales = scale.permute(2, 0, 1).contiguous().expand_as(columns)
    codes, errors = torch.empty_like(columns), columns.new_empty(BLOCK, *columns.shape[1:])
    shares = upper.permute(1, 2, 0).contiguous().unsqueeze(3)
    m, diagonal = len(columns), upper.diagonal(dim1=1, dim2=2).T.unsqueeze(2)
    for first in range(0, m, BLOCK):
        last = min(first + BLOCK, m)
        for j in range(first, last):
            code = torch.div(columns[j], scales[j], out=codes[j]).round_().clamp_(grid.low, grid.high)
            error = torch.addcmul(columns[j], code, scales[j], value=-1, out=errors[j - first]).div_(diagonal[j])
            columns[j + 1 : last].addcmul_(shares[j, j + 1 : last], error, value=-1)
        columns[last:].transpose(0, 1).baddbmm_(
            upper[:, first:last, last:].mT, errors[: last - first].transpose(0, 1), alpha=-1
        )
    return codes.permute(1, 2, 0)


def descended(
    w: Float[Tensor, "g o m"], q: Float[Tensor, "g o m"], scale: Float[Tensor, "g o c"], grid: Grid,
    h: Float[Tensor, "g m m"], sweeps: int,
) -> Float[Tensor, "g o m"]:  # fmt: skip
    """Codes of weights after sweeps over their columns, each group with its H; `scale` is of each row (c = 1) or each weight.

    The gradient of the error follows each move within a block of columns, and each block outside of it.
    """
    codes, exact = _by_column(q), _by_column(w)
    s = scale.permute(2, 0, 1).contiguous().expand_as(codes)
    diagonal = h.diagonal(dim1=1, dim2=2)
    inverse = -1 / diagonal.maximum((1e-12 * diagonal.amax(1, keepdim=True)).clamp_min(TINY)).T.unsqueeze(2)
    steps = h.permute(1, 2, 0).unsqueeze(3)
    gradient = (h @ (codes * s - exact).transpose(0, 1)).transpose(0, 1).contiguous()
    m, moves = len(codes), codes.new_empty(BLOCK, *codes.shape[1:])
    for _ in range(sweeps):
        before = codes.clone()
        for first in range(0, m, BLOCK):
            last = min(first + BLOCK, m)
            block = gradient[first:last].clone()
            for j in range(first, last):
                better = torch.div(block[j - first], s[j]).mul_(inverse[j]).add_(codes[j]).round_()
                move = torch.mul(better.clamp_(grid.low, grid.high).sub_(codes[j]), s[j], out=moves[j - first])
                codes[j].add_(better)
                block[j + 1 - first :].addcmul_(steps[j + 1 : last, j], move)
            gradient.transpose(0, 1).baddbmm_(h[:, :, first:last], moves[: last - first].transpose(0, 1))
        if bool((codes == before).all()):
            break
    return codes.permute(1, 2, 0)


def errors_of(change: Float[Tensor, "o m"], gram: Float[Tensor, "g m m"]) -> Float[Tensor, "o"]:
    """The squared error of each output whose weights change so; in float32, since no large numbers cancel."""
    parts = change.unflatten(0, (len(gram), -1))
    return ((parts @ gram) * parts).sum(2).flatten()


def block_scales(
    w: Float[Tensor, "o m"], candidates: Sequence[Float[Tensor, "o b"]], grid: Grid, power: Float[Tensor, "m"]
) -> Float[Tensor, "o b"]:
    """For each group the candidate scale with the smallest squared error of its weights rounded to the nearest code, each
    weighted with the `power` of its input: the output error where inputs are not correlated.
    """
    candidate_qparams = [QParams(in_multiples(scale, grid), torch.zeros_like(scale, dtype=torch.int32)) for scale in candidates]
    errors = [
        ((fake(w, a, grid) - w).square() * power.float()).unflatten(1, (-1, grid.group_size)).sum(2) for a in candidate_qparams
    ]
    best = torch.stack(errors).argmin(0)
    return torch.stack(list(candidates)).gather(0, best[None])[0]


def _by_column(x: Float[Tensor, "g r m"]) -> Float[Tensor, "m g r"]:
    """A copy in which a column lies in one piece."""
    return x.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def by_row(scale: Float[Tensor, "g r ..."], rows: Float[Tensor, "g r m"]) -> Float[Tensor, "g r c"]:
    """Scales of each row (c = 1) or of each of its weights."""
    return scale.unsqueeze(2) if scale.ndim == 2 else scale.repeat_interleave(rows.shape[2] // scale.shape[2], 2)


def damped(h: Float[Tensor, "*g m m"], share: Float[Tensor, "*g"]) -> Float[Tensor, "*g m m"]:
    """H with a share of the mean of its diagonal added to the diagonal; of nothing but zeros, the identity."""
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    result = h.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, share * mean, torch.ones_like(mean)).unsqueeze(-1))
    return result


def factor(h: Float[Tensor, "*g m m"], share: float) -> Float[Tensor, "*g m m"]:
    """The lower Cholesky factor of H with a share of its diagonal's mean added, ten times more until it succeeds: for inputs
    that are nearly constant, H is only rounding noise.
    """
    shares = h.new_full(h.shape[:-2], share)
    for _ in range(TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped(h, shares))
        if not bool(failed.any()):
            return lower
        shares = torch.where(failed > 0, 10 * shares, shares)
    return torch.linalg.cholesky(damped(h, shares))
