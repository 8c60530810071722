"""Convolutions with a ReLU between them: a channel is divided by a number here and multiplied by it there.

Nagel et al. 2019 (data-free quantization, section 4.1). ReLU is positively homogeneous; a clamp at 6 is not, and is left alone.
Each output channel of a weight has its own scale; the gain is in the tensor between, which has only one.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fewbit.core.grid import Grid
from fewbit.equalize.migrate import STRENGTHS, Migration, scales
from fewbit.equalize.samples import Extremes


def for_weight(factor: Float[Tensor, "c"], w: Tensor) -> Tensor:
    """A factor for each channel that a convolution reads, as it multiplies the weight w (c_out, c_in, *kernel): along c_in;
    where the convolution is depthwise (c_in is 1) along c_out, repeated for the outputs that read the same channel.
    """
    kernel = [1] * (w.ndim - 2)
    if w.shape[1] == 1:
        return factor.repeat_interleave(w.shape[0] // len(factor)).view(-1, 1, *kernel)
    return factor.view(1, -1, *kernel)


def balanced(seen: Extremes, w: Tensor, activation: Grid, weight: Grid) -> Migration:
    """The strength with the smallest expected squared error of the second convolution's output.

    `seen` is what is known of the channels between, w is (c_out, c_in, *kernel). Rounding errors are assumed uniform: scale²
    / 12 for each element that an output sums. What of one half of the images lies outside of the range of the other is an error
    as well, of one number of a channel at least: channels that just fill the range on few images leave it on others.
    """
    low, high, squares = seen.low, seen.high, seen.squares

    def factors(low: Tensor, high: Tensor, strength: float | None) -> Tensor:
        reach = torch.maximum(-low, high)
        reach = reach.clamp_min(float(reach.mean()) * 1e-3 + 1e-30)
        return torch.ones_like(reach) if strength is None else scales(reach, strength)

    def outside(strength: float | None, scale: Tensor) -> float:
        """The expected square of what is cut, through the weights; with the images of both halves half as much."""
        cut = torch.zeros_like(scale)
        for (low, high), (lower, higher) in (seen.halves, seen.halves[::-1]):
            own = factors(low, high, strength)
            bottom, top = (low / own).amin().clamp_max(0), (high / own).amax().clamp_min(0)
            beyond = torch.maximum(bottom - lower / own, higher / own - top).clamp_min(0) * own
            cut += beyond.square() / (4 * seen.count)
        return float((w * for_weight(cut.sqrt(), w)).square().sum())

    def error(scale: Tensor) -> float:
        activation_scale = float((high / scale).amax().clamp_min(0) - (low / scale).amin().clamp_max(0)) / (
            activation.high - activation.low
        )
        heavier = w * for_weight(scale, w)
        through = activation_scale**2 * float(heavier.square().sum())
        weight_scales = heavier.flatten(1).abs().amax(1) / weight.high
        kernel = math.prod(w.shape[2:])
        read = for_weight(squares / scale.square(), w).flatten()  # by each output, where depthwise
        summed = (weight_scales.square() * read).sum() if w.shape[1] == 1 else weight_scales.square().sum() * read.sum()
        return (through + kernel * float(summed)) / 12

    strengths = (None, *STRENGTHS)
    candidates = [factors(low, high, strength) for strength in strengths]
    errors = [error(scale) + outside(strength, scale) for strength, scale in zip(strengths, candidates, strict=True)]
    best = min(range(len(errors)), key=errors.__getitem__)
    return Migration(candidates[best], torch.zeros_like(low), strengths[best], errors[0], errors[best])
