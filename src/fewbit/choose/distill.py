"""Model scope: the weights of the quantized model themselves, trained against the float model's answers (FDDA's student).

Settings and what knows no graph: rounding with a gradient, crops, the loss, the schedule. `fewbit.choose.finetune` runs them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewbit.core.grid import Grid, QParams, fake, position
from fewbit.data.synthesize.fdda import Fdda
from fewbit.data.synthesize.source import SHORT, in_steps


class Straight(torch.autograd.Function):
    """`fake` whose gradient is that of a clamp: 1 where the value has a code of its own, 0 where it is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qparams: QParams, grid: Grid) -> Tensor:
        at = position(x, qparams, grid)
        low, high = ((end if end.ndim == 0 else end.view(-1, *[1] * (x.ndim - 1))) for end in grid.ends())
        ctx.save_for_backward((at >= low - 0.5) & (at <= high + 0.5))
        return fake(x, qparams, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


@dataclass(frozen=True)
class Distill:
    """Fine-tuning of weights and biases on real and synthetic images together, from the float model's answers.

        L = alpha · T² · KL(softmax(float / T) ‖ softmax(quantized / T)) + CE(quantized, label)

    Each step takes `batch` real and `batch` synthetic images, cropped to a random part of `real_crop` and `made_crop` of their
    area, resized and mirrored at random. SGD with Nesterov's `momentum`, `rate` falling to 0 along half a cosine. The steps
    of the plan stay; rounding passes gradients straight through. `images` makes the synthetic images, `pool` so many.
    Labels are the float model's own answers, or with `loss` = `labels` those of the images. Defaults are the paper's.
    """

    epochs: int = 350
    iterations: int = 200
    batch: int = 16
    rate: float = 1e-6
    momentum: float = 0.9
    decay: float = 1e-4
    alpha: float = 20.0
    temperature: float = 20.0
    ce: float = 1.0
    real_crop: tuple[float, float] = (0.08, 1.0)
    made_crop: tuple[float, float] = (0.5, 1.0)
    loss: str = "kl"
    images: Fdda = Fdda()
    pool: int = 4096

    def __post_init__(self) -> None:
        if min(self.epochs, self.iterations) < 0 or min(self.batch, self.pool) < 1 or self.loss not in ("kl", "labels"):
            raise ValueError(f"counts of at least 1 and the loss kl or labels are allowed, not {self}")

    @property
    def steps(self) -> int:
        return self.epochs * self.iterations

    def in_steps(self, steps: int) -> Distill:
        """About so many steps of the student, and as many of the generator before it."""
        made = min(self.pool, steps * self.batch)
        return replace(self, epochs=1, iterations=steps, images=in_steps(self.images, steps), pool=made)

    def rate_at(self, step: int) -> float:
        return 0.5 * self.rate * (1 + math.cos(math.pi * step / max(self.steps, 1)))

    def __call__(
        self, taught: Float[Tensor, "b classes"], learnt: Float[Tensor, "b classes"], labels: Int[Tensor, " b"]
    ) -> Tensor:
        """The loss of a batch of answers; KL is the mean over images."""
        t = self.temperature
        exact, found = (F.log_softmax(x / t, 1) for x in (taught, learnt))
        kl = F.kl_div(found, exact, reduction="batchmean", log_target=True)
        return self.alpha * t * t * kl + self.ce * F.cross_entropy(learnt, labels)


SHORTER = Distill(epochs=30, iterations=100, rate=1e-5, images=SHORT, pool=1024, real_crop=(0.5, 1.0))


def cropped(
    images: Float[Tensor, "b c h w"], area: tuple[float, float], generator: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """Each image cut to a random part of its area, sides within 3/4 to 4/3 of each other, resized back, mirrored or not."""
    count = len(images)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    share, ratio = drawn(*area), torch.exp(drawn(-1.0, 1.0) * math.log(4 / 3))
    wide, high = (share * ratio).sqrt().clamp_max(1), (share / ratio).sqrt().clamp_max(1)
    x, y = ((1 - side) * drawn(-1.0, 1.0) for side in (wide, high))  # of the middle, in [-1, 1] across the image
    mirror = torch.where(drawn(0.0, 1.0) < 0.5, -1.0, 1.0)
    zero = torch.zeros(count)
    place = torch.stack([torch.stack([wide * mirror, zero, x], 1), torch.stack([zero, high, y], 1)], 1)
    grid = F.affine_grid(place, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
