"""A dead channel: weights near zero under a bias that is not. Its bias must not fill the int32 accumulator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fewbit.capture import capture
from fewbit.execute.simulate import simulate
from fewbit.load import load_model
from fewbit.observe import observe
from fewbit.realize import realize
from fewbit.recipes import recipe_named
from fewbit.target import load_target
from fewbit.verify import compare
from planning import plan_for


def test_a_dead_channel_keeps_its_bias_and_its_codes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6()).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(4, 3, 3, 3, generator=generator))
        net[0].weight[1] *= 1e-12
        net[0].bias.copy_(torch.tensor([0.1, 3.0, -0.2, 0.3]))
    graph = capture(load_model(net, overrides={"input_size": (3, 8, 8)}))
    x = torch.randn(8, 3, 8, 8, generator=generator)
    plan = plan_for(graph, observe(graph, [x]), load_target("ort-x86-vnni"), recipe_named("minmax"))
    out = simulate(graph, plan)(x)
    torch.testing.assert_close(out[:, 1], torch.full_like(out[:, 1], 3.0), rtol=0, atol=6 / 255 / 2 + 1e-6)
    realize(graph, plan, tmp_path / "model.onnx", opset=20)
    assert compare(graph, plan, tmp_path / "model.onnx", [x]).wrong == ()
