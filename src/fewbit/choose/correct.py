"""Correction: what is left of the error after the codes are chosen, taken out of the bias."""

from __future__ import annotations

from dataclasses import dataclass

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
