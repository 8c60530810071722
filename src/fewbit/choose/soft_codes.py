"""Codes of a weight while they are learned: each may go to the code below it or the one above it."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewbit.core.grid import Grid, QParams, along, fake, position, saturated
from fewbit.core.plan import Choice

Rounding = Literal["sigmoid", "straight"]
ZETA, GAMMA = 1.1, -0.1  # how far the sigmoid is stretched (Nagel et al. 2020, equation 23)
EDGE = 1e-3  # how near to the border between two codes a weight may begin, in codes


def open_codes(
    rounding: Literal["sigmoid", "straight"],
    w: Float[Tensor, "*shape"],
    codes: Int[Tensor, "*shape"],
    qparams: QParams,
    grid: Grid,
) -> Soft:
    """Soft codes that begin at the weight, limited to values that round to its code (sigmoid), or at the code (straight)."""
    q = codes.to(torch.float32)
    if rounding == "straight":
        return Rounded(q, qparams, grid)
    start = torch.minimum(torch.maximum(position(w, qparams, grid), q - 0.5 + EDGE), q + 0.5 - EDGE)
    return Sigmoid(start, qparams, grid)


class Straight(torch.autograd.Function):
    """`fake` whose gradient is that of a clamp: 1 where the value has a code of its own, 0 where it is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qparams: QParams, grid: Grid) -> Tensor:
        at = position(x, qparams, grid)
        low, high = ((end if end.ndim == 0 else end.view(-1, *[1] * (x.ndim - 1))) for end in grid.ends(x.device))
        ctx.save_for_backward((at >= low - 0.5) & (at <= high + 0.5))
        return fake(x, qparams, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def straight(x: Tensor, choice: Choice) -> Tensor:
    """The real numbers of a choice's codes, with a straight gradient."""
    return cast(Tensor, Straight.apply(x, choice.qparams, choice.grid))  # type: ignore[no-untyped-call]


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
    """The codes of one weight while they are learned; `start` (c_out, ...) are real numbers in units of codes."""

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

    def rounding_loss(self, beta: float) -> Tensor:
        return torch.zeros((), device=self.parameter.device)


class Sigmoid(Soft):
    """AdaRound's: the code below plus h(V); at the end h >= ½ goes up."""

    def __init__(self, start: Tensor, qparams: QParams, grid: Grid) -> None:
        super().__init__(start, qparams, grid)
        self.below = start.floor()
        self.parameter = h_inverse(start - self.below).requires_grad_()

    def position(self) -> Tensor:
        low, high = (along(end, self.below, self.grid.axis) for end in self.grid.ends(self.below.device))
        return (self.below + h(self.parameter)).clamp(low, high)

    def codes(self) -> Tensor:
        up = (h(self.parameter.detach()) >= 0.5).to(self.below.dtype)
        return saturated(self.below + up, self.grid).to(torch.int32)

    def rounding_loss(self, beta: float) -> Tensor:
        return rounding_loss(h(self.parameter), beta)


class Rounded(Soft):
    """A number that is rounded whenever it is read; its gradient is that of a clamp."""

    def __init__(self, start: Tensor, qparams: QParams, grid: Grid) -> None:
        super().__init__(start, qparams, grid)
        self.parameter = start.clone().requires_grad_()

    def position(self) -> Tensor:
        low, high = (along(end, self.parameter, self.grid.axis) for end in self.grid.ends(self.parameter.device))
        inside = self.parameter.clamp(low - 0.5 + EDGE, high + 0.5 - EDGE)
        return inside + (saturated(inside.detach().round(), self.grid) - inside.detach())

    def codes(self) -> Tensor:
        return saturated(self.parameter.detach().round(), self.grid).to(torch.int32)


def soft_fake(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """`fake` with a gradient for the input (a clamp's) and for the scale (Esser et al. 2020, equation 3)."""
    unit, shift = along(scale, x, grid.axis), along(zero, x, grid.axis)
    at = x / unit
    low, high = (along(end, x, grid.axis) for end in grid.ends(x.device))
    q = (at + (at.round() - at).detach() + shift).clamp(low, high)
    return (q - shift) * unit
