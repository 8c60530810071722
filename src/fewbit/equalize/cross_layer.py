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


def per_channel_between(w: Tensor, channels: int) -> tuple[int, ...]:
    """The view of a factor for each of the `channels` between two convolutions that multiplies w (c_out, c_in, *kernel), the
    weight of the second: along c_out where it is depthwise, else along c_in.
    """
    kernel = [1] * (w.ndim - 2)
    return (-1, 1, *kernel) if w.shape[1] == 1 and w.shape[0] == channels else (1, -1, *kernel)


def balanced(
    low: Float[Tensor, "c"], high: Float[Tensor, "c"], squares: Float[Tensor, "c"], w: Tensor, activation: Grid, weight: Grid
) -> Migration:
    """The strength with the smallest expected squared error of the second convolution's output.

    `low`, `high` and `squares` (mean of squares) are those of the channels between, w is (c_out, c_in, *kernel). Rounding
    errors are assumed uniform: scale² / 12 for each element that an output sums.
    """
    reach = torch.maximum(-low, high)
    reach = reach.clamp_min(float(reach.mean()) * 1e-3 + 1e-30)
    along = per_channel_between(w, len(low))
    depthwise = along[0] == -1

    def error(scale: Tensor) -> float:
        activation_scale = float((high / scale).amax().clamp_min(0) - (low / scale).amin().clamp_max(0)) / (
            activation.high - activation.low
        )
        heavier = w * scale.view(along)
        through = activation_scale**2 * float(heavier.square().sum())
        weight_scales = heavier.flatten(1).abs().amax(1) / weight.high
        kernel = math.prod(w.shape[2:])
        read = squares / scale.square()
        summed = (weight_scales.square() * read).sum() if depthwise else weight_scales.square().sum() * read.sum()
        return (through + kernel * float(summed)) / 12

    candidates: list[tuple[float | None, Tensor]] = [(None, torch.ones_like(reach))]
    candidates += [(strength, scales(reach, strength)) for strength in STRENGTHS]
    errors = [error(scale) for _, scale in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    return Migration(candidates[best][1], torch.zeros_like(reach), candidates[best][0], errors[0], errors[best])
