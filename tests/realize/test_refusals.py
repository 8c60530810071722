"""What cannot be written is named, and nothing is."""

from __future__ import annotations

import pytest
from torch import nn

from fewbit.errors import BadModel
from fewbit.realize import float_onnx


def test_an_operator_that_onnx_has_not_is_named(capture_net, tmp_path):
    net = capture_net(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(4)))
    with pytest.raises(BadModel, match=r"torch\.onnx cannot write aten\.adaptive_max_pool2d; write that part"):
        float_onnx(net.graph, tmp_path / "float.onnx", opset=20)
    assert not list(tmp_path.iterdir())
