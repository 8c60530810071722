"""Three tiny nets and their images: every number is a small integer over a constant, the same on every processor."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import Block

SIZE = (3, 16, 16)
CLASSES = 5


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Sums of four dice, spread 1: torch.randn rounds as the processor's vectors do, integers do not."""
    return torch.randint(-128, 128, (4, *shape), generator=generator).sum(0).float() / 148


def images(count: int, seed: int) -> Tensor:
    """Noise of another colour and strength in each image, (count, 3, 16, 16)."""
    g = torch.Generator().manual_seed(seed)
    colour, strength = noise((count, 3, 1, 1), g), noise((count, 1, 1, 1), g)
    return colour + (1 + 0.25 * strength) * noise((count, *SIZE), g)


def drawn(net: nn.Module, seed: int) -> nn.Module:
    """Every parameter and statistic drawn: matrices by their inputs, scales near 1, one channel of each an outlier."""
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        p.requires_grad_(False)
        if p.ndim > 1:
            p.copy_(noise(tuple(p.shape), g) / math.sqrt(p[0].numel()))
        elif name.endswith("weight"):
            p.copy_(1 + 0.25 * noise(tuple(p.shape), g))
            p[1] *= 4
        else:
            p.copy_(0.25 * noise(tuple(p.shape), g))
    for name, b in net.named_buffers():
        if name.endswith("mean"):
            b.copy_(0.25 * noise(tuple(b.shape), g))
        elif name.endswith("var"):
            b.copy_(1 + noise(tuple(b.shape), g).abs() / 2)
    return net.eval()


def normed(channels: int, out: int, size: int = 1, **options: int) -> nn.Sequential:
    """A convolution and its batch norm."""
    return nn.Sequential(nn.Conv2d(channels, out, size, bias=False, **options), nn.BatchNorm2d(out))


class Conv(nn.Module):
    """Batch norm behind each convolution, one of them depthwise, relu6 and relu, a residual addition, pooling, a flat head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = normed(3, 16, 3, padding=1, stride=2), normed(16, 16, 3, padding=1, groups=16)
        self.a, self.b = normed(16, 24), nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depth(F.relu6(self.stem(x))))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Vit(nn.Module):
    """A class token and 16 others of width 32, places, two blocks with two heads, a head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.zeros(1, 1, 32))
        self.places = nn.Parameter(torch.zeros(1, 17, 32))
        self.blocks = nn.Sequential(Block(32, 2), Block(32, 2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Mixed(nn.Module):
    """A normed stem, maxima and a convolution joined (one step), a residual addition, then a block of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = normed(3, 16, 3, padding=1, stride=2), normed(16, 16)
        self.wide, self.patch = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 2, 2)
        self.block, self.norm, self.head = Block(32, 2), nn.LayerNorm(32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([F.max_pool2d(x, 3, 1, 1), self.side(x)], 1)
        x = self.patch(F.relu(x + self.wide(x)))
        return self.head(self.norm(self.block(x.flatten(2).transpose(1, 2))).mean(1))


NETS: Mapping[str, tuple[type[nn.Module], int]] = {"conv": (Conv, 1), "vit": (Vit, 2), "mixed": (Mixed, 3)}


def net(name: str) -> nn.Module:
    """A net by name, its numbers drawn with its own seed."""
    made, seed = NETS[name]
    return drawn(made(), seed)
