"""Images from batch norms, without a generator: Cai et al. 2020, ZeroQ (2001.00281), begun from the spectrum of photographs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.data.synthesize.inversion import Inversion
from fewbit.data.synthesize.losses import apart, roughness
from fewbit.data.synthesize.teacher import Teacher, refuse_without_norms


@dataclass(frozen=True)
class NormInversion(Inversion):
    """Images in which the model's batch norms see what they saw in training, and its answer a class.

        L = bns · L_BNS in units of each channel's spread + ce · CE + variation · max(roughness − natural, 0)

    ZeroQ starts from white noise and takes squared differences as they are, as FDDA does: in EfficientNet-Lite0 a few channels
    of large variance are then all of the loss. In units of what each channel spreads over, and from noise that has the spectrum
    of photographs, a tenth of the iterations is enough. Roughness is that of colours in [0, 1], which is 0.04 to 0.13 in
    photographs of 224 px; a limit to it brings the statistics closer as well.
    """

    iterations: int = 60
    rounds: int = 1
    warm_up: int = 6
    rate: float = 0.2
    jitter: tuple[float, ...] = (16 / 224,)
    bns: float = 1.0
    ce: float = 0.1
    variation: float = 10.0
    natural: float = 0.1

    def refuse(self, teacher: Teacher) -> None:
        refuse_without_norms(teacher)

    def held(self, teacher: Teacher, labels: Tensor, unit: Tensor, random: torch.Generator) -> Callable[[Tensor], Tensor]:
        def loss(images: Tensor) -> Tensor:
            response = teacher(images)
            statistics = apart(response.moments, teacher.running, teacher.eps)
            rough = (roughness(images / unit) - self.natural).clamp_min(0)
            return self.bns * statistics + self.ce * F.cross_entropy(response.logits, labels) + self.variation * rough

        return loss
