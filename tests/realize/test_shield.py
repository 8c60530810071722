"""What onnxruntime rewrites beside codes. Oracle: the simulation, code by code; without the nodes these tests fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.capture import capture
from fewbit.choose import Bits
from fewbit.load import load_model
from fewbit.observe import observe
from fewbit.realize import realize
from fewbit.recipes import recipe_named
from fewbit.target import load_target
from fewbit.verify.compare import compare
from planning import plan_for


class Upsampled(nn.Module):
    """A transposed convolution, which stays float, between two convolutions."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.up(self.a(x)))


class Deep(nn.Module):
    """A convolution of volumes, which stays float, between two of maps; its one layer is put in and taken out again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.volume = nn.Conv3d(16, 16, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.volume(self.a(x).unsqueeze(2)).squeeze(2))


class Rectified(nn.Module):
    """A convolution that is kept float, with what onnxruntime makes part of it: a bias, and rectified."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.kept = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.kept(self.a(x)).relu())


class Smaller(nn.Module):
    """A map with fewer pixels by bicubic interpolation, which is written by its size or by a factor."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.interpolate(self.a(x), mode="bicubic", **self.how))


class Weighed(nn.Module):
    """Probabilities between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).softmax(-1))


class Returned(nn.Module):
    """Tokens that are an output, and read by a product after a transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.layer_norm(self.stem(x).flatten(2), (256,))
        return x, self.head(x.transpose(1, 2))


@pytest.mark.parametrize(
    ("net", "op", "nodes"),
    [
        (Upsampled(True), "Add", 1),
        (Upsampled(False), "Add", 1),
        (Deep(), "Add", 1),
        (Rectified(), "Add", 1),
        (Smaller(size=(5, 20)), "Reshape", 1),
        (Smaller(scale_factor=0.5), "Reshape", 1),
        (Weighed(), "Add", 1),
        (Returned(), "Transpose", 2),
    ],
    ids=["bias", "no bias", "volumes", "kept", "cubic", "cubic by half", "softmax", "output"],
)
def test_what_stands_beside_codes_stays_what_it_is(
    ort_target: str, tmp_path: Path, net: nn.Module, op: str, nodes: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, 0.3, generator=generator)
    graph = capture(load_model(net.eval(), overrides={"input_size": (3, 16, 16)}))
    images, target = torch.randn(8, 3, 16, 16, generator=generator), load_target(ort_target)
    plan = plan_for(
        graph,
        observe(graph, [images]),
        target,
        recipe_named("minmax"),
        bits=Bits(7, 8),
        keep_float=["kept"] if isinstance(net, Rectified) else [],
    )
    realize(graph, plan, tmp_path / "model.onnx", **target.file_format)
    file = onnx.load(tmp_path / "model.onnx")
    assert sum(node.op_type == op and not node.input[0].startswith("unpack") for node in file.graph.node) >= nodes
    checks = compare(graph, plan, tmp_path / "model.onnx", images.split(4))
    assert not checks.wrong
    assert not checks.wrong_outputs
    assert checks.kernels["found"] == checks.kernels["expected"] > 0
