"""Models of 1, 4 and 8 channels from the file that a user has to a verified one. Oracle: the runtimes' codes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import fewbit
from fewbit.data.preprocess import Preprocess
from fewbit.data.synthesize.norms import NormInversion
from fewbit.data.synthesize.teacher import Teacher
from fewbit.errors import BadImages
from fewbit.load import load_model
from fewbit.load.named import timm_model, timm_record
from fewbit.stages.preprocessing import assumed, assumptions, preprocess_of

NET = """
import timm

def small():
    return timm.create_model("test_vit", in_chans=1, num_classes=4, img_size=32).eval()

def five():
    return timm.create_model("test_resnet", in_chans=5, num_classes=4).eval()
"""


def net(channels: int, seed: int = 0) -> nn.Module:
    """A stem, a depthwise convolution, a residual addition and a head, with seeded weights and statistics."""
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
            self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head((x + self.depth(x)).mean((2, 3)))

    made = Net().train()
    with torch.no_grad():
        for _ in range(20):
            made(torch.randn(8, channels, 16, 16))
    return made.eval()


def pictures(folder: Path, channels: int, count: int = 12) -> Any:
    """What a user has: grey PNG of 16 bits in a folder, RGBA pictures in a folder, an array of uint16 in a file."""
    draw = np.random.default_rng(0)
    values = draw.integers(0, 65536, (count, 20, 24, channels), dtype=np.uint16)
    if channels == 8:
        np.save(folder / "x.npy", values)
        return folder / "x.npy"
    (folder / "x").mkdir()
    for i, one in enumerate(values):
        Image.fromarray(one[..., 0] if channels == 1 else (one >> 8).astype(np.uint8)).save(folder / "x" / f"{i}.png")
    return folder / "x"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-x86-vnni", "openvino-x86"])
@pytest.mark.parametrize("channels", [1, 4, 8])
@pytest.mark.parametrize("onnx", [False, True])
def test_a_model_of_any_number_of_channels_is_verified(tmp_path: Path, channels: int, target: str, onnx: bool) -> None:
    model: Any = net(channels)
    if onnx:
        model = str(tmp_path / "net.onnx")
        batch = {0: torch.export.Dim("batch")}
        x = torch.randn(2, channels, 16, 16)
        torch.onnx.export(net(channels), (x,), model, dynamic_shapes=(batch,), dynamo=True, verbose=False)
    result = fewbit.quantize(
        model, pictures(tmp_path, channels), target=target, out=tmp_path / "run", mean=0.4, std=0.3, labels=False,
        input_size=None if onnx else (channels, 16, 16),
    )  # fmt: skip
    verify = result.report["verify"]
    assert (verify["problems"], verify["codes_wrong"]) == ([], 0)
    assert verify["codes_compared"] > 1_000
    with fewbit.Run.open(tmp_path / "run") as run:
        assert run.preprocess.mean == (0.4,) * channels
    assert "<img" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("name", "channels"), [("small", 1), ("five", 5)])
def test_a_timm_net_is_asked_for_its_channels(tmp_path: Path, name: str, channels: int) -> None:
    (tmp_path / "nets.py").write_text(NET)
    loaded = load_model(f"{tmp_path}/nets.py:{name}")
    assert loaded.input_shape[0] == channels
    preprocess = preprocess_of(loaded, {})
    assert (preprocess.mean, preprocess.std) == ((0.5,) * channels, (0.5,) * channels)
    (said,) = assumptions(loaded, preprocess, assumed(loaded, {}))
    assert "assumed is --mean 0.5, --std 0.5. Set what" in said
    with pytest.raises(BadImages, match=f"mean has 3 numbers and the model {channels} channel"):
        preprocess_of(loaded, {"mean": (0.1, 0.2, 0.3)})


def test_a_timm_net_whose_first_convolution_has_16_times_its_channels_says_them_too() -> None:
    record = timm_record(timm.create_model("tresnet_m", in_chans=2))
    assert record["input_size"] == (2, 224, 224)
    assert not {"mean", "std"} & set(record)


def test_a_checkpoint_of_timm_says_the_channels_that_it_was_trained_with(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", in_chans=2, num_classes=5).state_dict()
    args = argparse.Namespace(model="test_resnet", in_chans=2, mean=[0.3, 0.4], std=None)
    torch.save({"state_dict": state, "args": args}, tmp_path / "w.pth")
    made, record, _ = timm_model("test_resnet", tmp_path / "w.pth", (), "")
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())
    assert (record["input_size"][0], record["mean"], "std" in record) == (2, (0.3, 0.4), False)


def test_images_are_made_from_a_model_of_any_number_of_channels() -> None:
    for channels in (1, 4):
        program = load_model(net(channels), overrides={"input_size": (channels, 16, 16)}).program
        low, high = Preprocess((channels, 16, 16), 0.4, 0.3).ends()
        images, _ = NormInversion().shorter(2)(Teacher(program), (channels, 16, 16), 4, 3, low, high)
        assert images.shape == (3, channels, 16, 16)
        assert bool(((low <= images) & (images <= high)).all())
        assert images.std() > 0.1
