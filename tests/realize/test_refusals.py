"""What cannot be written is named, and nothing is."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from fewbit.errors import BadModel
from fewbit.realize import float_onnx


class Ranked(nn.Module):
    """The third smallest number of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).kthvalue(3, dim=2).values


def test_an_operator_that_onnx_has_not_is_named(capture_net, tmp_path):
    net = capture_net(nn.Sequential(nn.Conv2d(3, 4, 3), Ranked()))
    with pytest.raises(BadModel, match=r"torch\.onnx cannot write aten\.kthvalue; write that part"):
        float_onnx(net.graph, tmp_path / "float.onnx", opset=20)
    assert not list(tmp_path.iterdir())
