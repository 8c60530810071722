"""Models by name with the weights of a file: what they compute is what the module computes whose weights were saved."""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import nn
from torchvision import models

from fewbit.data.preprocess import Preprocess
from fewbit.errors import BadFile, BadModel, UnknownName
from fewbit.load import load_model
from fewbit.load.checkpoint import read_checkpoint, unwrapped
from fewbit.load.named import timm_model, torchvision_model
from fewbit.request import Request

NAME, CLASSES = "test_resnet", 7


def random(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net in eval mode, with statistics and weights that no two seeds share."""
    torch.manual_seed(seed)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.1 + 0.02)
    return net.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return random(timm.create_model(NAME, num_classes=CLASSES))


def made(path: Path) -> nn.Module:
    return timm_model(NAME, path, (), "")[0].eval()


def same(one: nn.Module, other: nn.Module, side: int = 64) -> bool:
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(one(x), other(x))


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


WRAPS = {
    "plain": lambda s, o: s,
    "state_dict": lambda s, o: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}}},
    "model": lambda s, o: {"model": s},
    "model_state": lambda s, o: {"model_state": s},
    "the average": lambda s, o: {"state_dict": o, "state_dict_ema": s},
    "torchvision's average": lambda s, o: {"model": o, "model_ema": {"n_averaged": torch.tensor(3), **prefixed(s, "module.")}},
    "DataParallel": lambda s, o: prefixed(s, "module."),
    "compiled in DataParallel": lambda s, o: {"state_dict": prefixed(s, "module._orig_mod.")},
    "a larger module": lambda s, o: {"state_dict": {**prefixed(s, "backbone."), "criterion.weight": torch.ones(3)}},
    "without counters": lambda s, o: {n: t for n, t in s.items() if not n.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_in_every_wrapping(net, tmp_path, wrap, zipped):
    other = random(copy.deepcopy(net), 1).state_dict()
    torch.save(WRAPS[wrap](net.state_dict(), other), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(made(tmp_path / "w.pth"), net)


def test_the_options_of_a_training_with_timm_are_taken(tmp_path):
    net = random(timm.create_model(NAME, num_classes=3, global_pool="max"))
    args = argparse.Namespace(model=NAME, gp="max", input_size=[3, 96, 96], mean=[0.5] * 3, crop_pct=0.7)
    torch.save({"arch": NAME, "state_dict": net.state_dict(), "args": args}, tmp_path / "w.pth.tar")
    found, record, _ = timm_model(NAME, tmp_path / "w.pth.tar", (), "")
    assert same(found.eval(), net)
    assert (record["input_size"], record["mean"], record["crop_pct"]) == ((3, 96, 96), (0.5,) * 3, 0.7)


def test_what_does_not_fit_is_named_with_its_shape(net, tmp_path):
    state = dict(net.state_dict())
    lost = state.pop("fc.bias")
    state |= {"extra": torch.ones(2), "conv1.0.weight": torch.ones(1, 2), "bn1.weight": state["bn1.weight"].to(torch.int8)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BadModel) as error:
        made(tmp_path / "w.pth")
    for part in (f"lacks fc.bias ({lost.shape[0]})", "no extra (2)", "conv1.0.weight (1, 2) for (", "bn1.weight int8 ("):
        assert part in str(error.value)


def test_two_models_in_one_file_are_told_apart(net, tmp_path):
    state = net.state_dict()
    torch.save({**prefixed(state, "student."), **prefixed(state, "teacher.")}, tmp_path / "w.pth")
    with pytest.raises(BadModel, match="under student and teacher"):
        made(tmp_path / "w.pth")


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FEWBIT_PLANTED"],)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWBIT_PLANTED", str(tmp_path / "ran"))
    for name, planted in (("a.pth", Code()), ("b.pth", {"args": argparse.Namespace(x=Code())})):
        torch.save(planted, tmp_path / name)
        with pytest.raises(BadFile, match="without running code"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"w": torch.zeros(2), "seen": np.float64(3)}, r"it holds numpy\S+scalar, which is not a tensor\. Write them with"),
        ({"w": torch.zeros(2), "from": Path("x")}, r"it holds pathlib\.\w+, which is not a tensor\. Write them with"),
        (None, r"neither safetensors nor torch\.save has written it whole\. Write them with"),
        (b"text", r"neither safetensors nor torch\.save has written it whole\. Write them with"),
        (b"", r"is empty, of 0 bytes\. Copy or download it again\.$"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            r"is the place of a file in Git LFS, .*: git lfs pull\.$",
        ),
        (save({"w": torch.zeros(500)})[:900], r"is cut off or damaged: SafetensorError: .* Copy or download it again\.$"),
        (0.5, r"is cut off: its end is missing\. Copy or download it again\.$"),
    ],
    ids=["numpy", "path", "pickle", "text", "empty", "lfs", "cut safetensors", "cut"],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_file_that_holds_more_than_tensors_or_less_is_refused_without_advice_to_run_it(name, content, says, tmp_path):
    path = tmp_path / name
    if isinstance(content, dict):
        torch.save(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.write_bytes(pickle.dumps({"w": [1.0]}))
    else:
        torch.save({"w": torch.zeros(500)}, path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * content)])
    with pytest.raises(BadFile, match=says) as found:
        read_checkpoint(path)
    assert "weights_only" not in str(found.value)
    assert "\x1b" not in str(found.value)


def test_weights_are_read_by_what_a_file_is_and_not_by_its_name(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "w.pth")
    torch.save(net.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert same(made(tmp_path / name), net)


def test_torchscript_is_no_file_of_weights(tmp_path):
    traced = torch.jit.trace(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8))
    traced.save(str(tmp_path / "w.pt"))
    with pytest.raises(BadFile, match=r"is TorchScript, a model .* give it as the model: fewbit quantize .*w\.pt"):
        read_checkpoint(tmp_path / "w.pt")
    with pytest.raises(BadModel, match=r"is TorchScript, .* torch\.jit\.save\(module, 'model\.pt'\)"):
        load_model(nn.Sequential(traced), overrides={"input_size": (3, 8, 8)})


def test_a_file_of_weights_is_no_model(net, tmp_path):
    torch.save({"state_dict": net.state_dict(), "args": argparse.Namespace(model=NAME)}, tmp_path / "w.pth")
    with pytest.raises(BadModel, match=rf"fewbit quantize {NAME} --weights"):
        load_model(str(tmp_path / "w.pth"))
    with pytest.raises(BadFile, match="does not exist"):
        load_model("nowhere.pth")
    with pytest.raises(Exception, match="is for a timm or torchvision model"):
        Request(model="model.onnx", images=str(tmp_path), weights=tmp_path / "w.pth")


def test_modules_are_unwrapped():
    net = nn.Conv2d(3, 4, 3)
    assert unwrapped(torch.compile(nn.DataParallel(net))) is net
    assert unwrapped(nn.DataParallel(torch.compile(net))) is net


@pytest.mark.parametrize(("name", "side"), [("resnet18", 64), ("squeezenet1_1", 64), ("googlenet", 64)])
def test_a_torchvision_name_with_weights_and_another_head(tmp_path, name, side):
    options = {"aux_logits": False, "transform_input": True, "init_weights": False} if name == "googlenet" else {}
    net = random(models.get_model(name, num_classes=5, **options))
    save_file({key: tensor.contiguous() for key, tensor in net.state_dict().items()}, tmp_path / "w.safetensors")
    found, record, _ = torchvision_model(f"torchvision:{name}", tmp_path / "w.safetensors", None)
    assert same(found.eval(), net, side)
    assert "classes" not in record


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "swin_v2_t"])
def test_default_weights_come_with_their_preprocessing_and_classes(monkeypatch, name):
    weights = models.get_model_weights(name).DEFAULT
    net = random(models.get_model(name))
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): t for key, t in net.state_dict().items()
    }  # as in the file
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: state)
    found, record, _ = torchvision_model(f"torchvision:{name}", None, None)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), net.state_dict().values(), strict=True))
    assert record["classes"] == tuple(weights.meta["categories"])
    noise = torch.randint(0, 256, (301, 417, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.numpy())
    fields = {key: record[key] for key in ("mean", "std", "interpolation", "resize", "crop_pct")}
    ours = Preprocess(record["input_size"], **fields)(picture)
    torch.testing.assert_close(ours, weights.transforms()(picture), atol=1e-6, rtol=0)  # float32 of one division


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("resnet19", UnknownName, "resnet18"),
        ("fasterrcnn_resnet50_fpn", BadModel, "ObjectDetection"),
        ("quantized_resnet18", BadModel, "torchvision:resnet18"),
    ],
)
def test_torchvision_names_that_are_refused(name, kind, match):
    with pytest.raises(kind, match=match):
        load_model(f"torchvision:{name}")
