"""What cannot be written is named, and nothing is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import BadModel
from fewbit.realize import float_onnx


class Ranked(nn.Module):
    """The third smallest number of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).kthvalue(3, dim=2).values


class Apart(nn.Module):
    """Distances of channels, which torch opens before it writes them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x.flatten(2), x.flatten(2))


def test_an_operator_that_torch_opens_is_found_in_the_model(capture_net, tmp_path):
    net = capture_net(nn.Sequential(nn.Conv2d(3, 4, 3), Apart()))
    with pytest.raises(BadModel, match=r"cannot write aten\._cdist_forward, which is in 1; write that part"):
        float_onnx(net.graph, tmp_path / "float.onnx", opset=20)


def test_an_operator_that_onnx_has_not_is_named(capture_net, tmp_path):
    net = capture_net(nn.Sequential(nn.Conv2d(3, 4, 3), Ranked()))
    with pytest.raises(BadModel, match=r"torch\.onnx cannot write aten\.kthvalue, which is in 1; write that part"):
        float_onnx(net.graph, tmp_path / "float.onnx", opset=20)
    assert not list(tmp_path.iterdir())
