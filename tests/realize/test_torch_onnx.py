"""How torch.onnx is called. Oracles: torch.onnx as it is, PyTorch, onnxruntime."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from fewbit.realize import rendered_float, torch_onnx
from fewbit.realize.torch_onnx import DECOMPOSE


class Bits(nn.Module):
    """An `and`, which torch.onnx has to decompose, behind a layer that it need not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.stem(x)
        return torch.where((y > 0) & (y < 0.5), y, -y).mean((2, 3))


def spied(monkeypatch, function=DECOMPOSE):
    """How often the decomposition runs, with `function` in its place."""
    calls = []
    monkeypatch.setattr(torch_onnx, "DECOMPOSE", lambda *args: (calls.append(1), function(*args))[1])
    return calls


def shape_of(model: ir.Model) -> list[tuple[str, int, int]]:
    return [(node.op_type, len(node.inputs), len(node.outputs)) for node in model.graph]


@pytest.mark.parametrize("name", ["conv_net", "vit"])
def test_without_decompositions_the_file_is_the_same(name, request, monkeypatch):
    graph = request.getfixturevalue(name).graph
    calls = spied(monkeypatch)
    quick = rendered_float(graph, opset=21)
    assert not calls
    monkeypatch.setattr(torch_onnx, "_decomposed", DECOMPOSE)
    whole = rendered_float(graph, opset=21)
    assert shape_of(quick) == shape_of(whole)
    x = torch.randn(2, *graph.input_shape, generator=torch.Generator().manual_seed(0)).numpy()
    ours, theirs = (
        ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {graph.input_name: x})[0]
        for model in (quick, whole)
    )
    assert (ours == theirs).all()


def test_what_torch_onnx_cannot_write_is_decomposed(capture_net, monkeypatch):
    net = capture_net(Bits())
    calls = spied(monkeypatch)
    model = rendered_float(net.graph, opset=21)
    assert calls
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(None, {net.graph.input_name: net.images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net.module(net.images), rtol=1e-4, atol=1e-5)


class Typed(nn.Module):
    """A change of type, which torch.onnx takes apart but has in no table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.stem(x).mean((2, 3)).argmax(1, keepdim=True).to(torch.int32)


def test_what_is_in_no_table_is_tried_again(capture_net):
    net = capture_net(Typed())
    session = ort.InferenceSession(ir.to_proto(rendered_float(net.graph, opset=21)).SerializeToString())
    (found,) = session.run(None, {net.graph.input_name: net.images.numpy()})
    with torch.no_grad():
        assert (found == net.module(net.images).numpy()).all()
