"""A small net with batch norms that have seen something."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = (3, 8, 8)


class Normed(nn.Module):
    """Three convolutions, each behind or before a batch norm, and a head of four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.third, self.norm3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.second(x)))
        return self.head(F.relu(self.norm3(self.third(x))).mean((2, 3)))


def normed(images: Tensor) -> Normed:
    """The net whose running statistics are those of `images` (b, 3, 8, 8), in eval mode."""
    torch.manual_seed(0)
    net = Normed().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net(images)
    count = images.shape[0]
    for module, pixels in zip((net.norm1, net.norm2, net.norm3), (64, 16, 16), strict=True):
        module.running_var *= (count * pixels - 1) / (count * pixels)  # torch keeps the unbiased variance
    return net.eval()
