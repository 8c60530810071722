"""FDDA's generator: noise and a class to an image; the class enters through conditional batch norms alone."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 0.8  # of the batch norms behind convolutions, as in the released code
SLOPE = 0.2


class ClassNorm(nn.Module):
    """Batch norm with a scale (from 1) and a shift (from 0) for each class."""

    def __init__(self, channels: int, classes: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.scale = nn.Embedding(classes, channels)
        self.shift = nn.Embedding(classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scale, shift = (table(labels)[:, :, None, None] for table in (self.scale, self.shift))
        return cast(Tensor, self.norm(x) * scale + shift)


class ImageGenerator(nn.Module):
    """(b, latent) noise and (b,) classes to (b, c, h, w) images with mean 0 and variance 1 in each colour.

    Linear to a quarter of the size, twice doubled (the second time to the size itself), three 3 x 3 convolutions, tanh.
    """

    def __init__(self, size: tuple[int, int, int], classes: int, latent: int = 100, channels: int = 128) -> None:
        super().__init__()
        colours, height, width = size
        self.size, self.start = (height, width), (math.ceil(height / 4), math.ceil(width / 4))
        self.channels, self.latent = channels, latent
        self.linear = nn.Linear(latent, channels * self.start[0] * self.start[1])
        self.norm0 = ClassNorm(channels, classes)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = ClassNorm(channels, classes, EPS)
        self.conv2 = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.norm2 = ClassNorm(channels // 2, classes, EPS)
        self.conv3 = nn.Conv2d(channels // 2, colours, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(colours, affine=False)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x = self.linear(noise).view(-1, self.channels, *self.start)
        x = F.interpolate(self.norm0(x, labels), scale_factor=2.0)
        x = F.leaky_relu(self.norm1(self.conv1(x), labels), SLOPE)
        x = F.interpolate(x, size=self.size)
        x = F.leaky_relu(self.norm2(self.conv2(x), labels), SLOPE)
        return cast(Tensor, self.norm3(torch.tanh(self.conv3(x))))


def generator_of(size: tuple[int, int, int], classes: int, latent: int, channels: int, seed: int) -> ImageGenerator:
    """A generator whose weights are drawn with `seed`; torch's own random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageGenerator(size, classes, latent, channels)
