"""Two small convolutional networks for CIFAR-10, trained by `bench.train_demo`, for what a transformer has not.

resnet20     He et al. 2016, section 4.2: 3 stages of 3 blocks, 16 to 64 channels, batch norm, ReLU; 0.27 M parameters
mobilenet    inverted bottlenecks with depthwise convolutions and ReLU6 (Sandler et al. 2018); 0.27 M parameters
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fewbit.demo.model import CLASSES, INPUT_SIZE, MEAN, STD

__all__ = ["CLASSES", "INPUT_SIZE", "MEAN", "NETS", "STD", "mobilenet", "resnet20", "weights_of"]


def conv_norm(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, and its batch norm."""
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; where the shape changes the shortcut is a 1 x 1 convolution (option B)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(c_in, c_out, 3, stride)
        self.conv2 = conv_norm(c_out, c_out, 3)
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else conv_norm(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet20(nn.Module):
    """(batch, 3, 32, 32) to (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, 3)
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
        pairs = list(pairwise(widths))
        self.blocks = nn.Sequential(*[BasicBlock(a, b, 1 if a == b else 2) for a, b in pairs])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(F.relu(self.stem(x)))).flatten(1))


class Bottleneck(nn.Module):
    """Widen by `expand`, filter each channel, narrow without an activation; added to the input where the shapes agree."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = c_in * expand
        self.widen = conv_norm(c_in, wide, 1)
        self.depthwise = conv_norm(wide, wide, 3, stride, groups=wide)
        self.narrow = conv_norm(wide, c_out, 1)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(F.relu6(self.depthwise(F.relu6(self.widen(x)))))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """(batch, 3, 32, 32) to (batch, 10); the size is halved three times, first in the first bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, 3)
        rows = ((24, 2, 3), (24, 1, 4), (32, 1, 4), (48, 2, 4), (48, 1, 4), (64, 1, 4), (64, 1, 4), (96, 2, 4), (96, 1, 4))
        widths = (16, *(c for c, _, _ in rows))
        self.blocks = nn.Sequential(
            *[Bottleneck(c_in, c, stride, expand) for c_in, (c, stride, expand) in zip(widths, rows, strict=False)]
        )
        self.last = conv_norm(96, 320, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(320, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.last(self.blocks(F.relu6(self.stem(x)))))
        return self.head(self.pool(x).flatten(1))


NETS: Mapping[str, Callable[[], nn.Module]] = {"resnet20": ResNet20, "mobilenet": MobileNet}


def weights_of(name: str) -> Path:
    """The file with the weights of one of `NETS`."""
    return Path(__file__).parent / f"{name}.safetensors"


def resnet20() -> nn.Module:
    """The trained ResNet-20 in eval mode; weights are stored as fp16 and used as fp32, and "float" means these."""
    return _trained("resnet20")


def mobilenet() -> nn.Module:
    """The trained MobileNet in eval mode, stored like the ResNet-20."""
    return _trained("mobilenet")


def _trained(name: str) -> nn.Module:
    net = NETS[name]()
    weights = load_file(weights_of(name))
    net.load_state_dict({k: w.float() if w.is_floating_point() else w for k, w in weights.items()})
    return net.eval()
