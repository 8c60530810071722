"""Round each weight to the nearest code."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from fewbit.core.grid import Grid, QParams, codes


@dataclass(frozen=True)
class Nearest:
    """Every weight on its own, half to even."""

    def __call__(self, w: Float[Tensor, "*shape"], qparams: QParams, grid: Grid) -> Int[Tensor, "*shape"]:
        return codes(w, qparams, grid)
