"""A joint linear layer for queries, keys and values becomes three with the same values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbit.capture import capture
from fewbit.load import load_model


class Joint(nn.Module):
    """timm's form of attention behind a patch stem; `used` parts of the joint layer are read."""

    def __init__(self, bias: bool = True, rows: int = 3) -> None:
        super().__init__()
        self.stem, self.rows = nn.Conv2d(3, 8, 4, stride=4), rows
        self.qkv, self.proj = nn.Linear(8, 8 * rows, bias=bias), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        b, t, c = x.shape
        parts = self.qkv(x).reshape(b, t, self.rows, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[self.rows - 1])
        return self.proj(y.transpose(1, 2).reshape(b, t, c)).mean(1)


def check(net: nn.Module, linears: int) -> None:
    graph = capture(load_model(net.eval(), overrides={"input_size": (3, 16, 16)}))
    assert sum(op.kind == "linear" for op in graph.ops) == linears
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(graph.module(x), net(x), rtol=1e-4, atol=1e-5)


def test_three_parts_become_three_linear_layers_with_the_same_values() -> None:
    check(Joint(), linears=5)
    check(Joint(bias=False), linears=5)


def test_two_parts_are_told_from_three() -> None:
    check(Joint(rows=2), linears=4)


def test_a_joint_layer_that_someone_else_reads_stays_whole() -> None:
    class Shared(Joint):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            joint = self.qkv(x)
            q, k, v = joint.reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            return (q @ k.transpose(-2, -1) @ v).sum((1, 3)) + joint.sum(2)

    check(Shared(), linears=2)
