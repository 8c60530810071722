"""A width for every channel of a tensor, the same number of codes in all (Banner et al. 2019, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.core.device import wide

ROUNDS = 10  # of the correction that brings the mean width back after rounding
SETTLED = 0.01  # bits: a smaller correction is not made


@dataclass(frozen=True)
class ChannelBits:
    """B_i = B σ_i^(2/3) / Σ_j σ_j^(2/3) codes for channel i, so that σ_i² / B_i³ is the same for all (equations 10 and 11).

    B is channels times 2^bits; a channel gets round(log2 B_i) bits, `least` to `most`. Rounding and the limits move the mean,
    so the target is moved by half of the difference, at most 10 times, as the released code does. Only tensors of `nominal`
    bits or fewer are allocated. Symmetric grids have at least 2 bits: with one bit only the code 0 would remain.
    """

    weights: bool = True
    activations: bool = True
    nominal: int = 4
    least: int = 0
    most: int = 8

    def __call__(self, spread: Float[Tensor, "channels"], bits: int, *, symmetric: bool) -> tuple[int, ...]:
        """The width of each channel from its standard deviation."""
        least = max(self.least, 2) if symmetric else self.least
        goal, target = float(bits), float(bits)
        for _ in range(ROUNDS):
            widths = shares(spread, target).log2().round().clamp(least, self.most)
            missing = goal - widths.mean().item()
            if abs(missing) <= SETTLED:
                break
            target += missing / 2
        return tuple(int(width) for width in widths)


def shares(spread: Float[Tensor, "channels"], bits: float) -> Float[Tensor, "channels"]:
    """The codes B_i of each channel before rounding; they sum to channels times 2^bits. A channel without spread gets none."""
    power = wide(spread).clamp_min(0).pow(2 / 3)
    total = power.sum()
    if not total > 0:
        return torch.full_like(power, 2.0**bits)
    return len(power) * 2.0**bits * power / total
