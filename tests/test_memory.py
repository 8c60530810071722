"""Oracle: the same bytes as without a limit; the kernel's count of what the process held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbit import quantize
from fewbit.core import limit
from fewbit.errors import FewbitError, Stopped

STATUS = Path("/proc/self/status")
BIG = """
import sys
import torch
from timm.models.vision_transformer import VisionTransformer
from fewbit import quantize

torch.manual_seed(0)
net = VisionTransformer(32, 8, num_classes=10, embed_dim=1024, depth=3, num_heads=16)
images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
quantize(net, images.numpy(), input_size=(3, 32, 32), out=sys.argv[1], memory=sys.argv[2], threads=1, quick=True)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_a_limit_changes_no_byte_of_the_plan_and_of_the_files(conv_net, tmp_path, monkeypatch):
    monkeypatch.setattr(limit, "peak", lambda: 10**9)
    options = {"target": "ort-x86-vnni", "recipe": "fast", "input_size": (3, 8, 8), "quick": True, "threads": 1}
    for name, more in (("free", {}), ("held", {"memory": "4GB"})):
        quantize(conv_net.module, conv_net.images, out=tmp_path / name, **options, **more)
    for name in ("plan.safetensors", "model.onnx", "float.onnx", "stats.safetensors", "exported.pt2"):
        assert (tmp_path / "free" / name).read_bytes() == (tmp_path / "held" / name).read_bytes(), name


def test_a_limit_that_is_passed_stops_the_run_and_more_of_it_goes_on(conv_net, tmp_path, monkeypatch):
    held = [1_000_000_000]
    monkeypatch.setattr(limit, "peak", lambda: held[0])
    options = {"target": "ort-x86-vnni", "input_size": (3, 8, 8), "quick": True, "threads": 1, "out": tmp_path / "run"}
    begun: list[str] = []
    check = limit.check

    def passed_in_choose(text, stage):
        begun.append(stage)
        held[0] = 2_340_000_000 if stage == "choose" else held[0]
        check(text, stage)

    monkeypatch.setattr("fewbit.run.check", passed_in_choose)
    with pytest.raises(
        Stopped, match=r"--memory 1\.5GB was passed: 2\.4GB were held up to the end of choose; type --memory 2\.4GB"
    ):
        quantize(conv_net.module, conv_net.images, memory="1.5GB", **options)
    assert begun[-1] == "choose"
    assert (tmp_path / "run.part" / "plan.json").exists()
    quantize(conv_net.module, conv_net.images, memory="2.4GB", **options)
    assert not (tmp_path / "run.part").exists()


def test_a_limit_that_cannot_be_enough_is_refused_with_one_that_is(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8192), torch.nn.ReLU(), torch.nn.Linear(8192, 10))
    images = torch.rand(8, 3, 8, 8)
    options = {"input_size": (3, 8, 8), "out": tmp_path / "run"}
    wanted = limit.LIBRARIES + 9 * 8 * 8192**2  # the matrices of the second layer's inputs
    with pytest.raises(FewbitError, match=rf"8,192 inputs to a layer takes about {limit.shown(wanted)}; type --memory 6"):
        quantize(net, images, recipe="fast", memory="4GB", **options)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.part").exists()


@pytest.mark.parametrize("text", ["4", "GB", "-4GB", "4TB", "1e9GB", "four GB"])
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(FewbitError, match="give a number of MB or GB: type --memory 4GB"):
        limit.parse(text)


def test_a_limit_below_the_libraries_is_refused_and_units_are_decimal():
    with pytest.raises(FewbitError, match=r"the libraries and a batch of images take 1\.1GB"):
        limit.parse("1000MB")
    assert limit.parse("1.5 gb") == limit.parse("1500MB") == 1_500_000_000


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="Linux alone counts so")
def test_a_model_of_150_megabytes_stays_below_its_limit(tmp_path):
    command = [sys.executable, "-c", BIG, str(tmp_path / "run"), "1.9GB"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8e9 < int(ended.stdout.split()[-1]) * 1024 < 1.9e9
