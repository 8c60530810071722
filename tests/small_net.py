"""The text of a small model file, for tests that name one on the command line; each adds its own functions."""

NET = """
import torch
from torch import nn
INPUT_SIZE = (3, 16, 16)
MEAN = STD = (0.5, 0.5, 0.5)

class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))

def model():
    return Net().eval()
"""
