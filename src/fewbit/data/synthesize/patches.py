"""Images from attention: Li et al. 2022, Patch Similarity Aware Data-Free Quantization (PSAQ-ViT, 2203.02250)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.data.synthesize.inversion import Inversion
from fewbit.data.synthesize.losses import distance, patch_entropy, prefix_of, roughness
from fewbit.data.synthesize.teacher import Seen, Teacher
from fewbit.errors import BadModel


@dataclass(frozen=True)
class PatchDiversity(Inversion):
    """Images that start as noise and become what the model tells apart: patches of many kinds, and a class.

        L = − diversity · Σ entropy + ce · CE + variation · |roughness − `natural`| + bns · L_BNS

    The entropy is that of the similarities of patches in the output of each attention. L_BNS is there for models that have
    batch norm as well.

    Rates, iterations, jitter and weights are the released code's, for DeiT. Its total variation is a sum of norms over 32
    images of 224 px held to 2,500 to 3,000: in units that depend on no size a root mean square of 0.285 to 0.342 between
    neighbours, and the weight 439. `points` and `bandwidth` of the density are ours: the code has 10 points and 0.01 over the
    range that was found, where most similarities fall between two points and nothing holds them. The paper starts from white
    noise.
    """

    diversity: float = 1.0
    ce: float = 1.0
    variation: float = 439.0
    natural: tuple[float, float] = (0.285, 0.342)
    bns: float = 0.2
    points: int = 201
    bandwidth: float = 0.05

    def refuse(self, teacher: Teacher) -> None:
        if not teacher.has_attention:
            raise BadModel("the model has no attention, which these images are made from; give real ones: --images DIR.")

    def held(self, teacher: Teacher, labels: Tensor, unit: Tensor, random: torch.Generator) -> Callable[[Tensor], Tensor]:
        natural = self.natural[0] + (self.natural[1] - self.natural[0]) * float(torch.rand((), generator=random))
        return lambda images: self.loss(teacher(images), labels, teacher, images, natural)

    def loss(self, response: Seen, labels: Tensor, teacher: Teacher, images: Tensor, natural: float) -> Tensor:
        """The loss of a batch of images (b, c, h, w), from the teacher's response to them."""
        entropies = [
            patch_entropy(maps, self.points, self.bandwidth, prefix_of(maps.shape[-2]))
            for maps in response.attention
            if maps.shape[-2] - prefix_of(maps.shape[-2]) > 1
        ]
        total = -self.diversity * torch.stack(entropies).sum() if entropies else torch.zeros(())
        total = total + self.ce * F.cross_entropy(response.logits, labels)
        total = total + self.variation * (roughness(images) - natural).abs()
        if len(teacher.running):
            total = total + self.bns * distance(response.moments, teacher.running)
        return total
