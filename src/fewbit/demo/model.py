"""The demo model: a plain vision transformer for CIFAR-10, small enough to ship.

32 px images, a stem of two convolutions with batch norm (64 tokens, and a class token), 6 blocks of width 128 with 4 heads,
1.3 M parameters. The encoder is timm's own VisionTransformer, so what works for it works for timm's bigger ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewbit.demo import DEMOS

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

INPUT_SIZE = (3, 32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

WEIGHTS = Path(__file__).parent / "weights.safetensors"
CALIBRATION, TEST = DEMOS["demo"].calibration, DEMOS["demo"].test


class ConvStem(nn.Module):
    """(batch, 3, 32, 32) to (batch, 64, width): a small transformer learns much faster behind two convolutions."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: object) -> None:
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        half = embed_dim // 2
        self.conv1 = nn.Conv2d(in_chans, half, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, embed_dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x)).flatten(2).transpose(1, 2)


def architecture() -> VisionTransformer:
    """The untrained network: (batch, 3, 32, 32) normalized images to (batch, 10) logits."""
    from timm.models.vision_transformer import VisionTransformer  # here, because it takes a second and only demo needs it

    return VisionTransformer(
        img_size=32,
        patch_size=4,
        num_classes=len(CLASSES),
        embed_dim=128,
        depth=6,
        num_heads=4,
        embed_layer=ConvStem,
    )


def model() -> torch.nn.Module:
    """The trained network in eval mode; weights are stored as fp16 and used as fp32, and "float" means these."""
    net = architecture()
    net.load_state_dict({name: w.float() for name, w in load_file(WEIGHTS).items()})
    return net.eval()
