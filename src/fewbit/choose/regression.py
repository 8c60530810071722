"""Real weights, and gains, that fit second moments best."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.choose.columns import factor
from fewbit.choose.moments import Moments
from fewbit.core.device import wide


def regressed(w: Float[Tensor, "o m"], moments: Moments, share: float) -> Float[Tensor, "o m"]:
    """W*; `moments` are centred."""
    return (wide(w) + _solved(moments.lacking(w), moments, share)).float()


def _solved(lacking: Float[Tensor, "o m"], moments: Moments, share: float) -> Float[Tensor, "o m"]:
    """W* - W, of what W lacks."""
    parts = lacking.unflatten(0, (len(moments.gram), -1))
    return torch.cholesky_solve(parts.mT, factor(moments.gram, share)).mT.flatten(0, 1)


def held_out_error(lacking: Tensor, inside: Moments, held_out: Tensor, outside: Moments, share: float) -> float:
    """The error of W* - W on held-out moments for a λ; below 0 where it is better than nothing."""
    return float(outside.error(held_out, _solved(lacking, inside, share)).sum())


def agreement(w: Float[Tensor, "o m"], target: Float[Tensor, "o m"], moments: Moments) -> tuple[Tensor, Tensor]:
    """Of the outputs of quantized weights, each the covariance with its target and its own variance."""
    v = wide(w)
    return (target * v).sum(1), (moments.through(v) * v).sum(1)


def factor_of(together: Float[Tensor, "o"], power: Float[Tensor, "o"]) -> Float[Tensor, "o"]:
    """The gain, of what `agreement` gives: the best factor for each output to match its target, which goes into the scale; 1
    where it would be below a half or above two.
    """
    best = together / power.clamp_min(1e-30)
    return torch.where((power > 0) & (best > 0.5) & (best < 2), best, torch.ones_like(best)).float()


def product(w: Tensor, mean: Tensor) -> Tensor:
    """W times a mean row (groups, m) -> (c_out,)."""
    return torch.einsum("gom,gm->go", wide(w).unflatten(0, (len(mean), -1)), mean).flatten()
