"""Patch convolutions become linear layers with the same values; other convolutions stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit.capture import capture
from fewbit.load import load_model


class Stem(nn.Module):
    """A convolution and what puts its channels last."""

    def __init__(self, tail: str, **settings: int) -> None:
        super().__init__()
        self.tail = tail
        self.conv = nn.Conv2d(3, 10, 4, **settings)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.tail == "flatten":
            return y.flatten(2).transpose(1, 2).sum(1)
        if self.tail == "reshape":  # as files have it
            return y.reshape(-1, 10, 15).transpose(1, 2).sum(1)
        if self.tail == "other reshape":  # which mixes channels
            return y.reshape(-1, 15, 10).transpose(1, 2).sum(2)
        return y.permute(0, 2, 3, 1).sum((1, 2)) if self.tail == "permute" else y.mean((2, 3))


@pytest.mark.parametrize("tail", ["flatten", "reshape", "permute"])
def test_a_patch_convolution_becomes_a_linear_layer_with_the_same_values(tail: str) -> None:
    net = Stem(tail, stride=4).eval()
    graph = capture(load_model(net, overrides={"input_size": (3, 12, 20)}))
    assert [op.kind for op in graph.ops] == ["linear"]
    assert graph.ops[0].macs == 3 * 5 * 10 * 48
    x = torch.randn(3, 3, 12, 20)
    torch.testing.assert_close(graph.module(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tail", "settings", "size"),
    [
        ("flatten", {"stride": 2}, (3, 12, 20)),  # overlapping
        ("flatten", {"stride": 4, "padding": 2}, (3, 12, 20)),
        ("flatten", {"stride": 4}, (3, 14, 20)),  # the last rows belong to no patch
        ("other reshape", {"stride": 4}, (3, 12, 20)),
        ("mean", {"stride": 4}, (3, 12, 20)),  # channels never go last
    ],
)
def test_any_other_convolution_stays(tail: str, settings: dict[str, int], size: tuple[int, int, int]) -> None:
    net = Stem(tail, **settings).eval()
    graph = capture(load_model(net, overrides={"input_size": size}))
    assert [op.kind for op in graph.ops] == ["conv"]
    x = torch.randn(3, *size)
    torch.testing.assert_close(graph.module(x), net(x), rtol=1e-5, atol=1e-5)
