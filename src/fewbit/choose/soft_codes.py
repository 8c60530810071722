"""Codes of weights that are learnt: each may go to the code below it or the one above it, for the output of a whole unit.

Settings and the arithmetic that knows no graph: soft codes, their pull to integers, the schedule.
`fewbit.choose.reconstruct` runs them on a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewbit.core.grid import Grid, QParams, along, position, saturated

ZETA, GAMMA = 1.1, -0.1  # how far the sigmoid is stretched (Nagel et al. 2020, equation 23)
EDGE = 1e-3  # how near to the border between two codes a weight may begin, in codes


@dataclass(frozen=True)
class Reconstruct:
    """The codes, and more, of all weights of a unit, learnt together for the unit's float output.

        minimise   E ‖f(x) − f̂(x̂)‖² / E₀  +  pull · mean(1 − |2h − 1|^β)      E₀ the error at the start

    AdaRound (Nagel et al. 2020): a weight is (⌊w/s⌋ + h(V)) s, h(V) = clip(σ(V) (ζ − γ) + γ, 0, 1), and β falls from `hard`
    to `soft` behind a share `warmup` of the steps. With `rounding` = `straight` the weight is a number that begins at its
    code and is rounded in every step, with a gradient of 1 through the rounding (no pull); Adam moves it by `rate` at most, so
    it leaves its code only where the gradients of many steps agree. BRECQ (Li et al. 2021): `scope` = `unit` is an
    attention module, MLP or residual block with the addition behind it; with `fisher` an error weighs as much as the square of
    the model's gradient there. QDrop (Wei et al. 2022): each element of an activation is its float value with probability
    `drop`. `learn_steps` learns steps of activations along (Esser et al. 2020, LSQ), `learn_biases` the biases;
    without `learn_codes` the codes stay as they are.

    Adam with `rate` for V (in codes for `straight`), `step_rate` for the logarithm of a step and `bias_rate` for a bias, in
    units of the spread of its output; all but that of V fall along half a cosine. `steps` of
    `batch` images for each unit, fewer where `seconds` (None: no limit) are spent. The papers have 20,000 steps of 32 images
    at 1e-3, steps at 4e-5, warm-up 0.2, β from 20 to 2; their pull of 0.01 is on a sum beside an error that is not relative.
    """

    steps: int = 20_000
    batch: int = 32
    rate: float = 1e-3
    scope: Literal["op", "unit"] = "unit"
    rounding: Literal["sigmoid", "straight"] = "sigmoid"
    drop: float = 0.0
    fisher: bool = False
    learn_codes: bool = True
    learn_steps: bool = False
    learn_biases: bool = False
    step_rate: float = 4e-5
    bias_rate: float = 1e-3
    pull: float = 1.0
    warmup: float = 0.2
    hard: float = 20.0
    soft: float = 2.0
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or not 0 <= self.drop <= 1 or not 0 <= self.warmup < 1:
            raise ValueError(f"steps >= 0, batch >= 1, drop in [0, 1] and warmup in [0, 1) are allowed, not {self}")
        if min(self.rate, self.step_rate, self.bias_rate) <= 0 or self.pull < 0 or not 0 < self.soft <= self.hard:
            raise ValueError(f"rates > 0, pull >= 0 and 0 < soft <= hard are allowed, not {self}")
        if self.seconds is not None and self.seconds < 0:
            raise ValueError(f"seconds >= 0 or None is allowed, not {self.seconds}")

    def beta(self, progress: float) -> float | None:
        """β at a share of the steps; None before the end of the warm-up, where nothing pulls."""
        if progress < self.warmup:
            return None
        return self.soft + (self.hard - self.soft) * (1 - (progress - self.warmup) / (1 - self.warmup))

    def in_seconds(self, seconds: float) -> Reconstruct:
        return replace(self, seconds=seconds)

    def open(self, w: Float[Tensor, "*shape"], codes: Int[Tensor, "*shape"], qparams: QParams, grid: Grid) -> Soft:
        """Soft codes that begin, with the sigmoid, as near to the weight itself as its code is kept, else at the code."""
        q = codes.to(torch.float32)
        if self.rounding == "straight":
            return Rounded(q, qparams, grid)
        start = torch.minimum(torch.maximum(position(w, qparams, grid), q - 0.5 + EDGE), q + 0.5 - EDGE)
        return Sigmoid(start, qparams, grid)


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def h(v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The rectified sigmoid."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def h_inverse(share: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """V with h(V) = share, for shares in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)


def rounding_loss(share: Float[Tensor, "*shape"], beta: float) -> Tensor:
    """Σ 1 − |2h − 1|^β: 0 where every h is 0 or 1."""
    return (1 - (2 * share - 1).abs().pow(beta)).sum()


class Soft:
    """The codes of one weight while they are learnt; `start` (c_out, ...) are real numbers in units of codes."""

    settles = False  # whether a pull brings it to integers

    def __init__(self, start: Tensor, qparams: QParams, grid: Grid) -> None:
        self.qparams, self.grid = qparams, grid
        self.parameter = start

    def position(self) -> Tensor:
        """Codes (c_out, ...), float32, with a gradient."""
        raise NotImplementedError

    def codes(self) -> Tensor:
        """The integers (c_out, ...) at the end, int32."""
        raise NotImplementedError

    def real(self) -> Tensor:
        """The weight (c_out, ...), float32, with a gradient."""
        zero, scale = (along(v, self.parameter, self.grid.axis) for v in (self.qparams.zero, self.qparams.scale))
        return (self.position() - zero) * scale

    def pull(self, beta: float) -> Tensor:
        return torch.zeros(())


class Sigmoid(Soft):
    """AdaRound's: the code below plus h(V); at the end h >= ½ goes up."""

    settles = True

    def __init__(self, start: Tensor, qparams: QParams, grid: Grid) -> None:
        super().__init__(start, qparams, grid)
        self.below = start.floor()
        self.parameter = h_inverse(start - self.below).requires_grad_()

    def position(self) -> Tensor:
        low, high = (along(end, self.below, self.grid.axis) for end in self.grid.ends())
        return (self.below + h(self.parameter)).clamp(low, high)

    def codes(self) -> Tensor:
        up = (h(self.parameter.detach()) >= 0.5).to(self.below.dtype)
        return saturated(self.below + up, self.grid).to(torch.int32)

    def pull(self, beta: float) -> Tensor:
        return rounding_loss(h(self.parameter), beta)


class Rounded(Soft):
    """A number that is rounded whenever it is read; its gradient is that of a clamp."""

    def __init__(self, start: Tensor, qparams: QParams, grid: Grid) -> None:
        super().__init__(start, qparams, grid)
        self.parameter = start.clone().requires_grad_()

    def position(self) -> Tensor:
        low, high = (along(end, self.parameter, self.grid.axis) for end in self.grid.ends())
        inside = self.parameter.clamp(low - 0.5 + EDGE, high + 0.5 - EDGE)
        return inside + (saturated(inside.detach().round(), self.grid) - inside.detach())

    def codes(self) -> Tensor:
        return saturated(self.parameter.detach().round(), self.grid).to(torch.int32)


def soft_fake(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """`fake` with a gradient for the input (a clamp's) and for the step (Esser et al. 2020, equation 3)."""
    step, shift = along(scale, x, grid.axis), along(zero, x, grid.axis)
    at = x / step
    low, high = (along(end, x, grid.axis) for end in grid.ends())
    q = (at + (at.round() - at).detach() + shift).clamp(low, high)
    return (q - shift) * step
