"""Correction: what is left of the error after the codes are chosen, taken out of the bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class OutputBias:
    """The mean error of each output channel, subtracted from the bias (Liu et al. 2021, section 3.3).

        b' = b - E[Ô - O]      so that the mean over the samples of each channel is that of the float op

    Over images and tokens. With `each_round` a search corrects after each of its rounds as well, so that the next one scores
    outputs without the error that is taken out in the end; otherwise once, after the search.
    """

    each_round: bool = True

    def __call__(
        self, exact: Float[Tensor, "rows channels"], quantized: Float[Tensor, "rows channels"], bias: Float[Tensor, "channels"]
    ) -> Float[Tensor, "channels"]:
        error = (quantized.double() - exact.double()).mean(0)
        return (bias.double() - error).to(bias.dtype)


@dataclass(frozen=True)
class WeightMean:
    """The mean of each output channel of a weight as it was before rounding (Banner et al. 2019, section 5).

        ŵ' = ξ ŵ + mean w - ξ mean ŵ        ξ = std w / std ŵ with `variance`, else 1 (the released code's form)

    No integer kernel has an offset for each channel of a weight. ξ goes into the step, exactly; the offset meets the sum of
    what the weight is multiplied with, and its mean over the calibration images goes into the bias.
    """

    variance: bool = False

    def ratio(self, exact: Float[Tensor, "channels m"], quantized: Float[Tensor, "channels m"]) -> Float[Tensor, "channels"]:
        """ξ of each channel."""
        spread = quantized.double().std(1, unbiased=False)
        if not self.variance:
            return torch.ones(len(exact))
        wanted = exact.double().std(1, unbiased=False)
        return torch.where(spread > 0, wanted / spread.clamp_min(1e-30), torch.ones_like(spread)).float()

    def offset(self, exact: Float[Tensor, "channels m"], quantized: Float[Tensor, "channels m"]) -> Float[Tensor, "channels"]:
        """What each channel lacks of its mean; `quantized` has been multiplied by ξ."""
        return (exact.double().mean(1) - quantized.double().mean(1)).float()


@dataclass(frozen=True)
class LayerOutput:
    """What is left of each output channel's error on all calibration rows, once its codes are known.

        y' = g ŷ + b'        `gain`: g = cov(y, ŷ) / var(ŷ), which goes into the step;  `bias`: the means agree

    y is the float output, ŷ that of the quantized layer on what the quantized model so far gives it to read.
    """

    bias: bool = True
    gain: bool = True
