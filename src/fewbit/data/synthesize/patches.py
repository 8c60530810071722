"""Images from attention: Li et al. 2022, Patch Similarity Aware Data-Free Quantization (PSAQ-ViT, 2203.02250)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.data.synthesize.losses import distance, patch_entropy, prefix_of, roughness
from fewbit.data.synthesize.teacher import Seen, Teacher
from fewbit.errors import BadModel


@dataclass(frozen=True)
class PatchDiversity:
    """Images that start as noise and become what the model tells apart: patches of many kinds, and a class.

        L = − diversity · Σ entropy + ce · CE + variation · |roughness − `natural`| + bns · L_BNS

    The entropy is that of the similarities of patches in the output of each attention. L_BNS is there for models that have
    batch norm as well. Adam with `rate` (a ramp over `warm_up` iterations, then a half cosine) for `rounds` times
    `iterations`, each image rolled by up to `jitter` of its size (a share for each round) and mirrored at random, colours held
    in [0, 1]. `batch` images at a time.

    Rates, iterations, jitter and weights are the released code's, for DeiT. Its total variation is a sum of norms over 32
    images of 224 px held to 2,500 to 3,000: in units that depend on no size a root mean square of 0.285 to 0.342 between
    neighbours, and the weight 439. `points` and `bandwidth` of the density are ours: the code has 10 points and 0.01 over the
    range that was found, where most similarities fall between two points and nothing holds them.
    """

    iterations: int = 500
    rounds: int = 2
    warm_up: int = 100
    batch: int = 32
    rate: float = 0.2
    betas: tuple[float, float] = (0.5, 0.9)
    jitter: tuple[float, ...] = (15 / 224, 30 / 224)
    diversity: float = 1.0
    ce: float = 1.0
    variation: float = 439.0
    natural: tuple[float, float] = (0.285, 0.342)
    bns: float = 0.2
    points: int = 201
    bandwidth: float = 0.05

    def __post_init__(self) -> None:
        if min(self.iterations, self.rounds, self.batch, self.warm_up) < 1 or len(self.jitter) < self.rounds:
            raise ValueError(f"counts of at least 1 and a jitter for each round are allowed, not {self}")

    def shorter(self, iterations: int) -> PatchDiversity:
        """The same schedule in fewer iterations."""
        return replace(self, iterations=iterations, warm_up=max(1, self.warm_up * iterations // self.iterations))

    def __call__(
        self,
        teacher: Teacher,
        size: tuple[int, int, int],
        classes: int,
        count: int,
        low: Tensor,
        high: Tensor,
        *,
        seed: int = 0,
        progress: Callable[[str], None] = lambda text: None,
    ) -> tuple[Tensor, Tensor]:
        """`count` images (count, c, h, w) and their classes (count,), with colours in [low, high], (c, 1, 1) each.

        Each batch depends on `seed` and its first image's number alone. Raises BadModel for a model without attention.
        """
        if not teacher.has_attention:
            raise BadModel("the model has no attention, which these images are made from; give real ones: --images DIR.")
        labels = torch.arange(count) % classes
        made = []
        for first in range(0, count, self.batch):
            random = torch.Generator().manual_seed(seed * 1_000_003 + first)
            wanted = labels[first : first + self.batch]
            made.append(self._batch(teacher, size, wanted, low, high, random, progress))
        return torch.cat(made), labels

    def loss(self, seen: Seen, labels: Tensor, teacher: Teacher, images: Tensor, natural: float) -> Tensor:
        """Of a batch of images (b, c, h, w) that the teacher has seen."""
        entropies = [
            patch_entropy(maps, self.points, self.bandwidth, prefix_of(maps.shape[-2]))
            for maps in seen.attention
            if maps.shape[-2] - prefix_of(maps.shape[-2]) > 1
        ]
        total = -self.diversity * torch.stack(entropies).sum() if entropies else torch.zeros(())
        total = total + self.ce * F.cross_entropy(seen.logits, labels)
        total = total + self.variation * (roughness(images) - natural).abs()
        if len(teacher.running):
            total = total + self.bns * distance(seen.moments, teacher.running)
        return total

    def _batch(
        self, teacher: Teacher, size: tuple[int, int, int], labels: Tensor, low: Tensor, high: Tensor,
        random: torch.Generator, progress: Callable[[str], None],
    ) -> Tensor:  # fmt: skip
        images = torch.randn(len(labels), *size, generator=random).requires_grad_()
        optimizer = torch.optim.Adam([images], self.rate, self.betas)
        natural = self.natural[0] + (self.natural[1] - self.natural[0]) * float(torch.rand((), generator=random))
        for shift in self.jitter[: self.rounds]:
            limit = max(1, round(shift * size[1]))
            for i in range(self.iterations):
                for group in optimizer.param_groups:
                    group["lr"] = self._rate(i)
                by = int(torch.randint(-limit, limit + 1, (), generator=random))
                moved = torch.roll(images, (by, by), (2, 3))
                if torch.rand((), generator=random) > 0.5:
                    moved = moved.flip(3)
                loss = self.loss(teacher(moved), labels, teacher, moved, natural)
                (images.grad,) = torch.autograd.grad(loss, [images])
                optimizer.step()
                with torch.no_grad():
                    images.copy_(images.maximum(low).minimum(high))
                progress(f"loss {float(loss.detach()):.3g}")
        return images.detach()

    def _rate(self, i: int) -> float:
        if i < self.warm_up:
            return self.rate * (i + 1) / self.warm_up
        return 0.5 * self.rate * (1 + math.cos(math.pi * (i - self.warm_up) / max(1, self.iterations - self.warm_up)))
